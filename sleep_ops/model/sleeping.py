"""Reading a text with sleep, whatever the model: from token ids to windows, logits and loss."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sleep_ops import ragged
from sleep_ops.checks import check_choice, check_flags, expect
from sleep_ops.model.config import SleepSettings
from sleep_ops.model.loss import chunked_cross_entropy, summed_cross_entropy
from sleep_ops.model.sleep import Reading, SleepStack
from sleep_ops.model.spans import Counts, Span, at_once, marked, spans
from sleep_ops.model.state import SleepState
from sleep_ops.ragged import Lengths, Rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SleepOutput(NamedTuple):
    """What a model that sleeps returns.

    logits: `[B, T', vocab_size]`, from first passes only (causal), or None without return_logits.
    positions: int64 `[T']`, the columns of input_ids they belong to: all T with all_logits or with
        padded or packed input (zero where none was computed), else those of the windows that have
        loss. None without logits.
    loss: mean cross-entropy over the loss tokens, at least float32, or None.
    state: what a continuation passes in, or None.
    """

    logits: Tensor | None
    loss: Tensor | None
    state: SleepState | None
    positions: Tensor | None


class Call(NamedTuple):
    """The arguments of `SleepingModel.forward`, as they are given."""

    input_ids: Tensor
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    passes: int | float | None = None
    state: SleepState | None = None
    cu_seqlens: Tensor | None = None
    windows_by: str = "tokens"
    all_logits: bool | None = None
    return_logits: bool = True
    return_state: bool = True
    group: "ProcessGroup | None" = None
    predict: Callable[[Tensor], Tensor] | None = None


class Plan(NamedTuple):
    """A checked call: what the host decides by, and what the device computes from.

    rows: where the tokens stand.
    ids: `[rows, max(lengths)]`.
    labels: int64 likewise, or None.
    counted: bool likewise, the positions whose loss is taken.
    loss: counts of the tokens with loss, see `spans`.
    loss_tokens: how many there are.
    passes, state, all_logits, return_logits, return_state, group: as in `SleepingModel.forward`, resolved.
    padded: places of each row's first window that padding takes up.
    """

    rows: Rows
    ids: Tensor
    labels: Tensor | None
    counted: Tensor | None
    loss: Counts
    loss_tokens: int
    passes: int | float
    state: SleepState | None
    padded: Lengths
    all_logits: bool
    return_logits: bool
    return_state: bool
    group: "ProcessGroup | None"


_FREE = (
    "passes",
    "sleep_on",
    "attention_backend",
    "impl",
    "windows_at_once",
    "activation_checkpointing",
    "recompute",
    "initializer_range",
    "backprop_passes",
)


class SleepingModel:
    """What a model made of blocks gains by sleeping. A class that has it also has

    settings: its `SleepSettings`.
    sleep_blocks: the blocks, first one first, with the methods of `layers.block.Block`.
    vocab_size: tokens there are.
    embedding_weight: any parameter that shows the device and dtype of embeddings, and their size as
        its last.
    training: as an `nn.Module`'s.
    embed: int64 ids `[B, T]` -> `[B, T, hidden_size]`.
    predict: outputs of the last block -> logits.
    """

    settings: SleepSettings
    sleep_blocks: Sequence
    vocab_size: int
    embedding_weight: Tensor
    training: bool
    embed: Callable[[Tensor], Tensor]
    predict: Callable[[Tensor], Tensor]
    feed: Callable[[Tensor, Tensor | None], Tensor] | None = None  # see `SleepStack`
    feed_from_input = False
    random = False  # whether blocks or the head draw random numbers, as dropout does

    @property
    def stack(self) -> SleepStack:
        """The blocks with these settings' sleep rules."""
        return SleepStack(
            self.sleep_blocks,
            self.settings,
            feed=self.feed,
            feed_from_input=self.feed_from_input,
            training=self.training,
            random=self.random,
        )

    def read(
        self,
        ids: Tensor,
        lengths: Lengths,
        state: SleepState,
        *,
        passes: int | float,
        wanted: Counts,
        loss: Counts | None = None,
        close: bool = True,
        group: "ProcessGroup | None" = None,
    ) -> Reading:
        """Algorithm 1 over ids `[rows, max(lengths)]` from `state`; the rest as in `spans` and `Reading`."""
        filled, settings = ragged.add(state.in_window, state.padded), self.settings
        cut = spans(
            lengths, settings.window, filled=filled, labelled=state.labelled, wanted=wanted, loss=loss, close=close
        )
        if settings.windows_at_once and settings.window and (passes == 1 or settings.sleep_kind == "replay"):
            cut = at_once(cut, settings.window, least=2 if group is None else 1)
        return Reading(self.stack, self.embed, ids, cut, state, passes, group)

    def init_state(self, batch_size: int) -> SleepState:
        """The state before the first token."""
        return self.stack.init_state(batch_size)

    def identity(self) -> dict:
        """What a saved session must agree on: plain values that decide what a state means."""
        kept = {k: v for k, v in self.settings.to_dict().items() if k not in _FREE}
        return kept | {"loop": self.settings.resolve_loop(len(self.sleep_blocks))}

    def rows(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Rows, Tensor]:
        """The real tokens of an input, checked: (rows, left-aligned ids `[rows, max(lengths)]`)."""
        device = self.embedding_weight.device
        for name, x in (("input_ids", input_ids), ("attention_mask", attention_mask), ("cu_seqlens", cu_seqlens)):
            given = isinstance(x, Tensor) or (x is None and name != "input_ids")
            expect(given, name, "a tensor", type(x).__name__)
        shape = tuple(input_ids.shape)
        expect(input_ids.dim() == 2 and input_ids.numel() > 0, "input_ids", "[B, T], not empty", shape)
        expect(input_ids.dtype in (torch.int32, torch.int64), "input_ids", "int32 or int64", input_ids.dtype)
        expect(input_ids.device == device, "input_ids", f"a tensor on {device}", str(input_ids.device))
        rows = Rows.of(input_ids, attention_mask, cu_seqlens)
        ids = rows.pack(input_ids)
        if _readable(ids):
            low, high = ids.min().item(), ids.max().item()
            inside = 0 <= low and high < self.vocab_size
            expect(inside, "input_ids", f"0 to {self.vocab_size - 1}", f"{low} to {high}")
        return rows, ids

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        passes: int | float | None = None,
        state: SleepState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        windows_by: str = "tokens",
        all_logits: bool | None = None,
        return_logits: bool = True,
        return_state: bool = True,
        group: "ProcessGroup | None" = None,
        predict: Callable[[Tensor], Tensor] | None = None,
    ) -> SleepOutput:
        """Algorithm 1: reads window by window, predicts awake, sleeps on full windows, evicts.

        input_ids: int32 or int64 `[B, T]`.
        labels: likewise, and *not shifted here*: `labels[b, t]` is what position t has to predict
            (for language modelling, the next token), -100 for no loss.
        loss_mask: bool `[B, T]`, the positions that count (default: `labels != -100`); on the CPU
            it saves a wait for the device, and every position it marks must then have a label.
        attention_mask: `[B, T]`, 1 = real token; padding may stand anywhere.
        cu_seqlens: packed input, `[num_seqs + 1]` with B = 1.
        windows_by: "tokens", a window is full with L real tokens; or "positions", without padding
            between real tokens: windows end at columns L, 2L, ..., padding or not.
        passes: N, instead of the configuration's.
        state: from an earlier call, to read on.
        all_logits: logits of every window (default: only when there is neither a label nor a loss
            mask). With labels every window then takes part in the backward, if only with zeros:
            processes that gather parameters for each call have to make the same calls.
        return_logits: False gives the loss alone, of logits made some tokens at a time
            (`model.loss`): no others are in memory, forward or backward.
        return_state: False saves what only a continuation would see: the sleep on a last full
            window, and any window after the last loss.

        group: process group whose ranks have consecutive parts of the texts, in rank order and of
            as many whole windows each. For models that read `windows_at_once`, with one pass or by
            replay; with return_state=False, and without padding, packing and a state. All windows
            take part, as with all_logits; the loss is the mean over this rank's loss tokens, zero
            where it has none. Every rank's backward must run; gradients are this rank's part.
        predict: makes the logits, loss and output, of the last block's outputs
            `[..., hidden_size]`, token by token, instead of the model's own norm and head. The
            identity gives those outputs themselves, in `logits`.

        Returns a SleepOutput: logits of the windows with loss alone (or of all, see all_logits),
        the columns they belong to in `positions`, the mean loss, and the state.

        Raises ValueError naming the argument for wrong shapes, dtypes or values, for labels without
        a loss token, for neither logits nor labels, and for passes=math.inf where a window's
        replays don't converge.
        """
        call = Call(
            input_ids, labels, loss_mask, attention_mask, passes, state,
            cu_seqlens, windows_by, all_logits, return_logits, return_state, group, predict,
        )  # fmt: skip
        return self.answer(call)

    def answer(self, call: Call) -> SleepOutput:
        """What `forward` returns."""
        return self.run(self.plan(call), call.predict)

    def plan(self, call: Call, *, may_lack_loss: bool = False) -> Plan:
        """The first half of a call: checks, and works out all that the host must know.

        may_lack_loss: labels without a loss token are no error; it is then up to the caller not to
            `run` for a loss.

        Waits for the device only to read an attention_mask, cu_seqlens, or a loss mask that is not
        on the CPU. Errors as of `forward`.
        """
        labels, loss_mask, state, all_logits = call.labels, call.loss_mask, call.state, call.all_logits
        rows, ids = self.rows(call.input_ids, call.attention_mask, call.cu_seqlens)
        check_choice("windows_by", call.windows_by, ("tokens", "positions"))
        padded = self._padded(rows, call) if call.windows_by == "positions" else (0,) * len(rows.lengths)
        self._check(call)
        passes = self.settings.resolve_passes(call.passes)
        if state is not None:
            self.stack.check(state, len(rows.lengths), self.embedding_weight.shape[-1])
            if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
                state = state.recordable()
        if call.group is not None:
            self._check_group(call, passes)
            all_logits = may_lack_loss = True
        if all_logits is None:
            all_logits = labels is None and loss_mask is None
        if not call.return_logits:
            expect(labels is not None, "labels", "a tensor with return_logits=False", None)
        if labels is not None and (loss_mask is None or loss_mask.device == labels.device):
            real = labels != -100
            loss_mask = real if loss_mask is None else real & loss_mask
        loss = rows.counts(loss_mask)
        loss_tokens = sum(row[-1] for row in loss)
        counted = None
        if labels is not None:
            expect(loss_tokens > 0 or may_lack_loss, "labels", "at least one loss token", "none")
            labels = rows.pack(labels).long()
            if _readable(labels):
                valid = (labels >= 0) & (labels < self.vocab_size) | (labels == -100)
                expected = f"0 to {self.vocab_size - 1}, or -100"
                expect(bool(valid.all()), "labels", expected, labels[~valid][:1].tolist())
            counted = rows.pack(ragged.send(loss_mask, ids.device))
        return Plan(
            rows, ids, labels, counted, loss, loss_tokens, passes, state, padded,
            all_logits, call.return_logits, call.return_state, call.group,
        )  # fmt: skip

    def run(self, plan: Plan, predict: Callable[[Tensor], Tensor] | None = None) -> SleepOutput:
        """The second half: the work, queued without waiting for the device (but for math.inf).

        predict: what makes the output's `logits` of the last block's outputs, instead of this
            model's own.

        Where all rows are full, in phase and alike in which of their windows sleep, nothing is
        copied from the host either, so a CUDA graph can capture this and its backward.
        """
        rows, state = plan.rows, plan.state
        if state is None:
            first = 0 if plan.group is None else plan.group.rank() * rows.shape[1]
            position = (first,) * len(rows.lengths)
            state = self.init_state(len(rows.lengths)).changed(padded=plan.padded, position=position)
        predict = self.predict if predict is None else predict
        reading = self.read(
            plan.ids,
            rows.lengths,
            state,
            passes=plan.passes,
            wanted=[range(n + 1) for n in rows.lengths] if plan.all_logits else plan.loss,
            loss=plan.loss if self.settings.sleep_on == "unlabelled" else None,
            close=plan.return_state,
            group=plan.group,
        )
        pieces, counted, idle = [], [], []
        for span, h in reading:
            if span.wanted:
                x = predict(h) if plan.return_logits else h
                pieces.append((span.starts, span.lengths, x))
                if plan.labels is not None and any(marked(plan.loss, span.starts, span.lengths)):
                    counted.append((x.flatten(0, 1), _targets(plan, span)))
                elif plan.labels is not None:
                    idle.append(0 * h.float().sum())
        loss = None if plan.labels is None else sum(idle, self._loss(plan, counted, predict))
        logits, positions = rows.unpack(pieces) if plan.return_logits else (None, None)
        return SleepOutput(logits, loss, reading.state if plan.return_state else None, positions)

    def _loss(self, plan: Plan, counted: list[tuple[Tensor, Tensor]], predict: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean loss of spans' logits, or hidden states without return_logits, and targets."""
        if not counted:
            return torch.zeros((), device=plan.ids.device)
        if plan.return_logits:
            return sum(summed_cross_entropy(*x) for x in counted) / plan.loss_tokens  # type: ignore[return-value]
        h, targets = map(torch.cat, zip(*counted, strict=True))
        if len(targets) > plan.loss_tokens:
            # The device puts the tokens with loss first. How many there are the host knows, so it needn't wait.
            first = (targets == -100).to(torch.int8).argsort(stable=True)[: plan.loss_tokens]
            h, targets = h.index_select(0, first), targets.index_select(0, first)
        total = chunked_cross_entropy(predict, h, targets, vocab_size=self.vocab_size, random=self.random)
        return total / plan.loss_tokens

    def _padded(self, rows: Rows, call: Call) -> Lengths:
        """How many columns of the window with each row's first real token are padding."""
        expect(call.cu_seqlens is None, "cu_seqlens", "None with windows_by 'positions'", "a tensor")
        expect(call.state is None, "state", "None with windows_by 'positions'", "a state")
        mask, window, width = call.attention_mask, self.settings.window, rows.shape[1]
        if mask is None or window is None:
            return (0,) * len(rows.lengths)
        mask, column = mask.bool(), torch.arange(width, device=mask.device)
        first = mask.int().argmax(1, keepdim=True)
        together = (column >= first) & (column < first + mask.sum(1, keepdim=True))
        fits = bool((mask == together).all())
        expect(fits, "attention_mask", "no padding between real tokens with windows_by 'positions'", "some")
        return tuple(n % window for n in first[:, 0].tolist())

    def _check_group(self, call: Call, passes: int | float) -> None:
        settings, tokens = self.settings, call.input_ids.shape[1]
        allowed = settings.windows_at_once and (passes == 1 or settings.sleep_kind == "replay")
        expect(allowed, "group", "None but for windows_at_once with one pass or by replay", "a group")
        whole = settings.window is not None and tokens % settings.window == 0
        expect(whole, "input_ids", f"whole windows of {settings.window} tokens with group", f"{tokens} tokens")
        for name in ("attention_mask", "cu_seqlens", "state"):
            expect(getattr(call, name) is None, name, "None with group", "one")
        expect(not call.return_state, "return_state", "False with group", call.return_state)

    def _check(self, call: Call) -> None:
        check_flags(return_logits=call.return_logits, return_state=call.return_state)
        if call.all_logits is not None:
            check_flags(all_logits=call.all_logits)
        labels, loss_mask = call.labels, call.loss_mask
        shape, device = tuple(call.input_ids.shape), self.embedding_weight.device
        for name, x in (("labels", labels), ("loss_mask", loss_mask)):
            if x is not None:
                expect(isinstance(x, Tensor), name, "a tensor", type(x).__name__)
                expect(tuple(x.shape) == shape, name, f"shape {shape}", tuple(x.shape))
        if loss_mask is not None:
            expect(loss_mask.dtype == torch.bool, "loss_mask", "bool", loss_mask.dtype)
        if labels is not None:
            expect(labels.dtype in (torch.int32, torch.int64), "labels", "int32 or int64", labels.dtype)
            expect(labels.device == device, "labels", f"a tensor on {device}", str(labels.device))


def _targets(plan: Plan, span: Span) -> Tensor:
    """int64 `[rows * max(span.lengths)]`, -100 where no loss is taken."""
    targets, counted = (ragged.take(x, span.starts, span.lengths) for x in (plan.labels, plan.counted))
    if not ragged.uniform(span.lengths):
        counted = counted & plan.rows.real(span.lengths, targets.device)
    return targets.masked_fill(~counted, -100).flatten()


def _readable(x: Tensor) -> bool:
    """Whether the host can look at values without waiting, or leaving a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def sleeping(model: object) -> SleepingModel:
    """The model itself, or what `sleepify` gave a model of another library.

    ValueError for one that does not sleep.
    """
    found = find_sleeping(model)
    expect(found is not None, "model", "one that sleeps (see sleepify)", type(model).__name__)
    return found


def find_sleeping(model: object) -> SleepingModel | None:
    """As `sleeping`, but None for a model that does not sleep."""
    found = model if isinstance(model, SleepingModel) else getattr(model, "sleep", None)
    return found if isinstance(found, SleepingModel) else None
