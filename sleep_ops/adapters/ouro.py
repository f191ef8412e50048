"""Ouro, whose steps become passes over a window: a port with the names of its checkpoints.

Zhu et al., "Scaling Latent Reasoning via Looped Language Models", arXiv 2510.25741. A step of Ouro
runs every layer and then the final norm; the next step is fed with the normed states. Sleep is that
loop, over windows (Lee et al., arXiv 2605.26099): passes 1..N are steps, the attention caches are
evicted after them, and fast-weight layers inserted between Ouro's own carry what was read, from
pass to pass and from window to window.

    layer:     h <- h + input_layernorm_2(self_attn(input_layernorm(h)))
               h <- h + post_attention_layernorm_2(mlp(post_attention_layernorm(h)))
    inserted:  h <- h + mixer(norm(h)), its output projection zero at first: then the model is Ouro
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sleep_ops.adapters.checkpoint import load_weights, read_config
from sleep_ops.adapters.port import Port
from sleep_ops.checks import check_choice, check_count, check_flags, check_positive, expect
from sleep_ops.layers.attention import Attention, AttentionState, SpanContext
from sleep_ops.layers.block import Block, SwiGLU
from sleep_ops.layers.gdn import SleepGDNLayer
from sleep_ops.layers.jet import JetBlock
from sleep_ops.model.config import SleepSettings

MIXERS: dict[str, type] = {"jet": JetBlock, "gdn": SleepGDNLayer}
NUM_INSERTED = 6  # as in the sleep paper, where Ouro has 24 layers

# What the port takes from a checkpoint's config.json under these names, and what it asks of it beyond.
_PUBLISHED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps", "rope_theta", "total_ut_steps", "tie_word_embeddings", "initializer_range",
)  # fmt: skip
_REQUIRED = {"model_type": "ouro", "hidden_act": "silu", "use_sliding_window": False, "rope_scaling": None}
_OWN = "sleep_ops"  # the key in config.json under which a saved model keeps its sleep settings and inserted layers
_INSERTED = "model.fast_weights."


@dataclass(frozen=True, kw_only=True)
class OuroConfig(SleepSettings):
    """Everything that defines an `Ouro`: `SleepSettings`, a checkpoint's sizes, what is inserted.

    vocab_size to initializer_range: as in a checkpoint's config.json.
    num_key_value_heads: default num_attention_heads.
    head_dim: default hidden_size / num_attention_heads.
    total_ut_steps: of `Ouro.step_logits` alone; with sleep the steps are `passes`.
    mixer: of the inserted layers, "jet" (`JetBlock`) or "gdn" (`SleepGDNLayer`).
    jet_layers: the layers after which one is inserted, ascending, first layer 0; default 6 spread
        evenly, the last one at the end (3, 7, .., 23 of 24); () for none.
    jet_num_heads: H of the inserted mixers, default half of attention's heads (8 in Ouro 1.4B).
    jet_head_dim: their K, default attention's head dim (128).
    jet_head_v_dim: their V, default twice that (256).
    conv_size: taps of their convolutions.

    An Ouro step runs every layer, so `loop` is None. Raises ValueError, naming the field, for
    values that can't be.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    total_ut_steps: int = 4
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    mixer: str = "jet"
    jet_layers: tuple[int, ...] | None = None
    jet_num_heads: int | None = None
    jet_head_dim: int | None = None
    jet_head_v_dim: int | None = None
    conv_size: int = 4

    def __post_init__(self):
        super().__post_init__()
        expect(self.loop in (None, "all"), "loop", "'all' (an Ouro step runs every layer)", self.loop)
        for name in (*_PUBLISHED[:5], "total_ut_steps", "conv_size"):
            check_count(name, getattr(self, name))
        heads = self.num_attention_heads
        if self.head_dim is None:
            expected = f"a divisor of hidden_size {self.hidden_size} where head_dim is None"
            expect(self.hidden_size % heads == 0, "num_attention_heads", expected, heads)
        self._default(num_key_value_heads=heads, head_dim=self.hidden_size // heads)
        for name in ("num_key_value_heads", "head_dim"):
            check_count(name, getattr(self, name))
        self._default(
            jet_layers=_evenly(self.num_hidden_layers),
            jet_num_heads=max(heads // 2, 1),
            jet_head_dim=self.head_dim,
            jet_head_v_dim=2 * self.head_dim,
        )
        for name in ("jet_num_heads", "jet_head_dim", "jet_head_v_dim"):
            check_count(name, getattr(self, name))
        check_positive(self, "rms_norm_eps", "rope_theta", "initializer_range")
        check_flags(tie_word_embeddings=self.tie_word_embeddings)
        check_choice("mixer", self.mixer, tuple(MIXERS))
        groups = self.num_key_value_heads
        expect(heads % groups == 0, "num_key_value_heads", f"a divisor of num_attention_heads {heads}", groups)
        expect(self.head_dim % 2 == 0, "head_dim", "an even number (rotary)", self.head_dim)
        listed = isinstance(self.jet_layers, tuple | list) and all(type(i) is int for i in self.jet_layers)
        ascending = listed and list(self.jet_layers) == sorted({*self.jet_layers} & {*range(self.num_hidden_layers)})
        expect(ascending, "jet_layers", f"ascending layers from 0 to {self.num_hidden_layers - 1}", self.jet_layers)
        object.__setattr__(self, "jet_layers", tuple(self.jet_layers))

    def _default(self, **values: object) -> None:
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @classmethod
    def from_checkpoint(cls, values: dict, **options) -> "OuroConfig":
        """Of the contents of a checkpoint's config.json.

        options: fields of this class that a published config.json doesn't have: window, which it
            needs, passes, eviction, jet_layers and so on. One that `to_checkpoint` made has them
            all; options then replace its settings of sleep, but can't move the inserted layers.

        Raises ValueError, naming the field, for the config.json of another model, and for what this
        port doesn't do.
        """
        saved = values.get(_OWN, {})
        given = sorted(options.keys() - {f.name for f in dataclasses.fields(SleepSettings)} - set(_PUBLISHED))
        expect(not (given and saved.get("jet_layers")), "options", "none for inserted layers that were saved", given)
        values = _REQUIRED | {"model_type": None} | values
        rope = values.get("rope_parameters") or values["rope_scaling"] or {}  # the former is transformers 5's name
        values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta"))
        values["rope_scaling"] = None if rope.get("rope_type", rope.get("type", "default")) == "default" else rope
        for name, needed in _REQUIRED.items():
            expect(values.get(name) == needed, f"config.json: {name}", repr(needed), values.get(name))
        missing = [name for name in (*_PUBLISHED[:5], "rope_theta") if values.get(name) is None]
        expect(not missing, "config.json", f"values of {', '.join(missing)}", None)
        published = {name: values[name] for name in _PUBLISHED if name in values}
        options = saved | options
        expect("window" in options, "window", "tokens per window, or None for neither eviction nor sleep", "nothing")
        return cls.from_dict(published | options)

    def to_checkpoint(self) -> dict:
        """The contents of a config.json that `from_checkpoint` reads."""
        values = self.to_dict()
        published = {name: values.pop(name) for name in _PUBLISHED}
        return {"architectures": ["OuroForCausalLM"], **_REQUIRED, **published, _OWN: values}


def _evenly(num_layers: int) -> tuple[int, ...]:
    """The layers that end each of six equal parts."""
    count = min(NUM_INSERTED, num_layers)
    return tuple((i + 1) * num_layers // count - 1 for i in range(count))


class OuroLayer(nn.Module):
    """One of Ouro's layers, a block of `SleepStack` with a cache of keys and values."""

    fast_weights = False

    def __init__(self, config: OuroConfig):
        super().__init__()
        c = config
        self.self_attn = Attention(
            c.hidden_size,
            num_heads=c.num_attention_heads,
            num_kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            rope_theta=c.rope_theta,
            backend=c.attention_backend,
        )
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.input_layernorm_2 = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.post_attention_layernorm_2 = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)

    def forward(
        self, h: Tensor, state: AttentionState, context: SpanContext, *, output: bool = True
    ) -> tuple[Tensor | None, AttentionState, None]:
        """See `Block.forward`; nothing writes fast weights."""
        y, state = self.self_attn(self.input_layernorm(h), state, context, output=output)
        if not output:
            return None, state, None
        h = h + self.input_layernorm_2(y)
        h = h + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(h)))
        return h, state, None

    def init_state(self, batch_size: int) -> AttentionState:
        """An empty cache."""
        return self.self_attn.init_state(batch_size)


class OuroModel(nn.Module):
    """Ouro's embedding, layers, final norm and exit gate, and the inserted `fast_weights`."""

    def __init__(self, config: OuroConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OuroLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)
        self.fast_weights = _inserted(config)


class StepLogits(NamedTuple):
    """What plain Ouro says after each of S steps.

    logits: `[B, T, S, vocab_size]`, zero at padding.
    exit_probabilities: `[B, T, S]`, at least float32, zero at padding: of stopping after each step
        as the gate has it, the last one taking what is left, so that they sum to one.
    """

    logits: Tensor
    exit_probabilities: Tensor


class Ouro(Port, nn.Module):
    """Ouro with sleep: passes are its steps over a window, predictions come from the first (awake).

    Called like `SleepHybridModel`; runs in a `SleepSession`. `step_logits` is the model as it was
    published.
    """

    def __init__(self, config: OuroConfig):
        super().__init__()
        self.config = config
        self.model = OuroModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _initialise(self) -> None:
        """Normal weights, as published, but in the inserted mixers, which have their own."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and not name.startswith(_INSERTED):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **options,
    ) -> "Ouro":
        """Reads a published checkpoint, then inserting layers, or what `save_pretrained` wrote.

        folder: with config.json and safetensors files.
        dtype: of all parameters, default as stored.
        options: fields of `OuroConfig`, window first of all; see `OuroConfig.from_checkpoint`.

        New layers are drawn from PyTorch's random numbers on the CPU. Raises FileNotFoundError or
        ValueError for a folder without an Ouro, with the names of missing, unexpected or wrongly
        shaped tensors, and ValueError for options that can't be.
        """
        values = read_config(folder)
        config = OuroConfig.from_checkpoint(values, **options)
        with torch.device("meta"):
            model = cls(config)
        if values.get(_OWN, {}).get("jet_layers"):
            load_weights(model, folder, dtype=dtype, device=device)
        else:
            model.model.fast_weights = _inserted(config)
            load_weights(model, folder, dtype=dtype, device=device, missing_ok=(_INSERTED,))
            model.model.fast_weights.to(model.embedding_weight.dtype)
        return model

    @property
    def sleep_blocks(self) -> Sequence[OuroLayer | Block]:
        blocks = list(self.model.layers)
        for place, layer in zip(reversed(self.config.jet_layers), reversed(self.model.fast_weights), strict=True):
            blocks.insert(place + 1, layer)
        return blocks

    def feed(self, h: Tensor, loop_input: Tensor | None) -> Tensor:
        return self.model.norm(h)

    def step_logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, steps: int | None = None
    ) -> StepLogits:
        """Plain Ouro: every layer over the whole text, step after step, and no sleep.

        In each step a position attends to the keys that step itself gave the positions up to it, so
        all steps are causal. Nothing is evicted, and inserted layers are left out.

        input_ids: int32 or int64 `[B, T]`.
        attention_mask: `[B, T]`, 1 = real token.
        steps: S, default the checkpoint's total_ut_steps.

        Raises ValueError naming the argument.
        """
        steps = self.config.total_ut_steps if steps is None else steps
        check_count("steps", steps)
        rows, ids = self.rows(input_ids, attention_mask)
        none = (0,) * len(rows.lengths)
        context = SpanContext(rows.lengths, none, none, None, ids.device)
        h, logits, gates = self.embed(ids), [], []
        for _ in range(steps):
            for layer in self.model.layers:
                h, _, _ = layer(h, layer.init_state(len(none)), context)
            h = self.model.norm(h)
            logits.append(self.lm_head(h))
            gates.append(self.model.early_exit_gate(h))
        logits, exits = torch.cat(logits, dim=2), _exit_probabilities(torch.cat(gates, dim=2))
        logits, exits = (rows.unpack([(none, rows.lengths, x)])[0] for x in (logits, exits))
        return StepLogits(logits.unflatten(2, (steps, -1)), exits)


def _exit_probabilities(gates: Tensor) -> Tensor:
    """Of stopping at each step, if not before: sigmoid of the gate's logits `[B, T, S]`."""
    stop = gates.to(torch.promote_types(gates.dtype, torch.float32)).sigmoid()
    going = (1 - stop[..., :-1]).cumprod(-1)  # past each step but the last
    before = torch.cat([torch.ones_like(stop[..., :1]), going], dim=-1)
    return torch.cat([before[..., :-1] * stop[..., :-1], before[..., -1:]], dim=-1)


def _inserted(c: OuroConfig) -> nn.ModuleList:
    """The inserted layers, untrained."""
    sizes = dict(num_heads=c.jet_num_heads, head_dim=c.jet_head_dim, head_v_dim=c.jet_head_v_dim)
    options = dict(conv_size=c.conv_size, impl=c.impl)
    layers = nn.ModuleList()
    for _ in c.jet_layers:
        mixer = MIXERS[c.mixer](c.hidden_size, **sizes, **options)
        nn.init.zeros_(mixer.o_proj.weight)
        layers.append(Block(mixer, c.hidden_size, None, c.rms_norm_eps))
    return layers
