"""From a command line to a dataclass: the options of a command are the fields', with their defaults and docstrings.

    @command
    def recall(settings: Annotated[dict, Fields(RecallSettings)], out: ...) -> None:

has an option for each field of `RecallSettings`, and gets a dict of their values. Dataclasses used here are in modules
that don't import PyTorch, so that help doesn't.
"""

import functools
import inspect
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.console import Console

from sleep_ops.cli.common import refusals

TASK, MODEL, RECIPE, RUN = "Task", "Model", "Recipe", "Run"

# Options that are called otherwise than their fields.
_NAMES = {
    "batch_size": "batch",
    "cases": "case",
    "presets": "preset",
    "windows": "window",
    "hidden_size": "width",
    "num_heads": "heads",
    "gdn_head_v_dim": "head_v_dim",
    "allow_neg_eigval": "neg_eigval",
    "initializer_range": "init_std",
}
# Fields of a recipe that are about the run.
_OF_RUN = {
    *("seed", "device", "cuda_graph", "parallel", "split", "reshard", "replicas"),
    *("checkpoint_every", "keep_checkpoints", "async_checkpoints", "eval_every", "eval_samples", "profile"),
}
_MOST_SEEDS = 1000
# For dataclasses that say nothing of these.
_HELP = {"seed": "Random seed.", "device": '"auto" (CUDA where there is one), "cpu", "cuda" or "cuda:i".'}


def option(help: str, panel: str | None = None, **kwargs):
    return typer.Option(help=help, rich_help_panel=panel, **kwargs)


Seed = Annotated[int, option(_HELP["seed"])]
OneSeed = Annotated[int | None, option("Random seed; 0 by default.")]
Seeds = Annotated[str | None, option("Several random seeds, such as 0-9 or 0,3,5: each run once with each.")]
Jobs = Annotated[
    int | None, option("Runs at a time, with equal shares of the threads; one for each core of a CPU, 1 on CUDA.")
]
Device = Annotated[str, option(_HELP["device"])]
Resume = Annotated[bool, typer.Option("--resume/--fresh", help="Go on with the run in the folder, or delete it first.")]
Until = Annotated[int | None, option("Stop (and save) at this step; the schedule stays that of all steps.", RUN)]


def integers(name: str, text: str) -> tuple[int, ...]:
    return _separated(name, text, int, "integers")


def seeds_of(one: int | None, several: str | None) -> tuple[int, ...]:
    """The seeds of --seed and --seeds: numbers and ranges FIRST-LAST, both included, separated by commas."""
    if several is None:
        return (one or 0,)
    if one is not None:
        raise ValueError(f"seeds: expected --seed or --seeds, got both, {one} and {several}")
    found: list[int] = []
    for part in several.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and 0 <= int(last) - int(first) < _MOST_SEEDS):
            expected = f"integers >= 0 and ranges of at most {_MOST_SEEDS} of them, such as 0-9 or 0,3,5"
            raise ValueError(f"seeds: expected {expected}, got {several!r}")
        found += range(int(first), int(last) + 1)
    return tuple(found)


def numbers(name: str, text: str) -> tuple[float, ...]:
    return _separated(name, text, float, "numbers")


def _separated(name: str, text: str, kind: Callable, kinds: str) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name}: expected {kinds} separated by commas, got {text!r}") from error


def count_or_inf(name: str, text: str) -> int | float:
    try:
        return math.inf if text == "inf" else int(text)
    except ValueError as error:
        raise ValueError(f"{name}: expected an integer >= 1 or inf, got {text!r}") from error


def block_range(name: str, text: str) -> tuple[int, int] | str:
    return text if text == "all" else _range(name, text, "all or FIRST:LAST (blocks, both included)")


def step_range(name: str, text: str) -> tuple[int, int]:
    return _range(name, text, "FIRST:LAST (steps, both included)")


def _range(name: str, text: str, expected: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise ValueError(f"{name}: expected {expected}, got {text!r}")
    return int(first), int(last)


# How values of a type are written, and what reads them; those of layers are an exception. Other types are typer's.
_WRITTEN: dict[Any, tuple[str, Callable]] = {
    tuple[int, ...]: ("N,N,...", integers),
    tuple[float, ...]: ("X,X,...", numbers),
    tuple[str, ...]: ("A,B,...", lambda name, text: tuple(text.split(","))),
    int | float: ("N|inf", count_or_inf),
    tuple[int, int]: ("FIRST:LAST", step_range),
    tuple[int, int] | str: ("all|FIRST:LAST", block_range),
    "layers": ("BLOCK-BLOCK-...", lambda name, text: tuple(text.split("-"))),
}


@dataclass(frozen=True)
class Fields:
    """Annotates a command's parameter that is an option for each field of a dataclass, then a dict of their values.

    owner  the dataclass, or one of it, whose values are then the defaults.
    names  of the fields; all by default.
    given  no option has a default, and only those that are given are in the dict.
    panel  of the help.
    """

    owner: Any
    names: tuple[str, ...] = ()
    given: bool = False
    panel: str | None = None

    def _kinds(self) -> dict[str, Any]:
        """The fields' types, without None."""
        hints = get_type_hints(self.owner if isinstance(self.owner, type) else type(self.owner))
        return {name: _without_none(hints[name]) for name in self.names or all_but(self.owner)}

    def parameters(self) -> dict[str, tuple[Any, Any]]:
        """The options' annotations and defaults, by name."""
        said, found = _HELP | docstring(self.owner), {}
        for name, kind in self._kinds().items():
            written, _ = _written(name, kind)
            default = None if self.given else getattr(self.owner, name, ...)
            if isinstance(default, tuple):
                default = ",".join(f"{x:g}" if isinstance(x, float) else str(x) for x in default)
            text, panel = said.get(name, ""), RUN if self.panel and name in _OF_RUN else self.panel
            help = option(text[:1].upper() + text[1:], panel, metavar=written)
            found[_NAMES.get(name, name)] = (Annotated[(str if written else kind) | None, help], default)
        return found

    def take(self, values: dict[str, Any]) -> dict[str, Any]:
        """The fields' values, taken out of those of all options of the command."""
        found = {}
        for name, kind in self._kinds().items():
            value, (written, read) = values.pop(_NAMES.get(name, name)), _written(name, kind)
            if value is not None or not self.given:
                found[name] = read(name, value) if written and value is not None else value
        return found


def _without_none(kind: Any) -> Any:
    kinds = [part for part in get_args(kind) if part is not NoneType] if isinstance(kind, UnionType) else [kind]
    return functools.reduce(operator.or_, kinds)


def _written(name: str, kind: Any) -> tuple[str | None, Callable | None]:
    return _WRITTEN.get(name) or _WRITTEN.get(kind) or (None, None)


def all_but(owner: Any, *names: str) -> tuple[str, ...]:
    """The fields of a dataclass, without these."""
    return tuple(field.name for field in fields(owner) if field.name not in names)


def docstring(owner: Any) -> dict[str, str]:
    """What docstrings say of fields: lines "name, name   text" or "name: text", which may run on indented."""
    text: dict[str, str] = {}
    for base in (owner if isinstance(owner, type) else type(owner)).__mro__[::-1]:
        names: list[str] = []
        for line in inspect.cleandoc(base.__doc__ or "").splitlines():
            if found := re.match(r"(\w+(?:, \w+)*)(?: {2,}|: )(\S.*)", line):
                names = found[1].split(", ")
                text |= dict.fromkeys(names, found[2])
            elif names and line.startswith("  "):
                text |= {name: f"{text[name]} {line.strip()}" for name in names}
            else:
                names = []
    return text


def command(function: Callable) -> Callable:
    """A function as typer takes it: what `Fields` annotates becomes options, errors become exit codes."""
    parts, parameters = {}, []

    def add(name: str, annotation: Any, default: Any) -> None:
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, kind, annotation=annotation, default=default))

    for name, parameter in inspect.signature(function).parameters.items():
        marks = [x for x in getattr(parameter.annotation, "__metadata__", ()) if isinstance(x, Fields)]
        if marks:
            parts[name] = marks[0]
            for other, (annotation, default) in marks[0].parameters().items():
                add(other, annotation, default)
        else:
            add(name, parameter.annotation, parameter.default)

    @functools.wraps(function)
    def run(**values: Any) -> None:
        with refusals(Console()):
            function(**{name: part.take(values) for name, part in parts.items()}, **values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
