"""Commands in this process: what they print, on one line, and the tables they write."""

import csv
import functools
import os
import re

from typer.testing import CliRunner

import sleep_ops.cli


def run(*arguments, code=0) -> str:
    """What `sleep-ops` prints, without colours and line breaks; it must end with `code`."""
    result = CliRunner().invoke(sleep_ops.cli.app, [*map(str, arguments)])
    error = "" if result.exception is None else repr(result.exception)
    assert result.exit_code == code, result.output + error
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m", "", result.output))


bench = functools.partial(run, "bench")


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


def leave(code, *, label, console):
    """A run whose process ends without a word, as one that is killed for its memory."""
    os._exit(code)
