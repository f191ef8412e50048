"""Reproducible random numbers: counter-based, so that any part of a stream can be had without those before it.

What is drawn is keyed by a seed and a number: a task's batch by its step, with the split in the highest bit; N of a
training step by that step, with the next bit set.
"""

import numpy as np

SPLITS = {"train": 0, "eval": 1 << 63}
PASSES = 1 << 62


def source(seed: int, key: int) -> np.random.Philox:
    """Random words of the stream (seed, key), both of 64 bits."""
    return np.random.Philox(key=np.array([seed, key], dtype=np.uint64))


def shuffled(seed: int, key: int, count: int) -> np.ndarray:
    """int64 [count]: 0..count-1 in the order of the stream (seed, key)."""
    return np.random.Generator(source(seed, key)).permutation(count)


def split_key(split: str, step: int) -> int:
    """The key of batch `step` of a split. ValueError for an unknown one."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {tuple(SPLITS)}, got {split!r}")
    return SPLITS[split] | step


class Stream:
    """The random numbers of batch `step` of the stream (seed, split).

    Built on Philox's raw words alone, so a stream is the same with every version of numpy.
    """

    def __init__(self, seed: int, step: int, size: int, split: str):
        key = split_key(split, step)
        if not (0 <= seed < 1 << 64 and 0 <= step < 1 << 63 and size >= 1):
            expected = "integers 0 <= seed < 2^64, 0 <= step < 2^63, size >= 1"
            raise ValueError(f"seed, step, size: expected {expected}, got {seed}, {step}, {size}")
        self._source = source(seed, key)

    def words(self, count: int) -> np.ndarray:
        """uint64 [count], uniform."""
        return self._source.random_raw(count)

    def uniform(self, *shape: int) -> np.ndarray:
        """float64 in [0, 1), with 53 random bits."""
        return (self._source.random_raw(shape) >> np.uint64(11)) * 2.0**-53

    def below(self, total: int, *shape: int) -> np.ndarray:
        """int64 in [0, total), uniform to within total / 2^53."""
        return (self.uniform(*shape) * total).astype(np.int64)

    def distinct(self, total: int, rows: int, count: int) -> np.ndarray:
        """int64 [rows, count]: in each row `count` different integers of [0, total), uniform over ordered choices."""
        if total <= 4 * count:
            return self.uniform(rows, total).argsort(1)[:, :count]
        # Numbers that repeat an earlier one of their row are drawn again until none does. Renaming the integers changes
        # nothing in that, and some renaming takes any choice to any other: all are equally likely.
        drawn, unsettled = self.below(total, rows, count), np.arange(rows)
        while len(unsettled):
            part = drawn[unsettled]
            order = part.argsort(1, kind="stable")
            ranked = np.take_along_axis(part, order, 1)
            i, j = (ranked[:, 1:] == ranked[:, :-1]).nonzero()
            drawn[unsettled[i], order[i, j + 1]] = self.below(total, len(i))
            unsettled = unsettled[np.unique(i)]
        return drawn
