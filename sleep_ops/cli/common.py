"""What commands share: options, values read from text, refusals, the table of evaluations."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

Seed = Annotated[int, typer.Option(help="Random seed.")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:i.")]
Resume = Annotated[bool, typer.Option("--resume/--fresh", help="Go on with the run in the folder, or delete it first.")]


def option(help: str, panel: str | None = None, **kwargs):
    return typer.Option(help=help, rich_help_panel=panel, **kwargs)


@contextmanager
def refusals(console: Console):
    """Bad settings become exit code 2, failed runs exit code 1, both with one plain line."""
    from sleep_ops.training import CheckpointError, TrainingDiverged

    try:
        yield
    except ValueError as error:
        console.print(f"[red]error[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except (CheckpointError, TrainingDiverged, OSError) as error:
        console.print(f"[red]failed[/red] {error}", highlight=False, soft_wrap=True)
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


def parse_loop(text: str | None) -> tuple[int, int] | None:
    if text is None or text == "all":
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise ValueError(f"loop: expected all or FIRST:LAST (blocks, both included), got {text!r}")
    return int(first), int(last)


def print_evaluations(console: Console, task, found: list[tuple[int | float, dict]]) -> None:
    title, chance = "held-out strings" if task.held_out else "fresh sequences", task.chance()
    table = Table("N", "exact", "+/-", "per label", "loss", "sequences", title=f"accuracy on {title}")
    percent: Callable[[float], str] = "{:.2%}".format
    for n, r in found:
        cells = (percent(r["exact"]), percent(r["exact_stderr"]), percent(r["per_label"]), f"{r['loss']:.4f}")
        table.add_row(str(n), *cells, f"{r['samples']:.0f}")
    table.add_row("chance", percent(chance["majority"]), "", percent(max(chance["ones"], 1 - chance["ones"])), "", "")
    console.print(table)
