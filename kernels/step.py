"""One token of the gated delta rule, state in and state out.

Per value head: S1 = e^g S + k (beta (v - (e^g S)^T k))^T and o = scale S1^T q, or k (beta v)^T for the Hebbian rule
(arXiv 2412.06464; equation (3) of arXiv 2605.26099). Columns of S are independent, so each program owns some of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleep_ops.kernels.primitives import L2_NORM_EPS, softplus

BLOCK_V = 32
NUM_WARPS = 4


@triton.jit
def step_kernel(
    q,
    k,
    v,
    g,
    beta,
    state,
    A_log,
    dt_bias,
    output,
    new_state,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BETA_SCALE: tl.constexpr,
    IS_DELTA: tl.constexpr,
    USE_L2NORM: tl.constexpr,
):
    """output [B, HV, V] and new_state [B, HV, K, V] of contiguous inputs; all arithmetic in float32.

    new_state may be state itself: a program reads the columns it owns, which no other does, before it writes them.

    Reads q, k [B, H, K], v [B, HV, V], g, beta [B, HV], state [B, HV, K, V] (float32), A_log and dt_bias [HV] or None;
    BETA_SCALE > 0 takes beta as the logit of BETA_SCALE * sigmoid(beta). Grid (B * HV, V / BV). Mirrors `one_pass` of
    sleep_ops/reference.py.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_hv = i_bh % HV
    i_k = (i_bh // HV) * H + i_hv // (HV // H)
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V

    b_q = tl.load(q + i_k * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.load(k + i_k * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    if USE_L2NORM:
        b_q *= tl.rsqrt(tl.sum(b_q * b_q, 0) + L2_NORM_EPS)
        b_k *= tl.rsqrt(tl.sum(b_k * b_k, 0) + L2_NORM_EPS)
    b_g = tl.load(g + i_bh).to(tl.float32)
    if A_log is not None:
        b_g = -tl.exp(tl.load(A_log + i_hv).to(tl.float32)) * softplus(b_g + tl.load(dt_bias + i_hv).to(tl.float32))
    b_beta = tl.load(beta + i_bh).to(tl.float32)
    if BETA_SCALE > 0:
        b_beta = BETA_SCALE * tl.sigmoid(b_beta)

    o_s = i_bh * K * V + o_k[:, None] * V + o_v[None, :]
    m_s = m_k[:, None] & m_v[None, :]
    b_S = tl.exp(b_g) * tl.load(state + o_s, mask=m_s, other=0.0)
    b_v = tl.load(v + i_bh * V + o_v, mask=m_v, other=0.0).to(tl.float32)
    if IS_DELTA:
        b_v -= tl.sum(b_S * b_k[:, None], 0)
    b_S += b_k[:, None] * (b_beta * b_v)[None, :]
    b_o = scale * tl.sum(b_S * b_q[:, None], 0)
    tl.store(output + i_bh * V + o_v, b_o.to(output.dtype.element_ty), mask=m_v)
    tl.debug_barrier()  # threads that hold copies of an element must all have read it
    tl.store(new_state + o_s, b_S, mask=m_s)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    *,
    scale: float,
    rule: str,
    use_qk_l2norm: bool,
    beta_scale: float,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch `step_kernel`; shapes as there, contiguous. Returns the output in v's dtype and the new state."""
    H, K = k.shape[1:]
    B, HV, V = v.shape
    output, new_state = torch.empty_like(v), state if inplace else torch.empty_like(state)
    BV = min(BLOCK_V, triton.next_power_of_2(V))
    step_kernel[(B * HV, triton.cdiv(V, BV))](
        q,
        k,
        v,
        g,
        beta,
        state,
        A_log,
        dt_bias,
        output,
        new_state,
        scale,
        H=H,
        HV=HV,
        K=K,
        V=V,
        BK=triton.next_power_of_2(K),
        BV=BV,
        BETA_SCALE=beta_scale,
        IS_DELTA=rule == "delta",
        USE_L2NORM=use_qk_l2norm,
        num_warps=NUM_WARPS,
    )
    return output, new_state
