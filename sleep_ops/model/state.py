"""What a text leaves behind: the states of all blocks, and how far each row has come."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sleep_ops import ragged
from sleep_ops.layers.block import BlockState
from sleep_ops.layers.mixer import GDNState, ReplayInputs
from sleep_ops.ragged import Lengths


class SleepState(NamedTuple):
    """Everything a text leaves behind, for B rows.

    Tensors are never changed in place; lengths are host integers, one a row.

    blocks: each block's state: fast weights and convolution state, or cached keys and values.
    start: the GDN blocks' states when the open window began, which refining passes go back to; None
        for attention, and where sleep replays.
    hidden: `[B, in_window, hidden_size]`, what the looped blocks put out awake for the open window.
        With a feed that needs it, what the loop was fed awake is joined to that along the last
        axis. None with one pass, and where sleep replays.
    writes: what each GDN block of the loop wrote in the open window, `[B, in_window, ...]`, where
        sleep replays; None with one pass, and for every other block.
    position: tokens read so far, and so where the next one stands.
    in_window: those of them in the open window.
    carried: keys and values carried over from earlier windows (`eviction="sliding"`).
    labelled: whether the open window has had a token with loss (`sleep_on="unlabelled"` alone).
    padded: places of the open window that padding takes up (`windows_by="positions"` alone).
    """

    blocks: tuple[BlockState, ...]
    start: tuple[GDNState | None, ...]
    hidden: Tensor | None
    writes: tuple[ReplayInputs | None, ...]
    position: Lengths
    in_window: Lengths
    carried: Lengths
    labelled: tuple[bool, ...]
    padded: Lengths

    def changed(self, **parts) -> "SleepState":
        """The same state, but for these parts of it; TypeError for a name it hasn't.

        In place of `_replace`, whose result torch.compile can't return up to torch 2.11.
        """
        return SleepState(**self._asdict() | parts)

    def to(self, device=None, dtype: torch.dtype | None = None) -> "SleepState":
        """The same state elsewhere, or in another dtype, fast weights no narrower than float32."""

        def move(state: BlockState | ReplayInputs | None) -> BlockState | ReplayInputs | None:
            if state is None:
                return None
            moved = type(state)(*(x.to(device=device, dtype=dtype) for x in state))
            if isinstance(state, GDNState):
                wide = None if dtype is None else torch.promote_types(dtype, torch.float32)
                moved = GDNState(state.fast_weights.to(device=device, dtype=wide), moved.conv_state)
            return moved

        hidden = None if self.hidden is None else self.hidden.to(device=device, dtype=dtype)
        blocks, start, writes = (tuple(map(move, part)) for part in (self.blocks, self.start, self.writes))
        return self.changed(blocks=blocks, start=start, hidden=hidden, writes=writes)

    def select(self, rows: Sequence[int]) -> "SleepState":
        """The state of these rows, in this order; a row may come several times."""
        index = ragged.tensor(rows, self.blocks[0][0].device)
        position, in_window, carried, labelled, padded = (
            tuple(values[b] for b in rows)
            for values in (self.position, self.in_window, self.carried, self.labelled, self.padded)
        )
        cache_lengths = ragged.add(carried, in_window)

        def pick(x: Tensor, width: int | None = None) -> Tensor:
            return x.index_select(0, index)[:, :width]  # no wider than the longest of these rows

        def picked(s: tuple | None, width: int | None = None) -> tuple | None:
            return s if s is None else type(s)(*(pick(x, width) for x in s))

        blocks = tuple(picked(s, None if isinstance(s, GDNState) else max(cache_lengths)) for s in self.blocks)
        hidden = None if self.hidden is None or max(in_window) == 0 else pick(self.hidden, max(in_window))
        writes = tuple(None if max(in_window) == 0 else picked(w, max(in_window)) for w in self.writes)
        return SleepState(
            blocks, tuple(map(picked, self.start)), hidden, writes, position, in_window, carried, labelled, padded
        )

    def detach(self) -> "SleepState":
        """The same state, cut from the autograd graph (truncated backpropagation)."""
        return self._each(Tensor.detach)

    def recordable(self) -> "SleepState":
        """The same state, with copies of inference_mode's tensors, which autograd can't save."""
        return self._each(lambda x: x.clone() if x.is_inference() else x)

    def _each(self, function: Callable[[Tensor], Tensor]) -> "SleepState":
        hidden = None if self.hidden is None else function(self.hidden)
        blocks, start, writes = (each(part, function) for part in (self.blocks, self.start, self.writes))
        return self.changed(blocks=blocks, start=start, hidden=hidden, writes=writes)


def each(states: Sequence[tuple | None], function: Callable[[Tensor], Tensor]) -> tuple:
    """The states, with `function` applied to all their tensors."""
    return tuple(s if s is None else type(s)(*map(function, s)) for s in states)
