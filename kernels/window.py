"""Windows that fit one chunk: the whole forward in one launch, and the whole backward in another.

Notation of chunk_prepare.py, chunk_scan.py and chunk_grad.py. A program takes a window from its raw inputs to the
result: gates, sigmoid, normalisation, inverse, output and final state. Nothing is kept for the backward, which computes
all of that again from the same inputs. At such lengths launches cost more than arithmetic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleep_ops.kernels.chunk_grad import store_key_gradient, value_head_gradient
from sleep_ops.kernels.chunk_prepare import (
    activate_gates,
    decay_dtype,
    decay_gradient,
    delta_rule_inverse,
    log_decay_gradient,
)
from sleep_ops.kernels.configs import WindowConfig, block_size
from sleep_ops.kernels.primitives import decay, load_key_tile, load_rows, load_tile, pair_decay, store_tile


@triton.jit(do_not_specialize=["T"])
def window_forward_kernel(
    q,
    k,
    v,
    g,
    beta,
    A_log,
    dt_bias,
    initial_state,
    output,
    final_state,
    scale,
    T,
    stride_q,
    stride_k,
    stride_v,
    stride_g,
    stride_beta,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BETA_SCALE: tl.constexpr,
    IS_DELTA: tl.constexpr,
    USE_L2NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    G_DTYPE: tl.constexpr,
):
    """Output and final state of one window of T <= C tokens and value head.

    Reads q, k, v rows, g and beta [B, T, HV] as chunk_prepare does, A_log and dt_bias [HV] or None, and initial_state
    [B, HV, K, V] or None (zero). Writes output [B, T, HV, V], where given (q is read for it only), and final_state
    [B, HV, K, V].

    Grid (B * HV). Mirrors `gated_delta_rule_reference` of sleep_ops/reference.py.
    """
    i_bh = tl.program_id(0)
    i_hv = i_bh % HV
    i_h = i_hv // (HV // H)
    start = (i_bh // HV).to(tl.int64) * T
    o_i = tl.arange(0, C)
    o_k = tl.arange(0, BK)

    b_k = load_key_tile(k + start * stride_k + i_h * K, o_i, o_k, stride_k, T, K, USE_L2NORM)
    p_g = g + start * stride_g + i_hv
    p_beta = beta + start * stride_beta + i_hv
    b_G, b_beta = activate_gates(p_g, p_beta, A_log, dt_bias, i_hv, o_i, stride_g, stride_beta, T, BETA_SCALE, G_DTYPE)
    G_C = tl.sum(tl.where(o_i == C - 1, b_G, 0.0))
    b_e = decay(b_G)
    dtype = b_k.dtype
    if IS_DELTA:
        b_A = delta_rule_inverse(b_k, b_G, b_beta, C, PRECISION).to(dtype)
    if output is not None:
        b_q = load_key_tile(q + start * stride_q + i_h * K, o_i, o_k, stride_q, T, K, USE_L2NORM)
        b_P = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * pair_decay(b_G, o_i[:, None] >= o_i[None, :])
        b_P = b_P.to(dtype)

    for i_v in range(0, tl.cdiv(V, BV)):
        o_v = i_v * BV + tl.arange(0, BV)
        o_state = i_bh.to(tl.int64) * K * V
        b_U = load_tile(v + start * stride_v + i_hv * V, o_i, o_v, stride_v, T, V).to(tl.float32)
        if initial_state is not None:
            b_S = load_tile(initial_state + o_state, o_k, o_v, V, K, V)
            if IS_DELTA:
                b_U -= b_e[:, None] * tl.dot(b_k, b_S.to(dtype), input_precision="ieee")
        b_U *= b_beta[:, None]
        if IS_DELTA:
            b_U = tl.dot(b_A, b_U.to(dtype), input_precision="ieee")

        if output is not None:
            b_O = tl.dot(b_P, b_U.to(dtype), input_precision="ieee")
            if initial_state is not None:
                b_O += b_e[:, None] * tl.dot(b_q, b_S.to(dtype), input_precision="ieee")
            store_tile(output + (start * HV + i_hv) * V, b_O * scale, o_i, o_v, HV * V, T, V)

        b_W = (decay(G_C - b_G)[:, None] * b_U).to(dtype)
        b_S1 = tl.dot(tl.trans(b_k), b_W, input_precision="ieee")
        if initial_state is not None:
            b_S1 += decay(G_C) * b_S
        store_tile(final_state + o_state, b_S1, o_k, o_v, V, K, V)


@triton.jit(do_not_specialize=["T"])
def window_backward_kernel(
    q,
    k,
    v,
    g,
    beta,
    A_log,
    dt_bias,
    initial_state,
    d_output,
    d_final_state,
    dq,
    dk,
    dv,
    dg,
    dbeta,
    partial,
    d_initial_state,
    scale,
    T,
    stride_q,
    stride_k,
    stride_v,
    stride_g,
    stride_beta,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BETA_SCALE: tl.constexpr,
    IS_DELTA: tl.constexpr,
    USE_L2NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    G_DTYPE: tl.constexpr,
):
    """Gradients of one window of T <= C tokens and query/key head, summed over its value heads.

    Reads what the forward reads, d_output [B, T, HV, V] and d_final_state [B, HV, K, V], each None for zero. Writes
    dq, dk [B, T, H, K], dv [B, T, HV, V], dg, dbeta [B, T, HV], d_initial_state where given, and with A_log the
    window's part of the cotangents of A_log and dt_bias, partial [B, 2, HV] float32. Without d_output neither q nor dq
    is touched.

    Grid (B * H). Mirrors the backward of `gated_delta_rule_reference` of sleep_ops/reference.py.
    """
    i_b = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    start = i_b.to(tl.int64) * T
    o_i = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    p_k = k + start * stride_k + i_h * K
    b_dq = tl.zeros([C, BK], tl.float32)
    b_dk = tl.zeros([C, BK], tl.float32)

    for i_group in range(0, HV // H):
        i_hv = i_h * (HV // H) + i_group
        p_g = g + start * stride_g + i_hv
        p_beta = beta + start * stride_beta + i_hv
        b_G, b_beta = activate_gates(
            p_g, p_beta, A_log, dt_bias, i_hv, o_i, stride_g, stride_beta, T, BETA_SCALE, G_DTYPE
        )
        b_A = None
        b_AT = None
        if IS_DELTA:
            b_k = load_key_tile(p_k, o_i, o_k, stride_k, T, K, USE_L2NORM)
            b_A = delta_rule_inverse(b_k, b_G, b_beta, C, PRECISION).to(b_k.dtype)
            # An exact product instead of tl.trans, which no left operand may be: see chunk_grad.py.
            b_I = tl.where(o_i[:, None] == o_i[None, :], 1.0, 0.0).to(b_k.dtype)
            b_AT = tl.dot(b_I, tl.trans(b_A), input_precision="ieee").to(b_k.dtype)
        b_dq, b_dk, b_dg, b_dbeta = value_head_gradient(
            b_dq,
            b_dk,
            b_G,
            tl.sum(tl.where(o_i == C - 1, b_G, 0.0)),
            b_beta,
            b_A,
            b_AT,
            q,
            k,
            v,
            initial_state,
            d_final_state,
            d_output,
            dv,
            d_initial_state,
            start,
            i_h,
            i_hv,
            i_b.to(tl.int64) * HV + i_hv,
            scale,
            T,
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
            False,
        )

        m_i = o_i < T
        o_gate = (start + o_i) * HV + i_hv
        b_dg = tl.cumsum(b_dg, 0, reverse=True)
        b_x = load_rows(p_g, o_i, stride_g, T).to(tl.float32)
        if A_log is None:
            b_dg = decay_gradient(b_dg, b_x)
        else:
            b_rate = tl.exp(tl.load(A_log + i_hv).to(tl.float32))
            b_x += tl.load(dt_bias + i_hv).to(tl.float32)
            b_dg, b_drate = log_decay_gradient(b_dg, b_x, b_rate)
            p_partial = partial + i_b.to(tl.int64) * 2 * HV + i_hv
            tl.store(p_partial, tl.sum(b_drate))
            tl.store(p_partial + HV, tl.sum(b_dg))
        if BETA_SCALE > 0:
            b_dbeta *= b_beta * (1.0 - b_beta / BETA_SCALE)
        tl.store(dg + o_gate, b_dg.to(dg.dtype.element_ty), mask=m_i)
        tl.store(dbeta + o_gate, b_dbeta.to(dbeta.dtype.element_ty), mask=m_i)

    o_dx = (start * H + i_h) * K
    store_key_gradient(dk + o_dx, b_dk, p_k, o_i, o_k, H * K, stride_k, T, K, USE_L2NORM)
    if d_output is not None:
        p_q = q + start * stride_q + i_h * K
        store_key_gradient(dq + o_dx, b_dq, p_q, o_i, o_k, H * K, stride_q, T, K, USE_L2NORM)


def _options(k: Tensor, v: Tensor, rule: str, use_qk_l2norm: bool, beta_scale: float, config: WindowConfig) -> dict:
    """What both kernels are compiled for, and with."""
    K, V = k.shape[3], v.shape[3]
    return {
        "H": k.shape[2],
        "HV": v.shape[2],
        "K": K,
        "V": V,
        "C": config.chunk,
        "BK": block_size(K),
        "BV": config.launch.block_v,
        "BETA_SCALE": beta_scale,
        "IS_DELTA": rule == "delta",
        "USE_L2NORM": use_qk_l2norm,
        "PRECISION": "ieee" if k.dtype == torch.float32 else "tf32x3",
        "G_DTYPE": tl.float64 if decay_dtype(k.dtype) == torch.float64 else tl.float32,
        "num_warps": config.launch.warps,
        "num_stages": config.launch.stages,
    }


def window_forward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    row_strides: tuple[int, int, int, int, int],
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    *,
    scale: float,
    rule: str,
    use_qk_l2norm: bool,
    beta_scale: float,
    config: WindowConfig,
) -> tuple[Tensor | None, Tensor]:
    """Output [B, T, HV, V] in v's dtype (None without q) and final state [B, HV, K, V] float32.

    q, k [B, T, H, K], v [B, T, HV, V], g and beta [B, T, HV] with rows of contiguous heads, `row_strides` elements
    apart; T <= config.chunk; initial_state [B, HV, K, V] float32, contiguous.
    """
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    output = None if q is None else torch.empty(B, T, HV, V, dtype=v.dtype, device=v.device)
    final_state = torch.empty(B, HV, K, V, dtype=torch.float32, device=v.device)
    window_forward_kernel[(B * HV,)](
        q,
        k,
        v,
        g,
        beta,
        A_log,
        dt_bias,
        initial_state,
        output,
        final_state,
        scale,
        T,
        *row_strides,
        **_options(k, v, rule, use_qk_l2norm, beta_scale, config),
    )
    return output, final_state


def window_backward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    row_strides: tuple[int, int, int, int, int],
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    d_output: Tensor | None,
    d_final_state: Tensor | None,
    *,
    scale: float,
    rule: str,
    use_qk_l2norm: bool,
    beta_scale: float,
    config: WindowConfig,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq (None without d_output), dk, dv, dg, dbeta in their inputs' dtypes; of A_log and dt_bias, [2, HV] float32.

    The last is that of initial_state. d_output [B, T, HV, V] and d_final_state [B, HV, K, V] float32 are contiguous,
    or None for zero, not both; other inputs as in window_forward, q None without d_output.
    """
    B, T, H, K = k.shape
    HV, V = v.shape[2:]
    dk = torch.empty(B, T, H, K, dtype=k.dtype, device=k.device)
    dq = None if d_output is None else torch.empty_like(dk)
    dv = torch.empty(B, T, HV, V, dtype=v.dtype, device=k.device)
    dg, dbeta = (torch.empty(B, T, HV, dtype=x.dtype, device=k.device) for x in (g, beta))
    partial = None if A_log is None else torch.empty(B, 2, HV, dtype=torch.float32, device=k.device)
    d_initial_state = None if initial_state is None else torch.empty_like(initial_state)
    window_backward_kernel[(B * H,)](
        q,
        k,
        v,
        g,
        beta,
        A_log,
        dt_bias,
        initial_state,
        d_output,
        d_final_state,
        dq,
        dk,
        dv,
        dg,
        dbeta,
        partial,
        d_initial_state,
        scale,
        T,
        *row_strides,
        **_options(k, v, rule, use_qk_l2norm, beta_scale, config),
    )
    return dq, dk, dv, dg, dbeta, None if partial is None else partial.sum(0), d_initial_state
