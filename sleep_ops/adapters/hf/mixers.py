"""The gated-delta-rule mixers of transformers' hybrids on this project's kernels.

Each is a subclass of the class it stands in for, so an existing layer changes class and keeps its
parameters, adapters and hooks. Submodules are called, never reached into, but for the weights of
the convolution and of the output norm.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from sleep_ops.adapters.hf.cache import LayerCache
from sleep_ops.adapters.hf.states import cached_state, store_state
from sleep_ops.checks import IMPLS, check_choice, expect
from sleep_ops.layers.mixer import GDNMixer, ReplayInputs
from sleep_ops.ops.gated_norm import gated_rms_norm
from sleep_ops.ops.short_conv import short_convolution


class _Mixer(GDNMixer):
    """What the families share: a convolution over q, k and v, a gated norm, an output projection.

    A subclass gives `_inputs(x)` -> (q, k, v joined [B, T, 2K + V], raw decay a, raw beta b, gate z
    [B, T, HV, V]), and `_output()` -> (norm, projection).
    """

    num_heads = property(lambda self: self.num_k_heads)
    head_dim = property(lambda self: self.head_k_dim)
    conv_size = property(lambda self: self.conv_kernel_size)
    conv_channels = property(lambda self: 2 * self.key_dim + self.value_dim)
    convolutions: tuple[str, ...] = ("conv1d",)

    def forward(
        self, hidden_states: Tensor, cache_params=None, attention_mask: Tensor | None = None, *, cache=None, **kwargs
    ):
        """Called by transformers' layers. hidden_states `[B, T, hidden_size]` -> the same shape.

        cache (cache_params before transformers 5.24): a transformers cache, whose states of this
            layer are read and replaced; or a `LayerCache`.
        attention_mask: `[B, T]`, 1 = real token, padding anywhere.
        cu_seq_lens_q: borders of packed sequences.
        """
        cache = cache_params if cache is None else cache
        if isinstance(cache, LayerCache):
            return cache.mix(self, hidden_states)
        borders = kwargs.get("cu_seq_lens_q")
        state = None if cache is None else cached_state(cache, self)
        if attention_mask is not None:
            attention_mask = attention_mask[:, -hidden_states.shape[1] :]
        y, state = self.read(  # type: ignore[misc]
            hidden_states, state=state, attention_mask=attention_mask, cu_seqlens=borders, return_state=True
        )
        if cache is not None:
            store_state(cache, self, state)
        return y

    read = GDNMixer.forward

    def _project(self, x, conv_state, lengths, cu_seqlens):
        weights = [self._filters(name) for name in self.convolutions]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        qkv, a, b, gate = self._inputs(x)
        qkv, conv_state = short_convolution(
            qkv, weight, conv_state=conv_state, lengths=lengths, cu_seqlens=cu_seqlens, impl=self._plain_impl()
        )
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        q, k = (t.unflatten(-1, (self.num_k_heads, self.head_k_dim)) for t in (q, k))
        return q, ReplayInputs(k, v.unflatten(-1, (self.num_v_heads, self.head_v_dim)), a, b), conv_state, gate

    def _filters(self, name):
        convolution = getattr(self, name)
        adapted = hasattr(convolution, "base_layer")
        expect(not adapted, name, "a plain convolution, whose weight is all there is to it", "one with an adapter")
        return convolution.weight.squeeze(1)

    def _emit(self, o, gate):
        norm, projection = self._output()
        if hasattr(norm, "base_layer"):  # an adapter's, which knows what to compute
            return projection(norm(o, gate).flatten(2))
        # Before 5.15 it is fla's where that is installed, which has another name for epsilon.
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        o = gated_rms_norm(o, gate, norm.weight, eps=eps, impl=self._plain_impl())
        return projection(o.flatten(2))

    def _plain_impl(self) -> str:
        return "torch" if self.impl == "reference" else self.impl


class _QwenMixer(_Mixer):
    def _output(self):
        return self.norm, self.out_proj


class _SplitInputs(_QwenMixer):
    """in_proj_qkv, in_proj_z, in_proj_b, in_proj_a."""

    def _dtype(self) -> torch.dtype:
        return self.in_proj_qkv.weight.dtype

    def _inputs(self, x):
        z = self.in_proj_z(x).unflatten(-1, (self.num_v_heads, self.head_v_dim))
        return self.in_proj_qkv(x), self.in_proj_a(x), self.in_proj_b(x), z


class SleepQwen3_5Mixer(_SplitInputs, Qwen3_5GatedDeltaNet):
    """Qwen3_5GatedDeltaNet on this project's kernels."""


class SleepQwen3_5MoeMixer(_SplitInputs, Qwen3_5MoeGatedDeltaNet):
    """Qwen3_5MoeGatedDeltaNet on this project's kernels."""


class SleepQwen3NextMixer(_QwenMixer, Qwen3NextGatedDeltaNet):
    """Qwen3NextGatedDeltaNet on this project's kernels: projections interleaved per key head."""

    def _dtype(self) -> torch.dtype:
        return self.in_proj_qkvz.weight.dtype

    def _inputs(self, x):
        groups = self.num_v_heads // self.num_k_heads
        values = groups * self.head_v_dim
        per_head = self.in_proj_qkvz(x).unflatten(-1, (self.num_k_heads, -1))
        q, k, v, z = per_head.split([self.head_k_dim, self.head_k_dim, values, values], dim=-1)
        b, a = self.in_proj_ba(x).unflatten(-1, (self.num_k_heads, -1)).split(groups, dim=-1)
        qkv = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], dim=-1)
        z = z.flatten(2).unflatten(-1, (self.num_v_heads, self.head_v_dim))
        return qkv, a.flatten(2), b.flatten(2), z


class SleepOlmoHybridMixer(_Mixer, OlmoHybridGatedDeltaNet):
    """OlmoHybridGatedDeltaNet on this project's kernels; three convolutions before 5.15."""

    @property
    def convolutions(self) -> tuple[str, ...]:
        return ("conv1d",) if hasattr(self, "conv1d") else ("q_conv1d", "k_conv1d", "v_conv1d")

    def _dtype(self) -> torch.dtype:
        return self.q_proj.weight.dtype

    def _inputs(self, x):
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        gate = self.g_proj(x).unflatten(-1, (self.num_v_heads, self.head_v_dim))
        return qkv, self.a_proj(x), self.b_proj(x), gate

    def _output(self):
        return self.o_norm, self.o_proj


MIXERS = {
    Qwen3_5GatedDeltaNet: SleepQwen3_5Mixer,
    Qwen3_5MoeGatedDeltaNet: SleepQwen3_5MoeMixer,
    Qwen3NextGatedDeltaNet: SleepQwen3NextMixer,
    OlmoHybridGatedDeltaNet: SleepOlmoHybridMixer,
}


def replace_mixers(model: nn.Module, *, impl: str = "auto") -> nn.Module:
    """Puts this project's kernels under a model's gated-delta-rule mixers; returns it, changed.

    impl: as in `gated_delta_rule`.

    Weights, their names, adapters and hooks stay; a second call changes `impl` alone. In
    transformers 5.14, olmo_hybrid's own cache fails in its own forward pass: there, use_cache=False
    or `sleepify`. Raises ValueError where there is no such mixer.
    """
    check_choice("impl", impl, IMPLS)
    found = [m for m in model.modules() if type(m) in MIXERS or isinstance(m, _Mixer)]
    expect(len(found) > 0, "model", f"one with {' or '.join(c.__name__ for c in MIXERS)}", type(model).__name__)
    for module in found:
        if type(module) in MIXERS:
            module.__class__ = MIXERS[type(module)]
        module.impl = impl
    return model


@contextmanager
def replaced_mixers() -> Iterator[None]:
    """Models built or loaded inside have this project's kernels from the start:

    with replaced_mixers():
        model = AutoModelForCausalLM.from_pretrained(folder)
    """
    places = [(sys.modules[original.__module__], original) for original in MIXERS]
    for module, original in places:
        setattr(module, original.__name__, MIXERS[original])
    try:
        yield
    finally:
        for module, original in places:
            setattr(module, original.__name__, original)
