"""The Gated DeltaNet mixer (Yang, Kautz, Hatamizadeh, arXiv 2412.06464), able to replay windows (sleep) on its own."""

import torch
from torch import Tensor, nn

from sleep_ops.layers.mixer import GDNWrites
from sleep_ops.layers.projections import ProjectingMixer
from sleep_ops.ops.short_conv import carried_tail, short_convolution
from sleep_ops.validation import check_flags


class ShortConvolution(nn.Module):
    """Causal depthwise convolution with SiLU: weight [channels, width], no bias."""

    def __init__(self, channels: int, width: int, impl: str = "auto"):
        super().__init__()
        self.width, self.impl = width, impl
        # The range torch gives a depthwise Conv1d, as in the published layer.
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, x: Tensor, tail: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None):
        """x [B, T, channels] and the tail [N, width - 1, channels] before it -> (output, new tail)."""
        return short_convolution(x, self.weight, tail=tail, lengths=lengths, cu_seqlens=cu_seqlens, impl=self.impl)


class SleepGDNLayer(ProjectingMixer):
    """Gated DeltaNet mixer [B, T, hidden_size] -> the same shape; causal, so it stands in for an attention mixer.

    Args:
        hidden_size: width of the model.
        num_heads, head_dim: query and key heads (H) and their size (K).
        num_v_heads, head_v_dim: value heads (HV, a multiple of H) and their size (V); default H and K.
        conv_size: taps of the short convolution over q, k and v.
        allow_neg_eigval: beta in (0, 2) instead of (0, 1). In 16 bits keys that repeat with beta near 2 and next to no
            decay are not computed well (see `gated_delta_rule`): state tracking of that kind wants float32 inputs.
        norm_eps: of the output norm.
        passes: replay passes over each window; 1 is plain Gated DeltaNet, math.inf replays to convergence.
        window: tokens per window, counted from the first token of each call; None makes every call one window.
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
        super().__init__(
            hidden_size,
            num_heads=num_heads,
            head_dim=head_dim,
            num_v_heads=num_v_heads,
            head_v_dim=head_v_dim,
            conv_size=conv_size,
            norm_eps=norm_eps,
            passes=passes,
            window=window,
            output_pass=output_pass,
            rule=rule,
            impl=impl,
        )
        self.allow_neg_eigval = allow_neg_eigval

    def _build_convolutions(self, impl: str) -> None:
        self.tail_channels = 2 * self.key_channels + self.value_channels
        self.q_conv = ShortConvolution(self.key_channels, self.conv_size, impl)
        self.k_conv = ShortConvolution(self.key_channels, self.conv_size, impl)
        self.v_conv = ShortConvolution(self.value_channels, self.conv_size, impl)

    def _project(self, x, tail, lengths, cu_seqlens):
        q_tail, k_tail, v_tail = self._tails(tail)
        writes, k_tail, v_tail = self._writes(x, k_tail, v_tail, lengths, cu_seqlens)
        q, q_tail = self.q_conv(self.q_proj(x), q_tail, lengths, cu_seqlens)
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        return q, writes, torch.cat([q_tail, k_tail, v_tail], dim=-1), self._gate(x)

    def _project_writes(self, x, tail, lengths):
        """Queries only for the tail."""
        q_tail, k_tail, v_tail = self._tails(tail)
        writes, k_tail, v_tail = self._writes(x, k_tail, v_tail, lengths, None)
        kept = self.conv_size - 1
        if lengths is None:
            last, real = x[:, max(x.shape[1] - kept, 0) :], None
        else:
            first, real = (lengths - kept).clamp(min=0), lengths.clamp(max=kept)
            index = (first[:, None] + torch.arange(min(kept, x.shape[1]), device=x.device)).clamp(max=x.shape[1] - 1)
            last = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
        if kept:
            q_tail = carried_tail(self.q_proj(last), self.conv_size, q_tail, real)
        else:
            q_tail = writes.k.new_zeros(x.shape[0], 0, self.key_channels)
        return writes, torch.cat([q_tail, k_tail, v_tail], dim=-1)

    def _writes(self, x, k_tail, v_tail, lengths, cu_seqlens):
        """What x writes, and the new tails of k and v."""
        k, k_tail = self.k_conv(self.k_proj(x), k_tail, lengths, cu_seqlens)
        v, v_tail = self.v_conv(self.v_proj(x), v_tail, lengths, cu_seqlens)
        k = k.unflatten(-1, (self.num_heads, self.head_dim))
        v = v.unflatten(-1, (self.num_v_heads, self.head_v_dim))
        return GDNWrites(k, v, self.a_proj(x), self.b_proj(x)), k_tail, v_tail

    def _tails(self, tail):
        if tail is None:
            return None, None, None
        return tail.split([self.key_channels, self.key_channels, self.value_channels], dim=-1)
