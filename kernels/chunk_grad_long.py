"""The gradients of chunk_grad for chunks of 64 tokens, whose sums are too many to be formed at once: in two stages.

Notation of chunk_grad.py. A program takes one chunk and query/key head through all of them, so that what it reads more
than once comes from nearer than the GPU's memory. Between stages stand, in k's dtype but for dG:

    values     e^{G_C - G} U, dY, ds, dKK, dbeta, and dG but for its part through Q S0
    keys       dQ = scale e^G dO S0^T + ds K, the rest of dG
               dK = ds^T Q + (e^{G_C - G} U) dS1^T - e^G dY S0^T + (dKK + dKK^T) K

Over the tiles of values the first one carries [C, C] sums, the second one two of [C, K]. The terms of dG in QK and M
are formed from ds and dKK as rounded for the products with K and Q, so that rows still cancel columns. <S0, dS1> is the
trace of a product, so that no tile that a product reads is read into registers too.
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
    load_columns,
    load_keys,
    load_last,
    load_queries,
    load_square,
    load_values,
    load_vector,
    make_dims,
    store_columns,
    store_square,
    store_vector,
)
from sleep_ops.kernels.chunk_grad import store_key_gradient
from sleep_ops.kernels.configs import ChunkConfig
from sleep_ops.kernels.primitives import (
    LN2,
    decay,
    load_tile,
    locate_chunk,
    pair_decay,
    pair_decay_transposed,
    state_columns,
)


class Values(NamedTuple):
    """What the first stage hands on.

    U_decayed: [rows, HV, width], e^{G_C - G} U.
    dY: [rows, HV, width].
    ds: [chunks, HV, C, C], None without a cotangent of the output.
    dKK: [chunks, HV, C, C], None for the Hebbian rule.
    dG: [chunks, HV, C] (natural), but for what comes through Q S0: all of it without an output.
    """

    U_decayed: Any
    dY: Any
    ds: Any
    dKK: Any
    dG: Any


@triton.jit
def values_head(b_q, b_k, tokens, prepared, states, cotangents, values, gradients, chunk, scale, dims: tl.constexpr):
    """Of one value head what needs no sum of [C, K]: values and dbeta."""
    num_rows = chunk.num_rows
    o_i = tl.arange(0, dims.C)
    o_k = tl.arange(0, dims.BK)
    o_c = tl.arange(0, dims.BV)
    b_G = load_vector(prepared.G, chunk, dims)
    G_C = load_last(prepared.G, chunk, dims)
    b_beta = load_vector(prepared.beta, chunk, dims)
    b_e = decay(b_G)
    b_end = decay(G_C - b_G)
    dtype = b_k.dtype
    G_DTYPE: tl.constexpr = prepared.G.dtype.element_ty
    b_dbeta = tl.full([dims.C], 0.0, G_DTYPE)
    b_read = tl.full([dims.C], 0.0, G_DTYPE)
    b_written = tl.full([dims.C], 0.0, G_DTYPE)
    b_SdS = tl.full([dims.BV, dims.BV], 0.0, tl.float32)
    if prepared.A is not None:
        b_A = load_square(prepared.A, chunk, dims)
        b_AT = tl.trans(b_A)
        b_dL = tl.full([dims.C, dims.C], 0.0, tl.float32)
    if cotangents.output is not None:
        b_QKT = scale * pair_decay_transposed(b_G, o_i[None, :] >= o_i[:, None])
        b_QKT = (b_QKT * tl.dot(b_k, tl.trans(b_q), input_precision="ieee")).to(dtype)  # QK^T  [C, C]
        b_dQK = tl.full([dims.C, dims.C], 0.0, tl.float32)

    for i_v in range(0, dims.tiles):
        o_v, num_cols, column0, has_values = state_columns(i_v, dims)
        o_state = chunk.number * dims.K * dims.width + column0
        b_S = load_tile(states + o_state, o_k, o_v, dims.width, dims.K, num_cols)
        b_dS = load_tile(cotangents.state + o_state, o_k, o_v, dims.width, dims.K, num_cols)
        b_SdS += tl.dot(tl.trans(b_S), b_dS, input_precision="ieee")  # S0^T dS1  [BV, BV]
        b_Y = load_values(tokens, chunk, o_v, tl.where(has_values, num_rows, 0), dims)
        if prepared.A is None:
            b_U = b_beta[:, None] * b_Y
        else:
            b_kS = b_e[:, None] * tl.dot(b_k, b_S, input_precision="ieee")  # K S0  [C, BV]
            b_Y -= b_kS
            b_U = tl.dot(b_A, (b_beta[:, None] * b_Y).to(dtype), input_precision="ieee")  # A (beta Y)  [C, BV]
        b_dU = b_end[:, None] * tl.dot(b_k, b_dS, input_precision="ieee")  # K dS1  [C, BV]
        b_written += tl.sum((b_U * b_dU).to(G_DTYPE), 1)
        if cotangents.output is not None:
            b_dO = load_columns(cotangents.output, chunk, o_v, dims.V, dims.V, dims)
            b_dU += tl.dot(b_QKT, b_dO, input_precision="ieee")  # QK^T dO  [C, BV]
        b_dX = b_dU
        if prepared.A is not None:
            b_dX = tl.dot(b_AT, b_dU.to(dtype), input_precision="ieee")  # A^T dU  [C, BV]
            b_read += tl.sum((b_dX * b_kS).to(G_DTYPE), 1)
        b_dbeta += tl.sum((b_dX * b_Y).to(G_DTYPE), 1)
        store_columns(values.U_decayed + column0, b_end[:, None] * b_U, chunk, o_v, dims.width, num_cols, dims)
        store_columns(values.dY + column0, b_beta[:, None] * b_dX, chunk, o_v, dims.width, num_cols, dims)
        b_UT = tl.trans(b_U.to(dtype))
        if cotangents.output is not None:
            b_dQK += tl.dot(b_dO, b_UT, input_precision="ieee")  # dO U^T  [C, C]
        if prepared.A is not None:
            b_dL += tl.dot((-b_dX).to(dtype), b_UT, input_precision="ieee")  # -dX U^T  [C, C]

    b_written = tl.where(o_i < num_rows - 1, b_written, 0.0)  # as in chunk_grad.py
    b_dG = -b_beta * b_read - b_written
    if cotangents.output is not None:
        b_ds = (scale * b_dQK * pair_decay(b_G, o_i[:, None] >= o_i[None, :])).to(dtype)
        store_square(values.ds, b_ds, chunk, dims)
        b_dQKQK = (b_ds * tl.dot(b_q, tl.trans(b_k), input_precision="ieee")).to(G_DTYPE)  # Q K^T  [C, C]
        b_dQKQK = tl.where(o_i[:, None] > o_i[None, :], b_dQKQK, 0.0)  # as in chunk_grad.py
        b_dG += tl.sum(b_dQKQK, 1) - tl.sum(b_dQKQK, 0)
    if prepared.A is not None:
        b_dl = b_dL * pair_decay(b_G, o_i[:, None] > o_i[None, :])
        b_kk = tl.dot(b_k, tl.trans(b_k), input_precision="ieee")  # K K^T  [C, C]
        b_dbeta += tl.sum((b_dl * b_kk).to(G_DTYPE), 1)
        b_dKK = (b_beta[:, None] * b_dl).to(dtype)
        store_square(values.dKK, b_dKK, chunk, dims)
        b_dKKKK = (b_dKK * b_kk).to(G_DTYPE)
        b_dG += tl.sum(b_dKKKK, 1) - tl.sum(b_dKKKK, 0)
    SdS = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_SdS, 0.0).to(G_DTYPE))
    b_dG += tl.where(o_i == num_rows - 1, decay(G_C) * SdS + tl.sum(b_written), 0.0)
    store_vector(values.dG, b_dG * LN2, chunk, dims)
    store_vector(gradients.beta, b_dbeta, chunk, dims)


@triton.jit
def keys_head(
    b_dq, b_dk, b_k, tokens, prepared, states, cotangents, values, gradients, chunk, scale, dims: tl.constexpr
):
    """dq and dk [C, BK] with one value head's part added; its dG, which is complete now, is stored."""
    o_k = tl.arange(0, dims.BK)
    G_DTYPE: tl.constexpr = prepared.G.dtype.element_ty
    b_e = decay(load_vector(prepared.G, chunk, dims))
    if cotangents.output is not None:
        b_q = load_queries(tokens, chunk, dims)
        # <q, this head's part of dq> as a difference, as in chunk_grad.py
        b_dG = load_vector(values.dG, chunk, dims) - LN2 * tl.sum((b_q * b_dq).to(G_DTYPE), 1)
        b_dqS = tl.full([dims.C, dims.BK], 0.0, tl.float32)
    for i_v in range(0, dims.tiles):
        o_v, num_cols, column0, _ = state_columns(i_v, dims)
        o_state = chunk.number * dims.K * dims.width + column0
        b_U = load_columns(values.U_decayed + column0, chunk, o_v, dims.width, num_cols, dims)
        b_dS = load_tile(cotangents.state + o_state, o_k, o_v, dims.width, dims.K, num_cols)
        b_dk += tl.dot(b_U, tl.trans(b_dS), input_precision="ieee")  # (e^{G_C - G} U) dS1^T  [C, BK]
        b_S = load_tile(states + o_state, o_k, o_v, dims.width, dims.K, num_cols)
        if cotangents.output is not None:
            b_dO = load_columns(cotangents.output, chunk, o_v, dims.V, dims.V, dims)
            if values.dKK is None:
                # Scaled below: Triton would overwrite a left operand in registers too early, as no product follows.
                b_dqS += tl.dot(b_dO, tl.trans(b_S), input_precision="ieee")  # dO S0^T  [C, BK]
            else:
                b_dOe = (scale * b_e[:, None] * b_dO.to(tl.float32)).to(b_U.dtype)
                b_dq += tl.dot(b_dOe, tl.trans(b_S), input_precision="ieee")  # scale e^G dO S0^T  [C, BK]
        if values.dKK is not None:
            b_dY = load_columns(values.dY + column0, chunk, o_v, dims.width, num_cols, dims)
            b_dkS = (-b_e[:, None] * b_dY.to(tl.float32)).to(b_U.dtype)
            b_dk += tl.dot(b_dkS, tl.trans(b_S), input_precision="ieee")  # -e^G dY S0^T  [C, BK]
    if cotangents.output is not None:
        if values.dKK is None:
            b_dq += scale * b_e[:, None] * b_dqS
        b_dG += LN2 * tl.sum((b_q * b_dq).to(G_DTYPE), 1)
        store_vector(gradients.g, b_dG, chunk, dims)
        b_ds = load_square(values.ds, chunk, dims)
        b_dq += tl.dot(b_ds, b_k, input_precision="ieee")  # ds K  [C, BK]
        b_dk += tl.dot(tl.trans(b_ds), b_q, input_precision="ieee")  # ds^T Q  [C, BK]
    if values.dKK is not None:
        b_dKK = load_square(values.dKK, chunk, dims)
        b_dKK += tl.trans(b_dKK)  # exact: no place holds numbers of both
        b_dk += tl.dot(b_dKK, b_k, input_precision="ieee")  # (dKK + dKK^T) K  [C, BK]
    return b_dq, b_dk


@triton.jit(do_not_specialize=["T", "num_seqs"])
def chunk_grad_long_kernel(
    tokens, prepared, packing, states, cotangents, values, gradients, scale, T, num_seqs, dims: tl.constexpr
):
    """What chunk_grad_kernel does, but for dv, which is dY in values; A is None for the Hebbian rule.

    Threads read what others of their program have stored, after a barrier.

    Grid (chunks, H). Mirrors the backward of `one_pass` of sleep_ops/reference.py.
    """
    i_c = tl.program_id(0)
    i_h = tl.program_id(1)
    start, num_rows = locate_chunk(i_c, packing, T, num_seqs, dims.C)
    if num_rows <= 0:
        return
    rows = Chunk(start, num_rows, i_h, None, None)
    number0 = i_c.to(tl.int64) * dims.HV
    first = i_h * (dims.HV // dims.H)
    last = first + dims.HV // dims.H
    b_k = load_keys(tokens, rows, dims)
    b_q = None
    if cotangents.output is not None:
        b_q = load_queries(tokens, rows, dims)

    for i_hv in range(first, last):
        chunk = Chunk(start, num_rows, i_h, i_hv, number0 + i_hv)
        values_head(b_q, b_k, tokens, prepared, states, cotangents, values, gradients, chunk, scale, dims)
    tl.debug_barrier()
    b_dq = tl.full([dims.C, dims.BK], 0.0, tl.float32)
    b_dk = tl.full([dims.C, dims.BK], 0.0, tl.float32)
    # Where values are one tile, Triton would pipeline this loop, and overwrite tiles that a product still reads.
    for i_hv in tl.range(first, last, num_stages=1):
        chunk = Chunk(start, num_rows, i_h, i_hv, number0 + i_hv)
        b_dq, b_dk = keys_head(
            b_dq, b_dk, b_k, tokens, prepared, states, cotangents, values, gradients, chunk, scale, dims
        )
    if cotangents.output is not None:
        store_key_gradient(gradients.q, b_dq, tokens.q, tokens.stride_q, prepared.rq, rows, dims)
    store_key_gradient(gradients.k, b_dk, tokens.k, tokens.stride_k, prepared.rk, rows, dims)


def chunk_grad_long(
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
    """`chunk_grad`'s arguments and results."""
    B, T, H, K = tokens.k.shape
    HV, V = tokens.v.shape[2:]
    dtype, device = tokens.k.dtype, tokens.k.device
    U_decayed, dY = (torch.empty(B, T, HV, states.shape[3], dtype=dtype, device=device) for _ in range(2))
    ds, dKK = (
        None if missing else torch.empty(*prepared.G.shape, config.chunk, dtype=dtype, device=device)
        for missing in (cotangents.output is None, prepared.A is None)
    )
    dG = torch.empty_like(prepared.G)
    values = Values(U_decayed, dY, ds, dKK, dG if ds is None else torch.empty_like(dG))
    dk = torch.empty(B, T, H, K, dtype=dtype, device=device)
    dq = None if cotangents.output is None else torch.empty_like(dk)
    gradients = Gradients(dq, dk, None, dG, torch.empty_like(prepared.beta))
    dims = make_dims(H, HV, K, V, config.chunk, config.grad.block_v, widened)
    length = (T, packing.num_seqs)
    chunk_grad_long_kernel[(states.shape[0], H)](
        tokens, prepared, packing, states, cotangents, values, gradients, scale, *length, dims, **config.grad.options
    )
    return gradients._replace(v=dY[..., K:].contiguous() if widened else dY)
