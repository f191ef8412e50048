"""A thin hybrid language model that sleeps: embedding, blocks, final norm, head."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sleep_ops import ragged
from sleep_ops.layers.attention import Attention
from sleep_ops.layers.block import Block
from sleep_ops.layers.gdn import SleepGDNLayer
from sleep_ops.ops.attention import BACKENDS
from sleep_ops.ragged import Lengths
from sleep_ops.rows import Rows
from sleep_ops.sleep import CONV_BOUNDARIES, EVICTIONS, SleepStack, SleepState

LAYERS = ("attn", "gdn")
SLEEP_ON = ("every", "unlabelled")


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def _is_count(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """Everything that defines a `SleepHybridModel`. Raises ValueError, naming the field, for values that can't be.

    layers: one of "attn", "gdn" per block, first block first.
    window: tokens read before the attention caches are evicted (L); None for neither eviction nor sleep.
    passes: sleep duration N; 1 is the ordinary hybrid.
    loop: first and last block of the looped range, both included (the middle 14 of 28 are `(7, 20)`); None for all.
    eviction: "hard" empties the caches after every window; "sliding" keeps the last L - 1 tokens' keys and values.
    sleep_on: "every" full window sleeps before it is evicted; "unlabelled": only those without a loss token (the
        paper's Algorithm 1 to the letter).
    conv_boundary: convolution tail a further pass starts from: "snapshot" (as when the window began) or "zero".
    num_heads, num_kv_heads, head_dim: attention's query heads, key/value heads (default num_heads) and head dim
        (default hidden_size / num_heads).
    gdn_num_heads, gdn_num_v_heads, gdn_head_dim, gdn_head_v_dim, conv_size, allow_neg_eigval, rule: see
        `SleepGDNLayer`; heads and head dim default to attention's.
    intermediate_size: SwiGLU width, default 8/3 hidden_size rounded up to a multiple of 16.
    attention_backend: "auto", "flash" or "torch" (see `causal_attention`); impl: kernels (see `gated_delta_rule`).
    activation_checkpointing: recompute each (window, pass) in the backward pass instead of storing it.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[str, ...]
    window: int | None
    passes: int = 1
    loop: tuple[int, int] | None = None
    eviction: str = "hard"
    sleep_on: str = "every"
    conv_boundary: str = "snapshot"
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    gdn_num_heads: int | None = None
    gdn_num_v_heads: int | None = None
    gdn_head_dim: int | None = None
    gdn_head_v_dim: int | None = None
    conv_size: int = 4
    allow_neg_eigval: bool = False
    rule: str = "delta"
    intermediate_size: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    attention_backend: str = "auto"
    impl: str = "auto"
    activation_checkpointing: bool = False

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        for name in ("vocab_size", "hidden_size", "passes", "num_heads"):
            _expect(_is_count(getattr(self, name)), name, "an integer >= 1", getattr(self, name))
        for name in ("window", "num_kv_heads", "head_dim", "intermediate_size"):
            value = getattr(self, name)
            _expect(value is None or _is_count(value), name, "an integer >= 1 or None", value)
        _expect(len(self.layers) > 0, "layers", "at least one block", self.layers)
        for layer in self.layers:
            _expect(layer in LAYERS, "layers", f"each one of {LAYERS}", layer)
        for name, allowed in (
            ("eviction", EVICTIONS),
            ("sleep_on", SLEEP_ON),
            ("conv_boundary", CONV_BOUNDARIES),
            ("attention_backend", BACKENDS),
        ):
            _expect(getattr(self, name) in allowed, name, f"one of {allowed}", getattr(self, name))
        if self.loop is not None:
            object.__setattr__(self, "loop", tuple(self.loop))
            good = len(self.loop) == 2 and all(isinstance(i, int) for i in self.loop)
            good = good and 0 <= self.loop[0] <= self.loop[1] < len(self.layers)
            _expect(good, "loop", f"(first, last) with 0 <= first <= last < {len(self.layers)}", self.loop)
        if self.window is None:
            _expect(
                self.passes == 1, "passes", "1 where window is None (nothing is evicted, nothing sleeps)", self.passes
            )
        head_dim, kv_heads = self.head_dim, self.num_kv_heads or self.num_heads
        if "attn" in self.layers:
            _expect(
                self.num_heads % kv_heads == 0, "num_kv_heads", f"a divisor of num_heads {self.num_heads}", kv_heads
            )
        if head_dim is None:
            _expect(self.hidden_size % self.num_heads == 0, "num_heads", "a divisor of hidden_size", self.num_heads)
            head_dim = self.hidden_size // self.num_heads
        _expect("attn" not in self.layers or head_dim % 2 == 0, "head_dim", "an even number (rotary)", head_dim)

    @property
    def loop_range(self) -> tuple[int, int]:
        """First and last looped block, both included."""
        return self.loop or (0, len(self.layers) - 1)

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "HybridConfig":
        """The inverse of `to_dict`; an unknown key is a ValueError."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        _expect(not unknown, "values", "known configuration keys", unknown)
        return cls(**values)


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
            conv_boundary=c.conv_boundary,
            checkpointing=c.activation_checkpointing and self.training,
        )

    def init_state(self, batch_size: int) -> SleepState:
        """The state before the first token."""
        return self.stack.init_state(batch_size)

    def predict(self, h: Tensor) -> Tensor:
        """Logits of block outputs. h `[..., hidden_size]` -> `[..., vocab_size]`."""
        return self.lm_head(self.norm(h))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        passes: int | None = None,
        state: SleepState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        all_logits: bool | None = None,
        return_state: bool = True,
    ) -> SleepOutput:
        """Algorithm 1: reads the text window by window, predicts awake, sleeps on full windows, evicts.

        input_ids: integer `[B, T]`. labels: integer `[B, T]`, `labels[b, t]` is what position t has to predict (shift
        them yourself for language modelling), -100 for no loss. loss_mask: bool `[B, T]`, the positions that count
        (default: `labels != -100`); on the CPU it saves a wait for the device, and every position it marks must then
        have a label. attention_mask: `[B, T]`, 1 = real token; padding may stand anywhere, windows count real tokens.
        cu_seqlens: packed input, `[num_seqs + 1]` with B = 1.
        passes: N, instead of the configuration's. state: from an earlier call, to read on. all_logits: logits of every
        window (default: only when there is neither a label nor a loss mask). return_state=False saves the sleep on a
        last full window, which nothing in this text sees.

        Raises ValueError naming the argument for wrong shapes, dtypes or values.
        """
        passes = self._check(input_ids, labels, loss_mask, passes)
        rows = Rows.of(input_ids, attention_mask, cu_seqlens)
        state = self.init_state(len(rows.lengths)) if state is None else state
        _expect(len(state.seen) == len(rows.lengths), "state", f"{len(rows.lengths)} rows", len(state.seen))
        if all_logits is None:
            all_logits = labels is None and loss_mask is None
        if labels is not None and (loss_mask is None or loss_mask.device == labels.device):
            labelled = labels != -100
            loss_mask = labelled if loss_mask is None else labelled & loss_mask.bool()
        has_loss = rows.marks(loss_mask)
        ids, targets = rows.pack(input_ids), None if labels is None else rows.pack(labels)
        counted = None if loss_mask is None else rows.pack(loss_mask.to(input_ids.device))
        pieces, losses = [], []

        def emit(starts: Lengths, parts: Lengths, h: Tensor) -> None:
            logits = self.predict(h)
            pieces.append((starts, parts, logits))
            if targets is not None and any(has_loss(starts, parts)):
                mask = ragged.take(counted, starts, parts) & rows.real(parts, h.device)
                target = ragged.take(targets, starts, parts).masked_fill(~mask, -100)
                exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
                losses.append(F.cross_entropy(exact.flatten(0, 1), target.flatten(), reduction="sum"))

        def sleepers(starts: Lengths, parts: Lengths) -> list[bool]:
            return [not labelled for labelled in has_loss(starts, parts)]

        state = self.stack.read(
            lambda starts, parts: self.embed(ragged.take(ids, starts, parts)),
            rows.lengths,
            state,
            passes=passes,
            wants=lambda starts, parts: all_logits or any(has_loss(starts, parts)),
            emit=emit,
            sleepers=sleepers if self.config.sleep_on == "unlabelled" else None,
            close=return_state,
        )
        logits, positions = rows.unpack(pieces)
        loss = None
        if labels is not None:
            _expect(len(losses) > 0, "labels", "at least one loss token", "none")
            loss = sum(losses) / rows.marked
        return SleepOutput(logits, loss, state if return_state else None, positions)

    def _check(self, input_ids: Tensor, labels: Tensor | None, loss_mask: Tensor | None, passes: int | None) -> int:
        shape = tuple(input_ids.shape)
        _expect(input_ids.dim() == 2 and input_ids.numel() > 0, "input_ids", "[B, T], not empty", shape)
        _expect(not input_ids.dtype.is_floating_point, "input_ids", "an integer dtype", input_ids.dtype)
        if input_ids.device.type == "cpu":  # elsewhere the look would make the host wait
            low, high = input_ids.min().item(), input_ids.max().item()
            _expect(0 <= low and high < self.config.vocab_size, "input_ids", f"0 to {self.config.vocab_size - 1}", high)
        for name, x in (("labels", labels), ("loss_mask", loss_mask)):
            _expect(x is None or tuple(x.shape) == shape, name, f"shape {shape}", x is not None and tuple(x.shape))
        _expect(labels is None or not labels.dtype.is_floating_point, "labels", "an integer dtype", labels)
        passes = self.config.passes if passes is None else passes
        _expect(_is_count(passes), "passes", "an integer >= 1", passes)
        _expect(passes == 1 or self.config.window is not None, "passes", "1 where window is None", passes)
        return passes


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
