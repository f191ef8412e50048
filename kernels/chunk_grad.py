"""All gradients of a chunk, from the states before it and the state cotangents after it; every chunk at once.

Notation of chunk_scan.py; S0 is the state before the chunk, dS1 the cotangent of the state after it. Besides dU, dY:

    dX = A^T dU        dQK = tril(dO U^T)        ds = dQK scale e^{G_i - G_j}
    dL = -strict_tril(dX U^T)        dl = dL e^{G_i - G_j}        dKK = beta dl
    dQ = scale e^G dO S0^T + ds K
    dK = ds^T Q + e^{G_C - G} U dS1^T - e^G dY S0^T + (dKK + dKK^T) K
    dV = dY = beta dX        dbeta_i = <dX_i, Y_i> + sum_j dL_ij M_ij
    dG = rows - columns of (dQK QK + dL beta M) + scale e^G <Q, dO S0^T> - e^G <dY, K S0> - e^{G_C - G} <U, K dS1>
    dG_C += e^{G_C} <S0, dS1> + sum e^{G_C - G} <U, K dS1>

The Hebbian rule has U = beta V, dV = beta dU, dbeta_i = <dU_i, V_i>, and no term in L, dKK or K S0.

Triton 3.4 to 3.7.0 miscompiles products with a transposed accumulator on the left on Hopper. So A^T is asked for beside
A, ds^T is formed, once rounded, by an exact product with the identity, and the terms in dKK share one product with the
symmetric dKK + dKK^T.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleep_ops.kernels.arguments import (
    Chunk,
    Cotangents,
    Gradients,
    Packing,
    Prepared,
    Tokens,
    key_stride,
    load_columns,
    load_keys,
    load_last,
    load_queries,
    load_square,
    load_values,
    load_vector,
    make_dims,
    store_vector,
)
from sleep_ops.kernels.configs import ChunkConfig
from sleep_ops.kernels.primitives import (
    LN2,
    decay,
    inverse_norm,
    l2norm_gradient,
    load_rows,
    load_tile,
    locate_chunk,
    pair_decay,
    pair_decay_transposed,
    state_columns,
    store_tile,
)


class ChunkGates(NamedTuple):
    """Of one chunk and value head: G [C], that of the whole chunk, beta [C], A and A^T [C, C] (Hebbian rule: None)."""

    b_G: Any
    G_C: Any
    b_beta: Any
    b_A: Any
    b_AT: Any


@triton.jit
def value_head_gradient(b_dq, b_dk, gates, tokens, chunk, S0, cotangents, dv, dS0, scale, dims: tl.constexpr):
    """Gradients of one chunk and value head: dq and dk with its part added, dG (natural) and dbeta, [C] float32.

    Reads q, k, v of tokens, and where they are not None for zero
        S0 [., K, width] at the chunk's number, in any float dtype,
        cotangents of the output and of the state, dS1, which is the one of that number.
    Writes
        dv [rows, HV, V],
        dS0 at that number, where given: e^{G_C} dS1 + Q^T (scale e^G dO) - K^T (e^G dY).
    """
    b_G, G_C, b_beta, b_A, b_AT = gates
    d_output = cotangents.output
    dS1 = cotangents.state
    o_i = tl.arange(0, dims.C)
    o_k = tl.arange(0, dims.BK)
    dtype = tokens.k.dtype.element_ty
    b_k = load_keys(tokens, chunk, dims)
    b_e = decay(b_G)
    b_end = decay(G_C - b_G)
    # In float32 rows and columns are summed in float64: their difference is then that of the products as they are.
    G_DTYPE: tl.constexpr = b_G.dtype
    b_dG = tl.full([dims.C], 0.0, G_DTYPE)
    b_dbeta = tl.full([dims.C], 0.0, G_DTYPE)
    b_SdS = tl.full([dims.BV], 0.0, G_DTYPE)
    dG_C = tl.full([], 0.0, G_DTYPE)
    if b_A is not None:
        b_dL = tl.full([dims.C, dims.C], 0.0, tl.float32)
    if d_output is not None:
        b_q = load_queries(tokens, chunk, dims)
        b_QKT = scale * pair_decay_transposed(b_G, o_i[None, :] >= o_i[:, None])
        b_QKT = (b_QKT * tl.dot(b_k, tl.trans(b_q), input_precision="ieee")).to(dtype)  # QK^T  [C, C]
        b_dQK = tl.full([dims.C, dims.C], 0.0, tl.float32)
        # <q, this head's part of dq> as a difference: in float32 that would cost digits beside other heads' parts.
        if G_DTYPE == tl.float64:
            b_dq_others = b_dq
            b_dq = tl.full([dims.C, dims.BK], 0.0, tl.float32)
        else:
            b_dG -= tl.sum(b_q * b_dq, 1)

    for i_v in range(0, dims.tiles):
        o_v, num_cols, column0, has_values = state_columns(i_v, dims)
        o_state = chunk.number * dims.K * dims.width + column0
        value_rows = tl.where(has_values, chunk.num_rows, 0)
        if S0 is not None:
            b_S = load_tile(S0 + o_state, o_k, o_v, dims.width, dims.K, num_cols)
        if dS1 is not None:
            b_dS = load_tile(dS1 + o_state, o_k, o_v, dims.width, dims.K, num_cols)
        b_v = load_values(tokens, chunk, o_v, value_rows, dims)
        b_dU = tl.full([dims.C, dims.BV], 0.0, tl.float32)
        if dS1 is not None:
            b_write = b_end[:, None] * tl.dot(b_k, b_dS.to(dtype), input_precision="ieee")  # K dS1  [C, BV]
            b_dU = b_write
        if d_output is not None:
            b_dO = load_columns(d_output, chunk, o_v, dims.V, dims.V, dims)
            b_dU += tl.dot(b_QKT, b_dO.to(dtype), input_precision="ieee")  # QK^T dO  [C, BV]
        b_Y = b_v
        if b_A is None:
            b_U = b_beta[:, None] * b_Y
            b_dX = b_dU
            b_dbeta += tl.sum((b_dX * b_Y).to(G_DTYPE), 1)
        else:
            if S0 is not None:
                b_read = b_e[:, None] * tl.dot(b_k, b_S.to(dtype), input_precision="ieee")  # K S0  [C, BV]
                b_Y -= b_read
            b_U = tl.dot(b_A, (b_beta[:, None] * b_Y).to(dtype), input_precision="ieee")  # A (beta Y)  [C, BV]
            b_dX = tl.dot(b_AT, b_dU.to(dtype), input_precision="ieee")  # A^T dU  [C, BV]
            b_dbeta += tl.sum((b_dX * b_Y).to(G_DTYPE), 1)
            if S0 is not None:
                b_dG -= tl.sum((b_beta[:, None] * b_dX * b_read).to(G_DTYPE), 1)
        if dS1 is not None:
            # What the last token writes does not decay. Nor does its own part of a product: see below.
            b_written = tl.where(o_i < chunk.num_rows - 1, tl.sum((b_U * b_write).to(G_DTYPE), 1), 0.0)
            b_dG -= b_written
            dG_C += tl.sum(b_written)
        p_dv = dv + (chunk.start * dims.HV + chunk.i_hv) * dims.V
        store_tile(p_dv, b_beta[:, None] * b_dX, o_i, o_v, dims.HV * dims.V, value_rows, dims.V)

        if d_output is not None:
            b_dqS = (scale * b_e[:, None] * b_dO.to(tl.float32)).to(dtype)
        if b_A is not None:
            b_dkS = (-(b_e * b_beta)[:, None] * b_dX).to(dtype)
        if dS0 is not None:
            b_dS0 = tl.full([dims.BK, dims.BV], 0.0, tl.float32)
            if dS1 is not None and dims.tiles > 1:
                b_dS0 += decay(G_C) * b_dS
            if d_output is not None:
                b_dS0 += tl.dot(tl.trans(b_q), b_dqS, input_precision="ieee")  # Q^T (scale e^G dO)  [BK, BV]
            if b_A is not None:
                b_dS0 += tl.dot(tl.trans(b_k), b_dkS, input_precision="ieee")  # -K^T (e^G dY)  [BK, BV]
            if dS1 is not None and dims.tiles == 1:
                # Loaded again: fewer registers than keeping a large tile until here.
                b_dS0 += decay(G_C) * load_tile(dS1 + o_state, o_k, o_v, dims.width, dims.K, num_cols)
            store_tile(dS0 + o_state, b_dS0, o_k, o_v, dims.width, dims.K, num_cols)

        # Loaded again, transposed: fewer registers than keeping the tiles until here.
        m_ST = (o_v[:, None] < num_cols) & (o_k[None, :] < dims.K)
        o_ST = o_state + o_k[None, :] * dims.width + o_v[:, None]
        if S0 is not None:
            b_ST = tl.load(S0 + o_ST, mask=m_ST, other=0.0)
        if dS1 is not None:
            b_dST = tl.load(dS1 + o_ST, mask=m_ST, other=0.0)
            if S0 is not None:
                b_SdS += tl.sum((b_ST.to(tl.float32) * b_dST).to(G_DTYPE), 1)
        b_UT = tl.trans(b_U.to(dtype))
        if dS1 is not None:
            # e^{G_C - G} U dS1^T  [C, BK]
            b_dk += tl.dot((b_end[:, None] * b_U).to(dtype), b_dST.to(dtype), input_precision="ieee")
        if b_A is not None:
            b_dL += tl.dot((-b_dX).to(dtype), b_UT, input_precision="ieee")  # -dX U^T  [C, C]
            if S0 is not None:
                b_dk += tl.dot(b_dkS, b_ST.to(dtype), input_precision="ieee")  # -e^G dY S0^T  [C, BK]
        if d_output is not None:
            b_dQK += tl.dot(b_dO.to(dtype), b_UT, input_precision="ieee")  # dO U^T  [C, C]
            if S0 is not None:
                b_dq += tl.dot(b_dqS, b_ST.to(dtype), input_precision="ieee")  # scale e^G dO S0^T  [C, BK]

    dG_C += decay(G_C) * tl.sum(b_SdS)
    if d_output is not None:
        b_q = load_queries(tokens, chunk, dims)
        b_k = load_keys(tokens, chunk, dims)
        b_dG += tl.sum((b_q * b_dq).to(G_DTYPE), 1)
        b_ds = scale * b_dQK * pair_decay(b_G, o_i[:, None] >= o_i[None, :])
        b_dQKQK = (b_ds * tl.dot(b_q, tl.trans(b_k), input_precision="ieee")).to(G_DTYPE)  # Q K^T  [C, C]
        # The diagonal would cancel but for rounding, beside which strong decays leave nothing else.
        b_dQKQK = tl.where(o_i[:, None] > o_i[None, :], b_dQKQK, 0.0)
        b_dG += tl.sum(b_dQKQK, 1) - tl.sum(b_dQKQK, 0)
        b_ds = b_ds.to(dtype)
        b_dq += tl.dot(b_ds, b_k, input_precision="ieee")  # ds K  [C, BK]
        if G_DTYPE == tl.float64:
            b_dq += b_dq_others
        b_I = tl.where(o_i[:, None] == o_i[None, :], 1.0, 0.0).to(dtype)
        b_dsT = tl.dot(b_I, tl.trans(b_ds), input_precision="ieee").to(dtype)  # ds^T  [C, C]
        b_dk += tl.dot(b_dsT, b_q, input_precision="ieee")  # ds^T Q  [C, BK]
    if b_A is not None:
        b_dl = b_dL * pair_decay(b_G, o_i[:, None] > o_i[None, :])
        b_dLM = (b_dl * tl.dot(b_k, tl.trans(b_k), input_precision="ieee")).to(G_DTYPE)  # K K^T  [C, C]
        b_dbeta += tl.sum(b_dLM, 1)
        b_dLM = b_beta[:, None] * b_dLM
        b_dG += tl.sum(b_dLM, 1) - tl.sum(b_dLM, 0)
        b_dKK = b_beta[:, None] * b_dl
        # (dKK + dKK^T) K  [C, BK]
        b_dk += tl.dot((b_dKK + tl.trans(b_dKK)).to(dtype), b_k, input_precision="ieee")
    b_dG += tl.where(o_i == chunk.num_rows - 1, dG_C, 0.0)
    return b_dq, b_dk, b_dG, b_dbeta


@triton.jit
def store_key_gradient(d, b_d, x, stride, r, chunk, dims: tl.constexpr):
    """Store the cotangent of rows of q or k in d [rows, H, K], from that of what load_heads made of rows of x.

    Where r is given, x are rows that were scaled by it to be normalised, and the cotangent is that of them before.
    """
    o_i = tl.arange(0, dims.C)
    o_k = tl.arange(0, dims.BK)
    if dims.USE_L2NORM or r is not None:
        elements = key_stride(stride, dims)
        p_x = x + chunk.start * elements + chunk.i_h * dims.K
        b_y = load_tile(p_x, o_i, o_k, elements, chunk.num_rows, dims.K).to(tl.float32)
        if r is None:
            b_r = inverse_norm(b_y)
            b_y *= b_r[:, None]
        else:
            b_r = load_rows(r + chunk.start * dims.H + chunk.i_h, o_i, dims.H, chunk.num_rows)
        b_d = l2norm_gradient(b_y, b_r, b_d)
    p_d = d + (chunk.start * dims.H + chunk.i_h) * dims.K
    store_tile(p_d, b_d, o_i, o_k, dims.H * dims.K, chunk.num_rows, dims.K)


@triton.jit(do_not_specialize=["T", "num_seqs"])
def chunk_grad_kernel(tokens, prepared, packing, states, cotangents, gradients, scale, T, num_seqs, dims: tl.constexpr):
    """Gradients of one chunk and query/key head, summed over its value heads; A is None for the Hebbian rule.

    Reads tokens, prepared, and
        states [chunks, HV, K, width], before each chunk,
        cotangents of the output and of the states after each chunk.
    Writes gradients, of q, k and v, of G (natural), and of the active beta. Without a cotangent of the output neither q
    nor its gradient is touched.

    Grid (chunks, H). Mirrors the backward of `one_pass` of sleep_ops/reference.py.
    """
    i_c = tl.program_id(0)
    i_h = tl.program_id(1)
    start, num_rows = locate_chunk(i_c, packing, T, num_seqs, dims.C)
    if num_rows <= 0:
        return
    b_dq = tl.full([dims.C, dims.BK], 0.0, tl.float32)
    b_dk = tl.full([dims.C, dims.BK], 0.0, tl.float32)

    for i_hv in range(i_h * (dims.HV // dims.H), (i_h + 1) * (dims.HV // dims.H)):
        chunk = Chunk(start, num_rows, i_h, i_hv, i_c.to(tl.int64) * dims.HV + i_hv)
        b_A = None
        b_AT = None
        if prepared.A is not None:
            b_A = load_square(prepared.A, chunk, dims)
            b_AT = tl.trans(b_A)
        b_G = load_vector(prepared.G, chunk, dims)
        G_C = load_last(prepared.G, chunk, dims)
        b_beta = load_vector(prepared.beta, chunk, dims)
        b_dq, b_dk, b_dG, b_dbeta = value_head_gradient(
            b_dq,
            b_dk,
            ChunkGates(b_G, G_C, b_beta, b_A, b_AT),
            tokens,
            chunk,
            states,
            cotangents,
            gradients.v,
            None,
            scale,
            dims,
        )
        store_vector(gradients.g, b_dG * LN2, chunk, dims)
        store_vector(gradients.beta, b_dbeta, chunk, dims)

    rows = Chunk(start, num_rows, i_h, None, None)
    store_key_gradient(gradients.k, b_dk, tokens.k, tokens.stride_k, prepared.rk, rows, dims)
    if cotangents.output is not None:
        store_key_gradient(gradients.q, b_dq, tokens.q, tokens.stride_q, prepared.rq, rows, dims)


def chunk_grad(
    tokens: Tokens,
    prepared: Prepared,
    packing: Packing,
    states: Tensor,
    cotangents: Cotangents,
    *,
    scale: float,
    config: ChunkConfig,
    widened: bool = False,
) -> Gradients:
    """Of q (None without a cotangent of the output), k [B, T, H, K], v [B, T, HV, V], and of prepared's G and beta.

    Each in its dtype. states are chunk_scan's, `widened` or not; the cotangents are of its output, and chunk_reverse's.
    """
    B, T, H, K = tokens.k.shape
    HV, V = tokens.v.shape[2:]
    dk = torch.empty(B, T, H, K, dtype=tokens.k.dtype, device=tokens.k.device)
    gradients = Gradients(
        None if cotangents.output is None else torch.empty_like(dk),
        dk,
        torch.empty(B, T, HV, V, dtype=tokens.v.dtype, device=dk.device),
        torch.empty_like(prepared.G),
        torch.empty_like(prepared.beta),
    )
    dims = make_dims(H, HV, K, V, config.chunk, config.grad.block_v, widened)
    length = (T, packing.num_seqs)
    chunk_grad_kernel[(states.shape[0], H)](
        tokens, prepared, packing, states, cotangents, gradients, scale, *length, dims, **config.grad.options
    )
    return gradients
