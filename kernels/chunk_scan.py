"""The two sweeps over the chunks of a sequence: the fast weights S forwards, their cotangent dS backwards.

Per value head and chunk of C tokens, with S the state before the chunk, G the log decay summed inside it and A from
chunk_prepare (Yang, Kautz, Hatamizadeh, arXiv 2412.06464, section 3.3):

    Y = V - e^G K S        U = A (beta Y)        (Hebbian rule: U = beta V)
    O = scale e^G Q S + QK U,    QK_ij = scale e^{G_i - G_j} <q_i, k_j> for i >= j
    S <- e^{G_C} S + K^T (e^{G_C - G} U)

and backwards, with dS the cotangent of the state after the chunk:

    dU = QK^T dO + e^{G_C - G} K dS        dY = beta A^T dU
    dS <- e^{G_C} dS + Q^T (scale e^G dO) - K^T (e^G dY)        (Hebbian rule: no dY term)

The columns of S are independent: a program carries [K, block_v] of them in float32 registers. So one pass over a
segment as an affine map, S -> P S + R, is the same sweep over wider columns: from [I | 0] with values [0 | V] it leaves
[P | R]. Products take operands in k's dtype, sums are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleep_ops.kernels.arguments import (
    Chunk,
    Cotangents,
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
)
from sleep_ops.kernels.configs import ChunkConfig, sweep_launch
from sleep_ops.kernels.primitives import (
    decay,
    first_chunk,
    load_tile,
    pair_decay,
    pair_decay_transposed,
    sequence_bounds,
    state_columns,
    store_tile,
)


@triton.jit(do_not_specialize=["T"])
def chunk_scan_kernel(
    tokens, prepared, packing, initial_state, output, states, final_state, scale, T, dims: tl.constexpr
):
    """States of one sequence, value head and column tile, chunk after chunk; A is None for the Hebbian rule.

    Reads tokens (q for the output only), prepared, and
        initial_state [N, HV, K, V], None for zero; with WIDENED it is [I | 0], and there is no output.
    Writes, where given,
        output [rows, HV, V],
        states [chunks, HV, K, width], each chunk's S before it, in that tensor's dtype,
        final_state [N, HV, K, width].

    Grid (N * HV * tiles). Mirrors `one_pass` of sleep_ops/reference.py.
    """
    i_nh = tl.program_id(0) // dims.tiles
    i_n = i_nh // dims.HV
    i_hv = i_nh % dims.HV
    i_h = i_hv // (dims.HV // dims.H)
    start, length = sequence_bounds(i_n, packing, T)
    chunk0 = first_chunk(i_n, packing, T, dims.C)

    o_i = tl.arange(0, dims.C)
    o_k = tl.arange(0, dims.BK)
    o_v, num_cols, column0, has_values = state_columns(tl.program_id(0) % dims.tiles, dims)
    o_state = i_nh.to(tl.int64) * dims.K * dims.width + column0
    if dims.WIDENED:
        b_S = tl.where((o_k[:, None] == o_v[None, :]) & (not has_values), 1.0, 0.0)
    elif initial_state is None:
        b_S = tl.full([dims.BK, dims.BV], 0.0, tl.float32)
    else:
        b_S = load_tile(initial_state + o_state, o_k, o_v, dims.V, dims.K, dims.V)

    for i_t in range(0, tl.cdiv(length, dims.C)):
        num_rows = tl.minimum(length - i_t * dims.C, dims.C)
        # In 64 bits from the start: a row's address is a constant more in each iteration, with no register of its own.
        chunk = Chunk(start + tl.cast(i_t, tl.int64) * dims.C, num_rows, i_h, i_hv, (chunk0 + i_t) * dims.HV + i_hv)
        if states is not None:
            o_chunk = chunk.number * dims.K * dims.width + column0
            store_tile(states + o_chunk, b_S, o_k, o_v, dims.width, dims.K, num_cols)

        b_k = load_keys(tokens, chunk, dims)
        b_v = load_values(tokens, chunk, o_v, tl.where(has_values, num_rows, 0), dims)
        b_G = load_vector(prepared.G, chunk, dims)
        b_beta = load_vector(prepared.beta, chunk, dims)
        b_e = decay(b_G)
        dtype = b_k.dtype
        if prepared.A is None:
            b_U = b_beta[:, None] * b_v
        else:
            b_kS = tl.dot(b_k, b_S.to(dtype), input_precision="ieee")  # K S  [C, BV]
            b_A = load_square(prepared.A, chunk, dims)
            b_Y = b_beta[:, None] * (b_v - b_e[:, None] * b_kS)
            b_U = tl.dot(b_A, b_Y.to(dtype), input_precision="ieee")  # U = A (beta Y)  [C, BV]

        G_C = load_last(prepared.G, chunk, dims)
        b_write = (decay(G_C - b_G)[:, None] * b_U).to(dtype)
        # S <- e^{G_C} S + K^T (e^{G_C - G} U)  [BK, BV]
        b_S_next = decay(G_C) * b_S + tl.dot(tl.trans(b_k), b_write, input_precision="ieee")

        if output is not None:
            b_q = load_queries(tokens, chunk, dims)
            if prepared.QK is None:
                b_QK = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # Q K^T  [C, C]
                b_QK *= pair_decay(b_G, o_i[:, None] >= o_i[None, :])
            else:
                b_QK = load_square(prepared.QK, chunk, dims)
            b_O = b_e[:, None] * tl.dot(b_q, b_S.to(dtype), input_precision="ieee")  # Q S  [C, BV]
            b_O += tl.dot(b_QK.to(dtype), b_U.to(dtype), input_precision="ieee")  # QK U  [C, BV]
            store_columns(output, scale * b_O, chunk, o_v, dims.V, dims.V, dims)
        b_S = b_S_next

    if final_state is not None:
        store_tile(final_state + o_state, b_S, o_k, o_v, dims.width, dims.K, num_cols)


@triton.jit(do_not_specialize=["T"])
def chunk_reverse_kernel(
    tokens, prepared, packing, cotangents, d_states, d_initial_state, scale, T, dims: tl.constexpr
):
    """Cotangents of the states of one sequence, value head and column tile, from the last chunk to the first.

    Reads q, with a cotangent of the output only, k, prepared and cotangents. V is the states' width.
    Writes
        d_states [chunks, HV, K, V], the cotangent of the state after each chunk,
        d_initial_state [N, HV, K, V], where given.

    Grid (N * HV * tiles). Mirrors the backward of `one_pass` of sleep_ops/reference.py.
    """
    i_nh = tl.program_id(0) // dims.tiles
    i_n = i_nh // dims.HV
    i_hv = i_nh % dims.HV
    i_h = i_hv // (dims.HV // dims.H)
    start, length = sequence_bounds(i_n, packing, T)
    chunk0 = first_chunk(i_n, packing, T, dims.C)

    o_i = tl.arange(0, dims.C)
    o_k = tl.arange(0, dims.BK)
    o_v = tl.program_id(0) % dims.tiles * dims.BV + tl.arange(0, dims.BV)
    o_state = i_nh.to(tl.int64) * dims.K * dims.V
    if cotangents.state is None:
        b_dS = tl.full([dims.BK, dims.BV], 0.0, tl.float32)
    else:
        b_dS = load_tile(cotangents.state + o_state, o_k, o_v, dims.V, dims.K, dims.V)

    num_chunks = tl.cdiv(length, dims.C)
    p_G = prepared.G + (chunk0 * dims.HV + i_hv) * dims.C + (dims.C - 1)
    # Loaded a chunk ahead.
    G_next = tl.load(p_G + (num_chunks - 1) * (dims.HV * dims.C), mask=length > 0, other=0.0)
    for i_r in range(0, num_chunks):
        i_t = num_chunks - 1 - i_r
        num_rows = tl.minimum(length - i_t * dims.C, dims.C)
        chunk = Chunk(start + tl.cast(i_t, tl.int64) * dims.C, num_rows, i_h, i_hv, (chunk0 + i_t) * dims.HV + i_hv)
        G_C = G_next
        G_next = tl.load(p_G + tl.maximum(i_t - 1, 0) * (dims.HV * dims.C))
        store_tile(d_states + chunk.number * dims.K * dims.V, b_dS, o_k, o_v, dims.V, dims.K, dims.V)

        b_G = load_vector(prepared.G, chunk, dims)
        b_e = decay(b_G)
        b_k = load_keys(tokens, chunk, dims)
        dtype = b_k.dtype
        b_dS_next = decay(G_C) * b_dS

        if cotangents.output is not None:
            b_q = load_queries(tokens, chunk, dims)
            b_dO = load_columns(cotangents.output, chunk, o_v, dims.V, dims.V, dims)
            b_dqS = (scale * b_e[:, None] * b_dO.to(tl.float32)).to(dtype)
            b_dS_next += tl.dot(tl.trans(b_q), b_dqS, input_precision="ieee")  # Q^T (scale e^G dO)  [BK, BV]

        if prepared.A is not None:
            # e^{G_C - G} K dS  [C, BV]
            b_dU = decay(G_C - b_G)[:, None] * tl.dot(b_k, b_dS.to(dtype), input_precision="ieee")
            if cotangents.output is not None:
                if prepared.QK is None:
                    b_decay = pair_decay_transposed(b_G, o_i[None, :] >= o_i[:, None])
                    b_QKT = scale * b_decay * tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # QK^T  [C, C]
                    b_dU += tl.dot(b_QKT.to(dtype), b_dO.to(dtype), input_precision="ieee")  # QK^T dO  [C, BV]
                else:
                    b_QK = load_square(prepared.QK, chunk, dims)
                    b_dU += scale * tl.dot(tl.trans(b_QK), b_dO.to(dtype), input_precision="ieee")  # QK^T dO  [C, BV]
            b_A = load_square(prepared.A, chunk, dims)
            b_beta = load_vector(prepared.beta, chunk, dims)
            b_dX = tl.dot(tl.trans(b_A), b_dU.to(dtype), input_precision="ieee")  # A^T dU  [C, BV]
            b_dkS = (-(b_e * b_beta)[:, None] * b_dX).to(dtype)
            b_dS_next += tl.dot(tl.trans(b_k), b_dkS, input_precision="ieee")  # -K^T (e^G dY)  [BK, BV]
        b_dS = b_dS_next

    if d_initial_state is not None:
        store_tile(d_initial_state + o_state, b_dS, o_k, o_v, dims.V, dims.K, dims.V)


def chunk_scan(
    tokens: Tokens,
    prepared: Prepared,
    packing: Packing,
    initial_state: Tensor | None,
    *,
    scale: float,
    config: ChunkConfig,
    widened: bool = False,
    num_chunks: int | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Output [B, T, HV, V] in v's dtype (None without q) and final state [N, HV, K, V] float32.

    With `num_chunks` (their bound over all sequences) the states before each chunk, [num_chunks, HV, K, V] in k's
    dtype, are returned instead of the final state and there is no output. `widened` (without output and initial_state):
    states are [P | R], [K, K + V].
    """
    q, k, v = tokens[:3]
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    N = B if packing.cu_seqlens is None else packing.num_seqs
    light = widened and num_chunks is None
    launch = sweep_launch(config.scan, N * HV, K + V if widened else V, k.device, light=light)
    dims = make_dims(H, HV, K, V, config.chunk, launch.block_v, widened)
    output = final_state = states = None
    if num_chunks is None:
        final_state = torch.empty(N, HV, K, dims.width, dtype=torch.float32, device=k.device)
        if q is not None:
            output = torch.empty(B, T, HV, V, dtype=v.dtype, device=k.device)
    else:
        states = torch.empty(num_chunks, HV, K, dims.width, dtype=k.dtype, device=k.device)
    chunk_scan_kernel[(N * HV * dims.tiles,)](
        tokens, prepared, packing, initial_state, output, states, final_state, scale, T, dims, **launch.options
    )
    return output, final_state if num_chunks is None else states


def chunk_reverse(
    tokens: Tokens,
    prepared: Prepared,
    packing: Packing,
    cotangents: Cotangents,
    *,
    width: int,
    scale: float,
    need_initial: bool,
    num_chunks: int,
    config: ChunkConfig,
) -> tuple[Tensor, Tensor | None]:
    """State cotangents after each chunk [num_chunks, HV, K, width] in k's dtype, and of the initial state if needed.

    The states may be widened ones. The cotangents are those of chunk_scan's results, contiguous.
    """
    B, T, H, K = tokens.k.shape
    HV, device = prepared.G.shape[1], tokens.k.device
    N = B if packing.cu_seqlens is None else packing.num_seqs
    launch = sweep_launch(config.reverse, N * HV, width, device, light=cotangents.output is None)
    dims = make_dims(H, HV, K, width, config.chunk, launch.block_v)
    d_states = torch.empty(num_chunks, HV, K, width, dtype=tokens.k.dtype, device=device)
    d_initial = torch.empty(N, HV, K, width, dtype=torch.float32, device=device) if need_initial else None
    chunk_reverse_kernel[(N * HV * dims.tiles,)](
        tokens, prepared, packing, cotangents, d_states, d_initial, scale, T, dims, **launch.options
    )
    return d_states, d_initial
