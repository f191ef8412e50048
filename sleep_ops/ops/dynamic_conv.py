"""Causal depthwise convolution whose filters are given per token, with a carried tail and SiLU.

    y_t = act(sum_{j<W} kernels_t[:, W-1-j] * x_{t-j})

Gu et al., "Jet-Nemotron", arXiv 2508.15884, where a small network makes the kernels. As in `short_convolution`, what
stands before the first token comes from the tail, and sequences may be rows of a batch, rows with right padding
(`lengths`), or packed in one row (`cu_seqlens`). In PyTorch alone, on every device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops.ops.short_conv import ShortConvOutput, carried_tail
from sleep_ops.validation import (
    check_cu_seqlens,
    check_first_order,
    check_full,
    check_lengths,
    check_no_tangents,
    check_tensor,
)


def dynamic_convolution(
    x: Tensor,
    kernels: Tensor,
    *,
    tail: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = "silu",
) -> ShortConvOutput:
    """Convolve every channel of x causally, each token with filters of its own.

    Args:
        x: inputs [B, T, D].
        kernels: filters [B, T, D, W], in any floating dtype; the last tap meets the token itself.
        tail: the W-1 inputs before x, oldest first, [N, W-1, D]; zeros when None. N is B, or the number of packed
            sequences.
        lengths: int64 [B], real tokens per row; what follows them is padding, whose output is zero.
        cu_seqlens: int32 or int64 [N + 1], borders of the sequences packed into x (B = 1).
        activation: "silu" or None.

    Returns the output and the last W-1 inputs of tail ++ x[:length] per sequence, in the dtype of x. Sums run in
    float32 (float64 for float64 inputs). Differentiable once in x, kernels and tail, through both results.

    Raises ValueError for a wrong shape, dtype or device, or an unknown option.
    """
    _check(x, kernels, tail, lengths, cu_seqlens, activation)
    check_no_tangents("dynamic_convolution", x, kernels, tail)
    B, T, D = x.shape
    W = kernels.shape[3]
    kept, silu = W - 1, activation == "silu"
    if tail is not None:
        tail = tail.to(x.dtype)
    carried = carried_tail(x, W, tail, lengths, cu_seqlens)
    if cu_seqlens is None:
        before = x.new_zeros(B, kept, D) if tail is None else tail
        output = _DynamicConv.apply(torch.cat([before, x], dim=1), kernels, silu)
        if lengths is not None:
            padded = torch.arange(T, device=x.device) >= lengths[:, None]
            output = output.masked_fill(padded[..., None], 0)
        return ShortConvOutput(output, carried)

    # Every sequence is laid down behind its tail: token t of sequence n stands behind n + 1 of them.
    num_seqs = cu_seqlens.shape[0] - 1
    token = torch.arange(T, device=x.device)
    place = token + torch.searchsorted(cu_seqlens, token.to(cu_seqlens.dtype), right=True) * kept
    laid = x.new_zeros(T + num_seqs * kept, D).index_copy(0, place, x[0])
    if tail is not None:
        slots = (cu_seqlens[:-1].long() + torch.arange(num_seqs, device=x.device) * kept)[:, None]
        slots = slots + torch.arange(kept, device=x.device)
        laid = laid.index_copy(0, slots.flatten(), tail.reshape(-1, D))
    spread = kernels.new_zeros(laid.shape[0] - kept, D, W).index_copy(0, place - kept, kernels[0])
    output = _DynamicConv.apply(laid[None], spread[None], silu)
    return ShortConvOutput(output[:, place - kept], carried)


class _DynamicConv(torch.autograd.Function):
    """act(sum_j kernels[..., j] * x[:, t + j]) over x [B, T + W-1, D] and kernels [B, T, D, W].

    Written out because autograd would store a float32 copy of the kernels, W times the size of x; only the inputs are.
    """

    @staticmethod
    def forward(ctx, x, kernels, silu):
        ctx.save_for_backward(x, kernels)
        ctx.silu = silu
        z = _products(x, kernels)
        return (F.silu(z) if silu else z).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        check_first_order("dynamic_convolution")
        x, kernels = ctx.saved_tensors
        T, W = kernels.shape[1], kernels.shape[3]
        wide = torch.promote_types(x.dtype, torch.float32)
        dz = dy.to(wide)
        if ctx.silu:
            dz = torch.ops.aten.silu_backward(dz, _products(x, kernels))
        dx, dkernels = torch.zeros_like(x, dtype=wide), torch.empty_like(kernels)
        for j in range(W):
            dx[:, j : j + T].addcmul_(dz, kernels[..., j].to(wide))
            dkernels[..., j] = dz * x[:, j : j + T]
        return dx.to(x.dtype), dkernels, None


def _products(x, kernels):
    T, W = kernels.shape[1], kernels.shape[3]
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x[:, :T].to(wide) * kernels[..., 0].to(wide)
    for j in range(1, W):
        z.addcmul_(x[:, j : j + T].to(wide), kernels[..., j].to(wide))
    return z


def _check(x, kernels, tail, lengths, cu_seqlens, activation):
    check_full("x", x, 3, "[B, T, D]", 2)
    B, T, D = x.shape
    check_full("kernels", kernels, 4, "[B, T, D, W]", 2)
    check_tensor("kernels", kernels, (B, T, D, kernels.shape[3]), "[B, T, D, W]", x.device)
    if activation is not None and activation != "silu":
        raise ValueError(f"activation: expected 'silu' or None, got {activation!r}")
    num_seqs = B
    if cu_seqlens is not None:
        if lengths is not None:
            raise ValueError("lengths: expected None together with cu_seqlens, got both")
        check_cu_seqlens(cu_seqlens, B, T, x.device)
        num_seqs = cu_seqlens.shape[0] - 1
    elif lengths is not None:
        check_lengths(lengths, B, T, x.device)
    if tail is not None:
        check_tensor("tail", tail, (num_seqs, kernels.shape[3] - 1, D), "[N, W-1, D]", x.device)
