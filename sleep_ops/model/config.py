"""How a model sleeps, and everything that defines a hybrid model that does; checked once."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sleep_ops.checks import BACKENDS, IMPLS, RULES, check_choice, check_count, check_flags, check_positive, expect

if TYPE_CHECKING:
    from typing_extensions import Self

LAYERS = ("attn", "swa", "gdn", "jet")
SLEEP_KINDS = ("refine", "replay")
EVICTIONS = ("hard", "sliding")
SLEEP_ON = ("every", "unlabelled")
CONV_BOUNDARIES = ("snapshot", "zero")
RECOMPUTE = ("pass", "block", "window")
_GDN_SIZES = ("gdn_num_heads", "gdn_num_v_heads", "gdn_head_dim", "gdn_head_v_dim")
_CHOICES = {
    "sleep_kind": SLEEP_KINDS,
    "eviction": EVICTIONS,
    "sleep_on": SLEEP_ON,
    "conv_boundary": CONV_BOUNDARIES,
    "recompute": RECOMPUTE,
    "attention_backend": BACKENDS,
    "impl": IMPLS,
}


@dataclass(frozen=True, kw_only=True)
class SleepSettings:
    """How a model made of blocks wakes, sleeps and forgets. Raises ValueError, naming the field, for bad values.

    window: tokens read before the attention caches are evicted (L); None for neither eviction nor sleep.
    passes: sleep duration N; 1 is the ordinary hybrid, and the only choice where window is None. math.inf is for
        replaying alone: to the fixed point, a ValueError when a window is read that has none.
    loop: first and last block of the looped range, both included (the middle 14 of 28 are `(7, 20)`); "all"; or None,
        the model's own choice, which is all unless it says otherwise.
    sleep_kind: what passes 2..N over a window are. "refine" (the paper's Algorithm 1) runs the looped blocks again on
        their own outputs; its cost grows with N. "replay" repeats in every GDN block of the loop the writes of the wake
        pass, the same k, v, g and beta, and leaves everything else as it is; its cost does not grow with N.
    eviction: "hard" empties the caches after every window; "sliding" keeps the last L - 1 tokens' keys and values.
    sleep_on: "every" full window sleeps before it is evicted; "unlabelled": only those without a loss token (the
        paper's Algorithm 1 to the letter).
    conv_boundary: convolution state that refining passes start from: "snapshot" (as when the window began) or "zero".
    backprop_passes: gradients go through the last so many passes of every sleep, and what the first of them starts from
        is taken as given, so nothing is learnt through a sleep of more; None for all. For refining alone.
    attention_backend: "auto", "flash" or "torch" (see `causal_attention`); impl: kernels (see `gated_delta_rule`).
    windows_at_once: read all whole windows of a text at once, where no window needs what a later pass over another
        computed: with one pass or by replay, in any case with hard eviction and sleep_on "every", of rows in phase.
        More work for the device at a time, and the activations of all windows.
    activation_checkpointing: recompute activations in the backward pass instead of storing them; what is replayed stays
        stored.
    recompute: how much at a time. A "pass" over a window stores the hidden states that each pass is fed with. A
        "block"'s part of it stores those of every block, but has the activations of one block alone at a time. A
        "window" stores no hidden states at all, only what windows leave to the next: its passes are computed three
        times, pass by pass the last time.
    """

    window: int | None
    passes: int | float = 1
    loop: tuple[int, int] | str | None = None
    sleep_kind: str = "refine"
    eviction: str = "hard"
    sleep_on: str = "every"
    conv_boundary: str = "snapshot"
    backprop_passes: int | None = None
    attention_backend: str = "auto"
    impl: str = "auto"
    windows_at_once: bool = False
    activation_checkpointing: bool = False
    recompute: str = "pass"

    def __post_init__(self):
        if isinstance(self.loop, list):
            object.__setattr__(self, "loop", tuple(self.loop))
        for name in ("window", "backprop_passes"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.backprop_passes is not None:
            expect(self.sleep_kind == "refine", "backprop_passes", "None where sleep_kind is 'replay'", self.sleep_kind)
        check_flags(windows_at_once=self.windows_at_once, activation_checkpointing=self.activation_checkpointing)
        if self.windows_at_once:
            for name, needed in (("eviction", "hard"), ("sleep_on", "every")):
                expect(getattr(self, name) == needed, name, f"{needed!r} with windows_at_once", getattr(self, name))
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        self.resolve_passes(self.passes)

    def resolve_loop(self, num_blocks: int) -> tuple[int, int]:
        """First and last looped block, both included, of a model of num_blocks. ValueError where they aren't in it."""
        if self.loop is None or self.loop == "all":
            return 0, num_blocks - 1
        pair = isinstance(self.loop, tuple) and len(self.loop) == 2 and all(type(i) is int for i in self.loop)
        inside = pair and 0 <= self.loop[0] <= self.loop[1] < num_blocks  # type: ignore[operator]
        expect(inside, "loop", f"'all', or (first, last) with 0 <= first <= last < {num_blocks}", self.loop)
        return self.loop  # type: ignore[return-value]

    def resolve_passes(self, passes: int | float | None) -> int | float:
        """N for a call that asks for `passes` (None: this configuration's). ValueError where it can't be."""
        passes = self.passes if passes is None else passes
        if isinstance(passes, float) and passes == math.inf:
            expected = "an integer >= 1 (math.inf with sleep_kind 'replay' only)"
            expect(self.sleep_kind == "replay", "passes", expected, passes)
        else:
            check_count("passes", passes)
        if self.window is None:
            expect(passes == 1, "passes", "1 where window is None (nothing is evicted or sleeps)", passes)
        return passes

    def to_dict(self) -> dict:
        """Plain values, for JSON; endless passes are "inf"."""
        values = dataclasses.asdict(self)
        return values | {"passes": "inf"} if self.passes == math.inf else values

    @classmethod
    def from_dict(cls, values: dict) -> "Self":
        """The inverse of `to_dict`; an unknown key is a ValueError."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        expect(not unknown, "values", "known configuration keys", unknown)
        missing = dataclasses.MISSING
        needed = {f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing}
        expect(needed <= set(values), "values", f"{', '.join(sorted(needed))} among them", sorted(values))
        if values.get("passes") == "inf":
            values = values | {"passes": math.inf}
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class HybridConfig(SleepSettings):
    """Everything that defines a `SleepHybridModel`: its `SleepSettings` and its sizes.

    vocab_size: tokens there are.
    hidden_size: width.
    layers: per block, first block first, one of "attn", "swa" (attention to the `sliding_window` most recent tokens, or
        to the window's where those are fewer), "gdn" (`SleepGDNLayer`) and "jet" (`JetBlock`).
    num_heads: heads, attention's query heads among them.
    num_kv_heads: attention's key/value heads, default num_heads.
    head_dim: of attention and, unless they have their own, of fast weights; default hidden_size / num_heads.
    gdn_num_heads, gdn_num_v_heads, gdn_head_dim, conv_size: of "gdn" and "jet" blocks, see `SleepGDNLayer`; heads and
        head dim default to attention's.
    gdn_head_v_dim: value head dim of "gdn" and "jet" blocks, see `SleepGDNLayer`.
    rule: of the writes of "gdn" and "jet" blocks, "delta" or "hebbian".
    allow_neg_eigval: let beta of "gdn" blocks be in (0, 2).
    jet_kernel_hidden: of "jet" blocks, see `JetBlock`.
    intermediate_size: SwiGLU width, default 8/3 hidden_size rounded up to a multiple of 16.
    rope_theta: base of the rotary positions.
    norm_eps: of every RMSNorm.
    tie_embeddings: the head shares the embedding's weight.
    initializer_range: standard deviation of the weights.
    tied_repeats: how often the blocks stand one after another, sharing their weights but not their states: the loop of
        a model that loops at prediction time too. `loop` counts them all.
    loop_gate, reinject: keep many refining passes stable. With x what the loop was fed awake and h what a pass put out,
        the next pass is fed x + gate (h - x), a gate per channel that starts at zero (loop_gate); or h + x (reinject).

    Raises ValueError, naming the field, for values that can't be.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[str, ...]
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    gdn_num_heads: int | None = None
    gdn_num_v_heads: int | None = None
    gdn_head_dim: int | None = None
    gdn_head_v_dim: int | None = None
    jet_kernel_hidden: int | None = None
    sliding_window: int | None = None
    conv_size: int = 4
    allow_neg_eigval: bool = False
    rule: str = "delta"
    intermediate_size: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    tied_repeats: int = 1
    loop_gate: bool = False
    reinject: bool = False

    def __post_init__(self):
        listed = isinstance(self.layers, tuple | list) and len(self.layers) > 0
        expect(listed, "layers", "a tuple of at least one block, such as ('attn', 'gdn')", self.layers)
        object.__setattr__(self, "layers", tuple(self.layers))
        super().__post_init__()
        for name in ("vocab_size", "hidden_size", "num_heads", "conv_size", "tied_repeats"):
            check_count(name, getattr(self, name))
        for name in (
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "jet_kernel_hidden",
            "sliding_window",
            *_GDN_SIZES,
        ):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_positive(self, "rope_theta", "norm_eps", "initializer_range")
        for name in ("allow_neg_eigval", "tie_embeddings", "loop_gate", "reinject"):
            check_flags(**{name: getattr(self, name)})
        check_choice("rule", self.rule, RULES)
        for layer in self.layers:
            expect(layer in LAYERS, "layers", f"each one of {LAYERS}", layer)
        self._check_together()

    def _check_together(self) -> None:
        """What one field asks of another."""
        self.resolve_loop(len(self.layers) * self.tied_repeats)
        for name in ("loop_gate", "reinject"):
            given = getattr(self, name)
            expect(not given or self.sleep_kind == "refine", name, "False where sleep_kind is 'replay'", given)
        attends = "attn" in self.layers or "swa" in self.layers
        if "swa" in self.layers:
            expect(self.sliding_window is not None, "sliding_window", "an integer >= 1 for 'swa' blocks", None)
        if self.head_dim is None and (attends or self.gdn_head_dim is None):
            expected = f"a divisor of hidden_size {self.hidden_size} where head_dim is None"
            expect(self.hidden_size % self.num_heads == 0, "num_heads", expected, self.num_heads)
        if attends:
            groups = self.num_kv_heads or self.num_heads
            expect(self.num_heads % groups == 0, "num_kv_heads", f"a divisor of num_heads {self.num_heads}", groups)
            head_dim = self.head_dim or self.hidden_size // self.num_heads
            expect(head_dim % 2 == 0, "head_dim", "an even number (rotary)", head_dim)
        if "gdn" in self.layers or "jet" in self.layers:
            heads = self.gdn_num_heads or self.num_heads
            value_heads = self.gdn_num_v_heads or heads
            expect(value_heads % heads == 0, "gdn_num_v_heads", f"a multiple of {heads} heads", value_heads)

    @property
    def loop_range(self) -> tuple[int, int]:
        """First and last looped block, both included."""
        return self.resolve_loop(len(self.layers) * self.tied_repeats)
