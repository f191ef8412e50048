"""Causal depthwise short convolution with a carried state and SiLU.

    y_t = act(bias + sum_{j<W} weight[:, W-1-j] * x_{t-j})

Inputs before the first token come from the conv_state: the last W-1 inputs of whatever ran before, zeros when there was
nothing. Sequences may be rows of a batch, rows with right padding (`lengths`), or packed in one row (`cu_seqlens`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops.checks import check_choice
from sleep_ops.ops.dispatch import choose_impl
from sleep_ops.ops.launching import contiguous, differentiable
from sleep_ops.validation import (
    KERNEL_IMPLS,
    check_cu_seqlens,
    check_first_order,
    check_full,
    check_lengths,
    check_no_tangents,
    check_tensor,
)


class ShortConvOutput(NamedTuple):
    """Convolved tokens [B, T, D] and the new conv_state [N, W-1, D], both in the dtype of x."""

    output: Tensor
    conv_state: Tensor


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    conv_state: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = "silu",
    impl: str = "auto",
) -> ShortConvOutput:
    """Convolve every channel of x causally with its own filter of W taps.

    Args:
        x: inputs [B, T, D].
        weight: filters [D, W]; the last tap meets the current token.
        bias: [D] or None.
        conv_state: the W-1 inputs before x, oldest first, [N, W-1, D]; zeros when None. N is B, or the number of packed
            sequences.
        lengths: int64 [B], real tokens per row; what follows them is padding, whose output is zero.
        cu_seqlens: int32 or int64 [N + 1], borders of the sequences packed into x (B = 1).
        activation: "silu" or None.
        impl: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "torch".

    Returns the output and the last W-1 inputs of conv_state ++ x[:length] per sequence. Sums run in float32 (float64
    for float64 inputs). Differentiable once in x, weight, bias and conv_state, through both results.

    Raises ValueError for a wrong shape, dtype or device, or an unknown option.
    """
    check_full("x", x, 3, "[B, T, D]", 2)
    D = x.shape[2]
    check_full("weight", weight, 2, "[D, W]")
    check_tensor("weight", weight, (D, weight.shape[1]), "[D, W]", x.device)
    if bias is not None:
        check_tensor("bias", bias, (D,), "[D]", x.device)
    check_choice("impl", impl, KERNEL_IMPLS)
    check_convolution(x, weight.shape[1], conv_state, lengths, cu_seqlens, activation)
    check_no_tangents("short_convolution", x, weight, bias, conv_state)
    if conv_state is not None:
        conv_state = conv_state.to(x.dtype)
    silu = activation == "silu"
    if x.numel() and choose_impl(impl, x) == "triton":
        output = short_conv(x, weight, bias, conv_state if weight.shape[1] > 1 else None, lengths, cu_seqlens, silu)
    else:
        output = _short_conv_torch(x, weight, bias, conv_state, lengths, cu_seqlens, silu)
    return ShortConvOutput(output, next_conv_state(x, weight.shape[1], conv_state, lengths, cu_seqlens))


def next_conv_state(
    x: Tensor, width: int, conv_state: Tensor | None, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The last width-1 inputs of conv_state ++ x[:length] of every sequence, [N, width-1, D]; arguments as above."""
    B, T, D = x.shape
    kept = width - 1
    if lengths is None and cu_seqlens is None:
        if T >= kept:
            return x[:, T - kept :].clone()
        return torch.cat([x.new_zeros(B, kept - T, D) if conv_state is None else conv_state[:, T:], x], dim=1)

    if cu_seqlens is None:
        starts = torch.arange(B, device=x.device) * T
    else:
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    position = lengths[:, None] - kept + torch.arange(kept, device=x.device)
    from_x = (position >= 0)[..., None]
    if B * T == 0:
        x = x.new_zeros(1, 1, D) + x.sum()  # a row to point at, which nobody reads
        B = T = 1
    rows = x.reshape(B * T, D)[(starts[:, None] + position).clamp(0, B * T - 1)]
    if conv_state is None:
        return rows.masked_fill(~from_x, 0)
    index = (position + kept).clamp(max=max(kept - 1, 0))[..., None].expand(-1, -1, D)
    return torch.where(from_x, rows, conv_state.gather(1, index))


def behind_states(
    x: Tensor, width: int, conv_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Every sequence of x behind its state, [B, T + width-1, D], and None; of packed sequences [1, T + N (width-1), D],
    and the place of every token's output among the outputs over that.
    """
    if cu_seqlens is not None:
        return _packed_behind_states(x, width - 1, conv_state, cu_seqlens)
    B, _, D = x.shape
    return torch.cat([x.new_zeros(B, width - 1, D) if conv_state is None else conv_state, x], dim=1), None


def _packed_behind_states(x, kept, conv_state, cu_seqlens):
    (_, T, D), num_seqs = x.shape, cu_seqlens.numel() - 1
    token = torch.arange(T, device=x.device)
    # Token t of sequence n stands behind n + 1 states.
    place = token + torch.searchsorted(cu_seqlens, token.to(cu_seqlens.dtype), right=True) * kept
    laid = x.new_zeros(1, T + num_seqs * kept, D).index_copy(1, place, x)
    if conv_state is not None:
        slots = (cu_seqlens[:-1].long() + torch.arange(num_seqs, device=x.device) * kept)[:, None]
        slots = slots + torch.arange(kept, device=x.device)
        laid = laid.index_copy(1, slots.flatten(), conv_state.reshape(1, -1, D))
    return laid, place - kept


def of_tokens(output: Tensor, place: Tensor | None, lengths: Tensor | None) -> Tensor:
    """From outputs over `behind_states`, those of the tokens, zero at padding."""
    if place is not None:
        return output[:, place]
    if lengths is not None:
        padded = torch.arange(output.shape[1], device=output.device) >= lengths[:, None]
        return output.masked_fill(padded[..., None], 0)
    return output


def _short_conv_torch(x, weight, bias, conv_state, lengths, cu_seqlens, silu):
    """The convolution in PyTorch: every sequence is laid down behind its state, then W shifted products are summed."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    laid, place = behind_states(x, weight.shape[1], conv_state, cu_seqlens)
    bias = None if bias is None else bias.to(dtype)
    output = _DepthwiseConv.apply(laid.to(dtype), weight.to(dtype), bias, silu)
    return of_tokens(output, place, lengths).to(x.dtype)


class _DepthwiseConv(torch.autograd.Function):
    """act(bias + sum_j weight[:, j] * x[:, t + j]) over x [B, T + W-1, D].

    Written out because autograd of the shifted products pads and adds a tensor per tap, twice the time on a CPU.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, silu):
        W = weight.shape[1]
        T = x.shape[1] - W + 1
        taps = weight.t().contiguous()
        z = x[:, :T] * taps[0]
        for j in range(1, W):
            z.addcmul_(x[:, j : j + T], taps[j])
        if bias is not None:
            z += bias
        ctx.save_for_backward(x, taps, z if silu else None)
        ctx.has_bias = bias is not None
        return F.silu(z) if silu else z.view_as(z)  # torch 2.11 compiles a result changed in place without its gradient

    @staticmethod
    def backward(ctx, dy):
        check_first_order("short_convolution")
        x, taps, z = ctx.saved_tensors
        W = taps.shape[0]
        T = dy.shape[1]
        dz = dy if z is None else torch.ops.aten.silu_backward(dy, z)
        dx, dtaps = torch.zeros_like(x), torch.empty_like(taps)
        for j in range(W):
            dx[:, j : j + T].addcmul_(dz, taps[j])
            dtaps[j] = (dz * x[:, j : j + T]).sum((0, 1))
        return dx, dtaps.t(), dz.sum((0, 1)) if ctx.has_bias else None, None


def _backward(d_output, x, weight, bias, conv_state, lengths, cu_seqlens, silu):
    from sleep_ops.kernels.short_conv import backward

    return backward(*contiguous(d_output, x, weight, bias, conv_state, lengths, cu_seqlens), silu)


def _shapes(x, weight, bias, conv_state, lengths, cu_seqlens, silu):
    return x.new_empty(x.shape)


@differentiable(
    "short_convolution", outputs="output", gradients="x weight bias conv_state", shapes=_shapes, backward=_backward
)
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> Tensor:
    """The convolved tokens by `kernels/short_conv.py`; arguments as in `short_convolution`, already checked."""
    from sleep_ops.kernels.short_conv import forward

    return forward(*contiguous(x, weight, bias, conv_state, lengths, cu_seqlens), silu)


def check_convolution(x, width, conv_state, lengths, cu_seqlens, activation) -> None:
    """What every convolution of x [B, T, D] with `width` taps asks of its other arguments."""
    B, T, D = x.shape
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
    if conv_state is not None:
        check_tensor("conv_state", conv_state, (num_seqs, width - 1, D), "[N, W-1, D]", x.device)
