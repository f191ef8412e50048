"""Causal depthwise short convolution with a carried state: forward, and backward with deterministic sums.

    z_t = bias + sum_{j<W} w_{W-1-j} x_{t-j}        y = silu(z), or z
    dz = dy silu'(z)    dx_t = sum_{j<W} w_{W-1-j} dz_{t+j}    dw_{W-1-j} = sum_t dz_t x_{t-j}    dbias = sum_t dz_t

Inputs at positions -1 .. -(W-1) of a sequence are its state, whose gradient is dx there. Tokens are flattened to rows
[R, D] with R = B * T; rows of a batch, rows with right padding (`lengths`) and packed sequences (`cu_seqlens`) differ
only in where a sequence starts and ends. The backward recomputes z and keeps dz, in float32, for the taps to read.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sleep_ops.kernels.primitives import masked_sum

BLOCK_T, BLOCK_D, NUM_WARPS = 16, 64, 4
SUM_BLOCK_T = 8  # where weight gradients are summed: fewer rows, for the registers
PARTIALS = 2048  # programs that sum weight gradients, each over every n-th block of its channels


class Inputs(NamedTuple):
    """x [R, D], weight [D, W], bias [D] or None, and the conv_state [N, W - 1, D] or None for zero."""

    x: Any
    weight: Any
    bias: Any
    conv_state: Any


class Borders(NamedTuple):
    """Where sequences lie; all None for rows of T tokens.

    seq_ids, cu_seqlens: [R] and [N + 1], of packed ones, the sequence of each token and where each begins.
    lengths: [N], of rows with right padding.
    """

    seq_ids: Any
    cu_seqlens: Any
    lengths: Any


class Sizes(NamedTuple):
    """Taps, tiles of tokens and channels, and where weights are summed one of more than W rows; whether y = silu(z)."""

    W: int
    BT: int
    BD: int
    BW: int = 0
    SILU: bool = False


@triton.jit
def _locate(o_r, num_rows, T, borders):
    """Sequence, its first row and number of real tokens, and the position inside it, of token rows o_r (int64).

    Rows past the last one stand right behind its sequence's last token, so that what they read is masked or finite.
    """
    m_r = o_r < num_rows
    o_r = tl.minimum(o_r, num_rows - 1)
    if borders.cu_seqlens is None:
        i_n = o_r // T
        start = i_n * T
        length = i_n * 0 + T
        if borders.lengths is not None:
            length = tl.minimum(length, tl.load(borders.lengths + i_n))
    else:
        i_n = tl.load(borders.seq_ids + o_r)
        start = tl.load(borders.cu_seqlens + i_n).to(tl.int64)
        length = tl.load(borders.cu_seqlens + i_n + 1).to(tl.int64) - start
    return i_n, start, length, tl.where(m_r, o_r - start, length)


@triton.jit
def _load_input(inputs, i_n, start, length, pos, o_d, D, W: tl.constexpr):
    """Inputs at positions pos, float32: tokens from 0 on, the state before, zero elsewhere."""
    m_d = (o_d < D)[None, :]
    m_x = ((pos >= 0) & (pos < length))[:, None] & m_d
    b_x = tl.load(inputs.x + (start + pos)[:, None] * D + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    if inputs.conv_state is not None:
        m_t = ((pos < 0) & (pos > -W))[:, None] & m_d
        o_t = i_n * (W - 1) + W - 1 + pos
        b_x += tl.load(inputs.conv_state + o_t[:, None] * D + o_d[None, :], mask=m_t, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def _load_tap(weight, i_w, o_d, D, W: tl.constexpr):
    return tl.load(weight + o_d * W + i_w, mask=o_d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _convolve(inputs, i_n, start, length, pos, o_d, D, W: tl.constexpr):
    """z at positions pos."""
    b_z = _load_input(inputs, i_n, start, length, pos, o_d, D, W) * _load_tap(inputs.weight, W - 1, o_d, D, W)
    for j in tl.static_range(1, W):
        b_x = _load_input(inputs, i_n, start, length, pos - j, o_d, D, W)
        b_z += b_x * _load_tap(inputs.weight, W - 1 - j, o_d, D, W)
    if inputs.bias is not None:
        b_z += tl.load(inputs.bias + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    return b_z


@triton.jit
def _x_gradient(dz, weight, start, length, pos, o_d, D, sizes: tl.constexpr):
    """dx at positions pos."""
    W: tl.constexpr = sizes.W
    b_dx = tl.full([sizes.BT, sizes.BD], 0.0, tl.float32)
    for j in tl.static_range(0, W):
        m = ((pos + j >= 0) & (pos + j < length))[:, None] & (o_d < D)[None, :]
        b_dz = tl.load(dz + (start + pos + j)[:, None] * D + o_d[None, :], mask=m, other=0.0)
        b_dx += b_dz * _load_tap(weight, W - 1 - j, o_d, D, W)
    return b_dx


@triton.jit(do_not_specialize=["T", "num_rows"])
def short_conv_forward_kernel(inputs, y, borders, num_rows, T, D, sizes: tl.constexpr):
    """y = act(z). Grid (row blocks, channel blocks). Reads inputs; writes y. `_short_conv_torch`."""
    o_r = tl.program_id(0).to(tl.int64) * sizes.BT + tl.arange(0, sizes.BT)
    o_d = tl.program_id(1) * sizes.BD + tl.arange(0, sizes.BD)
    i_n, start, length, pos = _locate(o_r, num_rows, T, borders)
    b_y = _convolve(inputs, i_n, start, length, pos, o_d, D, sizes.W)
    if sizes.SILU:
        b_y *= tl.sigmoid(b_y)
    b_y = tl.where((pos < length)[:, None], b_y, 0.0)
    m_y = (o_r < num_rows)[:, None] & (o_d < D)[None, :]
    tl.store(y + o_r[:, None] * D + o_d[None, :], b_y.to(y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["T", "num_rows", "blocks"])
def short_conv_z_backward_kernel(dy, inputs, dz, partial, borders, num_rows, blocks, T, D, sizes: tl.constexpr):
    """dz (zero at padding), and a program's sums of dw (rows 0 .. W-1) and dbias (row W) in `partial` [n, W + 1, D].

    Grid (n, channel blocks), each over `blocks` of rows. Reads dy and inputs.
    """
    W: tl.constexpr = sizes.W
    o_d = tl.program_id(1) * sizes.BD + tl.arange(0, sizes.BD)
    o_w = tl.arange(0, sizes.BW)
    m_d = o_d < D
    b_sums = tl.full([sizes.BW, sizes.BD], 0.0, tl.float32)
    for i in range(0, blocks):
        o_r = (i * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * sizes.BT + tl.arange(0, sizes.BT)
        i_n, start, length, pos = _locate(o_r, num_rows, T, borders)
        p_rows = o_r[:, None] * D + o_d[None, :]
        m_t = (pos < length)[:, None]
        m_y = m_t & m_d[None, :]
        b_dz = tl.load(dy + p_rows, mask=m_y, other=0.0).to(tl.float32)
        if sizes.SILU:
            b_z = _convolve(inputs, i_n, start, length, pos, o_d, D, W)
            b_s = tl.sigmoid(b_z)
            b_dz *= b_s * (1.0 + b_z * (1.0 - b_s))
        tl.store(dz + p_rows, b_dz, mask=(o_r < num_rows)[:, None] & m_d[None, :])
        for j in tl.static_range(0, W):
            b_x = _load_input(inputs, i_n, start, length, pos - j, o_d, D, W)
            b_sums += tl.where((o_w == W - 1 - j)[:, None], masked_sum(b_dz * b_x, m_t, 0)[None, :], 0.0)
        b_sums += tl.where((o_w == W)[:, None], masked_sum(b_dz, m_t, 0)[None, :], 0.0)
    p_partial = partial + (tl.program_id(0).to(tl.int64) * (W + 1) + o_w[:, None]) * D + o_d[None, :]
    tl.store(p_partial, b_sums, mask=(o_w <= W)[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["T", "num_rows"])
def short_conv_x_backward_kernel(dz, weight, dx, borders, num_rows, T, D, sizes: tl.constexpr):
    """dx. Grid (row blocks, channel blocks). Reads dz, weight."""
    o_r = tl.program_id(0).to(tl.int64) * sizes.BT + tl.arange(0, sizes.BT)
    o_d = tl.program_id(1) * sizes.BD + tl.arange(0, sizes.BD)
    i_n, start, length, pos = _locate(o_r, num_rows, T, borders)
    b_dx = _x_gradient(dz, weight, start, length, pos, o_d, D, sizes)
    m = (o_r < num_rows)[:, None] & (o_d < D)[None, :]
    tl.store(dx + o_r[:, None] * D + o_d[None, :], b_dx.to(dx.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["T"])
def short_conv_state_backward_kernel(dz, weight, dconv_state, borders, T, D, sizes: tl.constexpr):
    """dconv_state: dx at positions -(W-1) .. -1. Grid (sequences, channel blocks); BT >= W - 1."""
    o_t = tl.arange(0, sizes.BT)
    o_d = tl.program_id(1) * sizes.BD + tl.arange(0, sizes.BD)
    i_n = tl.program_id(0).to(tl.int64)
    if borders.cu_seqlens is None:
        start = i_n * T
        length = i_n * 0 + T
        if borders.lengths is not None:
            length = tl.minimum(length, tl.load(borders.lengths + i_n))
    else:
        start = tl.load(borders.cu_seqlens + i_n).to(tl.int64)
        length = tl.load(borders.cu_seqlens + i_n + 1).to(tl.int64) - start
    pos = o_t.to(tl.int64) - (sizes.W - 1)
    b_dx = _x_gradient(dz, weight, start, length, pos, o_d, D, sizes)
    m = (pos < 0)[:, None] & (o_d < D)[None, :]
    o_row = i_n * (sizes.W - 1) + o_t
    tl.store(dconv_state + o_row[:, None] * D + o_d[None, :], b_dx.to(dconv_state.dtype.element_ty), mask=m)


def forward(x, weight, bias, conv_state, lengths, cu_seqlens, silu):
    """y [B, T, D] in the dtype of x. All tensors contiguous; shapes as in `short_convolution`."""
    B, T, D = x.shape
    y = torch.empty_like(x)
    grid = (triton.cdiv(B * T, BLOCK_T), triton.cdiv(D, BLOCK_D))
    inputs, borders = Inputs(x, weight, bias, conv_state), Borders(_sequence_ids(cu_seqlens, T), cu_seqlens, lengths)
    sizes = Sizes(weight.shape[1], BLOCK_T, BLOCK_D, SILU=silu)
    short_conv_forward_kernel[grid](inputs, y, borders, B * T, T, D, sizes, num_warps=NUM_WARPS)
    return y


def backward(dy, x, weight, bias, conv_state, lengths, cu_seqlens, silu):
    """dx, dweight [D, W], dbias [D] and dconv_state, each in the dtype of what it belongs to, or None with it."""
    B, T, D = x.shape
    W = weight.shape[1]
    blocks_d = triton.cdiv(D, BLOCK_D)
    blocks_t = triton.cdiv(B * T, BLOCK_T)
    sum_blocks = triton.cdiv(B * T, SUM_BLOCK_T)
    programs = min(sum_blocks, max(PARTIALS // blocks_d, 1))
    borders = Borders(_sequence_ids(cu_seqlens, T), cu_seqlens, lengths)
    dz = torch.empty(B, T, D, dtype=torch.float32, device=x.device)
    partial = torch.empty(programs, W + 1, D, dtype=torch.float32, device=x.device)
    sizes = Sizes(W, SUM_BLOCK_T, BLOCK_D, triton.next_power_of_2(W + 1), silu)
    inputs, blocks = Inputs(x, weight, bias, conv_state), triton.cdiv(sum_blocks, programs)
    short_conv_z_backward_kernel[(programs, blocks_d)](
        dy, inputs, dz, partial, borders, B * T, blocks, T, D, sizes, num_warps=NUM_WARPS
    )
    dx = torch.empty_like(x)
    sizes = Sizes(W, BLOCK_T, BLOCK_D)
    short_conv_x_backward_kernel[(blocks_t, blocks_d)](dz, weight, dx, borders, B * T, T, D, sizes, num_warps=NUM_WARPS)
    dconv_state = None
    if conv_state is not None:
        dconv_state = torch.empty_like(conv_state)
        sizes = Sizes(W, triton.next_power_of_2(W - 1), BLOCK_D)
        short_conv_state_backward_kernel[(conv_state.shape[0], blocks_d)](
            dz, weight, dconv_state, borders, T, D, sizes, num_warps=NUM_WARPS
        )
    dweight = partial[:, :W].sum(0).t().to(weight.dtype).contiguous()
    dbias = None if bias is None else partial[:, W].sum(0).to(bias.dtype)
    return dx, dweight, dbias, dconv_state


def _sequence_ids(cu_seqlens, T):
    """Sequence of every packed token, int64 [T]: the last one that starts at or before it, so never an empty one."""
    if cu_seqlens is None:
        return None
    token = torch.arange(T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:-1].contiguous(), token, right=True)
