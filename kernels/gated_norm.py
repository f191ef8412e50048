"""Gated RMS normalisation of rows: forward, and backward with a deterministic weight gradient.

r = rsqrt(mean(x^2) + eps)      n = r x      y = n w silu(gate)
dn = dy w silu(gate)            dx = r (dn - n mean(n dn))
dgate = dy n w silu'(gate)      dw = sum over rows of dy n silu(gate)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sleep_ops.kernels.primitives import masked_sum

TILE = 2048  # elements a program holds: rows per block times the padded row length
MAX_PARTIALS = 1024


class Tile(NamedTuple):
    """Rows of a block, their padded length, and warps."""

    BR: int
    BV: int
    warps: int


@triton.jit
def _load_rows(p, o_r, o_v, num_rows, V):
    m = (o_r < num_rows)[:, None] & (o_v < V)[None, :]
    return tl.load(p + o_r[:, None] * V + o_v[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(p, b_x, o_r, o_v, num_rows, V):
    m = (o_r < num_rows)[:, None] & (o_v < V)[None, :]
    tl.store(p + o_r[:, None] * V + o_v[None, :], b_x.to(p.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_rows"])
def gated_norm_forward_kernel(x, gate, weight, y, num_rows, eps, V, tile: tl.constexpr):
    """y. Grid (row blocks). Reads x, gate [R, V] and weight [V]; mirrors `_gated_norm_torch`."""
    o_r = tl.program_id(0).to(tl.int64) * tile.BR + tl.arange(0, tile.BR)
    o_v = tl.arange(0, tile.BV)
    b_x = _load_rows(x, o_r, o_v, num_rows, V)
    b_gate = _load_rows(gate, o_r, o_v, num_rows, V)
    b_w = tl.load(weight + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]
    b_r = tl.rsqrt(tl.sum(b_x * b_x, 1) / V + eps)[:, None]
    _store_rows(y, b_x * b_r * b_w * b_gate * tl.sigmoid(b_gate), o_r, o_v, num_rows, V)


@triton.jit(do_not_specialize=["num_rows", "blocks"])
def gated_norm_backward_kernel(dy, x, gate, weight, dx, dgate, partial, num_rows, blocks, eps, V, tile: tl.constexpr):
    """dx, dgate, and a program's sum of dw in `partial` [programs, V]. Grid (programs), each over `blocks` of rows."""
    o_v = tl.arange(0, tile.BV)
    b_w = tl.load(weight + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]
    b_dw = tl.full([tile.BV], 0.0, tl.float32)
    for i in range(0, blocks):
        o_r = (i * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * tile.BR + tl.arange(0, tile.BR)
        b_dy = _load_rows(dy, o_r, o_v, num_rows, V)
        b_x = _load_rows(x, o_r, o_v, num_rows, V)
        b_gate = _load_rows(gate, o_r, o_v, num_rows, V)
        b_r = tl.rsqrt(tl.sum(b_x * b_x, 1) / V + eps)[:, None]
        b_n = b_x * b_r
        b_s = tl.sigmoid(b_gate)
        b_dn = b_dy * b_w * b_gate * b_s
        b_dw += masked_sum(b_dy * b_n * b_gate * b_s, (o_r < num_rows)[:, None], 0)
        b_mean = masked_sum(b_n * b_dn, (o_v < V)[None, :], 1) / V
        _store_rows(dx, b_r * (b_dn - b_n * b_mean[:, None]), o_r, o_v, num_rows, V)
        _store_rows(dgate, b_dy * b_n * b_w * b_s * (1.0 + b_gate * (1.0 - b_s)), o_r, o_v, num_rows, V)
    tl.store(partial + tl.program_id(0).to(tl.int64) * V + o_v, b_dw, mask=o_v < V)


def forward(x, gate, weight, eps):
    """y [R, V] in the dtype of x; x, gate [R, V] and weight [V] contiguous."""
    R, V = x.shape
    y = torch.empty_like(x)
    tile = tile_of(V)
    gated_norm_forward_kernel[(triton.cdiv(R, tile.BR),)](x, gate, weight, y, R, eps, V, tile, num_warps=tile.warps)
    return y


def backward(dy, x, gate, weight, eps):
    """dx, dgate, dweight, each in the dtype of what it belongs to."""
    R, V = x.shape
    dx, dgate = torch.empty_like(x), torch.empty_like(gate)
    tile = tile_of(V)
    blocks = triton.cdiv(R, tile.BR)
    programs = min(blocks, MAX_PARTIALS)
    partial = torch.empty(programs, V, dtype=torch.float32, device=x.device)
    gated_norm_backward_kernel[(programs,)](
        *(dy, x, gate, weight, dx, dgate, partial, R, triton.cdiv(blocks, programs), eps, V, tile),
        num_warps=tile.warps,
    )
    return dx, dgate, partial.sum(0).to(weight.dtype)


def tile_of(V):
    """For rows of V elements: at most 16 elements a thread up to V = 8192."""
    BV = triton.next_power_of_2(V)
    return Tile(max(TILE // BV, 1), BV, min(max(BV // 512, 4), 16))
