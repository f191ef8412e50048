"""What commands share: refusals, values read from text, the table of evaluations."""

import json
import os
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


def run_console() -> Console:
    """One that prints in the first of the processes of a run alone, as `torchrun` numbers them.

    Text is shown as it is: a path may have brackets.
    """
    return Console(markup=False, quiet=os.environ.get("RANK", "0") != "0")


@contextmanager
def refusals(console: Console):
    """Bad settings become exit code 2, failed runs exit code 1, both with one plain line."""
    from sleep_ops.training import CheckpointError, TrainingDiverged

    try:
        yield
    except ValueError as error:
        _print(console, "error", str(error))
        raise typer.Exit(2) from error
    except (CheckpointError, TrainingDiverged, OSError, ImportError, MemoryError) as error:
        told = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:  # without "[Errno 2]"
            told = f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
        _print(console, "failed", told)
        raise typer.Exit(1) from error


def _print(console: Console, word: str, text: str) -> None:
    console.print(Text.assemble((word, "red"), f" {text}"), soft_wrap=True)


def exit_with(console: Console, failed: dict[str, str]) -> None:
    """Exit code 1 where runs failed, which are named with why; nothing where none did."""
    if failed:
        lines = [f"{name}: {why.partition(chr(10))[0]}" for name, why in failed.items()]
        _print(console, "failed", "; ".join(lines))
        raise typer.Exit(1)


def named_values(option: str, texts: list[str]) -> dict:
    """What was given as NAME=VALUE; a value that is no JSON is a string."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"{option}: expected NAME=VALUE, got {text!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def print_evaluations(console: Console, task, found: list[tuple]) -> None:
    """A table of evaluations, a column for each N and one for chance; what they measure is the task's affair."""
    title = "sequences training never shows" if getattr(task, "held_out", 0) else "fresh sequences"
    chance = task.chance()
    table = Table("", *(f"N = {n}" for n, _ in found), "chance", title=f"accuracy on {title}")
    counts = {"stage": "stage of training", "samples": "sequences"}
    for name in found[0][1]:
        if name == "exact_stderr" or name in counts:
            continue
        form = "{:.4f}".format if "loss" in name else "{:.2%}".format
        cells = [form(r[name]) for _, r in found]
        if name == "exact" and "exact_stderr" in found[0][1]:
            cells = [f"{cell} +/- {r['exact_stderr']:.2%}" for cell, (_, r) in zip(cells, found, strict=True)]
        guess = chance.get(name, chance.get("majority") if name == task.metric != "loss" else None)
        table.add_row(name, *cells, "" if guess is None else form(guess))
    for name, title in counts.items():
        if name in found[0][1]:
            table.add_row(title, *(f"{r[name]:.0f}" for _, r in found), "")
    console.print(table)
