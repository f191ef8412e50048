"""`sleep-ops bench` in this process: its output on one line, and the tables it writes."""

import csv
import inspect
import re

from typer.testing import CliRunner

import sleep_ops.cli


def bench(*arguments, code=0) -> str:
    """What the command prints, without colours and line breaks; it must end with `code`."""
    result = CliRunner().invoke(sleep_ops.cli.app, ["bench", *map(str, arguments)])
    error = "" if result.exception is None else repr(result.exception)
    assert result.exit_code == code, result.output + error
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m", "", result.output))


def read(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def refuses(command: str, named: str, folder) -> None:
    """The command names the setting, and writes nothing."""
    text = bench(*command.split(), "--out", folder / "out", code=2)
    assert f"{named}:" in text and "expected" in text
    assert not list(folder.iterdir())


def check_defaults(command, benchmark, renamed: dict[str, str], own=("out", "seconds", "write")) -> None:
    """Every option of a command defaults to the benchmark's setting; `renamed` are those with a name of their own."""
    for option, parameter in inspect.signature(command).parameters.items():
        if option not in own:
            default = getattr(benchmark, renamed.get(option, option))
            default = ",".join(map(str, default)) if isinstance(default, tuple) else default
            assert parameter.default == default, option
