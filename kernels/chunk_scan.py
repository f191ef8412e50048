"""The two sweeps over the chunks of a sequence: the fast weights S forwards, their cotangent dS backwards.

Per value head and chunk of C tokens, with S the state before the chunk, G the log decay summed inside it and A from
chunk_prepare (Yang, Kautz, Hatamizadeh, arXiv 2412.06464, section 3.3):

    Y = V - e^G K S        U = A (beta Y)        (Hebbian rule: U = beta V)
    O = scale e^G Q S + P U,    P_ij = scale e^{G_i - G_j} <q_i, k_j> for i >= j
    S <- e^{G_C} S + K^T (e^{G_C - G} U)

and backwards, with dS the cotangent of the state after the chunk:

    dU = P^T dO + e^{G_C - G} K dS        dY = beta A^T dU
    dS <- e^{G_C} dS + Q^T (scale e^G dO) - K^T (e^G dY)        (Hebbian rule: no dY term)

Rows of q and k are normalised in the tile, or stay as they are while rows of products are scaled by their inverse
norms: with K = diag(r) K', K S = diag(r) (K' S) and K^T X = K'^T (diag(r) X).

The columns of S are independent: a program carries [K, block_v] of them in float32 registers. So one pass over a
segment as an affine map, S -> P S + R, is the same sweep over wider columns: from [I | 0] with values [0 | V] it leaves
[P | R]. Products take operands in k's dtype, sums are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleep_ops.kernels.configs import ChunkConfig, block_size
from sleep_ops.kernels.primitives import (
    decay,
    first_chunk,
    load_decay,
    load_key_tile,
    load_rows,
    load_tile,
    pair_decay,
    pair_decay_transposed,
    row_scales,
    sequence_bounds,
    state_columns,
    store_tile,
)


@triton.jit(do_not_specialize=["T"])
def chunk_scan_kernel(
    q,
    k,
    v,
    rq,
    rk,
    G,
    beta,
    A,
    initial_state,
    output,
    states,
    final_state,
    cu_seqlens,
    chunk_offsets,
    scale,
    T,
    stride_q,
    stride_k,
    stride_v,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    USE_L2NORM: tl.constexpr,
    WIDENED: tl.constexpr,
):
    """States of one sequence, value head and column tile, chunk after chunk; A is None for the Hebbian rule.

    Reads q, k, v rows, factors rq, rk [rows, H] of those of q and k (None for ones), G, beta [rows, HV], A [rows, HV,
    C], initial_state [N, HV, K, V] or None (zero). Writes, where given, output [rows, HV, V], states [chunks, HV, K, V]
    (each chunk's S before it, in that tensor's dtype) and final_state [N, HV, K, V]. q is read for the output only.
    WIDENED: states are [P | R], [K, K + V] instead of [K, V], from [I | 0]; there is no initial_state and no output.

    Grid (N * HV * value tiles). Mirrors `one_pass` of sleep_ops/reference.py.
    """
    NV: tl.constexpr = tl.cdiv(V, BV) + (tl.cdiv(K, BV) if WIDENED else 0)
    W: tl.constexpr = K + V if WIDENED else V
    i_nh = tl.program_id(0) // NV
    i_n = i_nh // HV
    i_hv = i_nh % HV
    i_h = i_hv // (HV // H)
    start, length = sequence_bounds(i_n, cu_seqlens, T)
    chunk0 = first_chunk(i_n, chunk_offsets, T, C)

    o_i = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v, num_cols, column0, has_values = state_columns(tl.program_id(0) % NV, K, V, BV, WIDENED)
    o_state = i_nh.to(tl.int64) * K * W + column0
    if WIDENED:
        b_S = tl.where((o_k[:, None] == o_v[None, :]) & (not has_values), 1.0, 0.0)
    elif initial_state is None:
        b_S = tl.zeros([BK, BV], tl.float32)
    else:
        b_S = load_tile(initial_state + o_state, o_k, o_v, V, K, V)

    for i_t in range(0, tl.cdiv(length, C)):
        row = start + i_t * C
        num_rows = tl.minimum(length - i_t * C, C)
        if states is not None:
            o_chunk = ((chunk0 + i_t) * HV + i_hv) * K * W + column0
            store_tile(states + o_chunk, b_S, o_k, o_v, W, K, num_cols)

        b_k = load_key_tile(k + row * stride_k + i_h * K, o_i, o_k, stride_k, num_rows, K, USE_L2NORM)
        value_rows = tl.where(has_values, num_rows, 0)
        b_v = load_tile(v + row * stride_v + i_hv * V, o_i, o_v, stride_v, value_rows, V).to(tl.float32)
        b_G = load_decay(G + row * HV + i_hv, o_i, HV, num_rows)
        b_beta = load_rows(beta + row * HV + i_hv, o_i, HV, num_rows)
        b_e = decay(b_G)
        b_rk = row_scales(rk, row * H + i_h, o_i, H, num_rows)
        dtype = b_k.dtype
        if A is None:
            b_U = b_beta[:, None] * b_v
        else:
            b_kS = tl.dot(b_k, b_S.to(dtype), input_precision="ieee")
            b_A = load_tile(A + (row * HV + i_hv) * C, o_i, o_i, HV * C, num_rows, C)
            b_Y = b_beta[:, None] * (b_v - (b_e * b_rk)[:, None] * b_kS)
            b_U = tl.dot(b_A, b_Y.to(dtype), input_precision="ieee")
        b_U *= b_rk[:, None]  # from here on it only meets k

        if output is not None:
            b_q = load_key_tile(q + row * stride_q + i_h * K, o_i, o_k, stride_q, num_rows, K, USE_L2NORM)
            b_P = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * pair_decay(b_G, o_i[:, None] >= o_i[None, :])
            b_O = b_e[:, None] * tl.dot(b_q, b_S.to(dtype), input_precision="ieee")
            b_O += tl.dot(b_P.to(dtype), b_U.to(dtype), input_precision="ieee")
            b_O *= scale * row_scales(rq, row * H + i_h, o_i, H, num_rows)[:, None]
            store_tile(output + (row * HV + i_hv) * V, b_O, o_i, o_v, HV * V, num_rows, V)

        G_C = tl.load(G + (row + num_rows - 1) * HV + i_hv)
        b_W = (decay(G_C - b_G)[:, None] * b_U).to(dtype)
        b_S = decay(G_C) * b_S + tl.dot(tl.trans(b_k), b_W, input_precision="ieee")

    if final_state is not None:
        store_tile(final_state + o_state, b_S, o_k, o_v, W, K, num_cols)


@triton.jit(do_not_specialize=["T"])
def chunk_reverse_kernel(
    q,
    k,
    rq,
    rk,
    G,
    beta,
    A,
    d_output,
    d_final_state,
    d_states,
    d_initial_state,
    cu_seqlens,
    chunk_offsets,
    scale,
    T,
    stride_q,
    stride_k,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    USE_L2NORM: tl.constexpr,
):
    """Cotangents of the states of one sequence, value head and value tile, from the last chunk to the first.

    Reads what chunk_scan reads but v, d_output [rows, HV, V] and d_final_state [N, HV, K, V], each None for zero; q is
    read with d_output only. Writes d_states [chunks, HV, K, V], the cotangent of the state after each chunk, and
    d_initial_state [N, HV, K, V] where given.

    Grid (N * HV * value tiles). Mirrors the backward of `one_pass` of sleep_ops/reference.py.
    """
    NV: tl.constexpr = tl.cdiv(V, BV)
    i_nh = tl.program_id(0) // NV
    i_n = i_nh // HV
    i_hv = i_nh % HV
    i_h = i_hv // (HV // H)
    start, length = sequence_bounds(i_n, cu_seqlens, T)
    chunk0 = first_chunk(i_n, chunk_offsets, T, C)

    o_i = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(0) % NV * BV + tl.arange(0, BV)
    o_state = i_nh.to(tl.int64) * K * V
    if d_final_state is None:
        b_dS = tl.zeros([BK, BV], tl.float32)
    else:
        b_dS = load_tile(d_final_state + o_state, o_k, o_v, V, K, V)

    num_chunks = tl.cdiv(length, C)
    for i_r in range(0, num_chunks):
        i_t = num_chunks - 1 - i_r
        row = start + i_t * C
        num_rows = tl.minimum(length - i_t * C, C)
        store_tile(d_states + ((chunk0 + i_t) * HV + i_hv) * K * V, b_dS, o_k, o_v, V, K, V)

        b_G = load_decay(G + row * HV + i_hv, o_i, HV, num_rows)
        G_C = tl.load(G + (row + num_rows - 1) * HV + i_hv)
        b_e = decay(b_G)
        b_k = load_key_tile(k + row * stride_k + i_h * K, o_i, o_k, stride_k, num_rows, K, USE_L2NORM)
        b_rk = row_scales(rk, row * H + i_h, o_i, H, num_rows)
        dtype = b_k.dtype
        b_dS_next = decay(G_C) * b_dS

        if d_output is not None:
            b_q = load_key_tile(q + row * stride_q + i_h * K, o_i, o_k, stride_q, num_rows, K, USE_L2NORM)
            b_dO = load_tile(d_output + (row * HV + i_hv) * V, o_i, o_v, HV * V, num_rows, V)
            b_rq = scale * row_scales(rq, row * H + i_h, o_i, H, num_rows)
            b_dQ = ((b_rq * b_e)[:, None] * b_dO.to(tl.float32)).to(dtype)
            b_dS_next += tl.dot(tl.trans(b_q), b_dQ, input_precision="ieee")

        if A is not None:
            b_dU = (b_rk * decay(G_C - b_G))[:, None] * tl.dot(b_k, b_dS.to(dtype), input_precision="ieee")
            if d_output is not None:
                b_decay = pair_decay_transposed(b_G, o_i[None, :] >= o_i[:, None])
                b_decay *= b_rk[:, None] * b_rq[None, :]
                b_PT = b_decay * tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
                b_dU += tl.dot(b_PT.to(dtype), b_dO.to(dtype), input_precision="ieee")
            b_A = load_tile(A + (row * HV + i_hv) * C, o_i, o_i, HV * C, num_rows, C)
            b_beta = load_rows(beta + row * HV + i_hv, o_i, HV, num_rows)
            b_dX = tl.dot(tl.trans(b_A), b_dU.to(dtype), input_precision="ieee")
            b_dkS = ((b_e * b_beta * b_rk)[:, None] * b_dX).to(dtype)
            b_dS_next -= tl.dot(tl.trans(b_k), b_dkS, input_precision="ieee")
        b_dS = b_dS_next

    if d_initial_state is not None:
        store_tile(d_initial_state + o_state, b_dS, o_k, o_v, V, K, V)


def chunk_scan(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    row_strides: tuple[int, int, int],
    norms: tuple[Tensor | None, Tensor | None],
    G: Tensor,
    beta: Tensor,
    A: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_offsets: Tensor | None,
    *,
    scale: float,
    use_qk_l2norm: bool,
    config: ChunkConfig,
    widened: bool = False,
    num_chunks: int | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Output [B, T, HV, V] in v's dtype (None without q) and final state [N, HV, K, V] float32.

    With `num_chunks` (their bound over all sequences) the states before each chunk, [num_chunks, HV, K, V] in k's
    dtype, are returned instead of the final state and there is no output. `widened` (without q and initial_state):
    states are [P | R], [K, K + V]. Inputs as chunk_prepare takes and returns them; row_strides are those of q, k and v.
    norms: inverse norms of q and k [B, T, H] by which rows of products are scaled; None where tiles are normalised.
    """
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    width = K + V if widened else V
    output = final_state = states = None
    if num_chunks is None:
        final_state = torch.empty(N, HV, K, width, dtype=torch.float32, device=k.device)
        if q is not None:
            output = torch.empty(B, T, HV, V, dtype=v.dtype, device=k.device)
    else:
        states = torch.empty(num_chunks, HV, K, width, dtype=k.dtype, device=k.device)
    block_v = config.scan.block_v
    tiles = triton.cdiv(V, block_v) + (triton.cdiv(K, block_v) if widened else 0)
    chunk_scan_kernel[(N * HV * tiles,)](
        q,
        k,
        v,
        *norms,
        G,
        beta,
        A,
        initial_state,
        output,
        states,
        final_state,
        cu_seqlens,
        chunk_offsets,
        scale,
        T,
        *row_strides,
        H=H,
        HV=HV,
        K=K,
        V=V,
        C=config.chunk,
        BK=block_size(K),
        BV=block_v,
        USE_L2NORM=use_qk_l2norm and norms[1] is None,
        WIDENED=widened,
        num_warps=config.scan.warps,
        num_stages=config.scan.stages,
    )
    return output, final_state if num_chunks is None else states


def chunk_reverse(
    q: Tensor | None,
    k: Tensor,
    row_strides: tuple[int, int, int],
    norms: tuple[Tensor | None, Tensor | None],
    G: Tensor,
    beta: Tensor,
    A: Tensor | None,
    d_output: Tensor | None,
    d_final_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_offsets: Tensor | None,
    *,
    width: int,
    scale: float,
    use_qk_l2norm: bool,
    need_initial: bool,
    num_chunks: int,
    config: ChunkConfig,
) -> tuple[Tensor, Tensor | None]:
    """State cotangents after each chunk [num_chunks, HV, K, V] in k's dtype, and of the initial state where needed.

    V is the `width` of the state, which may be a widened one. norms are those of chunk_scan. d_output [B, T, HV, V] and
    d_final_state [N, HV, K, V] float32 are contiguous, or None for zero.
    """
    B, T, H, K = k.shape
    HV, V = G.shape[2], width
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    d_states = torch.empty(num_chunks, HV, K, V, dtype=k.dtype, device=k.device)
    d_initial = torch.empty(N, HV, K, V, dtype=torch.float32, device=k.device) if need_initial else None
    block_v = config.reverse.block_v
    chunk_reverse_kernel[(N * HV * triton.cdiv(V, block_v),)](
        q,
        k,
        *norms,
        G,
        beta,
        A,
        d_output,
        d_final_state,
        d_states,
        d_initial,
        cu_seqlens,
        chunk_offsets,
        scale,
        T,
        *row_strides[:2],
        H=H,
        HV=HV,
        K=K,
        V=V,
        C=config.chunk,
        BK=block_size(K),
        BV=block_v,
        USE_L2NORM=use_qk_l2norm and norms[1] is None,
        num_warps=config.reverse.warps,
        num_stages=config.reverse.stages,
    )
    return d_states, d_initial
