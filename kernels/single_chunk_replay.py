"""Replay of sequences that fit one chunk: the state after N passes in one launch, its gradients in another.

Notation of chunk_prepare.py, and c = e^{G_C}. With

    N = diag(beta e^G) K K^T diag(e^{G_C - G})        F = c I - A N        D = A diag(beta) V
    W = A diag(beta e^G) K S0

n passes leave c^n S0 + K^T (e^{G_C - G} Z_n), where Z_0 = 0 and Z_n+1 = F Z_n + D - c^n W  [C, V]. That takes two sums
of powers of F  [C, C], which double and grow by one along the bits of the number of passes:

    Z_n = Sigma_n D - Gamma_n W        Sigma_n = sum_{m < n} F^m        Gamma_n = sum_{m < n} c^{n - 1 - m} F^m
    Sigma_2n = Sigma_n + F^n Sigma_n                     Gamma_2n = c^n Gamma_n + F^n Gamma_n
    Sigma_n+1 = Sigma_n + F^n                            Gamma_n+1 = c Gamma_n + F^n

The cotangent of F is H_n^T. With dZ = e^{G_C - G} K dS, that of Z_n, and Q = D dZ^T, R = W dZ^T, H goes along with the
sums, so that no power is kept:

    H_n = sum_{m < n} Z_m dZ^T F^{n - 1 - m}             H_n+1 = H_n F + Sigma_n Q - Gamma_n R
    H_2n = H_n F^n + F^n H_n + Sigma_n Q Sigma_n - Gamma_n R Gamma_n

So does Gamma'_n = c dGamma_n/dc = sum_{m < n} (n - 1 - m) c^{n - 1 - m} F^m. The Hebbian rule has N = 0, W = 0, A = I.

Z may have a large part that no state sees: products with it and with what becomes of it are those of `product`.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleep_ops.kernels.arguments import (
    Chunk,
    Gates,
    Gradients,
    Tokens,
    load_keys,
    load_values,
    make_dims,
)
from sleep_ops.kernels.chunk_grad import store_key_gradient
from sleep_ops.kernels.chunk_prepare import activate_gates, block_product, delta_rule_inverse
from sleep_ops.kernels.configs import Launch, block_size
from sleep_ops.kernels.primitives import decay, load_tile, pair_decay, store_tile
from sleep_ops.kernels.single_chunk import parameter_gradients, store_gate_gradients


class States(NamedTuple):
    """initial, None for zero; the cotangents of the final one, and of the initial one: [B, HV, K, V] float32."""

    initial: Any
    d_final: Any
    d_initial: Any


@triton.jit
def identity(C: tl.constexpr):
    """I [C, C], float32."""
    o_i = tl.arange(0, C)
    return tl.where(o_i[:, None] == o_i[None, :], 1.0, 0.0)


@triton.jit
def product(b_x, b_y, dtype: tl.constexpr):
    """x y of tiles of float32 or of `dtype`, that of q, k and v: to 2^-22, and to 2^-16 with bfloat16."""
    if dtype != tl.bfloat16:
        b_xy = block_product(b_x.to(tl.float32), b_y.to(tl.float32), dtype)
    elif b_x.dtype == dtype:
        b_y1, b_y2 = two_parts(b_y)
        b_xy = tl.dot(b_x, b_y1, tl.dot(b_x, b_y2))  # x (y1 + y2)
    elif b_y.dtype == dtype:
        b_x1, b_x2 = two_parts(b_x)
        b_xy = tl.dot(b_x1, b_y, tl.dot(b_x2, b_y))  # (x1 + x2) y
    else:
        b_x1, b_x2 = two_parts(b_x)
        b_y1, b_y2 = two_parts(b_y)
        b_xy = tl.dot(b_x1, b_y1, tl.dot(b_x1, b_y2, tl.dot(b_x2, b_y1)))  # (x1 + x2) (y1 + y2) - x2 y2
    return b_xy


@triton.jit
def two_parts(b_x):
    """Two tiles of bfloat16 whose sum is one of float32, to 2^-17."""
    # Rounded as an integer: conversions that are not of two numbers at once are slow.
    b_bits = (b_x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000
    b_x1 = b_bits.to(tl.float32, bitcast=True)
    return b_x1.to(tl.bfloat16), (b_x - b_x1).to(tl.bfloat16)


@triton.jit
def sums_of_powers(b_F, G_C, passes, doublings, b_Q, b_R, HAS_W: tl.constexpr, dtype: tl.constexpr, C: tl.constexpr):
    """Sigma, Gamma, Gamma' and H of `passes` passes, [C, C] float32: the second with HAS_W, the last two with Q.

    doublings: the number of bits of `passes` after the highest.
    """
    b_P = b_F  # F^n
    b_sigma = identity(C)
    b_gamma = b_sigma
    b_slope = tl.zeros_like(b_F)
    b_H = tl.zeros_like(b_F)
    c = decay(G_C)
    for i in range(0, doublings):
        n = passes >> (doublings - i)
        if b_Q is not None:
            # H F^n + F^n H + Sigma Q Sigma - Gamma R Gamma  [C, C]
            b_H = product(b_H, b_P, dtype) + product(b_P, b_H, dtype)
            b_H += product(product(b_sigma, b_Q, dtype), b_sigma, dtype)
        if HAS_W:
            c_n = decay(n * G_C)
            if b_Q is not None:
                b_H -= product(product(b_gamma, b_R, dtype), b_gamma, dtype)
                b_slope = c_n * (b_slope + n * b_gamma) + product(b_P, b_slope, dtype)  # F^n Gamma'  [C, C]
            b_gamma = c_n * b_gamma + product(b_P, b_gamma, dtype)  # F^n Gamma  [C, C]
        b_sigma += product(b_P, b_sigma, dtype)  # F^n Sigma  [C, C]
        b_P = product(b_P, b_P, dtype)  # F^n F^n  [C, C]
        if (passes >> (doublings - 1 - i)) & 1:
            if b_Q is not None:
                # H F + Sigma Q - Gamma R  [C, C]
                b_H = product(b_H, b_F, dtype) + product(b_sigma, b_Q, dtype)
            if HAS_W:
                if b_Q is not None:
                    b_H -= product(b_gamma, b_R, dtype)
                    b_slope = c * (b_slope + b_gamma)
                b_gamma = c * b_gamma + b_P
            b_sigma += b_P
            b_P = product(b_P, b_F, dtype)  # F^n F  [C, C]
    return b_sigma, b_gamma, b_slope, b_H


@triton.jit(do_not_specialize=["passes", "doublings", "T"])
def replay_forward_kernel(
    tokens,
    gates,
    initial_state,
    final_state,
    passes,
    doublings,
    T,
    IS_DELTA: tl.constexpr,
    BETA_SCALE: tl.constexpr,
    dims: tl.constexpr,
):
    """State after `passes` passes over one sequence of T <= C tokens and value head.

    Reads k and v of tokens, gates as chunk_prepare does, and initial_state [B, HV, K, V], None for zero.
    Writes final_state [B, HV, K, V].

    Grid (B * HV). Mirrors `replay_short` of sleep_ops/ops/short_windows.py.
    """
    i_bh = tl.program_id(0)
    i_hv = i_bh % dims.HV
    chunk = Chunk((i_bh // dims.HV).to(tl.int64) * T, T, i_hv // (dims.HV // dims.H), i_hv, i_bh.to(tl.int64))
    o_i = tl.arange(0, dims.C)
    o_k = tl.arange(0, dims.BK)
    HAS_W: tl.constexpr = IS_DELTA and initial_state is not None

    b_k = load_keys(tokens, chunk, dims)
    dtype: tl.constexpr = b_k.dtype
    b_G, b_beta = activate_gates(gates, chunk, dtype, BETA_SCALE, dims)
    G_C = tl.sum(tl.where(o_i == dims.C - 1, b_G, 0.0))
    b_e = decay(b_G)
    b_end = decay(G_C - b_G)
    b_F = decay(G_C) * identity(dims.C)
    if IS_DELTA:
        b_A = delta_rule_inverse(b_k, b_G, b_beta, dims.C)
        b_kk = tl.dot(b_k, tl.trans(b_k), input_precision="ieee")  # K K^T  [C, C]
        # E = A (beta e^G K K^T e^{G_C - G})  [C, C]
        b_F -= product(b_A, (b_beta * b_e)[:, None] * b_kk * b_end[None, :], dtype)
    b_sigma, b_gamma, _, _ = sums_of_powers(b_F, G_C, passes, doublings, None, None, HAS_W, dtype, dims.C)
    b_MV = b_sigma
    if IS_DELTA:
        b_MV = product(b_sigma, b_A, dtype)  # Sigma A  [C, C]
    b_MV *= b_beta[None, :]
    if HAS_W:
        b_MW = product(b_gamma, b_A, dtype) * b_beta[None, :]  # Gamma A  [C, C]

    for i_v in range(0, dims.tiles):
        o_v = i_v * dims.BV + tl.arange(0, dims.BV)
        o_state = chunk.number * dims.K * dims.V
        b_v = load_values(tokens, chunk, o_v, T, dims).to(dtype)
        b_Z = product(b_MV, b_v, dtype)  # (Sigma A beta) V  [C, BV]
        if initial_state is not None:
            b_S = load_tile(initial_state + o_state, o_k, o_v, dims.V, dims.K, dims.V)
        if HAS_W:
            b_KS = b_e[:, None] * product(b_k, b_S, dtype)  # K S0  [C, BV]
            b_Z -= product(b_MW, b_KS, dtype)  # (Gamma A beta) (e^G K S0)  [C, BV]
        # K^T (e^{G_C - G} Z)  [BK, BV]
        b_SN = product(tl.trans(b_k), b_end[:, None] * b_Z, dtype)
        if initial_state is not None:
            b_SN += decay(passes * G_C) * b_S
        store_tile(final_state + o_state, b_SN, o_k, o_v, dims.V, dims.K, dims.V)


@triton.jit(do_not_specialize=["passes", "doublings", "T"])
def replay_backward_kernel(
    tokens,
    gates,
    states,
    gradients,
    partial,
    passes,
    doublings,
    T,
    IS_DELTA: tl.constexpr,
    BETA_SCALE: tl.constexpr,
    dims: tl.constexpr,
):
    """Gradients of one sequence of T <= C tokens and query/key head, summed over its value heads.

    With Y = e^G K S0, M_V = Sigma A and M_W = Gamma A:

        dV = beta M_V^T dZ        dX = M_W^T dZ        dS0 = c^N dS - K^T (beta e^G dX)
        dN = -(H A)^T        dL = strict_tril(-(A dA^T A)^T)        A dA^T = Q Sigma - R Gamma - A N H
        dK = (e^{G_C - G} Z) dS^T - (beta e^G dX) S0^T + (dKK + dKK^T) K        with dKK of dL and dN as in chunk_grad

    Reads k and v of tokens, gates, and states: initial, None for zero, and the cotangent of the final one.
    Writes
        gradients of k, v, g and beta,
        partial [B, 2, HV] float32, with A_log: the sequence's part of the cotangents of A_log and dt_bias,
        the cotangent of the initial state, where there is one.

    Grid (B * H).
    """
    i_b = tl.program_id(0) // dims.H
    i_h = tl.program_id(0) % dims.H
    start = i_b.to(tl.int64) * T
    o_i = tl.arange(0, dims.C)
    o_k = tl.arange(0, dims.BK)
    HAS_W: tl.constexpr = IS_DELTA and states.initial is not None
    dtype: tl.constexpr = tokens.k.dtype.element_ty
    G_DTYPE: tl.constexpr = tl.float64 if dtype == tl.float32 else tl.float32
    b_dk = tl.full([dims.C, dims.BK], 0.0, tl.float32)

    for i_group in range(0, dims.HV // dims.H):
        i_hv = i_h * (dims.HV // dims.H) + i_group
        chunk = Chunk(start, T, i_h, i_hv, i_b.to(tl.int64) * dims.HV + i_hv)
        o_state = chunk.number * dims.K * dims.V
        b_k = load_keys(tokens, chunk, dims)
        b_G, b_beta = activate_gates(gates, chunk, dtype, BETA_SCALE, dims)
        G_C = tl.sum(tl.where(o_i == dims.C - 1, b_G, 0.0))
        b_e = decay(b_G)
        b_end = decay(G_C - b_G)

        b_VdZ = tl.full([dims.C, dims.C], 0.0, tl.float32)
        b_YdZ = tl.full([dims.C, dims.C], 0.0, tl.float32)
        for i_v in range(0, dims.tiles):
            o_v = i_v * dims.BV + tl.arange(0, dims.BV)
            b_dS = load_tile(states.d_final + o_state, o_k, o_v, dims.V, dims.K, dims.V)
            b_dZ = b_end[:, None] * product(b_k, b_dS, dtype)  # K dS  [C, BV]
            b_v = load_values(tokens, chunk, o_v, T, dims).to(dtype)
            b_VdZ += product(b_v, tl.trans(b_dZ), dtype)  # V dZ^T  [C, C]
            if HAS_W:
                b_S = load_tile(states.initial + o_state, o_k, o_v, dims.V, dims.K, dims.V)
                b_Y = b_e[:, None] * product(b_k, b_S, dtype)  # K S0  [C, BV]
                b_YdZ += product(b_Y, tl.trans(b_dZ), dtype)  # Y dZ^T  [C, C]

        b_c = decay(G_C) * identity(dims.C)
        b_F = b_c
        b_Q = b_beta[:, None] * b_VdZ
        b_R = b_beta[:, None] * b_YdZ
        if IS_DELTA:
            b_A = delta_rule_inverse(b_k, b_G, b_beta, dims.C)
            b_kk = tl.dot(b_k, tl.trans(b_k), input_precision="ieee")  # K K^T  [C, C]
            b_ends = b_e[:, None] * b_end[None, :]
            b_N = b_beta[:, None] * b_kk * b_ends
            b_F -= product(b_A, b_N, dtype)  # A N  [C, C]
            b_Q = product(b_A, b_Q, dtype)  # A (beta V dZ^T)  [C, C]
        if HAS_W:
            b_R = product(b_A, b_R, dtype)  # A (beta Y dZ^T)  [C, C]
        b_sigma, b_gamma, b_slope, b_H = sums_of_powers(b_F, G_C, passes, doublings, b_Q, b_R, HAS_W, dtype, dims.C)
        dG_C = decay(G_C) * tl.sum(tl.where(o_i[:, None] == o_i[None, :], b_H, 0.0).to(G_DTYPE))  # c in F
        if HAS_W:
            dG_C -= tl.sum((b_R * tl.trans(b_slope)).to(G_DTYPE))

        # Transposed by the identity, because no left operand may be tl.trans: see chunk_grad.py.
        b_I = identity(dims.C).to(dtype)
        b_MV = b_sigma
        if IS_DELTA:
            b_MV = product(b_sigma, b_A, dtype)  # Sigma A  [C, C]
        b_MVT = product(b_I, tl.trans(b_MV), dtype)  # (Sigma A)^T  [C, C]
        b_MV *= b_beta[None, :]
        if HAS_W:
            b_MW = product(b_gamma, b_A, dtype)  # Gamma A  [C, C]
            b_MWT = product(b_I, tl.trans(b_MW), dtype)  # (Gamma A)^T  [C, C]
            b_MW *= b_beta[None, :]

        b_dG = tl.full([dims.C], 0.0, G_DTYPE)
        b_dbeta = tl.full([dims.C], 0.0, G_DTYPE)
        b_SdS = tl.full([dims.BV], 0.0, G_DTYPE)
        if IS_DELTA:
            # A dA^T = Q Sigma - R Gamma - A N H  [C, C]
            b_AdAT = product(b_Q, b_sigma, dtype) + product(b_F - b_c, b_H, dtype)
            if HAS_W:
                b_AdAT -= product(b_R, b_gamma, dtype)
            b_dL = -tl.trans(product(b_AdAT, b_A, dtype))  # A dA^T A  [C, C]
            b_dl = b_dL * pair_decay(b_G, o_i[:, None] > o_i[None, :])
            b_dn = -tl.trans(product(b_H, b_A, dtype)) * b_ends  # H A  [C, C]
            b_dKK = b_dl + b_dn
            b_dbeta += tl.sum((b_dKK * b_kk).to(G_DTYPE), 1)
            b_dKK *= b_beta[:, None]
            dG_C += tl.sum((b_beta[:, None] * b_dn * b_kk).to(G_DTYPE))
            # The diagonal would cancel but for rounding.
            b_pairs = tl.where(o_i[:, None] == o_i[None, :], 0.0, (b_dKK * b_kk)).to(G_DTYPE)
            b_dG += tl.sum(b_pairs, 1) - tl.sum(b_pairs, 0)
            # (dKK + dKK^T) K  [C, BK]
            b_dk += product(b_dKK + tl.trans(b_dKK), b_k, dtype)

        for i_v in range(0, dims.tiles):
            o_v = i_v * dims.BV + tl.arange(0, dims.BV)
            b_dS = load_tile(states.d_final + o_state, o_k, o_v, dims.V, dims.K, dims.V)
            b_dZ = b_end[:, None] * product(b_k, b_dS, dtype)  # K dS  [C, BV]
            b_v = load_values(tokens, chunk, o_v, T, dims).to(dtype)
            b_dX = product(b_MVT, b_dZ, dtype)  # (Sigma A)^T dZ  [C, BV]
            b_dbeta += tl.sum((b_v * b_dX).to(G_DTYPE), 1)
            p_dv = gradients.v + (start * dims.HV + i_hv) * dims.V
            store_tile(p_dv, b_beta[:, None] * b_dX, o_i, o_v, dims.HV * dims.V, T, dims.V)
            b_Z = product(b_MV, b_v, dtype)  # (Sigma A beta) V  [C, BV]
            if states.initial is not None:
                b_S = load_tile(states.initial + o_state, o_k, o_v, dims.V, dims.K, dims.V)
                b_SdS += tl.sum((b_S * b_dS).to(G_DTYPE), 0)
                b_dS0 = decay(passes * G_C) * b_dS
            if HAS_W:
                b_Y = b_e[:, None] * product(b_k, b_S, dtype)  # K S0  [C, BV]
                b_Z -= product(b_MW, b_Y, dtype)  # (Gamma A beta) Y  [C, BV]
                b_dX = product(b_MWT, b_dZ, dtype)  # (Gamma A)^T dZ  [C, BV]
                b_YdX = tl.sum((b_Y * b_dX).to(G_DTYPE), 1)
                b_dbeta -= b_YdX
                b_dG -= b_beta * b_YdX
                b_dKS = -(b_beta * b_e)[:, None] * b_dX
                b_dk += product(b_dKS, tl.trans(b_S), dtype)  # -beta e^G dX S0^T  [C, BK]
                b_dS0 += product(tl.trans(b_k), b_dKS, dtype)  # -K^T (beta e^G dX)  [BK, BV]
            # What the last token writes does not decay.
            b_ZdZ = tl.where(o_i < T - 1, tl.sum((b_Z * b_dZ).to(G_DTYPE), 1), 0.0)
            b_dG -= b_ZdZ
            dG_C += tl.sum(b_ZdZ)
            b_dk += product(b_end[:, None] * b_Z, tl.trans(b_dS), dtype)  # e^{G_C - G} Z dS^T  [C, BK]
            if states.initial is not None:
                store_tile(states.d_initial + o_state, b_dS0, o_k, o_v, dims.V, dims.K, dims.V)

        if states.initial is not None:
            dG_C += passes * decay(passes * G_C) * tl.sum(b_SdS)
        b_dG += tl.where(o_i == T - 1, dG_C, 0.0)
        store_gate_gradients(gradients, partial, b_dG, b_dbeta, gates, b_beta, i_b, chunk, BETA_SCALE, dims)

    rows = Chunk(start, T, i_h, None, None)
    store_key_gradient(gradients.k, b_dk, tokens.k, tokens.stride_k, None, rows, dims)


def replay_launches(K: int, V: int, dtype: torch.dtype) -> tuple[Launch, Launch]:
    """Of the forward and the backward. As few warps as tiles fit into: predicted to be the fastest, not measured."""
    if dtype != torch.bfloat16:
        block_v, warps = 16, (4, 4)
    else:
        block_v, warps = 32 if K <= 128 else 16, (1 if K <= 64 else 2, 2)
    return tuple(Launch(min(block_v, block_size(V)), number, 1) for number in warps)


def _settings(
    tokens: Tokens, passes: int, rule: str, use_qk_l2norm: bool, beta_scale: float, chunk: int, backward: bool
) -> tuple[tuple, dict[str, int]]:
    """What a kernel is given after its tensors, and the options of its launch."""
    T, H, K = tokens.k.shape[1:]
    HV, V = tokens.v.shape[2:]
    launch = replay_launches(K, V, tokens.k.dtype)[backward]
    dims = make_dims(H, HV, K, V, chunk, launch.block_v, l2norm=use_qk_l2norm)
    return (passes, passes.bit_length() - 1, T, rule == "delta", beta_scale, dims), launch.options


def replay_forward(
    tokens: Tokens,
    gates: Gates,
    initial_state: Tensor | None,
    passes: int,
    *,
    rule: str,
    use_qk_l2norm: bool,
    beta_scale: float,
    chunk: int,
) -> Tensor:
    """State [B, HV, K, V] float32 after `passes` >= 1 passes over T <= chunk tokens; initial_state contiguous."""
    B, T, HV, V = tokens.v.shape
    final_state = torch.empty(B, HV, tokens.k.shape[3], V, dtype=torch.float32, device=tokens.v.device)
    settings, options = _settings(tokens, passes, rule, use_qk_l2norm, beta_scale, chunk, backward=False)
    replay_forward_kernel[(B * HV,)](tokens, gates, initial_state, final_state, *settings, **options)
    return final_state


def replay_backward(
    tokens: Tokens,
    gates: Gates,
    initial_state: Tensor | None,
    d_final_state: Tensor,
    passes: int,
    *,
    rule: str,
    use_qk_l2norm: bool,
    beta_scale: float,
    chunk: int,
) -> tuple[Gradients, tuple[Tensor | None, Tensor | None], Tensor | None]:
    """Gradients of k, v and the gates; of A_log and dt_bias; and of initial_state; in their inputs' dtypes."""
    B, T, H, K = tokens.k.shape
    HV, V = tokens.v.shape[2:]
    dk = torch.empty(B, T, H, K, dtype=tokens.k.dtype, device=tokens.k.device)
    dv = torch.empty(B, T, HV, V, dtype=tokens.v.dtype, device=dk.device)
    dg, dbeta = (torch.empty(B, T, HV, dtype=x.dtype, device=dk.device) for x in gates[:2])
    gradients = Gradients(None, dk, dv, dg, dbeta)
    partial = None if gates.A_log is None else torch.empty(B, 2, HV, dtype=torch.float32, device=dk.device)
    d_initial_state = None if initial_state is None else torch.empty_like(initial_state)
    states = States(initial_state, d_final_state, d_initial_state)
    settings, options = _settings(tokens, passes, rule, use_qk_l2norm, beta_scale, chunk, backward=True)
    replay_backward_kernel[(B * H,)](tokens, gates, states, gradients, partial, *settings, **options)
    return gradients, parameter_gradients(partial, gates), d_initial_state
