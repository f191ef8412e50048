"""What a text leaves behind: the states of all blocks, and how far each row has come."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sleep_ops import ragged
from sleep_ops.layers.block import BlockState
from sleep_ops.layers.mixer import GDNState, GDNWrites
from sleep_ops.ragged import Lengths


class SleepState(NamedTuple):
    """Everything a text leaves behind, for B rows. Tensors are never changed in place; the lengths are host integers.

    blocks: each block's state: fast weights and convolution tail, or cached keys and values.
    start: the GDN blocks' states when the live window began (None for attention, and where sleep replays).
    hidden: `[B, live, hidden_size]`, what the looped blocks put out awake for the live window; None with one pass, and
        where sleep replays. Where passes come back to it, what the loop was fed awake stands behind that in the last
        axis.
    writes: what the GDN blocks of the loop wrote in the live window, `[B, live, ...]` each, where sleep replays; None
        with one pass, and for every other block.
    seen: tokens read so far; live: those in the unfinished window; kept: keys kept from earlier windows.
    labelled: whether the live window has had a loss token (counted for `sleep_on="unlabelled"` alone).
    absent: places of the live window that stand empty, and make it full the sooner: left padding, where windows are cut
        by position.
    """

    blocks: tuple[BlockState, ...]
    start: tuple[GDNState | None, ...]
    hidden: Tensor | None
    writes: tuple[GDNWrites | None, ...]
    seen: Lengths
    live: Lengths
    kept: Lengths
    labelled: tuple[bool, ...]
    absent: Lengths

    def to(self, device=None, dtype: torch.dtype | None = None) -> "SleepState":
        """The same state elsewhere, or in another dtype; fast weights stay float32, or float64 for dtype float64."""

        def move(state: BlockState | GDNWrites | None) -> BlockState | GDNWrites | None:
            if state is None:
                return None
            moved = type(state)(*(x.to(device=device, dtype=dtype) for x in state))
            if isinstance(state, GDNState):
                wide = None if dtype is None else torch.promote_types(dtype, torch.float32)
                moved = moved._replace(fast_weights=state.fast_weights.to(device=device, dtype=wide))
            return moved

        hidden = None if self.hidden is None else self.hidden.to(device=device, dtype=dtype)
        blocks, start, writes = (tuple(map(move, part)) for part in (self.blocks, self.start, self.writes))
        return self._replace(blocks=blocks, start=start, hidden=hidden, writes=writes)

    def select(self, rows: Sequence[int]) -> "SleepState":
        """The state of these rows, in this order; a row may come several times."""
        index = ragged.tensor(rows, self.blocks[0][0].device)
        seen, live, kept, labelled, absent = (
            tuple(values[b] for b in rows) for values in (self.seen, self.live, self.kept, self.labelled, self.absent)
        )
        held = ragged.add(kept, live)

        def pick(x: Tensor, width: int | None = None) -> Tensor:
            return x.index_select(0, index)[:, :width]  # no wider than the longest of these rows

        def picked(s: tuple | None, width: int | None = None) -> tuple | None:
            return s if s is None else type(s)(*(pick(x, width) for x in s))

        blocks = tuple(picked(s, None if isinstance(s, GDNState) else max(held)) for s in self.blocks)
        hidden = None if self.hidden is None or max(live) == 0 else pick(self.hidden, max(live))
        writes = tuple(None if max(live) == 0 else picked(w, max(live)) for w in self.writes)
        return SleepState(blocks, tuple(map(picked, self.start)), hidden, writes, seen, live, kept, labelled, absent)

    def detach(self) -> "SleepState":
        """The same state, cut from the autograd graph (truncated backpropagation)."""
        return self._each(Tensor.detach)

    def recordable(self) -> "SleepState":
        """The same state, with copies of what was made under inference_mode: autograd can't save those tensors."""
        return self._each(lambda x: x.clone() if x.is_inference() else x)

    def _each(self, function: Callable[[Tensor], Tensor]) -> "SleepState":
        hidden = None if self.hidden is None else function(self.hidden)
        blocks, start, writes = (each(part, function) for part in (self.blocks, self.start, self.writes))
        return self._replace(blocks=blocks, start=start, hidden=hidden, writes=writes)


def each(states: Sequence[tuple | None], function: Callable[[Tensor], Tensor]) -> tuple:
    """The states, with `function` applied to all their tensors."""
    return tuple(s if s is None else type(s)(*map(function, s)) for s in states)
