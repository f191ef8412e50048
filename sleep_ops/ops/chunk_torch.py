"""The chunked gated delta rule in PyTorch: what runs on CPU tensors, and the yardstick of the Triton kernels.

Per chunk of C tokens, with G the cumulative log decay inside it, S0 the state before it and S1 after it:

    M_ij = e^(G_i - G_j) k_i . k_j  (i > j)     L = I + diag(beta) M     A = L^-1
    Y = V - e^G * (K S0)                        U = A (beta * Y)         (Hebbian rule: U = beta * V)
    O = scale e^G * (Q S0) + P U                P_ij = scale e^(G_i - G_j) q_i . k_j  (i >= j)
    S1 = e^G_C S0 + (e^(G_C - G) * K)^T U

after Yang et al., "Parallelizing Linear Transformers with the Delta Rule", arXiv 2406.06484, and Yang, Kautz,
Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464. Only Y, U and S1 are computed chunk by chunk; the rest is batched
over chunks.

float16 and bfloat16 inputs are computed as the kernels compute them: operands of matrix products are rounded to the
input dtype, sums, gates, the inverse and the states are float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops.ops.packed import PaddedSequences
from sleep_ops.reference import l2_normalise, log_decay, state_dtype, write_strength
from sleep_ops.validation import check_first_order

MAX_CHUNK = 64


class _RoundedMatmul(torch.autograd.Function):
    """x @ y with operands rounded to `dtype` and float32 sums, in the backward too."""

    @staticmethod
    def forward(ctx, x, y, dtype):
        x, y = x.to(dtype), y.to(dtype)
        ctx.save_for_backward(x, y)
        return x.float() @ y.float()

    @staticmethod
    def backward(ctx, grad):
        check_first_order("gated_delta_rule")
        x, y = ctx.saved_tensors
        grad = grad.to(x.dtype).float()
        return (grad @ y.float().mT).sum_to_size(x.shape), (x.float().mT @ grad).sum_to_size(y.shape), None


class _UnitLowerSolve(torch.autograd.Function):
    """L^-1 x for a unit lower triangular L, given its inverse A: dx = A^T du, dL = -dx u^T."""

    @staticmethod
    def forward(ctx, L, A, x, dtype):
        u = _product(A, x, dtype)
        ctx.save_for_backward(A, u)
        ctx.dtype = dtype
        return u

    @staticmethod
    def backward(ctx, grad):
        check_first_order("gated_delta_rule")
        A, u = ctx.saved_tensors
        dx = _product(A.mT, grad, ctx.dtype)
        return -_product(dx, u.mT, ctx.dtype).tril(-1), None, dx, None


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype in (torch.float16, torch.bfloat16):
        x, y = x.to(dtype).float(), y.to(dtype).float()
    return x @ y


def _matmul(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return _RoundedMatmul.apply(x, y, dtype) if dtype in (torch.float16, torch.bfloat16) else x @ y


def _chunks(x: Tensor, heads: int, num_chunks: int, chunk: int) -> Tensor:
    """[B, T, heads * R, ...] -> [B, heads, R, num_chunks, chunk, ...], zero-padded at the end."""
    batch, tokens, width = x.shape[:3]
    pad = num_chunks * chunk - tokens
    if pad:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad))
    x = x.reshape(batch, num_chunks, chunk, heads, width // heads, *x.shape[3:])
    return x.permute(0, 3, 4, 1, 2, *range(5, x.ndim))


def _split(x: Tensor) -> tuple[Tensor, ...]:
    """The chunks of a [B, heads, R, num_chunks, ...] tensor; a single one as a view whose gradient needs no copy."""
    return x.unbind(3) if x.shape[3] > 1 else (x.squeeze(3),)


def _join(chunks: list[Tensor]) -> Tensor:
    return torch.stack(chunks, 3) if len(chunks) > 1 else chunks[0].unsqueeze(3)


def chunk_gated_delta_rule_torch(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rule: str = "delta",
    use_qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """Output [B, T, HV, V] in v's dtype and final state [N, HV, K, V]; arguments as in `gated_delta_rule`, unchecked.

    Without q only the state is computed and the output is None. States are float32, or float64 for float64 inputs.
    """
    acc = state_dtype(q, k, v, initial_state)
    dtype = k.dtype
    out_dtype = v.dtype
    g = log_decay(g.to(acc), A_log, dt_bias)
    beta = write_strength(beta.to(acc), use_beta_sigmoid, allow_neg_eigval)
    k, v = k.to(acc), v.to(acc)
    q = None if q is None else q.to(acc)
    if use_qk_l2norm:
        k = l2_normalise(k).to(dtype).to(acc)
        q = None if q is None else l2_normalise(q).to(dtype).to(acc)

    if cu_seqlens is None:
        o, state = _padded(q, k, v, g, beta, scale, initial_state, rule, dtype)
        return None if o is None else o.to(out_dtype), state

    sequences = PaddedSequences(cu_seqlens, v.shape[1])
    q, k, v, g, beta = (None if x is None else sequences.pad(x) for x in (q, k, v, g, beta))
    o, state = _padded(q, k, v, g, beta, scale, initial_state, rule, dtype)
    return None if o is None else sequences.unpad(o).to(out_dtype), state


def _padded(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    state: Tensor | None,
    rule: str,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """The chunk recurrence over [B, T, ...] tensors with final gates; a token with beta = g = 0 changes nothing."""
    batch, tokens, heads, key_dim = k.shape
    value_heads, value_dim = v.shape[2:]
    groups = value_heads // heads
    num_chunks = -(-tokens // MAX_CHUNK)
    chunk = -(-tokens // num_chunks)  # equal chunks: the least padding

    k, v, g, beta = (_chunks(x, heads, num_chunks, chunk) for x in (k, v, g[..., None], beta[..., None]))
    G = g.cumsum(-2)
    G_end = G[..., -1:, :]
    row = torch.arange(chunk, device=v.device)
    causal = row[:, None] >= row
    decay = (G - G.mT).masked_fill(~causal, float("-inf")).exp()  # masked first: e^(G_i - G_j) overflows for i < j
    G_exp = G.exp()

    writes = beta * v
    if rule == "delta":
        L = beta * decay * _matmul(k, k.mT, dtype)  # the solves read it strictly below the diagonal, as unit triangular
        identity = torch.eye(chunk, dtype=L.dtype, device=L.device).expand_as(L)
        A = torch.linalg.solve_triangular(L.detach(), identity, upper=False, unitriangular=True)
        A, L = _split(A), _split(L)
    k_end = ((G_end - G).exp() * k).mT
    k_n, v_n, beta_n, k_end, G_exp_n, end_n = (_split(x) for x in (k, v, beta, k_end, G_exp, G_end.exp()))
    writes_n = _split(writes)

    if state is not None:
        state = state.to(v.dtype).reshape(batch, heads, groups, key_dim, value_dim)
    starts, updates = [], []
    for n in range(num_chunks):
        starts.append(state)
        u = writes_n[n]
        if rule == "delta":
            if state is not None:
                u = beta_n[n] * (v_n[n] - G_exp_n[n] * _matmul(k_n[n], state, dtype))
            u = _UnitLowerSolve.apply(L[n], A[n], u, dtype)
        updates.append(u)
        write = _matmul(k_end[n], u, dtype)
        state = write if state is None else end_n[n] * state + write
    final_state = state.reshape(batch, value_heads, key_dim, value_dim)
    if q is None:
        return None, final_state

    q = _chunks(q, heads, num_chunks, chunk)
    o = _matmul(scale * decay * _matmul(q, k.mT, dtype), _join(updates), dtype)
    known = [s for s in starts if s is not None]
    if known:
        first = num_chunks - len(known)
        inter = scale * G_exp[:, :, :, first:] * _matmul(q[:, :, :, first:], _join(known), dtype)
        o = o + inter if first == 0 else torch.cat([o[:, :, :, :1], o[:, :, :, 1:] + inter], 3)
    o = o.permute(0, 3, 4, 1, 2, 5).reshape(batch, num_chunks * chunk, value_heads, value_dim)
    return o[:, :tokens], final_state
