"""Sleep: windows, passes and eviction over a stack of blocks (Algorithm 1 of arXiv 2605.26099).

A window of at most L tokens is read *awake*: one pass, from which every prediction comes. When it is full it *sleeps*:
N - 1 further passes of the looped blocks over the window, each fed with the hidden states of the pass before and with
the fast weights that pass left behind. Then the attention caches are evicted. Training, evaluation and sessions all go
through `SleepStack.read`, so a text read at once, in chunks or token by token leaves the same state.

    window tokens --embed--> [before | looped | after] --> predictions          pass 1, awake
                                     h ^  | h, S
                                       +--+                                     passes 2..N, asleep
                             then: after the loop, once more; evict
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sleep_ops import ragged
from sleep_ops.layers.attention import AttentionState, Segment
from sleep_ops.layers.block import Block, BlockState
from sleep_ops.layers.gdn import GDNState
from sleep_ops.ragged import Lengths

EVICTIONS = ("hard", "sliding")
CONV_BOUNDARIES = ("snapshot", "zero")


class SleepState(NamedTuple):
    """Everything a text leaves behind, for B rows. Tensors are never changed in place; the lengths are host integers.

    blocks: each block's state: fast weights and convolution tail, or cached keys and values.
    start: the GDN blocks' states when the live window began (None for attention).
    hidden: `[B, live, hidden_size]`, what the looped blocks put out awake for the live window; None with one pass.
    seen: tokens read so far; live: those in the unfinished window; kept: keys kept from earlier windows.
    labelled: whether the live window has had a loss token (counted for `sleep_on="unlabelled"` alone).
    """

    blocks: tuple[BlockState, ...]
    start: tuple[GDNState | None, ...]
    hidden: Tensor | None
    seen: Lengths
    live: Lengths
    kept: Lengths
    labelled: tuple[bool, ...]

    def to(self, device=None, dtype: torch.dtype | None = None) -> "SleepState":
        """The same state elsewhere, or in another dtype; fast weights stay float32, or float64 for dtype float64."""

        def move(state: BlockState | None) -> BlockState | None:
            if state is None:
                return None
            moved = type(state)(*(x.to(device=device, dtype=dtype) for x in state))
            if isinstance(state, GDNState):
                wide = None if dtype is None else torch.promote_types(dtype, torch.float32)
                moved = moved._replace(fast_weights=state.fast_weights.to(device=device, dtype=wide))
            return moved

        hidden = None if self.hidden is None else self.hidden.to(device=device, dtype=dtype)
        return self._replace(blocks=tuple(map(move, self.blocks)), start=tuple(map(move, self.start)), hidden=hidden)

    def detach(self) -> "SleepState":
        """The same state, cut from the autograd graph (truncated backpropagation)."""
        cut = [type(s)(*(x.detach() for x in s)) for s in self.blocks]
        start = [s if s is None else type(s)(*(x.detach() for x in s)) for s in self.start]
        hidden = None if self.hidden is None else self.hidden.detach()
        return self._replace(blocks=tuple(cut), start=tuple(start), hidden=hidden)


def _select(rows: Sequence[bool], new: BlockState, old: BlockState) -> BlockState:
    """`new` for the rows marked True, `old` for the others."""
    if all(rows) or new is old:
        return new
    mask = torch.tensor(rows, device=new[0].device)
    return type(new)(*(torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(new, old, strict=True)))


class SleepStack:
    """The blocks of a model and the rules by which they wake, sleep and forget.

    blocks: objects with `forward(h, state, segment) -> (h, state)`, `update_state(h, state, segment) -> state`,
    `init_state` and `fast_weights`, as `Block`. window: L tokens, or None for no eviction and no sleep. loop: first and
    last looped block, both included. eviction: "hard" or "sliding". conv_boundary: what convolution tail a further pass
    starts from, "snapshot" (as when the window began) or "zero". checkpointing: recompute every run of blocks in the
    backward pass instead of storing it; one unit per window and pass.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        window: int | None,
        loop: tuple[int, int],
        eviction: str,
        conv_boundary: str = "snapshot",
        checkpointing: bool = False,
    ):
        self.blocks, self.window, self.loop, self.eviction = blocks, window, loop, eviction
        self.conv_boundary, self.checkpointing = conv_boundary, checkpointing

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> SleepState:
        """The state before the first token."""
        blocks = tuple(block.init_state(batch_size, device=device, dtype=dtype) for block in self.blocks)
        none = (0,) * batch_size
        return SleepState(blocks, self._fast_states(blocks), None, none, none, none, (False,) * batch_size)

    def check(self, state: SleepState, batch_size: int) -> None:
        """Raises ValueError where `state` can't be one of this stack's, for batch_size rows."""
        if not isinstance(state, SleepState):
            raise ValueError(f"state: expected a SleepState, got {type(state).__name__}")
        kinds = [GDNState if b.fast_weights else AttentionState for b in self.blocks]
        if [type(s) for s in state.blocks] != kinds:
            raise ValueError(f"state: expected one of these blocks, got {[type(s).__name__ for s in state.blocks]}")
        if len(state.seen) != batch_size:
            raise ValueError(f"state: expected {batch_size} rows, got {len(state.seen)}")

    def read(
        self,
        embed: Callable[[Lengths, Lengths], Tensor],
        lengths: Lengths,
        state: SleepState,
        *,
        passes: int,
        wants: Callable[[Lengths, Lengths], bool],
        emit: Callable[[Lengths, Lengths, Tensor], None],
        labelled: Callable[[Lengths, Lengths], Sequence[bool]] | None = None,
        close: bool = True,
    ) -> SleepState:
        """Reads `lengths[b]` further tokens of every row, sleeping whenever a row's window is full.

        The text is cut into segments, none of which crosses a window's end; of each, row b's part starts at `starts[b]`
        and has `parts[b]` tokens. `embed(starts, parts)` gives its embeddings, left-aligned `[B, max(parts), hidden]`;
        where `wants(starts, parts)`, `emit(starts, parts, h)` receives the first-pass outputs. With `labelled`, which
        says what rows have a loss token there, windows that have one do not sleep. close=False ends with the last
        output wanted: no later token is read, and no sleep that nothing wanted can see.
        """
        starts = (0,) * len(lengths)
        while starts != lengths:
            left = tuple(n - s for n, s in zip(lengths, starts, strict=True))
            if not close and not wants(starts, left):
                break
            parts = left
            if self.window is not None:
                parts = tuple(min(n, self.window - m) for n, m in zip(left, state.live, strict=True))
            full = tuple(m + n == self.window for m, n in zip(state.live, parts, strict=True))
            if labelled is not None:
                marks = tuple(a or b for a, b in zip(state.labelled, labelled(starts, parts), strict=True))
                state = state._replace(labelled=marks)
            asleep = full if labelled is None else tuple(f and not m for f, m in zip(full, marks, strict=True))
            end = ragged.add(starts, parts)
            last = not close and not wants(end, tuple(n - e for n, e in zip(lengths, end, strict=True)))
            wanted = wants(starts, parts)
            h, state = self.wake(embed(starts, parts), state, parts, output=wanted, passes=passes, asleep=asleep)
            if wanted:
                emit(starts, parts, h)
            if any(full) and not last:
                state = self.evict(self.sleep(state, passes=passes, rows=asleep), rows=full)
            starts = end
        return state

    def wake(
        self, h: Tensor, state: SleepState, lengths: Lengths, *, output: bool, passes: int, asleep: Sequence[bool] = ()
    ) -> tuple[Tensor | None, SleepState]:
        """The first pass over a segment that fits into the live window.

        h `[B, T, hidden]` embeddings -> (outputs of the last block, or None if not wanted; the state after it).
        `asleep` marks the rows that sleep right after it: what the sleep computes anew is left out.
        """
        held = ragged.add(state.kept, state.live)
        live = ragged.add(state.live, lengths)
        closed = all(n == self.window for n in live)
        segment = Segment(lengths, held, state.seen, self.window, h.device)
        blocks, hidden, end = state.blocks, None, len(self.blocks)
        begin = 0
        if passes > 1:
            hidden = self._begun(state, passes)
            begin = self.loop[1] + 1
            h, blocks = self._run(range(begin), h, blocks, segment, output=True, closed=closed)
            hidden = h if hidden is None else ragged.append(hidden.to(h.dtype), state.live, h, lengths)
        rerun = passes > 1 and len(asleep) > 0 and all(asleep)
        if output or not rerun:
            h, blocks = self._run(range(begin, end), h, blocks, segment, output=output, closed=closed)
        seen = ragged.add(state.seen, lengths)
        return h if output else None, state._replace(blocks=blocks, hidden=hidden, seen=seen, live=live)

    def sleep(self, state: SleepState, *, passes: int, rows: Sequence[bool]) -> SleepState:
        """Passes 2..N over the live window of the rows marked True; nothing is evicted yet."""
        first, last = self.loop
        if passes == 1 or not any(rows) or not any(self._outlives(i, True) for i in range(first, len(self.blocks))):
            return state
        h, blocks = self._begun(state, passes), list(state.blocks)
        begun = tuple(n - m for n, m in zip(state.seen, state.live, strict=True))
        segment = Segment(state.live, state.kept, begun, self.window, h.device)
        after = range(last + 1, len(self.blocks))
        refine_after = any(self._outlives(i, True) for i in after)
        for n in range(2, passes + 1):
            for i in range(first, last + 1):
                blocks[i] = self._pass_start(i, blocks[i], state)
            output = n < passes or refine_after
            h, run = self._run(range(first, last + 1), h, tuple(blocks), segment, output=output, closed=True)
            blocks = list(run)
        if refine_after:
            for i in after:
                begun_state = state.start[i] if self.blocks[i].fast_weights else self._kept_keys(state.blocks[i], state)
                blocks[i] = begun_state
            _, run = self._run(after, h, tuple(blocks), segment, output=False, closed=True)
            blocks = list(run)
        for i, old in enumerate(state.blocks):
            blocks[i] = _select(rows, blocks[i], old) if self._outlives(i, True) else old
        return state._replace(blocks=tuple(blocks))

    def evict(self, state: SleepState, *, rows: Sequence[bool]) -> SleepState:
        """Ends the live window of the rows marked True and forgets what the eviction rule says."""
        held = ragged.add(state.kept, state.live)
        limit = self.window - 1 if self.eviction == "sliding" else 0
        kept = tuple(min(limit, n) if r else k for r, n, k in zip(rows, held, state.kept, strict=True))
        live = tuple(0 if r else n for r, n in zip(rows, state.live, strict=True))
        hold = ragged.add(kept, live)
        blocks = tuple(
            s if b.fast_weights else AttentionState(*(ragged.take_last(x, held, hold) for x in s))
            for b, s in zip(self.blocks, state.blocks, strict=True)
        )
        start = tuple(
            new if new is None else _select(rows, new, old)
            for new, old in zip(self._fast_states(blocks), state.start, strict=True)
        )
        hidden = state.hidden
        if hidden is not None:
            hidden = ragged.take_last(hidden, state.live, live) if max(live) else None
        labelled = tuple(m and not r for r, m in zip(rows, state.labelled, strict=True))
        return SleepState(blocks, start, hidden, state.seen, live, kept, labelled)

    def _run(
        self, indices: range, h: Tensor, blocks: tuple, segment: Segment, *, output: bool, closed: bool
    ) -> tuple[Tensor | None, tuple]:
        """Runs the blocks at `indices`, and without `output` only as far as a later token can see it."""
        if not output:
            outliving = [i for i in indices if self._outlives(i, closed)]
            indices = range(indices.start, outliving[-1] + 1) if outliving else range(0)
        if len(indices) == 0:
            return h, blocks

        def run(h: Tensor, states: tuple) -> tuple[Tensor, tuple]:
            states = list(states)
            for place, i in enumerate(indices):
                if i == indices[-1] and not output:
                    states[place] = self.blocks[i].update_state(h, states[place], segment)
                else:
                    h, states[place] = self.blocks[i](h, states[place], segment)
            return h, tuple(states)

        states = blocks[indices.start : indices.stop]
        if self.checkpointing and torch.is_grad_enabled():
            h, states = checkpoint(run, h, states, use_reentrant=False, preserve_rng_state=False)
        else:
            h, states = run(h, states)
        return h, blocks[: indices.start] + states + blocks[indices.stop :]

    def _begun(self, state: SleepState, passes: int) -> Tensor | None:
        """What the looped blocks put out for the live window so far, None before its first token."""
        if state.hidden is None and max(state.live) > 0:
            raise ValueError(f"passes: expected 1, with which the live window was begun, got {passes}")
        return state.hidden

    def _outlives(self, i: int, closed: bool) -> bool:
        """Whether later tokens see block i's state once this run is over (`closed`: the run ends the window)."""
        return self.blocks[i].fast_weights or not closed or self.eviction == "sliding"

    def _pass_start(self, i: int, current: BlockState, state: SleepState) -> BlockState:
        """Block i's state at the start of a further pass: fast weights carried on, this window's keys forgotten."""
        if not self.blocks[i].fast_weights:
            return self._kept_keys(state.blocks[i], state)
        tail = state.start[i].conv_tail
        return current._replace(conv_tail=tail if self.conv_boundary == "snapshot" else torch.zeros_like(tail))

    def _kept_keys(self, cache: AttentionState, state: SleepState) -> AttentionState:
        return AttentionState(*(ragged.take(x, (0,) * len(state.kept), state.kept) for x in cache))

    def _fast_states(self, blocks: Sequence[BlockState]) -> tuple[GDNState | None, ...]:
        return tuple(s if b.fast_weights else None for b, s in zip(self.blocks, blocks, strict=True))
