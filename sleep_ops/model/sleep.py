"""Sleep: windows, passes and eviction over a stack of blocks (Algorithm 1 of arXiv 2605.26099).

A window of at most L tokens is read *awake*: one pass, from which every prediction comes. When it
is full it *sleeps*: N - 1 further passes over the window, each starting from the fast weights that
the pass before left behind. Then the attention caches are evicted. Training, evaluation and
sessions all go through one loop, `Reading`, so a text read at once, in chunks or token by token
leaves the same state. There are two kinds of further pass.

"refine" (Algorithm 1): the looped blocks run again, each time fed with the hidden states of the
pass before, so what they write changes from pass to pass. The cost is linear in N.

    window tokens --embed--> [before | looped | after] --> predictions          pass 1, awake
                                     h ^  | h, S
                                       +--+                                     passes 2..N, asleep
                             then: after the loop, once more; evict

"replay": every GDN block of the loop, on its own, repeats what it wrote awake, the same k, v, g and
beta. Nothing else is computed anew: attention caches, convolution states and the other blocks stay
as pass 1 left them. A pass is then an affine map of S, so the cost hardly grows with N, which may
be infinite.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from sleep_ops import ragged
from sleep_ops.checks import check_count, expect
from sleep_ops.layers.attention import AttentionState, SpanContext
from sleep_ops.layers.block import Block, BlockState
from sleep_ops.layers.mixer import GDNState, ReplayInputs
from sleep_ops.model.config import SleepSettings
from sleep_ops.model.spans import Span
from sleep_ops.model.state import SleepState, each
from sleep_ops.ragged import Lengths

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Reading:
    """A text being read: an iterator over its spans, with the outputs of their first pass.

    embed: int64 ids `[B, T]` -> `[B, T, hidden]`.
    ids: `[B, T]`.
    spans: the spans of ids, in order.
    state: what has been read leaves behind; in the end, what a continuation starts from.
    passes: N.
    group: process group whose ranks read consecutive parts of the text, or None.

    Outputs that nothing asks for are None.
    """

    def __init__(
        self,
        stack: "SleepStack",
        embed: Callable[[Tensor], Tensor],
        ids: Tensor,
        spans: Iterator[Span],
        state: SleepState,
        passes: int | float,
        group: "ProcessGroup | None" = None,
    ):
        self.stack, self.embed, self.ids, self.spans, self.state, self.passes = stack, embed, ids, spans, state, passes
        self.group = group

    def __iter__(self) -> Iterator[tuple[Span, Tensor | None]]:
        """Algorithm 1."""
        stack, N = self.stack, self.passes
        for span in self.spans:
            if stack.recompute == "window" and not span.windows:
                h, self.state = stack.recomputed(self._window, True)(span, self.state)
                yield span, h
                continue
            h = self.embed(ragged.take(self.ids, span.starts, span.lengths))  # h <- Embed(c)
            if span.windows:  # all at once
                h, self.state = stack.read(h, self.state, span, passes=N, group=self.group)
                for part in span.windows:
                    first = part.starts[0] - span.starts[0]
                    yield part, h[:, first : first + part.lengths[0]] if part.wanted else None
                continue
            h, self.state = stack.wake(h, self.state, span, passes=N)  # pass 1: h, S <- Blocks(h, S)
            yield span, h  # predictions and loss are made of this h alone
            self.state = stack.sleep(self.state, passes=N, rows=span.asleep)  # passes 2..N: h, S <- Blocks(h, S)
            self.state = stack.evict(self.state, rows=span.full)  # keys and values are forgotten, S is not

    def _window(self, span: Span, state: SleepState) -> tuple[Tensor | None, SleepState]:
        """The same over one span, as one function, of which the backward keeps `state` alone."""
        h = self.embed(ragged.take(self.ids, span.starts, span.lengths))
        h, state = self.stack.wake(h, state, span, passes=self.passes)
        state = self.stack.sleep(state, passes=self.passes, rows=span.asleep)
        return h, self.stack.evict(state, rows=span.full)


class SleepStack:
    """The blocks of a model and the rules by which they wake, sleep and forget.

    blocks: objects with the methods of `Block`.
    settings: the rules, see `SleepSettings`.
    feed: feed(h, loop_input) is what a refining pass gets in place of h, the looped blocks' outputs
        in the pass before; None for h itself.
    feed_from_input: loop_input is what the loop was fed awake; otherwise it is None.
    training: in training activations are checkpointed, if the settings say so. Recomputed at a time
        is one pass over one window, or a block's part of it, or all of the window, or all replays of
        a block over it, of which the writes are stored.
    random: blocks draw random numbers (dropout), the same ones again when they are recomputed.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        settings: SleepSettings,
        *,
        feed: Callable[[Tensor, Tensor | None], Tensor] | None = None,
        feed_from_input: bool = False,
        training: bool = False,
        random: bool = False,
    ):
        self.blocks, self.settings, self.window = blocks, settings, settings.window
        self.feed, self.feed_from_input = feed, feed_from_input
        self.recompute = settings.recompute if settings.activation_checkpointing and training else None
        self.random = random
        self.loop = settings.resolve_loop(len(blocks))
        looped = range(self.loop[0], self.loop[1] + 1) if settings.sleep_kind == "replay" else ()
        self.replayed = tuple(i for i in looped if blocks[i].fast_weights)

    def init_state(self, batch_size: int) -> SleepState:
        """The state before the first token. ValueError for a batch_size that is no integer >= 0."""
        check_count("batch_size", batch_size, 0)
        blocks = tuple(block.init_state(batch_size) for block in self.blocks)
        none, unwritten = (0,) * batch_size, (None,) * len(blocks)
        return SleepState(blocks, self._starts(blocks), None, unwritten, none, none, none, (False,) * batch_size, none)

    def check(self, state: SleepState, batch_size: int, hidden_size: int) -> None:
        """Raises ValueError where `state` can't be one of this stack's, for batch_size rows of hidden_size."""
        if not isinstance(state, SleepState):
            raise ValueError(f"state: expected a SleepState, got {type(state).__name__}")
        kinds = [GDNState if b.fast_weights else AttentionState for b in self.blocks]
        if [type(s) for s in state.blocks] != kinds:
            raise ValueError(f"state: expected one of these blocks, got {[type(s).__name__ for s in state.blocks]}")
        if [s is None for s in state.start] != [s is None for s in self._starts(state.blocks)]:
            raise ValueError(
                f"state: expected one of sleep_kind {self.settings.sleep_kind!r}, got one of the other kind"
            )
        if len(state.position) != batch_size:
            raise ValueError(f"state: expected {batch_size} rows, got {len(state.position)}")
        for i, (own, given) in enumerate(zip(self.init_state(1).blocks, state.blocks, strict=True)):
            skip = 1 if isinstance(own, GDNState) else 2  # rows, and as many tokens as were kept
            sizes, got = ([list(x.shape[skip:]) for x in s] for s in (own, given))
            expect(got == sizes, "state", f"one of this model, with sizes {sizes} in block {i}", got)
        if state.hidden is not None:
            width = hidden_size * (2 if self.feed_from_input else 1)
            got = state.hidden.shape[-1]
            expect(got == width, "state", f"one of this model, with hidden states of size {width}", got)
        filled = max(ragged.add(state.in_window, state.padded))
        fits = self.window is None or filled < self.window
        expect(fits, "state", f"less than a window of {self.window} tokens begun", filled)

    def wake(
        self, h: Tensor, state: SleepState, span: Span, *, passes: int | float
    ) -> tuple[Tensor | None, SleepState]:
        """The first pass over a span, which fits into the open window.

        h `[B, T, hidden]`, embeddings -> (outputs of the last block, the state after it). Outputs
        that are not wanted are None. What a sleep right after it computes anew is left out.
        """
        if passes > 1:
            self._check_begun(state, passes)
        lengths, output = span.lengths, span.wanted
        cache_lengths = ragged.add(state.carried, state.in_window)
        in_window = ragged.add(state.in_window, lengths)
        closed = all(span.full)
        context = SpanContext(lengths, cache_lengths, state.position, self.window, h.device)
        blocks, hidden, begin = state.blocks, None, 0
        refining = passes > 1 and self.settings.sleep_kind == "refine"
        if refining:
            first, begin = self.loop[0], self.loop[1] + 1
            loop_input, blocks, _ = self._run(range(first), h, blocks, context, output=True, closed=closed)
            h, blocks, _ = self._run(range(first, begin), loop_input, blocks, context, output=True, closed=closed)
            hidden = torch.cat([h, loop_input.to(h.dtype)], dim=-1) if self.feed_from_input else h
            if state.hidden is not None:
                hidden = ragged.append(state.hidden.to(h.dtype), state.in_window, hidden, lengths)
        writes = (None,) * len(self.blocks)
        if output or not (refining and all(span.asleep)):
            recorded = self.replayed if passes > 1 else ()
            rest = range(begin, len(self.blocks))
            h, blocks, new = self._run(rest, h, blocks, context, output=output, closed=closed, recorded=recorded)
            writes = tuple(_append(old, state.in_window, w, lengths) for old, w in zip(state.writes, new, strict=True))
        position = ragged.add(state.position, lengths)
        state = state.changed(
            blocks=blocks, hidden=hidden, writes=writes, position=position, in_window=in_window, labelled=span.labelled
        )
        return h if output else None, state

    def read(
        self,
        h: Tensor,
        state: SleepState,
        span: Span,
        *,
        passes: int | float,
        group: "ProcessGroup | None" = None,
    ) -> tuple[Tensor | None, SleepState]:
        """What wake, sleep and evict make of a span of several windows, all of them at once.

        No window needs hidden states of the ones before: it begins with empty caches, and between
        windows fast weights alone go on, each block's by themselves. So every block reads the whole
        span, its windows as rows; in one that is replayed the operator carries the maps of the
        windows' passes along (`sleep_gated_delta_rule`).

        h `[B, T, hidden]`, embeddings -> (outputs of the last block's first passes, the state after
        all); None for outputs that are not wanted. With a group the fast weights are those after
        the last rank's windows.
        """
        batch, n, L = len(span.lengths), len(span.windows), self.window
        begins = tuple(p + j * L for p in state.position for j in range(n))
        lengths, none = (L,) * (batch * n), (0,) * (batch * n)
        sleep = {"passes": 1, "window": L, "group": group}
        context = SpanContext(lengths, none, begins, L, h.device, windows=n, sleep=sleep)
        asleep = copy(context)  # with the same positions, worked out once
        asleep.sleep = sleep | {"passes": passes}
        blocks = tuple(
            s if b.fast_weights else AttentionState(*(x.new_empty(batch * n, 0, *x.shape[2:]) for x in s))
            for b, s in zip(self.blocks, state.blocks, strict=True)
        )
        everything = range(len(self.blocks))
        h, blocks, _ = self._run(
            everything, context.parted(h), blocks, context, output=span.wanted, closed=True, asleep=asleep
        )
        blocks = tuple(
            new if b.fast_weights else old for b, new, old in zip(self.blocks, blocks, state.blocks, strict=True)
        )
        position, full = ragged.add(state.position, span.lengths), (L,) * batch
        state = state.changed(blocks=blocks, position=position, in_window=full)
        return context.joined(h) if span.wanted else None, self.evict(state, rows=span.full)

    def sleep(self, state: SleepState, *, passes: int | float, rows: Sequence[bool]) -> SleepState:
        """Passes 2..N over the open window of the rows marked True; nothing is evicted yet.

        Raises ValueError for passes=math.inf where some row's replays don't converge.
        """
        if passes == 1 or not any(rows):
            return state
        self._check_begun(state, passes)
        return (
            self._replay(state, passes, rows)
            if self.settings.sleep_kind == "replay"
            else self._refine(state, passes, rows)
        )

    def _replay(self, state: SleepState, passes: int | float, rows: Sequence[bool]) -> SleepState:
        # Without the rows that stay awake: theirs need not converge, and would be for nothing.
        asleep = [b for b, sleeps in enumerate(rows) if sleeps]
        lengths = tuple(state.in_window[b] for b in asleep)
        device = state.blocks[0][0].device
        index = None if len(asleep) == len(rows) else ragged.tensor(asleep, device)
        real = None if ragged.uniform(lengths) else ragged.tensor(lengths, device)
        blocks = list(state.blocks)
        for i in self.replayed:
            writes, fast_weights = state.writes[i], state.blocks[i].fast_weights
            if index is not None:
                writes = ReplayInputs(*(x.index_select(0, index) for x in writes))
                fast_weights = fast_weights.index_select(0, index)
            writes = ReplayInputs(*(x[:, : max(lengths)] for x in writes))
            replay = self.recomputed(self.blocks[i].replay, self.recompute is not None)
            new = replay(writes, fast_weights, passes - 1, real)
            if index is not None:
                new = state.blocks[i].fast_weights.index_copy(0, index, new)
            blocks[i] = GDNState(new, state.blocks[i].conv_state)
        return state.changed(blocks=tuple(blocks))

    def _refine(self, state: SleepState, passes: int, rows: Sequence[bool]) -> SleepState:
        first, last = self.loop
        if not any(self._outlives(i, True) for i in range(first, len(self.blocks))):
            return state
        h, loop_input = state.hidden.chunk(2, dim=-1) if self.feed_from_input else (state.hidden, None)
        blocks = list(state.blocks)
        most = self.settings.backprop_passes
        given = 0 if most is None else passes - most  # no gradient goes through so many passes
        begun = ragged.subtract(state.position, state.in_window)
        context = SpanContext(state.in_window, state.carried, begun, self.window, h.device)
        after = range(last + 1, len(self.blocks))
        refine_after = any(self._outlives(i, True) for i in after)
        for n in range(2, passes + 1):
            if n == given + 1:
                h = h.detach()
                blocks[first : last + 1] = each(blocks[first : last + 1], Tensor.detach)
            blocks[first : last + 1] = [self._pass_start(i, blocks[i], state) for i in range(first, last + 1)]
            output = n < passes or refine_after
            with torch.no_grad() if n <= given else nullcontext():
                h = h if self.feed is None else self.feed(h, loop_input)
                h, run, _ = self._run(range(first, last + 1), h, tuple(blocks), context, output=output, closed=True)
            blocks = list(run)
        if refine_after:
            blocks[last + 1 :] = [self._begun(i, state) for i in after]
            _, run, _ = self._run(after, h, tuple(blocks), context, output=False, closed=True)
            blocks = list(run)
        for i, old in enumerate(state.blocks):
            blocks[i] = _select(rows, blocks[i], old) if self._outlives(i, True) else old
        return state.changed(blocks=tuple(blocks))

    def evict(self, state: SleepState, *, rows: Sequence[bool]) -> SleepState:
        """Ends the open window of the rows marked True and forgets what the eviction rule says."""
        if not any(rows):
            return state
        cache_lengths = ragged.add(state.carried, state.in_window)
        limit = self.window - 1 if self.settings.eviction == "sliding" else 0
        carried = tuple(min(limit, n) if r else k for r, n, k in zip(rows, cache_lengths, state.carried, strict=True))
        in_window = tuple(0 if r else n for r, n in zip(rows, state.in_window, strict=True))
        left = ragged.add(carried, in_window)
        blocks = tuple(
            s if b.fast_weights else AttentionState(*(ragged.take_last(x, cache_lengths, left) for x in s))
            for b, s in zip(self.blocks, state.blocks, strict=True)
        )
        start = tuple(
            new if new is None else _select(rows, new, old)
            for new, old in zip(self._starts(blocks), state.start, strict=True)
        )
        hidden, writes = None, (None,) * len(self.blocks)
        if max(in_window) > 0:
            hidden = None if state.hidden is None else ragged.take_last(state.hidden, state.in_window, in_window)
            writes = tuple(
                w if w is None else ReplayInputs(*(ragged.take_last(x, state.in_window, in_window) for x in w))
                for w in state.writes
            )
        labelled = tuple(m and not r for r, m in zip(rows, state.labelled, strict=True))
        padded = tuple(0 if r else n for r, n in zip(rows, state.padded, strict=True))
        return SleepState(blocks, start, hidden, writes, state.position, in_window, carried, labelled, padded)

    def _run(
        self,
        indices: range,
        h: Tensor,
        blocks: tuple,
        context: SpanContext,
        *,
        output: bool,
        closed: bool,
        recorded: Sequence[int] = (),
        asleep: SpanContext | None = None,
    ) -> tuple[Tensor | None, tuple, tuple]:
        """Runs the blocks at `indices`; without `output`, only as far as a later token can see it.

        asleep: the context of blocks that are replayed, where it is another.

        Returns (h, every block's state, what every block wrote; None for those not in `recorded`).
        """
        if not output:
            outliving = [i for i in indices if self._outlives(i, closed)]
            indices = range(indices.start, outliving[-1] + 1) if outliving else range(0)
        written = [None] * len(self.blocks)
        if len(indices) == 0:
            return h, blocks, tuple(written)

        def run(h: Tensor, states: tuple) -> tuple:  # torch.compile of torch 2.9 can't trace a type with "|" here
            after, writes = [], []
            for i, state in zip(indices, states, strict=True):
                block = self.recomputed(self.blocks[i], self.recompute == "block")
                where = context if asleep is None or i not in self.replayed else asleep
                h, state, new = block(h, state, where, output=output or i != indices[-1])
                after.append(state)
                writes.append(new if i in recorded else None)
            return h, tuple(after), tuple(writes)

        inside = slice(indices.start, indices.stop)
        h, states, written[inside] = self.recomputed(run, self.recompute in ("pass", "window"))(h, blocks[inside])
        return h, blocks[: indices.start] + states + blocks[indices.stop :], tuple(written)

    def recomputed(self, function: Callable, wanted: bool) -> Callable:
        """The function; if `wanted`, what it stores for its backward are its inputs alone."""
        if not (wanted and torch.is_grad_enabled()):
            return function

        def stored(*args, **kwargs):
            # Tensors one by one: in a tuple they would outlive what is recomputed with them in it.
            leaves, form = tree_flatten((args, kwargs))
            tensors = [x for x in leaves if isinstance(x, Tensor)]
            others = [None if isinstance(x, Tensor) else (x,) for x in leaves]

            def run(*tensors: Tensor):
                left = iter(tensors)
                args, kwargs = tree_unflatten([next(left) if x is None else x[0] for x in others], form)
                return function(*args, **kwargs)

            return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=self.random)

        return stored

    def _check_begun(self, state: SleepState, passes: int | float) -> None:
        """Raises ValueError unless the open window was begun with further passes in view."""
        refine = self.settings.sleep_kind == "refine"
        missing = state.hidden is None if refine else any(state.writes[i] is None for i in self.replayed)
        if missing and max(state.in_window) > 0:
            raise ValueError(f"passes: expected 1, with which the open window was begun, got {passes}")

    def _outlives(self, i: int, closed: bool) -> bool:
        """Whether later tokens see block i's state after a run; closed: it ends the window."""
        return self.blocks[i].fast_weights or not closed or self.settings.eviction == "sliding"

    def _begun(self, i: int, state: SleepState) -> BlockState:
        """Block i's state as the open window began."""
        if self.blocks[i].fast_weights:
            return state.start[i]
        return AttentionState(*(ragged.take(x, (0,) * len(state.carried), state.carried) for x in state.blocks[i]))

    def _pass_start(self, i: int, current: BlockState, state: SleepState) -> BlockState:
        """Block i's state as a further pass starts: fast weights go on, the window's keys don't."""
        begun = self._begun(i, state)
        if not self.blocks[i].fast_weights:
            return begun
        zero = self.settings.conv_boundary == "zero"
        return GDNState(current.fast_weights, torch.zeros_like(begun.conv_state) if zero else begun.conv_state)

    def _starts(self, blocks: Sequence[BlockState]) -> tuple[GDNState | None, ...]:
        """Those of the states at the start of a window to which refining passes return."""
        refine = self.settings.sleep_kind == "refine"
        return tuple(s if refine and b.fast_weights else None for b, s in zip(self.blocks, blocks, strict=True))


def _select(rows: Sequence[bool], new: BlockState, old: BlockState) -> BlockState:
    """`new` for the rows marked True, `old` for the others."""
    if all(rows) or new is old:
        return new
    mask = ragged.tensor(rows, new[0].device)
    return type(new)(*(torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(new, old, strict=True)))


def _append(
    old: ReplayInputs | None, old_lengths: Lengths, new: ReplayInputs | None, lengths: Lengths
) -> ReplayInputs | None:
    """Row by row, what was written before and then `new`; None where nothing is recorded."""
    if old is None or new is None:
        return new
    pairs = zip(old, new, strict=True)
    return ReplayInputs(*(ragged.append(x.to(y.dtype), old_lengths, y, lengths) for x, y in pairs))
