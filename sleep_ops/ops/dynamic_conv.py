"""Causal depthwise convolution whose filters are given per token, with a carried state and SiLU.

    y_t = act(sum_{j<W} kernels_t[:, W-1-j] * x_{t-j})

Gu et al., "Jet-Nemotron", arXiv 2508.15884, where a small network makes the kernels. As in `short_convolution`, what
stands before the first token comes from the state, and sequences may be rows of a batch, rows with right padding
(`lengths`), or packed in one row (`cu_seqlens`). In PyTorch alone, on every device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops.ops.short_conv import ShortConvOutput, behind_states, check_convolution, next_conv_state, of_tokens
from sleep_ops.validation import check_first_order, check_full, check_no_tangents, check_tensor


def dynamic_convolution(
    x: Tensor,
    kernels: Tensor,
    *,
    conv_state: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = "silu",
) -> ShortConvOutput:
    """Convolve every channel of x causally, each token with filters of its own.

    Args:
        x: inputs [B, T, D].
        kernels: filters [B, T, D, W], in any floating dtype; the last tap meets the token itself.
        conv_state: the W-1 inputs before x, oldest first, [N, W-1, D]; zeros when None. N is B, or the number of packed
            sequences.
        lengths: int64 [B], real tokens per row; what follows them is padding, whose output is zero.
        cu_seqlens: int32 or int64 [N + 1], borders of the sequences packed into x (B = 1).
        activation: "silu" or None.

    Returns the output and the last W-1 inputs of conv_state ++ x[:length] per sequence, in the dtype of x. Sums run
    in float32 (float64 for float64 inputs). Differentiable once in x, kernels and conv_state, through both results.

    Raises ValueError for a wrong shape, dtype or device, or an unknown option.
    """
    check_full("x", x, 3, "[B, T, D]", 2)
    check_full("kernels", kernels, 4, "[B, T, D, W]", 2)
    check_tensor("kernels", kernels, (*x.shape, kernels.shape[3]), "[B, T, D, W]", x.device)
    W = kernels.shape[3]
    check_convolution(x, W, conv_state, lengths, cu_seqlens, activation)
    check_no_tangents("dynamic_convolution", x, kernels, conv_state)
    if conv_state is not None:
        conv_state = conv_state.to(x.dtype)
    laid, place = behind_states(x, W, conv_state, cu_seqlens)
    if place is not None:
        kernels = kernels.new_zeros(1, laid.shape[1] - W + 1, *kernels.shape[2:]).index_copy(1, place, kernels)
    output = _DynamicConv.apply(laid, kernels, activation == "silu").to(x.dtype)
    output = of_tokens(output, place, lengths)
    return ShortConvOutput(output, next_conv_state(x, W, conv_state, lengths, cu_seqlens))


class _DynamicConv(torch.autograd.Function):
    """act(sum_j kernels[..., j] * x[:, t + j]) over x [B, T + W-1, D] and kernels [B, T, D, W].

    Written out because autograd would store a float32 copy of the kernels, W times the size of x; only the inputs are.
    """

    @staticmethod
    def forward(ctx, x, kernels, silu):
        ctx.save_for_backward(x, kernels)
        ctx.silu = silu
        z = _products(x, kernels)
        return F.silu(z) if silu else z.view_as(z)  # a view: see short_conv.py

    @staticmethod
    def backward(ctx, dy):
        check_first_order("dynamic_convolution")
        x, kernels = ctx.saved_tensors
        T, W = kernels.shape[1], kernels.shape[3]
        dz = torch.ops.aten.silu_backward(dy, _products(x, kernels)) if ctx.silu else dy
        dx, dkernels = torch.zeros_like(x, dtype=dy.dtype), torch.empty_like(kernels)
        for j in range(W):
            dx[:, j : j + T].addcmul_(dz, kernels[..., j].to(dy.dtype))
            dkernels[..., j] = dz * x[:, j : j + T]
        return dx.to(x.dtype), dkernels, None


def _products(x, kernels):
    T, W = kernels.shape[1], kernels.shape[3]
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x[:, :T].to(wide) * kernels[..., 0].to(wide)
    for j in range(1, W):
        z.addcmul_(x[:, j : j + T].to(wide), kernels[..., j].to(wide))
    return z
