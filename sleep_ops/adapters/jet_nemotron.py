"""Jet-Nemotron with sleep: a port that keeps the names of its published checkpoints.

Gu et al., "Jet-Nemotron: Efficient Language Model with Post Neural Architecture Search", arXiv
2508.15884. Most layers mix tokens by a `JetBlock`, a few by attention or sliding attention. Sleep
loops the middle half of the layers (7..20 of the 28 of the 2B model), as in Lee et al., arXiv
2605.26099.

    layer:  h <- h + self_attn(input_layernorm(h))
            h <- h + mlp(post_attention_layernorm(h))
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sleep_ops.adapters.checkpoint import load_weights, read_config
from sleep_ops.adapters.port import Port
from sleep_ops.checks import check_count, check_flags, check_positive, expect
from sleep_ops.layers.attention import Attention
from sleep_ops.layers.block import Block, SwiGLU
from sleep_ops.layers.jet import DynamicConvolution, JetBlock
from sleep_ops.layers.mixer import GDNMixer
from sleep_ops.model.config import SleepSettings

LAYER_TYPES = ("attn", "swa", "jet")

# Of a checkpoint's config.json: what this port takes, what it takes there to be where nothing is said, and what it
# can't do otherwise.
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
_JET = dict(num_heads=6, head_dim=256, expand_v=2.0, conv_size=4, dconv_generator_reduction=8, norm_eps=1e-5)
_HOW = ("mode", "dconv_implementation")  # of no meaning to this port
_REQUIRED = {"model_type": "jet_nemotron", "hidden_act": "silu", "rope_scaling": None, "attention_dropout": 0.0}
_OWN = "sleep_ops"  # the key in config.json under which a saved model keeps its sleep settings


@dataclass(frozen=True, kw_only=True)
class JetNemotronConfig(SleepSettings):
    """Everything that defines a `JetNemotron`: `SleepSettings`, and what its config.json says.

    loop: default the middle half of the layers, as in the sleep paper: (7, 20) of 28.
    layer_types: "attn", "swa" (sliding attention) or "jet" for each of num_hidden_layers.
    efficient_attention_config: {"jet": {num_heads, head_dim, expand_v, conv_size,
        dconv_generator_reduction, norm_eps}, "swa": {window_size}}, for the types among the layers;
        window_size counts the token itself.

    Raises ValueError, naming the field, for values that can't be.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    layer_types: tuple[str, ...]
    efficient_attention_config: dict
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    def __post_init__(self):
        for name in _SIZES:
            check_count(name, getattr(self, name))
        if self.loop is None:
            quarter = self.num_hidden_layers // 4
            object.__setattr__(self, "loop", (quarter, self.num_hidden_layers - quarter - 1))
        super().__post_init__()
        self.resolve_loop(self.num_hidden_layers)
        types, expected = self.layer_types, f"{self.num_hidden_layers} of {LAYER_TYPES}"
        listed = isinstance(types, tuple | list) and all(t in LAYER_TYPES for t in types)
        expect(listed and len(types) == self.num_hidden_layers, "layer_types", expected, types)
        object.__setattr__(self, "layer_types", tuple(types))
        check_positive(self, "rms_norm_eps", "rope_theta", "initializer_range")
        check_flags(tie_word_embeddings=self.tie_word_embeddings)
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        even = self.hidden_size % (2 * heads) == 0
        expect(even, "num_attention_heads", f"heads of one, even size in hidden_size {self.hidden_size}", heads)
        expect(heads % groups == 0, "num_key_value_heads", f"a divisor of num_attention_heads {heads}", groups)
        for kind in ("swa", "jet"):
            field = f"efficient_attention_config[{kind!r}]"
            given = isinstance(self.efficient_attention_config, dict) and self.efficient_attention_config.get(kind)
            expect(kind not in types or isinstance(given, dict), field, f"a dict for {kind!r} layers", given or None)
        if "swa" in types:
            check_count("efficient_attention_config['swa']['window_size']", self.sliding_window)
        if "jet" in types:
            self._check_jet()

    def _check_jet(self) -> None:
        given = self.efficient_attention_config["jet"]
        field = "efficient_attention_config['jet']"
        unknown = sorted(given.keys() - _JET.keys() - set(_HOW))
        expect(not unknown, field, f"keys of {(*_JET, *_HOW)}", unknown)
        values = _JET | given
        for name in ("num_heads", "head_dim", "conv_size", "dconv_generator_reduction"):
            check_count(f"{field}[{name!r}]", values[name])
        expand, whole = values["expand_v"], False
        if type(expand) in (int, float) and 0 < expand < math.inf:
            size = values["head_dim"] * expand
            whole = round(size) > 0 and math.isclose(size, round(size), rel_tol=1e-5)  # it is rounded in config.json
        expect(whole, f"{field}['expand_v']", f"a whole multiple of 1 / head_dim = 1 / {values['head_dim']}", expand)
        channels = values["num_heads"] * round(values["head_dim"] * expand)
        name, reduction = f"{field}['dconv_generator_reduction']", values["dconv_generator_reduction"]
        expect(reduction <= channels, name, f"at most v's {channels} channels", reduction)
        try:
            eps = float(values["norm_eps"])  # a string in config.json
        except (TypeError, ValueError):
            eps = math.nan
        expect(0 <= eps < math.inf, f"{field}['norm_eps']", "a number >= 0", values["norm_eps"])

    @property
    def sliding_window(self) -> int | None:
        """Tokens a "swa" layer sees, itself included."""
        return self.efficient_attention_config.get("swa", {}).get("window_size")

    @property
    def jet_sizes(self) -> dict:
        """What a `JetBlock` is made with."""
        values = _JET | self.efficient_attention_config["jet"]
        heads, head_v_dim = values["num_heads"], round(values["head_dim"] * values["expand_v"])
        return dict(
            num_heads=heads,
            head_dim=values["head_dim"],
            head_v_dim=head_v_dim,
            conv_size=values["conv_size"],
            kernel_hidden=heads * head_v_dim // values["dconv_generator_reduction"],
            norm_eps=float(values["norm_eps"]),
        )

    @classmethod
    def from_checkpoint(cls, values: dict, **options) -> "JetNemotronConfig":
        """Of the contents of a checkpoint's config.json.

        options: fields of `SleepSettings`, which a published config.json doesn't have, window first
            of all. One that `to_checkpoint` made has them; options then replace them.

        Raises ValueError, naming the field, for the config.json of another model, and for what this
        port doesn't do.
        """
        settings = [f.name for f in dataclasses.fields(SleepSettings)]
        unknown = sorted(options.keys() - set(settings))
        expect(not unknown, "options", f"some of {', '.join(settings)}", unknown)
        values = _REQUIRED | {"model_type": None} | values
        for name, needed in _REQUIRED.items():
            expect(values[name] == needed, f"config.json: {name}", repr(needed), values[name])
        needed = (*_SIZES, "layer_types", "efficient_attention_config")
        missing = [name for name in needed if values.get(name) is None]
        expect(not missing, "config.json", f"values of {', '.join(missing)}", None)
        published = {
            f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values and f.name not in settings
        }
        options = values.get(_OWN, {}) | options
        expect("window" in options, "window", "tokens per window, or None for neither eviction nor sleep", "nothing")
        return cls.from_dict(published | options)

    def to_checkpoint(self) -> dict:
        """The contents of a config.json that `from_checkpoint` reads."""
        published = self.to_dict()
        settings = {f.name: published.pop(f.name) for f in dataclasses.fields(SleepSettings)}
        return {"architectures": ["JetNemotronForCausalLM"], **_REQUIRED, **published, _OWN: settings}


class JetNemotronLayer(Block):
    """A `Block` whose parts have the published names."""

    def __init__(self, config: JetNemotronConfig, kind: str):
        nn.Module.__init__(self)
        self.self_attn = _mixer(config, kind)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.fast_weights = isinstance(self.self_attn, GDNMixer)

    @property
    def mixer(self) -> Attention | JetBlock:
        return self.self_attn

    @property
    def mixer_norm(self) -> nn.RMSNorm:
        return self.input_layernorm

    @property
    def mlp_norm(self) -> nn.RMSNorm:
        return self.post_attention_layernorm


class JetNemotronModel(nn.Module):
    """Jet-Nemotron's embedding, layers and final norm, in their order."""

    def __init__(self, config: JetNemotronConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(JetNemotronLayer(config, kind) for kind in config.layer_types)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class JetNemotron(Port, nn.Module):
    """Jet-Nemotron with sleep. Called like `SleepHybridModel`; runs in a `SleepSession`."""

    def __init__(self, config: JetNemotronConfig):
        super().__init__()
        self.config = config
        self.model = JetNemotronModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _initialise(self) -> None:
        """Normal weights and no biases, as published; static convolutions."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, DynamicConvolution):
                module.start_static(std)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **options,
    ) -> "JetNemotron":
        """Reads a published checkpoint, or what `save_pretrained` wrote.

        folder: with config.json and safetensors files.
        dtype: of all parameters, default as stored.
        options: fields of `SleepSettings`, window first of all; see
            `JetNemotronConfig.from_checkpoint`.

        Raises FileNotFoundError or ValueError for a folder without a Jet-Nemotron, with the names
        of missing, unexpected or wrongly shaped tensors, and ValueError for options that can't be.
        """
        config = JetNemotronConfig.from_checkpoint(read_config(folder), **options)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, folder, dtype=dtype, device=device)
        return model

    @property
    def sleep_blocks(self) -> Sequence[JetNemotronLayer]:
        return self.model.layers


def _mixer(c: JetNemotronConfig, kind: str) -> Attention | JetBlock:
    if kind == "jet":
        return JetBlock(c.hidden_size, impl=c.impl, **c.jet_sizes)
    return Attention(
        c.hidden_size,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        rope_theta=c.rope_theta,
        sliding_window=c.sliding_window if kind == "swa" else None,
        qkv_bias=True,
        backend=c.attention_backend,
    )
