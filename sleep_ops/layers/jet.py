"""The Jet block (Gu et al., arXiv 2508.15884): Gated DeltaNet with a dynamic convolution on v."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from sleep_ops.checks import check_count
from sleep_ops.layers.gdn import SleepGDNLayer
from sleep_ops.layers.mixer import ReplayInputs
from sleep_ops.ops.dynamic_conv import dynamic_convolution

KERNEL_REDUCTION = 8  # v channels per hidden unit of the kernel generator, as published


class DynamicConvolution(nn.Module):
    """Causal depthwise convolution with SiLU; a network makes its kernels of each token's features.

    kernel_generator: w1 -> SiLU -> w2 (with bias), features [..., in_features] -> kernels
        [..., channels * width], the taps of a channel side by side.
    """

    def __init__(self, channels: int, width: int, in_features: int, hidden: int):
        super().__init__()
        self.channels, self.width = channels, width
        w1, w2 = nn.Linear(in_features, hidden, bias=False), nn.Linear(hidden, channels * width)
        self.kernel_generator = nn.Sequential(OrderedDict(w1=w1, act=nn.SiLU(), w2=w2))
        self.start_static()

    def start_static(self, std: float = 0.02) -> None:
        """Makes the kernels equal w2's bias for every token; w2 learns from the first step on."""
        generator = self.kernel_generator
        nn.init.normal_(generator.w1.weight, std=std)  # not zero as well: then neither would ever have a gradient
        nn.init.zeros_(generator.w2.weight)
        nn.init.normal_(generator.w2.bias, std=std)

    def forward(
        self, x: Tensor, features: Tensor, conv_state: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None
    ):
        """x [B, T, channels], features [B, T, in_features] -> (output, new conv_state)."""
        kernels = self.kernel_generator(features).unflatten(-1, (self.channels, self.width))
        return dynamic_convolution(x, kernels, conv_state=conv_state, lengths=lengths, cu_seqlens=cu_seqlens)


class JetBlock(SleepGDNLayer):
    """Jet mixer [B, T, hidden_size] -> the same shape; causal, as attention is.

    q = SiLU(W_q x), k = SiLU(W_k x), v = DynamicConvolution(W_v x; kernels from x); then as in
    `SleepGDNLayer`, with beta in (0, 1) and parameters under their published names.

    hidden_size: width of the model.
    num_heads, head_dim: query and key heads (H) and their size (K).
    num_v_heads, head_v_dim: value heads (HV, a multiple of H) and their size (V); default H and K.
        Published blocks have HV = H.
    conv_size: taps of the dynamic convolution.
    kernel_hidden: hidden units of its kernel generator; default an eighth of v's channels, as
        published.
    norm_eps: of the output norm.
    passes, window, output_pass, rule: as in `SleepGDNLayer`.
    impl: likewise, but for the convolution, which is always PyTorch's.

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
        if kernel_hidden is not None:
            check_count("kernel_hidden", kernel_hidden)
        self._kernel_hidden = kernel_hidden
        super().__init__(
            hidden_size, num_heads=num_heads, head_dim=head_dim, num_v_heads=num_v_heads, head_v_dim=head_v_dim,
            conv_size=conv_size, norm_eps=norm_eps, passes=passes, window=window, output_pass=output_pass, rule=rule,
            impl=impl,
        )  # fmt: skip

    def _build_convolutions(self, impl: str) -> None:
        self.conv_channels = self.value_channels
        hidden = self._kernel_hidden or max(self.value_channels // KERNEL_REDUCTION, 1)
        self.dynamic_conv1d = DynamicConvolution(self.value_channels, self.conv_size, self.hidden_size, hidden)

    def _project(self, x, conv_state, lengths, cu_seqlens):
        writes, conv_state = self._project_writes(x, conv_state, lengths, cu_seqlens)
        q = F.silu(self.q_proj(x)).unflatten(-1, (self.num_heads, self.head_dim))
        return q, writes, conv_state, self._gate(x)

    def _project_writes(self, x, conv_state, lengths, cu_seqlens):
        """No queries and no gate."""
        k = F.silu(self.k_proj(x)).unflatten(-1, (self.num_heads, self.head_dim))
        v, conv_state = self.dynamic_conv1d(self.v_proj(x), x, conv_state, lengths, cu_seqlens)
        v = v.unflatten(-1, (self.num_v_heads, self.head_v_dim))
        return ReplayInputs(k, v, self.a_proj(x), self.b_proj(x)), conv_state
