"""Files that are whole or not there, tables, and plots; and whether a place can be written, asked before the work."""

import csv
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

_PARTIAL = ".partial-"


def kind(path: Path) -> str:
    """What there is at `path`, in words; "" where there is nothing."""
    if not os.path.lexists(path):
        return ""
    return "a folder" if path.is_dir() else "a file" if path.exists() else "a link to nothing"


def check_folder(name: str, folder: Path) -> None:
    """ValueError, naming the setting `name`, unless files can be written in `folder`, which need not be there yet."""
    folder = Path(folder)
    expected, place = f"{name}: expected a folder that can be written", folder
    try:
        while not _there(place):
            place = place.parent
        if not place.is_dir():
            below = "" if place == folder else f"{folder}, below "
            raise ValueError(f"{expected}, got {below}{kind(place)}: {place}")
        os.rmdir(tempfile.mkdtemp(dir=place, prefix=_PARTIAL))
    except OSError as error:
        raise ValueError(f"{expected}, got {folder} ({error.strerror})") from error


def check_file(name: str, path: Path, form: str) -> None:
    """ValueError, naming the setting `name`, unless a file of this form can be written at `path`."""
    if kind(path) == "a folder":
        raise ValueError(f"{name}: expected a {form} file, got the folder {path}")
    check_folder(name, path.parent)


def remove(path: Path) -> None:
    """Delete a folder, a file or a link (not what it leads to), if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a reader sees the old file or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder to write into, which then becomes `final`: a folder of that name is complete.

    A folder already there is replaced. What a process that was killed while it wrote left beside it is deleted.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=_PARTIAL))
    try:
        yield temporary
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            _flush_to_disk(path)
        os.chmod(temporary, 0o755)
        remove(final)
        os.replace(temporary, final)
        _flush_to_disk(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for left in final.parent.glob(f"{_PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)


def keep_others_out(file: IO, *, wait: bool = True) -> None:
    """Until `file` is closed no other process gets past here with it; waits for that, or raises OSError.

    Nobody is kept out where the system has no such locks.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows with the same keys as one CSV file, whole or not at all; its folder is made if need be."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode())


def read_table(path: Path, *columns: str) -> list[dict[str, str]]:
    """Rows of a CSV file. ValueError, naming it, for one without these columns or without a row."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, found = list(reader), reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: expected a CSV file, got one that can't be read ({error})") from error
    missing = [name for name in columns if name not in found]
    whole = rows and all(None not in row and None not in row.values() for row in rows)
    if missing or not whole:
        got = f"without {', '.join(missing)}" if missing else "with incomplete rows" if rows else "without a row"
        raise ValueError(f"{path}: expected a table with {', '.join(columns) or 'rows'}, got one {got}")
    return rows


def read_csv(path: Path, *columns: str) -> list[dict[str, float]]:
    """Rows of a log, as numbers; the errors are those of `read_table`."""
    rows = read_table(path, *columns)
    try:
        return [{key: float(value) for key, value in row.items()} for row in rows]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a table of numbers ({error})") from error


def pyplot():
    """matplotlib's pyplot, drawing into files alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _there(path: Path) -> bool:
    """Whether there is anything at `path`, which is not followed; OSError where that can't be known."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        if path == path.parent:
            raise
        return False
    return True


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
