"""The Jet block (Gu et al., "Jet-Nemotron", arXiv 2508.15884): Gated DeltaNet with a dynamic convolution on v alone."""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sleep_ops.layers.gdn import GatedRMSNorm
from sleep_ops.layers.mixer import GDNMixer, GDNWrites
from sleep_ops.ops.dynamic_conv import dynamic_convolution
from sleep_ops.validation import IMPLS, RULES, check_choice, check_count, check_eps, check_passes

KERNEL_REDUCTION = 8  # v channels per hidden unit of the kernel generator, as published


class DynamicConvolution(nn.Module):
    """Causal depthwise convolution with SiLU whose kernels a small network makes of each token's features.

    kernel_generator: features [..., in_features] -> w1 -> SiLU -> w2 (with bias) -> kernels [..., channels * width],
    the taps of a channel side by side.
    """

    def __init__(self, channels: int, width: int, in_features: int, hidden: int):
        super().__init__()
        self.channels, self.width = channels, width
        w1, w2 = nn.Linear(in_features, hidden, bias=False), nn.Linear(hidden, channels * width)
        self.kernel_generator = nn.Sequential(OrderedDict(w1=w1, act=nn.SiLU(), w2=w2))
        self.start_static()

    def start_static(self, std: float = 0.02) -> None:
        """Makes the kernels the same for every token, w2's bias; w2 learns from the first step on, w1 after it."""
        generator = self.kernel_generator
        nn.init.normal_(generator.w1.weight, std=std)  # not zero as well: then neither would ever have a gradient
        nn.init.zeros_(generator.w2.weight)
        nn.init.normal_(generator.w2.bias, std=std)

    def forward(
        self, x: Tensor, features: Tensor, tail: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None
    ):
        """x [B, T, channels], features [B, T, in_features], tail [N, width - 1, channels] -> (output, new tail)."""
        kernels = self.kernel_generator(features).unflatten(-1, (self.channels, self.width))
        return dynamic_convolution(x, kernels, tail=tail, lengths=lengths, cu_seqlens=cu_seqlens)


class JetBlock(GDNMixer):
    """Jet mixer [B, T, hidden_size] -> the same shape; causal, so it stands in for an attention mixer.

    q = SiLU(W_q x), k = SiLU(W_k x), v = DynamicConvolution(W_v x; kernels from x); then as in `SleepGDNLayer`, with
    beta in (0, 1) and parameters under their published names.

    Args:
        hidden_size: width of the model.
        num_heads, head_dim: query and key heads (H) and their size (K).
        num_v_heads, head_v_dim: value heads (HV, a multiple of H) and their size (V); default H and K. Published
            blocks have HV = H.
        conv_size: taps of the dynamic convolution.
        kernel_hidden: hidden units of its kernel generator; default an eighth of v's channels, as published.
        norm_eps: of the output norm.
        passes, window, output_pass, rule, impl: as in `SleepGDNLayer`. The convolution is PyTorch's whatever impl is.

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
        kernel_hidden: int | None = None,
        norm_eps: float = 1e-5,
        passes: int | float = 1,
        window: int | None = None,
        output_pass: str = "first",
        rule: str = "delta",
        impl: str = "auto",
    ):
        super().__init__()
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        head_v_dim = head_dim if head_v_dim is None else head_v_dim
        counts = dict(hidden_size=hidden_size, num_heads=num_heads, num_v_heads=num_v_heads, head_dim=head_dim)
        for name, value in (counts | dict(head_v_dim=head_v_dim, conv_size=conv_size)).items():
            check_count(name, value)
        if num_v_heads % num_heads:
            raise ValueError(f"num_v_heads: expected a multiple of num_heads = {num_heads}, got {num_v_heads}")
        key_channels, value_channels = num_heads * head_dim, num_v_heads * head_v_dim
        kernel_hidden = max(value_channels // KERNEL_REDUCTION, 1) if kernel_hidden is None else kernel_hidden
        check_count("kernel_hidden", kernel_hidden)
        check_eps("norm_eps", norm_eps)
        check_passes(passes, window, output_pass)
        check_choice("rule", rule, RULES)
        check_choice("impl", impl, IMPLS)

        self.hidden_size, self.conv_size = hidden_size, conv_size
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_v_heads, self.head_v_dim = num_v_heads, head_v_dim
        self.passes, self.window, self.output_pass = passes, window, output_pass
        self.rule, self.impl = rule, impl
        self.tail_channels = value_channels

        self.q_proj = nn.Linear(hidden_size, key_channels, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_channels, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_channels, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_v_heads, bias=False)
        self.a_proj = nn.Linear(hidden_size, num_v_heads, bias=False)
        self.g_proj = nn.Linear(hidden_size, value_channels, bias=False)
        self.o_proj = nn.Linear(value_channels, hidden_size, bias=False)
        self.dynamic_conv1d = DynamicConvolution(value_channels, conv_size, hidden_size, kernel_hidden)
        self.o_norm = GatedRMSNorm(head_v_dim, norm_eps, "torch" if impl == "reference" else impl)

        # As in `SleepGDNLayer`: decay rates uniform in (0, 16), time steps log-uniform in [1e-3, 1e-1].
        self.A_log = nn.Parameter(torch.empty(num_v_heads).uniform_(0, 16).clamp_(min=1e-4).log())
        dt = torch.empty(num_v_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp_(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self._mark_parameters()

    def _mark_parameters(self) -> None:
        for parameter in (self.A_log, self.dt_bias):
            parameter._no_weight_decay = True

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._mark_parameters()  # a copied parameter has lost the mark

    def _dtype(self) -> torch.dtype:
        return self.k_proj.weight.dtype

    def _project(self, x, tail, lengths, cu_seqlens):
        writes, tail = self._writes(x, tail, lengths, cu_seqlens)
        q = F.silu(self.q_proj(x)).unflatten(-1, (self.num_heads, self.head_dim))
        gate = self.g_proj(x).unflatten(-1, (self.num_v_heads, self.head_v_dim))
        return q, writes, tail, gate

    def _project_writes(self, x, tail, lengths):
        """No queries and no gate."""
        return self._writes(x, tail, lengths, None)

    def _emit(self, o, gate):
        # A padded position has q = 0, so o, the norm of it and its bias-free projection are exactly 0.
        return self.o_proj(self.o_norm(o, gate).flatten(2))

    def _writes(self, x, tail, lengths, cu_seqlens):
        """What x writes, and the new tail."""
        k = F.silu(self.k_proj(x)).unflatten(-1, (self.num_heads, self.head_dim))
        v, tail = self.dynamic_conv1d(self.v_proj(x), x, tail, lengths, cu_seqlens)
        v = v.unflatten(-1, (self.num_v_heads, self.head_v_dim))
        return GDNWrites(k, v, self.a_proj(x), self.b_proj(x)), tail
