"""A mixer that projects q, k, v, gates and output by itself: what `SleepGDNLayer` and `JetBlock` share."""

import math

import torch
from torch import Tensor, nn

from sleep_ops.layers.mixer import GDNMixer
from sleep_ops.ops.gated_norm import gated_rms_norm
from sleep_ops.validation import IMPLS, RULES, check_choice, check_count, check_eps, check_passes


class GatedRMSNorm(nn.Module):
    """RMSNorm(x) * weight * SiLU(gate) over the last axis: weight [size]."""

    def __init__(self, size: int, eps: float, impl: str = "auto"):
        super().__init__()
        self.eps, self.impl = eps, impl
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, self.weight, eps=self.eps, impl=self.impl)


class ProjectingMixer(GDNMixer):
    """The parameters *_proj of q, k, v, a, b, g and o, o_norm, A_log and dt_bias; arguments as in `SleepGDNLayer`.

    A subclass adds its convolutions in `_build_convolutions` and says what they carry (`tail_channels`).
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        num_v_heads: int | None,
        head_v_dim: int | None,
        conv_size: int,
        norm_eps: float,
        passes: int | float,
        window: int | None,
        output_pass: str,
        rule: str,
        impl: str,
    ):
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
        self.rule, self.impl = rule, impl
        self.key_channels, self.value_channels = num_heads * head_dim, num_v_heads * head_v_dim

        self.q_proj = nn.Linear(hidden_size, self.key_channels, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_channels, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_channels, bias=False)
        self.a_proj = nn.Linear(hidden_size, num_v_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_v_heads, bias=False)
        self.g_proj = nn.Linear(hidden_size, self.value_channels, bias=False)
        self.o_proj = nn.Linear(self.value_channels, hidden_size, bias=False)
        plain = "torch" if impl == "reference" else impl
        self._build_convolutions(plain)
        self.o_norm = GatedRMSNorm(head_v_dim, norm_eps, plain)

        # Decay rates uniform in (0, 16), time steps log-uniform in [1e-3, 1e-1]; the first clamp keeps the log finite.
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

    def _dtype(self) -> torch.dtype:
        return self.k_proj.weight.dtype

    def _gate(self, x: Tensor) -> Tensor:
        return self.g_proj(x).unflatten(-1, (self.num_v_heads, self.head_v_dim))

    def _emit(self, o: Tensor, gate: Tensor) -> Tensor:
        # A padded position has q = 0, so o, the norm of it and its bias-free projection are exactly 0.
        return self.o_proj(self.o_norm(o, gate).flatten(2))
