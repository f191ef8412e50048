"""All gradients of a chunk, from the states before it and the state cotangents after it; every chunk at once.

Notation of chunk_scan.py; S0 is the state before the chunk, dS1 the cotangent of the state after it. Besides dU, dY:

    dX = A^T dU        dP = tril(dO U^T)        dL = -strict_tril(dX U^T)        W_ij = dL_ij beta_i e^{G_i - G_j}
    dQ = scale e^G dO S0^T + (dP scale e^{G_i - G_j}) K
    dK = (dP scale e^{G_i - G_j})^T Q + e^{G_C - G} U dS1^T - e^G dY S0^T + (W + W^T) K
    dV = dY = beta dX        dbeta_i = <dX_i, Y_i> + sum_j dL_ij M_ij
    dG = rows - columns of (dP P + dL beta M) + scale e^G <Q, dO S0^T> - e^G <dY, K S0> - e^{G_C - G} <U, K dS1>
    dG_C += e^{G_C} <S0, dS1> + sum e^{G_C - G} <U, K dS1>

The Hebbian rule has U = beta V, dV = beta dU, dbeta_i = <dU_i, V_i>, and no term in L, W or K S0.

Triton 3.4 to 3.7.0 miscompiles products with a transposed accumulator on the left on Hopper. So A^T is asked for beside
A, (dP scale e^{G_i - G_j})^T is formed, once rounded, by an exact product with the identity, and the terms in W share
one product with the symmetric W + W^T.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleep_ops.kernels.configs import ChunkConfig, block_size
from sleep_ops.kernels.primitives import (
    LN2,
    decay,
    l2norm_gradient,
    load_decay,
    load_key_tile,
    load_rows,
    load_tile,
    locate_chunk,
    pair_decay,
    pair_decay_transposed,
    state_columns,
    store_tile,
)


@triton.jit
def value_head_gradient(
    b_dq,
    b_dk,
    b_G,
    G_C,
    b_beta,
    b_A,
    b_AT,
    q,
    k,
    v,
    states,
    d_states,
    d_output,
    dv,
    d_start,
    start,
    i_h,
    i_hv,
    i_state,
    scale,
    num_rows,
    stride_q,
    stride_k,
    stride_v,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    USE_L2NORM: tl.constexpr,
    WIDENED: tl.constexpr,
):
    """Gradients of one chunk and value head: dq and dk with its part added, dG (natural) and dbeta, [C] float32.

    b_G, b_beta, b_A and b_AT = A^T are the chunk's, G_C its whole decay; A is None for the Hebbian rule. states and
    d_states (None for zero) hold S0 and dS1 at number i_state, in any float dtype. Writes dv and, where given, d_start:
    at i_state the cotangent of S0, e^{G_C} dS1 + Q^T (scale e^G dO) - K^T (e^G dY).
    """
    W: tl.constexpr = K + V if WIDENED else V
    NV: tl.constexpr = tl.cdiv(V, BV) + (tl.cdiv(K, BV) if WIDENED else 0)
    o_i = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_values = (start * HV + i_hv) * V
    p_k = k + start * stride_k + i_h * K
    dtype = k.dtype.element_ty
    b_k = load_key_tile(p_k, o_i, o_k, stride_k, num_rows, K, USE_L2NORM)
    b_e = decay(b_G)
    b_end = decay(G_C - b_G)
    # In float32 rows and columns are summed in float64: their difference is then that of the products as they are.
    G_DTYPE: tl.constexpr = b_G.dtype
    b_dG = tl.zeros([C], G_DTYPE)
    b_dbeta = tl.zeros([C], G_DTYPE)
    b_SdS = tl.zeros([BV], G_DTYPE)
    dG_C = tl.full([], 0.0, G_DTYPE)
    if b_A is not None:
        b_dL = tl.zeros([C, C], tl.float32)
    if d_output is not None:
        p_q = q + start * stride_q + i_h * K
        b_q = load_key_tile(p_q, o_i, o_k, stride_q, num_rows, K, USE_L2NORM)
        b_PT = scale * pair_decay_transposed(b_G, o_i[None, :] >= o_i[:, None])
        b_PT = (b_PT * tl.dot(b_k, tl.trans(b_q), input_precision="ieee")).to(dtype)
        b_dP = tl.zeros([C, C], tl.float32)
        # <q, this head's part of dq> as a difference: in float32 that would cost digits beside other heads' parts.
        if G_DTYPE == tl.float64:
            b_dq_others = b_dq
            b_dq = tl.zeros([C, BK], tl.float32)
        else:
            b_dG -= tl.sum(b_q * b_dq, 1)

    for i_v in range(0, NV):
        o_v, num_cols, column0, has_values = state_columns(i_v, K, V, BV, WIDENED)
        o_state = i_state * K * W + column0
        value_rows = tl.where(has_values, num_rows, 0)
        if states is not None:
            b_S = load_tile(states + o_state, o_k, o_v, W, K, num_cols)
        if d_states is not None:
            b_dS = load_tile(d_states + o_state, o_k, o_v, W, K, num_cols)
        b_v = load_tile(v + start * stride_v + i_hv * V, o_i, o_v, stride_v, value_rows, V).to(tl.float32)
        b_dU = tl.zeros([C, BV], tl.float32)
        if d_states is not None:
            b_write = b_end[:, None] * tl.dot(b_k, b_dS.to(dtype), input_precision="ieee")
            b_dU = b_write
        if d_output is not None:
            b_dO = load_tile(d_output + o_values, o_i, o_v, HV * V, num_rows, V)
            b_dU += tl.dot(b_PT, b_dO.to(dtype), input_precision="ieee")
        b_Y = b_v
        if b_A is None:
            b_U = b_beta[:, None] * b_Y
            b_dX = b_dU
            b_dbeta += tl.sum((b_dX * b_Y).to(G_DTYPE), 1)
        else:
            if states is not None:
                b_read = b_e[:, None] * tl.dot(b_k, b_S.to(dtype), input_precision="ieee")
                b_Y -= b_read
            b_U = tl.dot(b_A, (b_beta[:, None] * b_Y).to(dtype), input_precision="ieee")
            b_dX = tl.dot(b_AT, b_dU.to(dtype), input_precision="ieee")
            b_dbeta += tl.sum((b_dX * b_Y).to(G_DTYPE), 1)
            if states is not None:
                b_dG -= tl.sum((b_beta[:, None] * b_dX * b_read).to(G_DTYPE), 1)
        if d_states is not None:
            # What the last token writes does not decay. Nor does its own part of a product: see below.
            b_written = tl.where(o_i < num_rows - 1, tl.sum((b_U * b_write).to(G_DTYPE), 1), 0.0)
            b_dG -= b_written
            dG_C += tl.sum(b_written)
        store_tile(dv + o_values, b_beta[:, None] * b_dX, o_i, o_v, HV * V, value_rows, V)

        if d_output is not None:
            b_dQ = (scale * b_e[:, None] * b_dO.to(tl.float32)).to(dtype)
        if b_A is not None:
            b_dkS = (-(b_e * b_beta)[:, None] * b_dX).to(dtype)
        if d_start is not None:
            b_dS0 = tl.zeros([BK, BV], tl.float32)
            if d_states is not None:
                b_dS0 += decay(G_C) * b_dS
            if d_output is not None:
                b_dS0 += tl.dot(tl.trans(b_q), b_dQ, input_precision="ieee")
            if b_A is not None:
                b_dS0 += tl.dot(tl.trans(b_k), b_dkS, input_precision="ieee")
            store_tile(d_start + o_state, b_dS0, o_k, o_v, W, K, num_cols)

        # Loaded again, transposed: fewer registers than keeping the tiles until here.
        m_ST = (o_v[:, None] < num_cols) & (o_k[None, :] < K)
        o_ST = o_state + o_k[None, :] * W + o_v[:, None]
        if states is not None:
            b_ST = tl.load(states + o_ST, mask=m_ST, other=0.0)
        if d_states is not None:
            b_dST = tl.load(d_states + o_ST, mask=m_ST, other=0.0)
            if states is not None:
                b_SdS += tl.sum((b_ST.to(tl.float32) * b_dST).to(G_DTYPE), 1)
        b_UT = tl.trans(b_U.to(dtype))
        if d_states is not None:
            b_dk += tl.dot((b_end[:, None] * b_U).to(dtype), b_dST.to(dtype), input_precision="ieee")
        if b_A is not None:
            b_dL += tl.dot((-b_dX).to(dtype), b_UT, input_precision="ieee")
            if states is not None:
                b_dk += tl.dot(b_dkS, b_ST.to(dtype), input_precision="ieee")
        if d_output is not None:
            b_dP += tl.dot(b_dO.to(dtype), b_UT, input_precision="ieee")
            if states is not None:
                b_dq += tl.dot(b_dQ, b_ST.to(dtype), input_precision="ieee")

    dG_C += decay(G_C) * tl.sum(b_SdS)
    if d_output is not None:
        b_q = load_key_tile(p_q, o_i, o_k, stride_q, num_rows, K, USE_L2NORM)
        b_k = load_key_tile(p_k, o_i, o_k, stride_k, num_rows, K, USE_L2NORM)
        b_dG += tl.sum((b_q * b_dq).to(G_DTYPE), 1)
        b_ds = scale * b_dP * pair_decay(b_G, o_i[:, None] >= o_i[None, :])
        b_dPP = (b_ds * tl.dot(b_q, tl.trans(b_k), input_precision="ieee")).to(G_DTYPE)
        # The diagonal would cancel but for rounding, beside which strong decays leave nothing else.
        b_dPP = tl.where(o_i[:, None] > o_i[None, :], b_dPP, 0.0)
        b_dG += tl.sum(b_dPP, 1) - tl.sum(b_dPP, 0)
        b_ds = b_ds.to(dtype)
        b_dq += tl.dot(b_ds, b_k, input_precision="ieee")
        if G_DTYPE == tl.float64:
            b_dq += b_dq_others
        b_I = tl.where(o_i[:, None] == o_i[None, :], 1.0, 0.0).to(dtype)
        b_dsT = tl.dot(b_I, tl.trans(b_ds), input_precision="ieee").to(dtype)
        b_dk += tl.dot(b_dsT, b_q, input_precision="ieee")
    if b_A is not None:
        b_W = b_dL * pair_decay(b_G, o_i[:, None] > o_i[None, :])
        b_dLM = (b_W * tl.dot(b_k, tl.trans(b_k), input_precision="ieee")).to(G_DTYPE)
        b_dbeta += tl.sum(b_dLM, 1)
        b_dLM = b_beta[:, None] * b_dLM
        b_dG += tl.sum(b_dLM, 1) - tl.sum(b_dLM, 0)
        b_W = b_beta[:, None] * b_W
        b_dk += tl.dot((b_W + tl.trans(b_W)).to(dtype), b_k, input_precision="ieee")
    b_dG += tl.where(o_i == num_rows - 1, dG_C, 0.0)
    return b_dq, b_dk, b_dG, b_dbeta


@triton.jit
def store_key_gradient(
    p_d, b_d, p_x, o_i, o_k, stride_d, stride_x, num_rows, K: tl.constexpr, USE_L2NORM: tl.constexpr
):
    """Store the cotangent of rows of q or k, x, from that of what load_key_tile made of them."""
    if USE_L2NORM:
        b_d = l2norm_gradient(load_tile(p_x, o_i, o_k, stride_x, num_rows, K), b_d)
    store_tile(p_d, b_d, o_i, o_k, stride_d, num_rows, K)


@triton.jit(do_not_specialize=["T", "num_seqs"])
def chunk_grad_kernel(
    q,
    k,
    v,
    G,
    beta,
    A,
    states,
    d_states,
    d_output,
    dq,
    dk,
    dv,
    dG,
    dbeta,
    cu_seqlens,
    chunk_offsets,
    scale,
    T,
    num_seqs,
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
    """Gradients of one chunk and query/key head, summed over its value heads; A is None for the Hebbian rule.

    Reads what chunk_scan reads, states and d_states [chunks, HV, K, V], and d_output [rows, HV, V] or None for zero.
    Writes dq, dk [rows, H, K], dv [rows, HV, V], and dG, dbeta [rows, HV], of the summed base-2 log decay and of the
    activated write strength. Without d_output neither q nor dq is touched. WIDENED: states are [P | R], [K, K + V].

    Grid (chunks, H). Mirrors the backward of `one_pass` of sleep_ops/reference.py.
    """
    i_c = tl.program_id(0)
    i_h = tl.program_id(1)
    start, num_rows = locate_chunk(i_c, cu_seqlens, chunk_offsets, T, num_seqs, C)
    if num_rows <= 0:
        return
    o_i = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    m_i = o_i < num_rows
    b_dq = tl.zeros([C, BK], tl.float32)
    b_dk = tl.zeros([C, BK], tl.float32)

    for i_hv in range(i_h * (HV // H), (i_h + 1) * (HV // H)):
        o_gate = start * HV + i_hv
        b_A = None
        b_AT = None
        if A is not None:
            b_A = load_tile(A + o_gate * C, o_i, o_i, HV * C, num_rows, C)
            b_AT = tl.trans(b_A)
        b_dq, b_dk, b_dG, b_dbeta = value_head_gradient(
            b_dq,
            b_dk,
            load_decay(G + o_gate, o_i, HV, num_rows),
            tl.load(G + o_gate + (num_rows - 1) * HV),
            load_rows(beta + o_gate, o_i, HV, num_rows),
            b_A,
            b_AT,
            q,
            k,
            v,
            states,
            d_states,
            d_output,
            dv,
            None,
            start,
            i_h,
            i_hv,
            i_c.to(tl.int64) * HV + i_hv,
            scale,
            num_rows,
            stride_q,
            stride_k,
            stride_v,
            HV,
            K,
            V,
            C,
            BK,
            BV,
            USE_L2NORM,
            WIDENED,
        )
        tl.store(dG + o_gate + o_i * HV, b_dG * LN2, mask=m_i)
        tl.store(dbeta + o_gate + o_i * HV, b_dbeta, mask=m_i)

    o_dx = (start * H + i_h) * K
    p_k = k + start * stride_k + i_h * K
    store_key_gradient(dk + o_dx, b_dk, p_k, o_i, o_k, H * K, stride_k, num_rows, K, USE_L2NORM)
    if d_output is not None:
        p_q = q + start * stride_q + i_h * K
        store_key_gradient(dq + o_dx, b_dq, p_q, o_i, o_k, H * K, stride_q, num_rows, K, USE_L2NORM)


def chunk_grad(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    row_strides: tuple[int, int, int],
    G: Tensor,
    beta: Tensor,
    A: Tensor | None,
    states: Tensor,
    d_states: Tensor,
    d_output: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_offsets: Tensor | None,
    *,
    scale: float,
    use_qk_l2norm: bool,
    config: ChunkConfig,
    widened: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """dq (None without d_output), dk [B, T, H, K], dv [B, T, HV, V] in their inputs' dtypes; dG in G's, dbeta float32.

    dG and dbeta [B, T, HV] belong to what chunk_prepare returns. states and d_states are those of chunk_scan and
    chunk_reverse, `widened` or not.
    """
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    dk = torch.empty(B, T, H, K, dtype=k.dtype, device=k.device)
    dq = None if d_output is None else torch.empty_like(dk)
    dv = torch.empty(B, T, HV, V, dtype=v.dtype, device=k.device)
    dG = torch.empty_like(G)
    dbeta = torch.empty(B, T, HV, dtype=torch.float32, device=k.device)
    chunk_grad_kernel[(states.shape[0], H)](
        q,
        k,
        v,
        G,
        beta,
        A,
        states,
        d_states,
        d_output,
        dq,
        dk,
        dv,
        dG,
        dbeta,
        cu_seqlens,
        chunk_offsets,
        scale,
        T,
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        *row_strides,
        H=H,
        HV=HV,
        K=K,
        V=V,
        C=config.chunk,
        BK=block_size(K),
        BV=config.grad.block_v,
        USE_L2NORM=use_qk_l2norm,
        WIDENED=widened,
        num_warps=config.grad.warps,
        num_stages=config.grad.stages,
    )
    return dq, dk, dv, dG, dbeta
