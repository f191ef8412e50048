"""The Gated DeltaNet mixer (Yang, Kautz, Hatamizadeh, arXiv 2412.06464), able to replay windows."""

import math

import torch
from torch import Tensor, nn

from sleep_ops.checks import IMPLS, RULES, check_choice, check_count, check_flags
from sleep_ops.layers.basic import Linear, project
from sleep_ops.layers.mixer import GDNMixer, ReplayInputs
from sleep_ops.ops.gated_norm import gated_rms_norm
from sleep_ops.ops.short_conv import next_conv_state, short_convolution
from sleep_ops.validation import check_eps, check_passes


class ShortConvolution(nn.Module):
    """Causal depthwise convolution with SiLU: weight [channels, width], no bias."""

    def __init__(self, channels: int, width: int, impl: str = "auto"):
        super().__init__()
        self.width, self.impl = width, impl
        # The range torch gives a depthwise Conv1d, as in the published layer.
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, x: Tensor, conv_state: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None):
        """x [B, T, channels], conv_state [N, width - 1, channels] -> (output, new conv_state)."""
        return short_convolution(
            x, self.weight, conv_state=conv_state, lengths=lengths, cu_seqlens=cu_seqlens, impl=self.impl
        )


class GatedRMSNorm(nn.Module):
    """RMSNorm(x) * weight * SiLU(gate) over the last axis: weight [size]."""

    def __init__(self, size: int, eps: float, impl: str = "auto"):
        super().__init__()
        self.eps, self.impl = eps, impl
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, self.weight, eps=self.eps, impl=self.impl)


class SleepGDNLayer(GDNMixer):
    """Gated DeltaNet mixer [B, T, hidden_size] -> the same shape; causal, as attention is.

    hidden_size: width of the model.
    num_heads, head_dim: query and key heads (H) and their size (K).
    num_v_heads, head_v_dim: value heads (HV, a multiple of H) and their size (V); default H and K.
    conv_size: taps of the short convolution over q, k and v.
    allow_neg_eigval: beta in (0, 2) instead of (0, 1). In 16 bits keys that repeat with beta near 2
        and next to no decay are not computed well (see `gated_delta_rule`): state tracking of that
        kind wants float32 inputs.
    norm_eps: of the output norm.
    passes: replay passes over each window; 1 is plain Gated DeltaNet, math.inf replays to
        convergence.
    window: tokens per window, counted from the first token of each call; None makes every call one
        window.
    output_pass: "first" (causal) or "last" (outputs see their whole window).
    rule: "delta" or "hebbian".
    impl: as in `gated_delta_rule`.

    Gates, softplus and states are float32 under autocast too. Raises ValueError for a bad argument.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        num_v_heads: int | None = None,
        head_v_dim: int | None = None,
        conv_size: int = 4,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
        passes: int | float = 1,
        window: int | None = None,
        output_pass: str = "first",
        rule: str = "delta",
        impl: str = "auto",
    ):
        check_flags(allow_neg_eigval=allow_neg_eigval)
        super().__init__()
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        head_v_dim = head_dim if head_v_dim is None else head_v_dim
        counts = dict(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim, num_v_heads=num_v_heads)
        counts |= dict(head_v_dim=head_v_dim, conv_size=conv_size)
        for name, value in counts.items():
            check_count(name, value)
        if num_v_heads % num_heads:
            raise ValueError(f"num_v_heads: expected a multiple of num_heads = {num_heads}, got {num_v_heads}")
        check_eps("norm_eps", norm_eps)
        check_passes(passes, window, output_pass)
        check_choice("rule", rule, RULES)
        check_choice("impl", impl, IMPLS)

        self.hidden_size, self.conv_size = hidden_size, conv_size
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_v_heads, self.head_v_dim = num_v_heads, head_v_dim
        self.passes, self.window, self.output_pass = passes, window, output_pass
        self.rule, self.impl, self.allow_neg_eigval = rule, impl, allow_neg_eigval
        self.key_channels, self.value_channels = num_heads * head_dim, num_v_heads * head_v_dim

        self.q_proj = Linear(hidden_size, self.key_channels, bias=False)
        self.k_proj = Linear(hidden_size, self.key_channels, bias=False)
        self.v_proj = Linear(hidden_size, self.value_channels, bias=False)
        self.a_proj = Linear(hidden_size, num_v_heads, bias=False)
        self.b_proj = Linear(hidden_size, num_v_heads, bias=False)
        self.g_proj = Linear(hidden_size, self.value_channels, bias=False)
        self.o_proj = Linear(self.value_channels, hidden_size, bias=False)
        plain = "torch" if impl == "reference" else impl
        self._build_convolutions(plain)
        self.o_norm = GatedRMSNorm(head_v_dim, norm_eps, plain)

        # Decay rates uniform in (0, 16), time steps log-uniform in [1e-3, 1e-1]; the first clamp
        # keeps the log finite.
        self.A_log = nn.Parameter(torch.empty(num_v_heads).uniform_(0, 16).clamp_(min=1e-4).log())
        dt = torch.empty(num_v_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp_(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self._mark_parameters()

    def _mark_parameters(self) -> None:
        for parameter in (self.A_log, self.dt_bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._mark_parameters()  # a copied parameter has lost the mark

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._mark_parameters()  # as may one that was moved
        return self

    def _build_convolutions(self, impl: str) -> None:
        self.conv_channels = 2 * self.key_channels + self.value_channels
        self.q_conv1d = ShortConvolution(self.key_channels, self.conv_size, impl)
        self.k_conv1d = ShortConvolution(self.key_channels, self.conv_size, impl)
        self.v_conv1d = ShortConvolution(self.value_channels, self.conv_size, impl)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        """Takes fla's filters [channels, 1, width] too, and the former names q_conv, ..."""
        for name in ("q_conv", "k_conv", "v_conv"):
            weight, former = f"{prefix}{name}1d.weight", f"{prefix}{name}.weight"
            if former in state_dict:
                state_dict[weight] = state_dict.pop(former)
            if weight in state_dict and state_dict[weight].dim() == 3:
                state_dict[weight] = state_dict[weight].squeeze(1)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._mark_parameters()  # those assigned have none

    def _project(self, x, conv_state, lengths, cu_seqlens):
        q_state, *states = self._split_state(conv_state)
        q, gate, *writes = project(x, self.q_proj, self.g_proj, self.k_proj, self.v_proj, self.a_proj, self.b_proj)
        writes, *states = self._writes(*writes, *states, lengths, cu_seqlens)
        q, q_state = self.q_conv1d(q, q_state, lengths, cu_seqlens)
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        gate = gate.unflatten(-1, (self.num_v_heads, self.head_v_dim))
        return q, writes, torch.cat([q_state, *states], dim=-1), gate

    def _project_writes(self, x, conv_state, lengths, cu_seqlens):
        """Queries only for the convolution's state."""
        q_state, *states = self._split_state(conv_state)
        writes = project(x, self.k_proj, self.v_proj, self.a_proj, self.b_proj)
        writes, *states = self._writes(*writes, *states, lengths, cu_seqlens)
        if lengths is None and cu_seqlens is None:
            x = x[:, max(x.shape[1] - self.conv_size + 1, 0) :]
        q_state = next_conv_state(self.q_proj(x), self.conv_size, q_state, lengths, cu_seqlens)
        return writes, torch.cat([q_state, *states], dim=-1)

    def _writes(self, k, v, a, b, k_state, v_state, lengths, cu_seqlens):
        """What is written of the projections k, v, a and b, and the new convolution states of k and v."""
        k, k_state = self.k_conv1d(k, k_state, lengths, cu_seqlens)
        v, v_state = self.v_conv1d(v, v_state, lengths, cu_seqlens)
        k = k.unflatten(-1, (self.num_heads, self.head_dim))
        v = v.unflatten(-1, (self.num_v_heads, self.head_v_dim))
        return ReplayInputs(k, v, a, b), k_state, v_state

    def _split_state(self, conv_state):
        if conv_state is None:
            return None, None, None
        return conv_state.split([self.key_channels, self.key_channels, self.value_channels], dim=-1)

    def _dtype(self) -> torch.dtype:
        return self.k_proj.weight.dtype

    def _gate(self, x: Tensor) -> Tensor:
        return self.g_proj(x).unflatten(-1, (self.num_v_heads, self.head_v_dim))

    def _emit(self, o: Tensor, gate: Tensor) -> Tensor:
        # A padded position has q = 0, so o, the norm of it and its bias-free projection are exactly 0.
        return self.o_proj(self.o_norm(o, gate).flatten(2))
