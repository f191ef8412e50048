"""What commands share: options, values read from text, refusals, the table of evaluations."""

import json
import math
import os
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Seed = Annotated[int, typer.Option(help="Random seed.")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:i.")]
Resume = Annotated[bool, typer.Option("--resume/--fresh", help="Go on with the run in the folder, or delete it first.")]


def option(help: str, panel: str | None = None, **kwargs):
    return typer.Option(help=help, rich_help_panel=panel, **kwargs)


TASK, MODEL, RECIPE, RUN = "Task", "Model", "Recipe", "Run"

Steps = Annotated[int, option("Optimiser steps.", RECIPE)]
BatchSize = Annotated[int, option("Sequences per step.", RECIPE)]
MicroBatch = Annotated[
    int | None, option("Sequences per forward and backward, where a whole batch does not fit; all by default.", RECIPE)
]
LrMuon = Annotated[float, option("Peak learning rate of the weight matrices.", RECIPE)]
LrAdamW = Annotated[float, option("Peak learning rate of everything else.", RECIPE)]
WeightDecay = Annotated[float, option("Decoupled, on matrices.", RECIPE)]
Momentum = Annotated[float, option("Muon's.", RECIPE)]
GradClip = Annotated[float, option("Largest gradient norm.", RECIPE)]
Warmup = Annotated[float, option("Fraction of the steps spent warming up.", RECIPE)]
Decay = Annotated[float, option("Fraction of the steps spent decaying.", RECIPE)]
FinalLr = Annotated[float, option("Last learning rate, of the peak.", RECIPE)]
Precision = Annotated[str, option("auto (bf16 on CUDA), bf16 or float32.", RECIPE)]
MaxSkipped = Annotated[int, option("Stop after this many steps in a row without a finite gradient.", RECIPE)]
CheckpointEvery = Annotated[int, option("Steps between checkpoints (0: only the last).", RUN)]
KeepCheckpoints = Annotated[int, option("Newest checkpoints kept.", RUN)]
EvalEvery = Annotated[int, option("Steps between evaluations (0: only the last).", RUN)]
EvalSamples = Annotated[int, option("Sequences per evaluation.", RUN)]
Until = Annotated[int | None, option("Stop (and save) at this step; the schedule stays that of all steps.", RUN)]


def run_console() -> Console:
    """One that prints in the first of the processes of a run alone, as `torchrun` numbers them."""
    return Console(quiet=os.environ.get("RANK", "0") != "0")


@contextmanager
def refusals(console: Console):
    """Bad settings become exit code 2, failed runs exit code 1, both with one plain line."""
    from sleep_ops.training import CheckpointError, TrainingDiverged

    try:
        yield
    except ValueError as error:
        console.print(f"[red]error[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except (CheckpointError, TrainingDiverged, OSError, ImportError) as error:
        told = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:  # without "[Errno 2]"
            told = f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
        console.print(f"[red]failed[/red] {escape(told)}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name}: expected integers separated by commas, got {text!r}") from error


def parse_passes(text: str) -> int | float:
    try:
        return math.inf if text == "inf" else int(text)
    except ValueError as error:
        raise ValueError(f"passes: expected an integer >= 1 or inf, got {text!r}") from error


def parse_loads(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"loads: expected numbers separated by commas, got {text!r}") from error


def parse_loop(text: str | None) -> tuple[int, int] | str | None:
    if text is None or text == "all":
        return text
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise ValueError(f"loop: expected all or FIRST:LAST (blocks, both included), got {text!r}")
    return int(first), int(last)


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
    for name in found[0][1]:
        if name in ("samples", "exact_stderr"):
            continue
        form = "{:.4f}".format if "loss" in name else "{:.2%}".format
        cells = [form(r[name]) for _, r in found]
        if name == "exact" and "exact_stderr" in found[0][1]:
            cells = [f"{cell} +/- {r['exact_stderr']:.2%}" for cell, (_, r) in zip(cells, found, strict=True)]
        guess = chance.get(name, chance.get("majority") if name == task.metric else None)
        table.add_row(name, *cells, "" if guess is None else form(guess))
    table.add_row("sequences", *(f"{r['samples']:.0f}" for _, r in found), "")
    console.print(table)
