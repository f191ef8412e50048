"""One token of the gated delta rule, state in and state out.

Per value head: S1 = e^g S + k (beta (v - (e^g S)^T k))^T and o = scale S1^T q, or k (beta v)^T for the Hebbian rule
(arXiv 2412.06464; equation (3) of arXiv 2605.26099). Columns of S are independent, so each program owns some of them.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleep_ops.kernels.arguments import Dims, Gates, Tokens
from sleep_ops.kernels.primitives import L2_NORM_EPS, softplus

BLOCK_V = 32
NUM_WARPS = 4


@triton.jit
def step_kernel(
    tokens, gates, state, output, new_state, scale, IS_DELTA: tl.constexpr, BETA_SCALE: tl.constexpr, dims: tl.constexpr
):
    """One token of a sequence, value head and tile of values; all inputs are contiguous, all arithmetic in float32.

    Reads tokens and gates without their axis T, and
        state [B, HV, K, V] float32.
    Writes
        output [B, HV, V],
        new_state, which may be state itself: a program reads the columns it owns, which no other does, before it writes
        them.
    BETA_SCALE > 0 takes beta as the logit of BETA_SCALE * sigmoid(beta).

    Grid (B * HV, tiles). Mirrors `one_pass` of sleep_ops/reference.py.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_hv = i_bh % dims.HV
    i_k = (i_bh // dims.HV) * dims.H + i_hv // (dims.HV // dims.H)
    o_k = tl.arange(0, dims.BK)
    o_v = tl.program_id(1) * dims.BV + tl.arange(0, dims.BV)
    m_k, m_v = o_k < dims.K, o_v < dims.V

    b_q = tl.load(tokens.q + i_k * dims.K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.load(tokens.k + i_k * dims.K + o_k, mask=m_k, other=0.0).to(tl.float32)
    if dims.USE_L2NORM:
        b_q *= tl.rsqrt(tl.sum(b_q * b_q, 0) + L2_NORM_EPS)
        b_k *= tl.rsqrt(tl.sum(b_k * b_k, 0) + L2_NORM_EPS)
    b_g = tl.load(gates.g + i_bh).to(tl.float32)
    if gates.A_log is not None:
        b_rate = tl.exp(tl.load(gates.A_log + i_hv).to(tl.float32))
        b_g = -b_rate * softplus(b_g + tl.load(gates.dt_bias + i_hv).to(tl.float32))
    b_beta = tl.load(gates.beta + i_bh).to(tl.float32)
    if BETA_SCALE > 0:
        b_beta = BETA_SCALE * tl.sigmoid(b_beta)

    o_s = i_bh * dims.K * dims.V + o_k[:, None] * dims.V + o_v[None, :]
    m_s = m_k[:, None] & m_v[None, :]
    b_S = tl.exp(b_g) * tl.load(state + o_s, mask=m_s, other=0.0)
    b_v = tl.load(tokens.v + i_bh * dims.V + o_v, mask=m_v, other=0.0).to(tl.float32)
    if IS_DELTA:
        b_v -= tl.sum(b_S * b_k[:, None], 0)
    b_S += b_k[:, None] * (b_beta * b_v)[None, :]
    b_o = scale * tl.sum(b_S * b_q[:, None], 0)
    tl.store(output + i_bh * dims.V + o_v, b_o.to(output.dtype.element_ty), mask=m_v)
    tl.debug_barrier()  # threads that hold copies of an element must all have read it
    tl.store(new_state + o_s, b_S, mask=m_s)


@functools.cache
def _dims(H: int, HV: int, K: int, V: int, l2norm: bool) -> Dims:
    BV = min(BLOCK_V, triton.next_power_of_2(V))
    return Dims(H, HV, K, V, V, 1, triton.next_power_of_2(K), BV, triton.cdiv(V, BV), l2norm, False)


def step(
    tokens: Tokens,
    gates: Gates,
    state: Tensor,
    *,
    scale: float,
    rule: str,
    use_qk_l2norm: bool,
    beta_scale: float,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch `step_kernel`; shapes as there, contiguous. Returns the output in v's dtype and the new state."""
    B, HV, V = tokens.v.shape
    output, new_state = torch.empty_like(tokens.v), state if inplace else torch.empty_like(state)
    H, K = tokens.k.shape[1:]
    dims = _dims(H, HV, K, V, use_qk_l2norm)
    step_kernel[(B * HV, dims.tiles)](
        tokens, gates, state, output, new_state, scale, rule == "delta", beta_scale, dims, num_warps=NUM_WARPS
    )
    return output, new_state
