"""Sleep: windows, passes and eviction over a stack of blocks (Algorithm 1 of arXiv 2605.26099).

A window of at most L tokens is read *awake*: one pass, from which every prediction comes. When it is full it *sleeps*:
N - 1 further passes over the window, each starting from the fast weights that the pass before left behind. Then the
attention caches are evicted. Training, evaluation and sessions all go through `SleepStack.read`, so a text read at
once, in chunks or token by token leaves the same state. There are two kinds of further pass.

"refine" (Algorithm 1): the looped blocks run again, each time fed with the hidden states of the pass before, so what
they write changes from pass to pass. The cost is linear in N.

    window tokens --embed--> [before | looped | after] --> predictions          pass 1, awake
                                     h ^  | h, S
                                       +--+                                     passes 2..N, asleep
                             then: after the loop, once more; evict

"replay": every GDN block of the loop, on its own, repeats what it wrote awake, the same k, v, g and beta. Nothing else
is computed anew: attention caches, convolution tails and the other blocks stay as pass 1 left them. A pass is then an
affine map of S, so the cost hardly grows with N, which may be infinite.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sleep_ops import ragged
from sleep_ops.layers.attention import AttentionState, Segment
from sleep_ops.layers.block import Block, BlockState
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

        def pick(part: tuple) -> tuple:
            return tuple(s if s is None else type(s)(*(x.index_select(0, index) for x in s)) for s in part)

        def chosen(values: tuple) -> tuple:
            return tuple(values[b] for b in rows)

        hidden = None if self.hidden is None else self.hidden.index_select(0, index)
        blocks, start, writes = map(pick, (self.blocks, self.start, self.writes))
        lengths = map(chosen, (self.seen, self.live, self.kept, self.labelled, self.absent))
        return SleepState(blocks, start, hidden, writes, *lengths)

    def detach(self) -> "SleepState":
        """The same state, cut from the autograd graph (truncated backpropagation)."""
        return self._each(Tensor.detach)

    def recordable(self) -> "SleepState":
        """The same state, with copies of what was made under inference_mode: autograd can't save those tensors."""
        return self._each(lambda x: x.clone() if x.is_inference() else x)

    def _each(self, function: Callable[[Tensor], Tensor]) -> "SleepState":
        hidden = None if self.hidden is None else function(self.hidden)
        blocks, start, writes = (_each(part, function) for part in (self.blocks, self.start, self.writes))
        return self._replace(blocks=blocks, start=start, hidden=hidden, writes=writes)


def _each(states: Sequence[tuple | None], function: Callable[[Tensor], Tensor]) -> tuple:
    return tuple(s if s is None else type(s)(*map(function, s)) for s in states)


def _select(rows: Sequence[bool], new: BlockState, old: BlockState) -> BlockState:
    """`new` for the rows marked True, `old` for the others."""
    if all(rows) or new is old:
        return new
    mask = ragged.tensor(rows, new[0].device)
    return type(new)(*(torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(new, old, strict=True)))


def _append(old: GDNWrites | None, old_lengths: Lengths, new: GDNWrites | None, lengths: Lengths) -> GDNWrites | None:
    """Row by row, what was written before and then `new`; None where nothing is recorded."""
    if old is None or new is None:
        return new
    pairs = zip(old, new, strict=True)
    return GDNWrites(*(ragged.append(x.to(y.dtype), old_lengths, y, lengths) for x, y in pairs))


class SleepStack:
    """The blocks of a model and the rules by which they wake, sleep and forget.

    blocks: objects with the methods of `Block`. window: L tokens, or None for no eviction and no sleep. loop: first and
    last looped block, both included. kind: of the further passes, "refine" or "replay". eviction: "hard" or "sliding".
    conv_boundary: what convolution tail a refining pass starts from, "snapshot" (as when the window began) or "zero".
    between: between(h, entry) is what a refining pass is fed with, of the looped blocks' outputs h and, with
    keep_entry, what the loop was fed awake (else None); None feeds h. backprop_passes: gradients go through the last so
    many passes of a sleep; what the first of them starts from is taken as given. None for all.
    checkpointing: recompute every run of blocks in the backward pass instead of storing it; one unit per window and
    pass. All replays of a block over a window are one unit, and what it replays is stored. random: blocks draw random
    numbers (dropout), the same ones again when they are recomputed.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        window: int | None,
        loop: tuple[int, int],
        eviction: str,
        kind: str = "refine",
        conv_boundary: str = "snapshot",
        between: Callable[[Tensor, Tensor | None], Tensor] | None = None,
        keep_entry: bool = False,
        backprop_passes: int | None = None,
        checkpointing: bool = False,
        random: bool = False,
    ):
        self.blocks, self.window, self.loop, self.eviction = blocks, window, loop, eviction
        self.kind, self.conv_boundary, self.between, self.keep_entry = kind, conv_boundary, between, keep_entry
        self.backprop_passes = backprop_passes
        self.checkpointing, self.random = checkpointing, random
        looped = range(loop[0], loop[1] + 1) if kind == "replay" else ()
        self.replayed = tuple(i for i in looped if blocks[i].fast_weights)

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> SleepState:
        """The state before the first token."""
        blocks = tuple(block.init_state(batch_size, device=device, dtype=dtype) for block in self.blocks)
        none, unwritten = (0,) * batch_size, (None,) * len(blocks)
        return SleepState(blocks, self._starts(blocks), None, unwritten, none, none, none, (False,) * batch_size, none)

    def check(self, state: SleepState, batch_size: int) -> None:
        """Raises ValueError where `state` can't be one of this stack's, for batch_size rows."""
        if not isinstance(state, SleepState):
            raise ValueError(f"state: expected a SleepState, got {type(state).__name__}")
        kinds = [GDNState if b.fast_weights else AttentionState for b in self.blocks]
        if [type(s) for s in state.blocks] != kinds:
            raise ValueError(f"state: expected one of these blocks, got {[type(s).__name__ for s in state.blocks]}")
        if [s is None for s in state.start] != [s is None for s in self._starts(state.blocks)]:
            raise ValueError(f"state: expected one of sleep_kind {self.kind!r}, got one of the other kind")
        if len(state.seen) != batch_size:
            raise ValueError(f"state: expected {batch_size} rows, got {len(state.seen)}")

    def read(
        self,
        embed: Callable[[Lengths, Lengths], Tensor],
        lengths: Lengths,
        state: SleepState,
        *,
        passes: int | float,
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
        output wanted: no later token is read, and no window sleeps that nothing wanted can see, such as a full one at
        the end of the text.
        """
        starts = (0,) * len(lengths)
        while starts != lengths:
            left = tuple(n - s for n, s in zip(lengths, starts, strict=True))
            if not close and not wants(starts, left):
                break
            parts = left
            if self.window is not None:
                filled = ragged.add(state.live, state.absent)
                parts = tuple(min(n, self.window - m) for n, m in zip(left, filled, strict=True))
            full = self._full(state, parts)
            if labelled is not None:
                marks = tuple(a or b for a, b in zip(state.labelled, labelled(starts, parts), strict=True))
                state = state._replace(labelled=marks)
            asleep = full if labelled is None else tuple(f and not m for f, m in zip(full, marks, strict=True))
            end = ragged.add(starts, parts)
            left = tuple(n - e for n, e in zip(lengths, end, strict=True))
            seen = close or (end != lengths and wants(end, left))  # whether anything sees what this segment leaves
            wanted = wants(starts, parts)
            h, state = self.wake(embed(starts, parts), state, parts, output=wanted, passes=passes, asleep=asleep)
            if wanted:
                emit(starts, parts, h)
            if seen and any(full):
                if any(a and (close or n > 0) for a, n in zip(asleep, left, strict=True)):
                    state = self.sleep(state, passes=passes, rows=asleep)
                state = self.evict(state, rows=full)
            starts = end
        return state

    def wake(
        self,
        h: Tensor,
        state: SleepState,
        lengths: Lengths,
        *,
        output: bool,
        passes: int | float,
        asleep: Sequence[bool] = (),
    ) -> tuple[Tensor | None, SleepState]:
        """The first pass over a segment that fits into the live window.

        h `[B, T, hidden]` embeddings -> (outputs of the last block, or None if not wanted; the state after it).
        `asleep` marks the rows that sleep right after it: what the sleep computes anew is left out.
        """
        if passes > 1:
            self._check_begun(state, passes)
        held = ragged.add(state.kept, state.live)
        live = ragged.add(state.live, lengths)
        closed = all(self._full(state, lengths))
        segment = Segment(lengths, held, state.seen, self.window, h.device)
        blocks, hidden, begin = state.blocks, None, 0
        refining = passes > 1 and self.kind == "refine"
        if refining:
            first, begin = self.loop[0], self.loop[1] + 1
            if self.keep_entry:
                h, blocks, _ = self._run(range(first), h, blocks, segment, output=True, closed=closed)
            entry, rest = h, range(first if self.keep_entry else 0, begin)
            h, blocks, _ = self._run(rest, h, blocks, segment, output=True, closed=closed)
            hidden = torch.cat([h, entry.to(h.dtype)], dim=-1) if self.keep_entry else h
            if state.hidden is not None:
                hidden = ragged.append(state.hidden.to(h.dtype), state.live, hidden, lengths)
        writes = (None,) * len(self.blocks)
        if output or not (refining and len(asleep) > 0 and all(asleep)):
            recorded = self.replayed if passes > 1 else ()
            rest = range(begin, len(self.blocks))
            h, blocks, new = self._run(rest, h, blocks, segment, output=output, closed=closed, recorded=recorded)
            writes = tuple(_append(old, state.live, w, lengths) for old, w in zip(state.writes, new, strict=True))
        seen = ragged.add(state.seen, lengths)
        state = state._replace(blocks=blocks, hidden=hidden, writes=writes, seen=seen, live=live)
        return h if output else None, state

    def sleep(self, state: SleepState, *, passes: int | float, rows: Sequence[bool]) -> SleepState:
        """Passes 2..N over the live window of the rows marked True; nothing is evicted yet.

        Raises ValueError for passes=math.inf where some row's replays don't converge.
        """
        if passes == 1 or not any(rows):
            return state
        self._check_begun(state, passes)
        return self._replay(state, passes, rows) if self.kind == "replay" else self._refine(state, passes, rows)

    def _replay(self, state: SleepState, passes: int | float, rows: Sequence[bool]) -> SleepState:
        # Without the rows that stay awake: theirs need not converge, and would be for nothing.
        asleep = [b for b, sleeps in enumerate(rows) if sleeps]
        lengths = tuple(state.live[b] for b in asleep)
        device = state.blocks[0][0].device
        index = None if len(asleep) == len(rows) else ragged.tensor(asleep, device)
        real = None if ragged.uniform(lengths) else ragged.tensor(lengths, device)
        blocks = list(state.blocks)
        for i in self.replayed:
            writes, fast_weights = state.writes[i], state.blocks[i].fast_weights
            if index is not None:
                writes = GDNWrites(*(x.index_select(0, index) for x in writes))
                fast_weights = fast_weights.index_select(0, index)
            writes = GDNWrites(*(x[:, : max(lengths)] for x in writes))
            new = self._unit(self.blocks[i].replay, writes, fast_weights, passes - 1, real)
            if index is not None:
                new = state.blocks[i].fast_weights.index_copy(0, index, new)
            blocks[i] = state.blocks[i]._replace(fast_weights=new)
        return state._replace(blocks=tuple(blocks))

    def _refine(self, state: SleepState, passes: int, rows: Sequence[bool]) -> SleepState:
        first, last = self.loop
        if not any(self._outlives(i, True) for i in range(first, len(self.blocks))):
            return state
        h, entry = state.hidden.chunk(2, dim=-1) if self.keep_entry else (state.hidden, None)
        blocks = list(state.blocks)
        given = 0 if self.backprop_passes is None else passes - self.backprop_passes  # no gradient through these passes
        begun = tuple(n - m for n, m in zip(state.seen, state.live, strict=True))
        segment = Segment(state.live, state.kept, begun, self.window, h.device)
        after = range(last + 1, len(self.blocks))
        refine_after = any(self._outlives(i, True) for i in after)
        for n in range(2, passes + 1):
            if n == given + 1:
                h = h.detach()
                blocks[first : last + 1] = _each(blocks[first : last + 1], Tensor.detach)
            for i in range(first, last + 1):
                blocks[i] = self._pass_start(i, blocks[i], state)
            output = n < passes or refine_after
            with torch.no_grad() if n <= given else nullcontext():
                h = h if self.between is None else self.between(h, entry)
                h, run, _ = self._run(range(first, last + 1), h, tuple(blocks), segment, output=output, closed=True)
            blocks = list(run)
        if refine_after:
            for i in after:
                begun_state = state.start[i] if self.blocks[i].fast_weights else self._kept_keys(state.blocks[i], state)
                blocks[i] = begun_state
            _, run, _ = self._run(after, h, tuple(blocks), segment, output=False, closed=True)
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
            for new, old in zip(self._starts(blocks), state.start, strict=True)
        )
        hidden, writes = None, (None,) * len(self.blocks)
        if max(live) > 0:
            hidden = None if state.hidden is None else ragged.take_last(state.hidden, state.live, live)
            writes = tuple(
                w if w is None else GDNWrites(*(ragged.take_last(x, state.live, live) for x in w)) for w in state.writes
            )
        labelled = tuple(m and not r for r, m in zip(rows, state.labelled, strict=True))
        absent = tuple(0 if r else n for r, n in zip(rows, state.absent, strict=True))
        return SleepState(blocks, start, hidden, writes, state.seen, live, kept, labelled, absent)

    def _run(
        self,
        indices: range,
        h: Tensor,
        blocks: tuple,
        segment: Segment,
        *,
        output: bool,
        closed: bool,
        recorded: Sequence[int] = (),
    ) -> tuple[Tensor | None, tuple, tuple]:
        """Runs the blocks at `indices`, and without `output` only as far as a later token can see it.

        Returns (h, every block's state, what every block wrote; None for those not in `recorded`).
        """
        if not output:
            outliving = [i for i in indices if self._outlives(i, closed)]
            indices = range(indices.start, outliving[-1] + 1) if outliving else range(0)
        written = [None] * len(self.blocks)
        if len(indices) == 0:
            return h, blocks, tuple(written)

        def run(h: Tensor, states: tuple) -> tuple[Tensor, tuple, tuple]:
            states, writes = list(states), [None] * len(states)
            for place, i in enumerate(indices):
                block, record = self.blocks[i], i in recorded
                if i == indices[-1] and not output:
                    states[place], writes[place] = block.update_state(h, states[place], segment, return_writes=record)
                else:
                    h, states[place], writes[place] = block(h, states[place], segment, return_writes=record)
            return h, tuple(states), tuple(writes)

        inside = slice(indices.start, indices.stop)
        h, states, written[inside] = self._unit(run, h, blocks[inside])
        return h, blocks[: indices.start] + states + blocks[indices.stop :], tuple(written)

    def _unit(self, function: Callable, *arguments):
        """function(*arguments); with checkpointing, its inputs are stored and the rest is computed again backward."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=self.random)
        return function(*arguments)

    def _full(self, state: SleepState, lengths: Lengths) -> tuple[bool, ...]:
        """Which rows' live windows are full after `lengths` further tokens."""
        filled = zip(state.live, lengths, state.absent, strict=True)
        return tuple(sum(parts) == self.window for parts in filled)

    def _check_begun(self, state: SleepState, passes: int | float) -> None:
        """Raises ValueError unless what further passes start from has been kept since the live window began."""
        refine = self.kind == "refine"
        missing = state.hidden is None if refine else any(state.writes[i] is None for i in self.replayed)
        if missing and max(state.live) > 0:
            raise ValueError(f"passes: expected 1, with which the live window was begun, got {passes}")

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

    def _starts(self, blocks: Sequence[BlockState]) -> tuple[GDNState | None, ...]:
        """Those of the states at the start of a window to which refining passes return."""
        refine = self.kind == "refine"
        return tuple(s if refine and b.fast_weights else None for b, s in zip(self.blocks, blocks, strict=True))
