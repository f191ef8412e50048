"""The gradients of chunk_grad by three kernels, for chunks of 64 tokens, whose sums are too many for one program.

Notation of chunk_grad.py. Per chunk, all in k's dtype but the parts of dG and dbeta:

    values     U' = e^{G_C - G} U, dY, ds = dP scale e^{G_i - G_j}, dl = dL e^{G_i - G_j}, parts of dG and dbeta
    queries    dQ = scale e^G dO S0^T + ds K, a part of dG
    keys       dK = U' dS1^T - e^G dY S0^T + ds^T Q + (beta dl + (beta dl)^T) K, and the sums of the parts

Over the tiles of values the first one carries [C, C] sums, the others one of [C, K]. The terms of dG in P and M are
formed from ds and dl as rounded for the products with K and Q, so that rows still cancel columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleep_ops.kernels.chunk_grad import store_key_gradient
from sleep_ops.kernels.configs import ChunkConfig, block_size
from sleep_ops.kernels.primitives import (
    LN2,
    decay,
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


@triton.jit(do_not_specialize=["T", "num_seqs"])
def chunk_grad_values_kernel(
    q,
    k,
    v,
    G,
    beta,
    A,
    states,
    d_states,
    d_output,
    U_end,
    dY,
    ds,
    dl,
    dG_part,
    dbeta_part,
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
    """What one chunk and value head needs no [C, K] sums for; A and dl are None for the Hebbian rule.

    Reads what chunk_grad_kernel reads. Writes U_end (U') and dY [rows, HV, state columns], ds, dl [rows, HV, C], and
    dG_part (base 2), dbeta_part [rows, HV]. Without d_output neither q nor ds is touched. WIDENED: states are [P | R].

    Grid (chunks, HV). Mirrors the backward of `one_pass` of sleep_ops/reference.py.
    """
    W: tl.constexpr = K + V if WIDENED else V
    NV: tl.constexpr = tl.cdiv(V, BV) + (tl.cdiv(K, BV) if WIDENED else 0)
    i_c = tl.program_id(0)
    i_hv = tl.program_id(1)
    i_h = i_hv // (HV // H)
    start, num_rows = locate_chunk(i_c, cu_seqlens, chunk_offsets, T, num_seqs, C)
    if num_rows <= 0:
        return
    o_i = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_gate = start * HV + i_hv
    b_G = load_decay(G + o_gate, o_i, HV, num_rows)
    G_C = tl.load(G + o_gate + (num_rows - 1) * HV)
    b_beta = load_rows(beta + o_gate, o_i, HV, num_rows)
    b_e = decay(b_G)
    b_end = decay(G_C - b_G)
    b_k = load_key_tile(k + start * stride_k + i_h * K, o_i, o_k, stride_k, num_rows, K, USE_L2NORM)
    dtype = b_k.dtype
    G_DTYPE: tl.constexpr = G.dtype.element_ty
    b_dG = tl.zeros([C], G_DTYPE)
    b_dbeta = tl.zeros([C], G_DTYPE)
    dG_C = tl.full([], 0.0, G_DTYPE)
    if A is not None:
        b_A = load_tile(A + o_gate * C, o_i, o_i, HV * C, num_rows, C)
        b_AT = tl.trans(b_A)
        b_dL = tl.zeros([C, C], tl.float32)
    if d_output is not None:
        b_q = load_key_tile(q + start * stride_q + i_h * K, o_i, o_k, stride_q, num_rows, K, USE_L2NORM)
        b_PT = scale * pair_decay_transposed(b_G, o_i[None, :] >= o_i[:, None])
        b_PT = (b_PT * tl.dot(b_k, tl.trans(b_q), input_precision="ieee")).to(dtype)
        b_dP = tl.zeros([C, C], tl.float32)

    for i_v in range(0, NV):
        o_v, num_cols, column0, has_values = state_columns(i_v, K, V, BV, WIDENED)
        o_state = (i_c.to(tl.int64) * HV + i_hv) * K * W + column0
        o_cols = o_gate * W + column0
        value_rows = tl.where(has_values, num_rows, 0)
        b_Y = load_tile(v + start * stride_v + i_hv * V, o_i, o_v, stride_v, value_rows, V).to(tl.float32)
        if A is None:
            b_U = b_beta[:, None] * b_Y
        else:
            b_S = load_tile(states + o_state, o_k, o_v, W, K, num_cols)
            b_read = b_e[:, None] * tl.dot(b_k, b_S, input_precision="ieee")
            b_Y -= b_read
            b_U = tl.dot(b_A, (b_beta[:, None] * b_Y).to(dtype), input_precision="ieee")
        store_tile(U_end + o_cols, b_end[:, None] * b_U, o_i, o_v, HV * W, num_rows, num_cols)
        b_UT = tl.trans(b_U.to(dtype))

        b_dS = load_tile(d_states + o_state, o_k, o_v, W, K, num_cols)
        b_dU = b_end[:, None] * tl.dot(b_k, b_dS, input_precision="ieee")
        b_written = tl.sum((b_U * b_dU).to(G_DTYPE), 1)
        b_written = tl.where(o_i < num_rows - 1, b_written, 0.0)  # as in chunk_grad.py
        b_dG -= b_written
        b_S = load_tile(states + o_state, o_k, o_v, W, K, num_cols)  # again: fewer registers than keeping it
        dG_C += tl.sum(b_written) + decay(G_C) * tl.sum((b_S.to(tl.float32) * b_dS).to(G_DTYPE))
        if d_output is not None:
            b_dO = load_tile(d_output + o_gate * V, o_i, o_v, HV * V, num_rows, V).to(dtype)
            b_dP += tl.dot(b_dO, b_UT, input_precision="ieee")
            b_dU += tl.dot(b_PT, b_dO, input_precision="ieee")
        b_dX = b_dU
        if A is not None:
            b_dX = tl.dot(b_AT, b_dU.to(dtype), input_precision="ieee")
            b_dL += tl.dot((-b_dX).to(dtype), b_UT, input_precision="ieee")
            b_dG -= tl.sum((b_beta[:, None] * b_dX * b_read).to(G_DTYPE), 1)
        b_dbeta += tl.sum((b_dX * b_Y).to(G_DTYPE), 1)
        store_tile(dY + o_cols, b_beta[:, None] * b_dX, o_i, o_v, HV * W, num_rows, num_cols)

    if d_output is not None:
        b_dP *= scale * pair_decay(b_G, o_i[:, None] >= o_i[None, :])
        store_tile(ds + o_gate * C, b_dP, o_i, o_i, HV * C, num_rows, C)
    if A is not None:
        b_dL *= pair_decay(b_G, o_i[:, None] > o_i[None, :])
        store_tile(dl + o_gate * C, b_dL, o_i, o_i, HV * C, num_rows, C)
    b_dG += tl.where(o_i == num_rows - 1, dG_C, 0.0)
    tl.store(dG_part + o_gate + o_i * HV, b_dG, mask=o_i < num_rows)
    tl.store(dbeta_part + o_gate + o_i * HV, b_dbeta, mask=o_i < num_rows)


@triton.jit(do_not_specialize=["T", "num_seqs"])
def chunk_grad_queries_kernel(
    q,
    k,
    G,
    states,
    d_output,
    ds,
    dq,
    dG_part,
    cu_seqlens,
    chunk_offsets,
    scale,
    T,
    num_seqs,
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
    """dq [rows, H, K] of one chunk and query head, summed over its value heads, and through P and Q S0 their dG.

    Reads states [chunks, HV, K, V] and ds of chunk_grad_values_kernel. Writes dG_part [rows, HV], base 2.

    Grid (chunks, H). Mirrors the backward of `one_pass` of sleep_ops/reference.py.
    """
    i_c = tl.program_id(0)
    i_h = tl.program_id(1)
    start, num_rows = locate_chunk(i_c, cu_seqlens, chunk_offsets, T, num_seqs, C)
    if num_rows <= 0:
        return
    o_i = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    p_q = q + start * stride_q + i_h * K
    p_k = k + start * stride_k + i_h * K
    b_dq = tl.zeros([C, BK], tl.float32)
    G_DTYPE: tl.constexpr = G.dtype.element_ty

    for i_hv in range(i_h * (HV // H), (i_h + 1) * (HV // H)):
        o_gate = start * HV + i_hv
        p_S = states + (i_c.to(tl.int64) * HV + i_hv) * K * V
        b_e = scale * decay(load_decay(G + o_gate, o_i, HV, num_rows))
        b_q = load_key_tile(p_q, o_i, o_k, stride_q, num_rows, K, USE_L2NORM)
        if G_DTYPE == tl.float64:  # as in chunk_grad.py
            b_dq_others = b_dq
            b_dq = tl.zeros([C, BK], tl.float32)
            b_dG = tl.zeros([C], G_DTYPE)
        else:
            b_dG = -tl.sum(b_q * b_dq, 1)
        for i_v in range(0, tl.cdiv(V, BV)):
            o_v = i_v * BV + tl.arange(0, BV)
            b_dO = load_tile(d_output + o_gate * V, o_i, o_v, HV * V, num_rows, V)
            b_dQ = (b_e[:, None] * b_dO.to(tl.float32)).to(b_q.dtype)
            b_S = load_tile(p_S, o_k, o_v, V, K, V)
            b_dq += tl.dot(b_dQ, tl.trans(b_S), input_precision="ieee")
        b_q = load_key_tile(p_q, o_i, o_k, stride_q, num_rows, K, USE_L2NORM)
        b_dG += tl.sum((b_q * b_dq).to(G_DTYPE), 1)

        b_k = load_key_tile(p_k, o_i, o_k, stride_k, num_rows, K, USE_L2NORM)
        b_ds = load_tile(ds + o_gate * C, o_i, o_i, HV * C, num_rows, C)
        b_dq += tl.dot(b_ds, b_k, input_precision="ieee")
        if G_DTYPE == tl.float64:
            b_dq += b_dq_others
        b_dPP = (b_ds * tl.dot(b_q, tl.trans(b_k), input_precision="ieee")).to(G_DTYPE)
        b_dPP = tl.where(o_i[:, None] > o_i[None, :], b_dPP, 0.0)  # as in chunk_grad.py
        b_dG += tl.sum(b_dPP, 1) - tl.sum(b_dPP, 0)
        tl.store(dG_part + o_gate + o_i * HV, b_dG, mask=o_i < num_rows)

    store_key_gradient(dq + (start * H + i_h) * K, b_dq, p_q, o_i, o_k, H * K, stride_q, num_rows, K, USE_L2NORM)


@triton.jit(do_not_specialize=["T", "num_seqs"])
def chunk_grad_keys_kernel(
    q,
    k,
    G,
    beta,
    states,
    d_states,
    U_end,
    dY,
    ds,
    dl,
    dG_values,
    dG_queries,
    dbeta_values,
    dk,
    dG,
    dbeta,
    cu_seqlens,
    chunk_offsets,
    T,
    num_seqs,
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
    """dk [rows, H, K] of one chunk and key head, summed over its value heads, and their dG (natural) and dbeta.

    Reads what the other two wrote: ds and dG_queries are None without d_output, dl for the Hebbian rule. V is the
    number of the states' columns, which may be widened ones.

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
    p_k = k + start * stride_k + i_h * K
    G_DTYPE: tl.constexpr = G.dtype.element_ty
    b_dk = tl.zeros([C, BK], tl.float32)

    for i_hv in range(i_h * (HV // H), (i_h + 1) * (HV // H)):
        o_gate = start * HV + i_hv
        o_state = (i_c.to(tl.int64) * HV + i_hv) * K * V
        b_e = decay(load_decay(G + o_gate, o_i, HV, num_rows))
        for i_v in range(0, tl.cdiv(V, BV)):
            o_v = i_v * BV + tl.arange(0, BV)
            b_U = load_tile(U_end + o_gate * V, o_i, o_v, HV * V, num_rows, V)
            b_dS = load_tile(d_states + o_state, o_k, o_v, V, K, V)
            b_dk += tl.dot(b_U, tl.trans(b_dS), input_precision="ieee")
            if dl is not None:
                b_dY = load_tile(dY + o_gate * V, o_i, o_v, HV * V, num_rows, V)
                b_dkS = (-b_e[:, None] * b_dY.to(tl.float32)).to(b_U.dtype)
                b_S = load_tile(states + o_state, o_k, o_v, V, K, V)
                b_dk += tl.dot(b_dkS, tl.trans(b_S), input_precision="ieee")

        if ds is not None:
            b_q = load_key_tile(q + start * stride_q + i_h * K, o_i, o_k, stride_q, num_rows, K, USE_L2NORM)
            b_ds = load_tile(ds + o_gate * C, o_i, o_i, HV * C, num_rows, C)
            b_dk += tl.dot(tl.trans(b_ds), b_q, input_precision="ieee")
        b_dG = tl.zeros([C], G_DTYPE)
        b_dbeta = tl.zeros([C], G_DTYPE)
        if dl is not None:
            b_k = load_key_tile(p_k, o_i, o_k, stride_k, num_rows, K, USE_L2NORM)
            b_beta = load_rows(beta + o_gate, o_i, HV, num_rows)
            b_dl = load_tile(dl + o_gate * C, o_i, o_i, HV * C, num_rows, C)
            b_dLM = (b_dl * tl.dot(b_k, tl.trans(b_k), input_precision="ieee")).to(G_DTYPE)
            b_dbeta = tl.sum(b_dLM, 1)
            b_dLM *= b_beta[:, None]
            b_dG = tl.sum(b_dLM, 1) - tl.sum(b_dLM, 0)
            # Loaded again, transposed: fewer registers than turning the tile.
            p_dlT = dl + o_gate * C + o_i[None, :] * (HV * C) + o_i[:, None]
            b_dlT = tl.load(p_dlT, mask=m_i[None, :], other=0.0)
            b_W = b_beta[:, None] * b_dl.to(tl.float32) + b_beta[None, :] * b_dlT.to(tl.float32)
            b_dk += tl.dot(b_W.to(b_k.dtype), b_k, input_precision="ieee")
        b_dG += load_rows(dG_values + o_gate, o_i, HV, num_rows)
        b_dbeta += load_rows(dbeta_values + o_gate, o_i, HV, num_rows)
        if ds is not None:
            b_dG += load_rows(dG_queries + o_gate, o_i, HV, num_rows)
        tl.store(dG + o_gate + o_i * HV, b_dG * LN2, mask=m_i)
        tl.store(dbeta + o_gate + o_i * HV, b_dbeta, mask=m_i)

    store_key_gradient(dk + (start * H + i_h) * K, b_dk, p_k, o_i, o_k, H * K, stride_k, num_rows, K, USE_L2NORM)


def chunk_grad_split(
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
    """`chunk_grad`'s arguments and results; all three kernels take config.grad."""
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    num_chunks, width = states.shape[0], states.shape[3]
    U_end, dY = (torch.empty(B, T, HV, width, dtype=k.dtype, device=k.device) for _ in range(2))
    ds, dl = (
        None if missing else torch.empty(B, T, HV, config.chunk, dtype=k.dtype, device=k.device)
        for missing in (d_output is None, A is None)
    )
    dG_values, dG_queries, dG = (torch.empty_like(G) for _ in range(3))
    dbeta_values, dbeta = (torch.empty(B, T, HV, dtype=torch.float32, device=k.device) for _ in range(2))
    dk = torch.empty(B, T, H, K, dtype=k.dtype, device=k.device)
    dq = None if d_output is None else torch.empty_like(dk)
    packing = (cu_seqlens, chunk_offsets)
    num_seqs = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    stride_q, stride_k, stride_v = row_strides
    options = {
        "H": H,
        "HV": HV,
        "K": K,
        "C": config.chunk,
        "BK": block_size(K),
        "BV": config.grad.block_v,
        "USE_L2NORM": use_qk_l2norm,
        "num_warps": config.grad.warps,
        "num_stages": config.grad.stages,
    }
    chunk_grad_values_kernel[(num_chunks, HV)](
        q,
        k,
        v,
        G,
        beta,
        A,
        states,
        d_states,
        d_output,
        U_end,
        dY,
        ds,
        dl,
        dG_values,
        dbeta_values,
        *packing,
        scale,
        T,
        num_seqs,
        stride_q,
        stride_k,
        stride_v,
        V=V,
        WIDENED=widened,
        **options,
    )
    if d_output is not None:
        chunk_grad_queries_kernel[(num_chunks, H)](
            q,
            k,
            G,
            states,
            d_output,
            ds,
            dq,
            dG_queries,
            *packing,
            scale,
            T,
            num_seqs,
            stride_q,
            stride_k,
            V=V,
            **options,
        )
    chunk_grad_keys_kernel[(num_chunks, H)](
        q,
        k,
        G,
        beta,
        states,
        d_states,
        U_end,
        dY,
        ds,
        dl,
        dG_values,
        dG_queries,
        dbeta_values,
        dk,
        dG,
        dbeta,
        *packing,
        T,
        num_seqs,
        stride_q,
        stride_k,
        V=width,
        **options,
    )
    dv = dY[..., K:].contiguous() if widened else dY
    return dq, dk, dv, dG, dbeta
