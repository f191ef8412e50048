"""Token sequences one after another, in memory or in files that are read where they are needed.

A folder of `stored` has

    tokens.bin                                        int32, as many as there are
    {starts,ends,answers,levels,lines}.npy            int64, one for each example
    top.txt                                           the largest token
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from sleep_ops.files import keep_others_out, whole_folder

# tokens int32, place of the first one to predict, level, line
Example: TypeAlias = tuple[np.ndarray, int, int, int]

_TOKENS, _TOP = "tokens.bin", "top.txt"


class Examples(NamedTuple):
    """Of a file, or some of them.

    tokens: int32 [total].
    starts, ends: int64 [n], where each example's are.
    answers: int64 [n], where in its sequence each example's first predicted token is.
    levels: int64 [n], of difficulty, -1 where none is given.
    lines: int64 [n], the line that each example is of, in order, counted from 0 without blank ones.
    top: the largest token.
    """

    tokens: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    answers: np.ndarray
    levels: np.ndarray
    lines: np.ndarray
    top: int

    def sequence(self, i: int) -> np.ndarray:
        """The tokens of an example."""
        return self.tokens[self.starts[i] : self.ends[i]]

    def given(self, count: int | None = None) -> list[bytes]:
        """The tokens to predict of the first so many examples, or of all."""
        return [self.sequence(i)[self.answers[i] :].tobytes() for i in range(len(self.answers[:count]))]

    def take(self, which: np.ndarray) -> "Examples":
        """The examples of these numbers, the tokens of all kept."""
        return self._replace(**{name: getattr(self, name)[which] for name in _PLACES})

    def hash_into(self, digest) -> None:
        """Adds the tokens one after another, where each example then begins, and the rest."""
        for i in range(len(self.answers)):
            digest.update(self.sequence(i).tobytes())
        starts = np.concatenate([[0], np.cumsum(self.ends - self.starts)])
        for values in (starts, self.answers, self.levels):
            digest.update(values.tobytes())


_PLACES = ("starts", "ends", "answers", "levels", "lines")


def gathered(found: Iterable[Example]) -> Examples:
    """These examples, in memory; there has to be one."""
    parts: list[np.ndarray] = []
    places, top = _gather(found, parts.append)
    return Examples(np.concatenate(parts), **places, top=top)


def stored(folder: Path, key: str, found: Callable[[], Iterable[Example]]) -> Examples:
    """The same, in files of `folder`/`key`, which are written if they are not there yet.

    One process writes, and others that ask for them wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / key
    with (folder / ".lock").open("w") as lock:
        keep_others_out(lock)
        if not place.is_dir():
            with whole_folder(place) as unfinished:
                with (unfinished / _TOKENS).open("wb") as file:
                    places, top = _gather(found(), lambda tokens: file.write(tokens.tobytes()))
                for name, values in places.items():
                    np.save(unfinished / f"{name}.npy", values)
                (unfinished / _TOP).write_text(str(top))
    tokens = np.memmap(place / _TOKENS, dtype=np.int32, mode="r")
    places = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in _PLACES}
    return Examples(tokens, **places, top=int((place / _TOP).read_text()))


def _gather(found: Iterable[Example], put: Callable[[np.ndarray], object]) -> tuple[dict[str, np.ndarray], int]:
    """Hands on the tokens of examples; returns where they are, and the largest one."""
    numbers: dict[str, array] = {name: array("q") for name in _PLACES}
    top, start = 0, 0
    for tokens, *rest in found:
        put(tokens)
        end = start + len(tokens)
        for name, value in zip(_PLACES, (start, end, *rest), strict=True):
            numbers[name].append(value)
        top, start = max(top, int(tokens.max())), end
    return {name: np.array(values, dtype=np.int64) for name, values in numbers.items()}, top


def file_key(*parts: object) -> str:
    """A name for what is made of these: paths count by their sizes and times, the rest by what it is."""
    digest = hashlib.sha256()
    for part in parts:
        found = (str(part.resolve()), part.stat().st_size, part.stat().st_mtime_ns) if isinstance(part, Path) else part
        digest.update(repr(found).encode())
    return digest.hexdigest()[:16]
