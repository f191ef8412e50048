"""A thin hybrid language model that sleeps: embedding, blocks, final norm, head."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sleep_ops import ragged
from sleep_ops.config import HybridConfig, expect
from sleep_ops.layers.attention import Attention
from sleep_ops.layers.block import Block
from sleep_ops.layers.gdn import SleepGDNLayer
from sleep_ops.ragged import Lengths
from sleep_ops.rows import Rows
from sleep_ops.sleep import SleepStack, SleepState


class SleepOutput(NamedTuple):
    """What `SleepHybridModel` returns.

    logits: `[B, T', vocab_size]`, from first passes only (causal). positions: int64 `[T']`, the columns of input_ids
    they belong to: all T with all_logits or with padded or packed input (zero where none was computed), else those of
    the windows that have loss. loss: mean cross-entropy over the loss tokens, at least float32, or None. state: what a
    continuation passes in, or None.
    """

    logits: Tensor | None
    loss: Tensor | None
    state: SleepState | None
    positions: Tensor | None


class Reading(NamedTuple):
    """A checked call of `SleepHybridModel.forward`: what the host decides by, and what the device computes from.

    rows: where the tokens stand. ids: `[rows, max(lengths)]`. labels: int64 likewise, or None; counted: bool likewise,
    the positions whose loss is taken. has_loss: a host function of (starts, parts), which rows have loss there;
    loss_tokens: how many positions have. passes, state, all_logits, return_state: as in `forward`, resolved.
    """

    rows: Rows
    ids: Tensor
    labels: Tensor | None
    counted: Tensor | None
    has_loss: Callable[[Lengths, Lengths], list[bool]]
    loss_tokens: int
    passes: int | float
    state: SleepState | None
    all_logits: bool
    return_state: bool


class SleepHybridModel(nn.Module):
    """Attention and GDN blocks; every window sleeps N passes before it is evicted (arXiv 2605.26099)."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(_mixer(config, kind), *_widths(config)) for kind in config.layers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def _initialise(self) -> None:
        """Normal weights; what writes into the residual stream is scaled by 1/sqrt(2 D), as in GPT-2."""
        std = self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=std / (2 * len(self.blocks)) ** 0.5 if residual else std)

    @property
    def stack(self) -> SleepStack:
        """The blocks with this configuration's sleep rules."""
        c = self.config
        return SleepStack(
            self.blocks,
            window=c.window,
            loop=c.loop_range,
            eviction=c.eviction,
            kind=c.sleep_kind,
            conv_boundary=c.conv_boundary,
            checkpointing=c.activation_checkpointing and self.training,
        )

    def init_state(self, batch_size: int) -> SleepState:
        """The state before the first token."""
        return self.stack.init_state(batch_size)

    def predict(self, h: Tensor) -> Tensor:
        """Logits of block outputs. h `[..., hidden_size]` -> `[..., vocab_size]`."""
        return self.lm_head(self.norm(h))

    def rows(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Rows, Tensor]:
        """The real tokens of an input as left-aligned rows, checked: (rows, token ids `[rows, max(lengths)]`)."""
        weight = self.embed.weight
        for name, x in (("input_ids", input_ids), ("attention_mask", attention_mask), ("cu_seqlens", cu_seqlens)):
            given = isinstance(x, Tensor) or (x is None and name != "input_ids")
            expect(given, name, "a tensor", type(x).__name__)
        shape = tuple(input_ids.shape)
        expect(input_ids.dim() == 2 and input_ids.numel() > 0, "input_ids", "[B, T], not empty", shape)
        expect(input_ids.dtype in (torch.int32, torch.int64), "input_ids", "int32 or int64", input_ids.dtype)
        expect(input_ids.device == weight.device, "input_ids", f"a tensor on {weight.device}", str(input_ids.device))
        rows = Rows.of(input_ids, attention_mask, cu_seqlens)
        ids = rows.pack(input_ids)
        if _readable(ids):
            low, high = ids.min().item(), ids.max().item()
            inside = 0 <= low and high < self.config.vocab_size
            expect(inside, "input_ids", f"0 to {self.config.vocab_size - 1}", f"{low} to {high}")
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
        all_logits: bool | None = None,
        return_state: bool = True,
    ) -> SleepOutput:
        """Algorithm 1: reads the text window by window, predicts awake, sleeps on full windows, evicts.

        input_ids: int32 or int64 `[B, T]`. labels: likewise, and *not shifted here*: `labels[b, t]` is what position t
        has to predict (for language modelling, the next token), -100 for no loss. loss_mask: bool `[B, T]`, the
        positions that count (default: `labels != -100`); on the CPU it saves a wait for the device, and every position
        it marks must then have a label. attention_mask: `[B, T]`, 1 = real token; padding may stand anywhere, windows
        count real tokens. cu_seqlens: packed input, `[num_seqs + 1]` with B = 1.
        passes: N, instead of the configuration's. state: from an earlier call, to read on. all_logits: logits of every
        window (default: only when there is neither a label nor a loss mask). return_state=False saves what only a
        continuation would see: the sleep on a last full window, and any window after the last loss.

        Returns a SleepOutput: logits of the windows with loss alone (or of all, see all_logits), the columns they
        belong to in `positions`, the mean loss, and the state.

        Raises ValueError naming the argument for wrong shapes, dtypes or values, for labels without a loss token, and
        for passes=math.inf where a window's replays don't converge.
        """
        reading = self.plan(
            input_ids,
            labels,
            loss_mask,
            attention_mask,
            passes,
            state,
            cu_seqlens=cu_seqlens,
            all_logits=all_logits,
            return_state=return_state,
        )
        return self.run(reading)

    def plan(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        passes: int | float | None = None,
        state: SleepState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        all_logits: bool | None = None,
        return_state: bool = True,
    ) -> Reading:
        """The first half of `forward`, with its arguments and errors: checks, and all that the host must know.

        Waits for the device only to read an attention_mask, cu_seqlens, or a loss mask that is not on the CPU.
        """
        rows, ids = self.rows(input_ids, attention_mask, cu_seqlens)
        self._check(tuple(input_ids.shape), labels, loss_mask)
        passes = self.config.resolve_passes(passes)
        if state is not None:
            self.stack.check(state, len(rows.lengths))
        if all_logits is None:
            all_logits = labels is None and loss_mask is None
        if labels is not None and (loss_mask is None or loss_mask.device == labels.device):
            real = labels != -100
            loss_mask = real if loss_mask is None else real & loss_mask.bool()
        has_loss, loss_tokens = rows.marks(loss_mask)
        counted = None
        if labels is not None:
            expect(loss_tokens > 0, "labels", "at least one loss token", "none")
            labels = rows.pack(labels).long()
            if _readable(labels):
                valid = (labels >= 0) & (labels < self.config.vocab_size) | (labels == -100)
                expected = f"0 to {self.config.vocab_size - 1}, or -100"
                expect(bool(valid.all()), "labels", expected, labels[~valid][:1].tolist())
            counted = rows.pack(ragged.send(loss_mask.bool(), ids.device))
        return Reading(rows, ids, labels, counted, has_loss, loss_tokens, passes, state, all_logits, return_state)

    def run(self, reading: Reading) -> SleepOutput:
        """The second half of `forward`: the work, queued without waiting for the device (but to check math.inf passes).

        Where all rows are full, in phase and alike in which of their windows sleep, nothing is copied from the host
        either, so a CUDA graph can capture this and its backward.
        """
        rows, ids = reading.rows, reading.ids
        targets = None if reading.labels is None else reading.labels.masked_fill(~reading.counted, -100)
        state = self.init_state(len(rows.lengths)) if reading.state is None else reading.state
        pieces, losses = [], []

        def emit(starts: Lengths, parts: Lengths, h: Tensor) -> None:
            logits = self.predict(h)
            pieces.append((starts, parts, logits))
            if targets is not None and any(reading.has_loss(starts, parts)):
                target = ragged.take(targets, starts, parts)
                if not ragged.uniform(parts):
                    target = target.masked_fill(~rows.real(parts, h.device), -100)
                exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
                losses.append(F.cross_entropy(exact.flatten(0, 1), target.flatten(), reduction="sum"))

        state = self.stack.read(
            lambda starts, parts: self.embed(ragged.take(ids, starts, parts)),
            rows.lengths,
            state,
            passes=reading.passes,
            wants=lambda starts, parts: reading.all_logits or any(reading.has_loss(starts, parts)),
            emit=emit,
            labelled=reading.has_loss if self.config.sleep_on == "unlabelled" else None,
            close=reading.return_state,
        )
        logits, positions = rows.unpack(pieces)
        loss = None if targets is None else sum(losses) / reading.loss_tokens
        return SleepOutput(logits, loss, state if reading.return_state else None, positions)

    def _check(self, shape: tuple, labels: Tensor | None, loss_mask: Tensor | None) -> None:
        for name, x in (("labels", labels), ("loss_mask", loss_mask)):
            if x is not None:
                expect(isinstance(x, Tensor), name, "a tensor", type(x).__name__)
                expect(tuple(x.shape) == shape, name, f"shape {shape}", tuple(x.shape))
        if labels is not None:
            expect(labels.dtype in (torch.int32, torch.int64), "labels", "int32 or int64", labels.dtype)
            device = self.embed.weight.device
            expect(labels.device == device, "labels", f"a tensor on {device}", str(labels.device))


def _readable(x: Tensor) -> bool:
    """Whether the host can look at values without waiting for a device or leaving a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _mixer(c: HybridConfig, kind: str) -> nn.Module:
    if kind == "attn":
        return Attention(
            c.hidden_size,
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            rope_theta=c.rope_theta,
            backend=c.attention_backend,
        )
    return SleepGDNLayer(
        c.hidden_size,
        num_heads=c.gdn_num_heads or c.num_heads,
        head_dim=c.gdn_head_dim or c.head_dim or c.hidden_size // c.num_heads,
        num_v_heads=c.gdn_num_v_heads,
        head_v_dim=c.gdn_head_v_dim,
        conv_size=c.conv_size,
        allow_neg_eigval=c.allow_neg_eigval,
        norm_eps=c.norm_eps,
        rule=c.rule,
        impl=c.impl,
    )


def _widths(c: HybridConfig) -> tuple[int, int, float]:
    return c.hidden_size, c.intermediate_size or -(-8 * c.hidden_size // 48) * 16, c.norm_eps
