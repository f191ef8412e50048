"""How a text is cut into spans, none across the end of a window: host integers, no tensors."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, TypeAlias

from sleep_ops import ragged
from sleep_ops.ragged import Lengths

Counts: TypeAlias = Sequence[Sequence[int]]  # of each row: how many of its first t tokens are marked, for t = 0, ..., n


class Span(NamedTuple):
    """A stretch of all rows: of row b, `lengths[b]` tokens from `starts[b]` on.

    wanted: whether anything asks for its outputs.
    full: the rows whose window ends with it, and is evicted.
    asleep: those of them that sleep before that.
    labelled: the rows whose window has had a token with loss, this span included.
    windows: those it consists of, where it is several whole ones of every row.
    """

    starts: Lengths
    lengths: Lengths
    wanted: bool
    full: tuple[bool, ...]
    asleep: tuple[bool, ...]
    labelled: tuple[bool, ...]
    windows: tuple["Span", ...] = ()


def marked(counts: Counts, starts: Lengths, lengths: Lengths) -> list[bool]:
    """Of each row: whether any of its `lengths[b]` tokens from `starts[b]` on is marked."""
    return [row[s + n] > row[s] for row, s, n in zip(counts, starts, lengths, strict=True)]


def spans(
    lengths: Lengths,
    window: int | None,
    *,
    filled: Lengths,
    labelled: Sequence[bool],
    wanted: Counts,
    loss: Counts | None = None,
    close: bool = True,
) -> Iterator[Span]:
    """The spans of a text of `lengths[b]` tokens a row, in order.

    window: L tokens, None for no end.
    filled: places of each row's open window that are taken already.
    wanted: counts of the tokens whose outputs are asked for.
    loss: counts of those with loss, where windows that have one do not sleep; None where every full
        window sleeps.
    labelled: rows whose open window has had one before.
    close: False ends with the last output wanted. No later token is read, and no window is evicted,
        or sleeps, that nothing wanted comes after.
    """
    starts = (0,) * len(lengths)
    while starts != lengths:
        left = ragged.subtract(lengths, starts)
        if not close and not any(marked(wanted, starts, left)):
            return
        parts = left if window is None else tuple(min(n, window - m) for n, m in zip(left, filled, strict=True))
        end, filled = ragged.add(starts, parts), ragged.add(filled, parts)
        full = tuple(n == window for n in filled)
        asleep = full
        if loss is not None:
            labelled = tuple(a or b for a, b in zip(labelled, marked(loss, starts, parts), strict=True))
            asleep = tuple(f and not m for f, m in zip(full, labelled, strict=True))
        left = ragged.subtract(lengths, end)
        followed = close or any(marked(wanted, end, left))
        awaited = followed and any(a and (close or n > 0) for a, n in zip(asleep, left, strict=True))
        nobody = (False,) * len(lengths)
        yield Span(
            starts,
            parts,
            any(marked(wanted, starts, parts)),
            full if followed else nobody,
            asleep if awaited else nobody,
            tuple(labelled),
        )
        filled = tuple(0 if f else n for f, n in zip(full, filled, strict=True))
        labelled = tuple(m and not f for f, m in zip(full, labelled, strict=True))
        starts = end


def at_once(spans: Iterable[Span], window: int, *, least: int = 2) -> Iterator[Span]:
    """The same, but `least` or more whole windows of all rows that follow one another are one span."""
    for whole, group in groupby(spans, lambda span: all(n == window for n in span.lengths)):
        windows = tuple(group)
        if not whole or len(windows) < least:
            yield from windows
            continue
        first, last, wanted = windows[0], windows[-1], any(span.wanted for span in windows)
        lengths = (window * len(windows),) * len(first.lengths)
        yield Span(first.starts, lengths, wanted, last.full, last.asleep, last.labelled, windows)
