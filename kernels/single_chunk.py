"""Sequences that fit one chunk: the whole forward in one launch, and the whole backward in another.

Notation of chunk_prepare.py, chunk_scan.py and chunk_grad.py. A program takes a sequence from its raw inputs to the
result: gates, sigmoid, normalisation, inverse, output and final state. Nothing is kept for the backward, which computes
all of that again from the same inputs. At such lengths launches cost more than arithmetic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleep_ops.kernels.arguments import (
    Chunk,
    Cotangents,
    Dims,
    Gates,
    Gradients,
    Tokens,
    load_keys,
    load_queries,
    load_values,
    make_dims,
    store_columns,
    store_gate,
)
from sleep_ops.kernels.chunk_grad import ChunkGates, store_key_gradient, value_head_gradient
from sleep_ops.kernels.chunk_prepare import (
    activate_gates,
    decay_gradient,
    delta_rule_inverse,
    load_gate_input,
    log_decay_gradient,
)
from sleep_ops.kernels.configs import Launch, SingleChunkConfig
from sleep_ops.kernels.primitives import decay, load_tile, pair_decay, store_tile


@triton.jit(do_not_specialize=["T"])
def single_chunk_forward_kernel(
    tokens,
    gates,
    initial_state,
    output,
    final_state,
    scale,
    T,
    IS_DELTA: tl.constexpr,
    BETA_SCALE: tl.constexpr,
    dims: tl.constexpr,
):
    """Output and final state of one sequence of T <= C tokens and value head.

    Reads tokens (q for the output only), gates as chunk_prepare does, and initial_state [B, HV, K, V], None for zero.
    Writes output [B, T, HV, V], where given, and final_state [B, HV, K, V].

    Grid (B * HV). Mirrors `gated_delta_rule_reference` of sleep_ops/reference.py.
    """
    i_bh = tl.program_id(0)
    i_hv = i_bh % dims.HV
    chunk = Chunk((i_bh // dims.HV).to(tl.int64) * T, T, i_hv // (dims.HV // dims.H), i_hv, i_bh.to(tl.int64))
    o_i = tl.arange(0, dims.C)
    o_k = tl.arange(0, dims.BK)

    b_k = load_keys(tokens, chunk, dims)
    dtype = b_k.dtype
    b_G, b_beta = activate_gates(gates, chunk, dtype, BETA_SCALE, dims)
    G_C = tl.sum(tl.where(o_i == dims.C - 1, b_G, 0.0))
    b_e = decay(b_G)
    if IS_DELTA:
        b_A = delta_rule_inverse(b_k, b_G, b_beta, dims.C).to(dtype)
    if output is not None:
        b_q = load_queries(tokens, chunk, dims)
        b_QK = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # Q K^T  [C, C]
        b_QK = (b_QK * pair_decay(b_G, o_i[:, None] >= o_i[None, :])).to(dtype)

    for i_v in range(0, dims.tiles):
        o_v = i_v * dims.BV + tl.arange(0, dims.BV)
        o_state = chunk.number * dims.K * dims.V
        b_U = load_values(tokens, chunk, o_v, T, dims)
        if initial_state is not None:
            b_S = load_tile(initial_state + o_state, o_k, o_v, dims.V, dims.K, dims.V)
            if IS_DELTA:
                # Y = V - e^G K S  [C, BV]
                b_U -= b_e[:, None] * tl.dot(b_k, b_S.to(dtype), input_precision="ieee")
        b_U *= b_beta[:, None]
        if IS_DELTA:
            b_U = tl.dot(b_A, b_U.to(dtype), input_precision="ieee")  # U = A (beta Y)  [C, BV]

        if output is not None:
            b_O = tl.dot(b_QK, b_U.to(dtype), input_precision="ieee")  # QK U  [C, BV]
            if initial_state is not None:
                b_O += b_e[:, None] * tl.dot(b_q, b_S.to(dtype), input_precision="ieee")  # Q S  [C, BV]
            store_columns(output, b_O * scale, chunk, o_v, dims.V, dims.V, dims)

        b_write = (decay(G_C - b_G)[:, None] * b_U).to(dtype)
        b_S1 = tl.dot(tl.trans(b_k), b_write, input_precision="ieee")  # K^T (e^{G_C - G} U)  [BK, BV]
        if initial_state is not None:
            b_S1 += decay(G_C) * b_S
        store_tile(final_state + o_state, b_S1, o_k, o_v, dims.V, dims.K, dims.V)


@triton.jit
def store_gate_gradients(
    gradients, partial, b_dG, b_dbeta, gates, b_beta, i_b, chunk, BETA_SCALE: tl.constexpr, dims: tl.constexpr
):
    """Store the gradients of g and beta of sequence i_b, and its part of those of A_log and dt_bias, from dG and dbeta.

    dG (natural) and dbeta are of what activate_gates gives  [C].
    """
    b_dg = tl.cumsum(b_dG, 0, reverse=True)
    b_x = load_gate_input(gates.g, gates.stride_g, chunk, dims)
    if gates.A_log is None:
        b_dg = decay_gradient(b_dg, b_x)
    else:
        b_rate = tl.exp(tl.load(gates.A_log + chunk.i_hv).to(tl.float32))
        b_x += tl.load(gates.dt_bias + chunk.i_hv).to(tl.float32)
        b_dg, b_drate = log_decay_gradient(b_dg, b_x, b_rate)
        p_partial = partial + i_b.to(tl.int64) * 2 * dims.HV + chunk.i_hv
        tl.store(p_partial, tl.sum(b_drate))
        tl.store(p_partial + dims.HV, tl.sum(b_dg))
    if BETA_SCALE > 0:
        b_dbeta *= b_beta * (1.0 - b_beta / BETA_SCALE)
    store_gate(gradients.g, b_dg, chunk, dims)
    store_gate(gradients.beta, b_dbeta, chunk, dims)


@triton.jit(do_not_specialize=["T"])
def single_chunk_backward_kernel(
    tokens,
    gates,
    initial_state,
    cotangents,
    gradients,
    partial,
    d_initial_state,
    scale,
    T,
    IS_DELTA: tl.constexpr,
    BETA_SCALE: tl.constexpr,
    dims: tl.constexpr,
):
    """Gradients of one sequence of T <= C tokens and query/key head, summed over its value heads.

    Reads what the forward reads, and cotangents of the output and of the final state.
    Writes
        gradients of tokens, and of g and beta; without a cotangent of the output neither q nor its gradient is touched,
        partial [B, 2, HV] float32, with A_log: the sequence's part of the cotangents of A_log and dt_bias,
        d_initial_state [B, HV, K, V], where given.

    Grid (B * H). Mirrors the backward of `gated_delta_rule_reference` of sleep_ops/reference.py.
    """
    i_b = tl.program_id(0) // dims.H
    i_h = tl.program_id(0) % dims.H
    start = i_b.to(tl.int64) * T
    o_i = tl.arange(0, dims.C)
    b_dq = tl.full([dims.C, dims.BK], 0.0, tl.float32)
    b_dk = tl.full([dims.C, dims.BK], 0.0, tl.float32)

    for i_group in range(0, dims.HV // dims.H):
        i_hv = i_h * (dims.HV // dims.H) + i_group
        chunk = Chunk(start, T, i_h, i_hv, i_b.to(tl.int64) * dims.HV + i_hv)
        b_G, b_beta = activate_gates(gates, chunk, tokens.k.dtype.element_ty, BETA_SCALE, dims)
        b_A = None
        b_AT = None
        if IS_DELTA:
            b_k = load_keys(tokens, chunk, dims)
            b_A = delta_rule_inverse(b_k, b_G, b_beta, dims.C).to(b_k.dtype)
            # An exact product instead of tl.trans, which no left operand may be: see chunk_grad.py.
            b_I = tl.where(o_i[:, None] == o_i[None, :], 1.0, 0.0).to(b_k.dtype)
            b_AT = tl.dot(b_I, tl.trans(b_A), input_precision="ieee").to(b_k.dtype)  # A^T  [C, C]
        b_dq, b_dk, b_dg, b_dbeta = value_head_gradient(
            b_dq,
            b_dk,
            ChunkGates(b_G, tl.sum(tl.where(o_i == dims.C - 1, b_G, 0.0)), b_beta, b_A, b_AT),
            tokens,
            chunk,
            initial_state,
            cotangents,
            gradients.v,
            d_initial_state,
            scale,
            dims,
        )

        store_gate_gradients(gradients, partial, b_dg, b_dbeta, gates, b_beta, i_b, chunk, BETA_SCALE, dims)

    rows = Chunk(start, T, i_h, None, None)
    store_key_gradient(gradients.k, b_dk, tokens.k, tokens.stride_k, None, rows, dims)
    if cotangents.output is not None:
        store_key_gradient(gradients.q, b_dq, tokens.q, tokens.stride_q, None, rows, dims)


def _dims(tokens: Tokens, use_qk_l2norm: bool, chunk: int, launch: Launch) -> Dims:
    (H, K), (HV, V) = tokens.k.shape[2:], tokens.v.shape[2:]
    return make_dims(H, HV, K, V, chunk, launch.block_v, l2norm=use_qk_l2norm)


def parameter_gradients(partial: Tensor | None, gates: Gates) -> tuple[Tensor | None, Tensor | None]:
    """Of A_log and dt_bias, from every sequence's part [B, 2, HV]; None without them."""
    if partial is None:
        return None, None
    sums = zip(partial.unbind(1), (gates.A_log, gates.dt_bias), strict=True)
    return tuple(x.sum(0).to(parameter.dtype) for x, parameter in sums)


def single_chunk_forward(
    tokens: Tokens,
    gates: Gates,
    initial_state: Tensor | None,
    *,
    scale: float,
    rule: str,
    use_qk_l2norm: bool,
    beta_scale: float,
    config: SingleChunkConfig,
) -> tuple[Tensor | None, Tensor]:
    """Output [B, T, HV, V] in v's dtype (None without q) and final state [B, HV, K, V] float32.

    T <= config.chunk; initial_state [B, HV, K, V] float32, contiguous.
    """
    v = tokens.v
    B, T, HV, V = v.shape
    output = None if tokens.q is None else torch.empty(B, T, HV, V, dtype=v.dtype, device=v.device)
    final_state = torch.empty(B, HV, tokens.k.shape[3], V, dtype=torch.float32, device=v.device)
    single_chunk_forward_kernel[(B * HV,)](
        *(tokens, gates, initial_state, output, final_state, scale, T, rule == "delta", beta_scale),
        _dims(tokens, use_qk_l2norm, config.chunk, config.forward),
        **config.forward.options,
    )
    return output, final_state


def single_chunk_backward(
    tokens: Tokens,
    gates: Gates,
    initial_state: Tensor | None,
    cotangents: Cotangents,
    *,
    scale: float,
    rule: str,
    use_qk_l2norm: bool,
    beta_scale: float,
    config: SingleChunkConfig,
) -> tuple[Gradients, tuple[Tensor | None, Tensor | None], Tensor | None]:
    """Gradients of the tokens and gates; of A_log and dt_bias; and of initial_state; in their inputs' dtypes.

    cotangents, of single_chunk_forward's results, are contiguous and not both None. Without one of the output there is
    no gradient of q, which is not read; other inputs as in single_chunk_forward.
    """
    B, T, H, K = tokens.k.shape
    HV, V = tokens.v.shape[2:]
    dk = torch.empty(B, T, H, K, dtype=tokens.k.dtype, device=tokens.k.device)
    dq = None if cotangents.output is None else torch.empty_like(dk)
    dv = torch.empty(B, T, HV, V, dtype=tokens.v.dtype, device=dk.device)
    dg, dbeta = (torch.empty(B, T, HV, dtype=x.dtype, device=dk.device) for x in gates[:2])
    gradients = Gradients(dq, dk, dv, dg, dbeta)
    partial = None if gates.A_log is None else torch.empty(B, 2, HV, dtype=torch.float32, device=dk.device)
    d_initial_state = None if initial_state is None else torch.empty_like(initial_state)
    single_chunk_backward_kernel[(B * H,)](
        *(tokens, gates, initial_state, cotangents, gradients, partial, d_initial_state),
        *(scale, T, rule == "delta", beta_scale),
        _dims(tokens, use_qk_l2norm, config.chunk, config.backward),
        **config.backward.options,
    )
    return gradients, parameter_gradients(partial, gates), d_initial_state
