"""The specification: the gated delta rule and its sleep, one token at a time.

Source: Lee, McLeish, Goldstein, Fanti, "Do Language Models Need Sleep?", arXiv 2605.26099: equation (3) is the
Hebbian rule; its experiments use the delta rule of Yang, Kautz, Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464.

Eager, differentiable, on any device, in float64 where an input is float64 and in float32 otherwise.

Shapes: q, k [B, T, H, K]; v [B, T, HV, V]; g, beta [B, T, HV]; states S [N, HV, K, V] with one state per batch row,
or per sequence where `cu_seqlens` packs several sequences into B = 1. Value head h reads q/k head h // (HV // H).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

L2_NORM_EPS = 1e-6


class DeltaRuleOutput(NamedTuple):
    """output [B, T, HV, V] ([B, HV, V] for one token) and final_state [N, HV, K, V]."""

    output: Tensor
    final_state: Tensor


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Dtype of states and gates: float64 if any of the tensors is, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def l2_normalise(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dim; a zero vector stays zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_NORM_EPS)


def log_decay(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> Tensor:
    """The natural-log decay: g itself, or -exp(A_log) * softplus(g + dt_bias) with both parameters ([HV])."""
    if A_log is None:
        return g
    # softplus(x) - x is below float64's rounding from 37 on, not from PyTorch's 20
    return -A_log.to(g.dtype).exp() * F.softplus(g + dt_bias.to(g.dtype), threshold=40.0)


def write_strength(beta: Tensor, use_beta_sigmoid: bool, allow_neg_eigval: bool) -> Tensor:
    """beta itself, or sigmoid(beta), times 2 where negative eigenvalues of the transition are allowed."""
    if not use_beta_sigmoid:
        return beta
    return beta.sigmoid() * (2.0 if allow_neg_eigval else 1.0)


def one_pass(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor, scale: float, rule: str
) -> tuple[Tensor, Tensor]:
    """One pass over the tokens of [B, T, HV, .] tensors from the states S; returns outputs and the states left."""
    outputs = []
    for t in range(v.shape[1]):
        k_t, v_t, beta_t = k[:, t], v[:, t], beta[:, t, :, None]
        S = g[:, t, :, None, None].exp() * S
        if rule == "delta":
            v_t = v_t - torch.einsum("bhkv,bhk->bhv", S, k_t)
        S = S + torch.einsum("bhk,bhv->bhkv", k_t, beta_t * v_t)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v), S


def sleep_gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    passes: int,
    window: int | None = None,
    output_pass: str = "last",
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rule: str = "delta",
    use_qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
) -> DeltaRuleOutput:
    """`passes` replay passes over each window of at most `window` tokens, in turn, carrying S.

    Windows are counted from the start of each sequence; a shorter last one is replayed like the others, and without
    `window` the whole sequence is one. Outputs are those of each window's first or last pass (`output_pass`), the final
    state is that of the last pass. Output and state come in the dtype computed in: float64 or float32.
    """
    dtype = state_dtype(q, k, v, initial_state)
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    if use_qk_l2norm:
        q, k = l2_normalise(q), l2_normalise(k)
    g = log_decay(g, A_log, dt_bias)
    beta = write_strength(beta, use_beta_sigmoid, allow_neg_eigval)
    groups = v.shape[2] // k.shape[2]
    q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
    scale = k.shape[-1] ** -0.5 if scale is None else scale

    if cu_seqlens is None:
        sequences = [(slice(None), 0, v.shape[1])]
        num_states = v.shape[0]
    else:
        ends = cu_seqlens.tolist()
        sequences = [(slice(0, 1), start, end) for start, end in zip(ends[:-1], ends[1:], strict=True)]
        num_states = len(sequences)
    if initial_state is None:
        S = v.new_zeros(num_states, v.shape[2], k.shape[-1], v.shape[-1])
    else:
        S = initial_state.to(dtype)

    outputs, final_states = [], []
    for i, (rows, start, end) in enumerate(sequences):
        S_i = S if cu_seqlens is None else S[i : i + 1]
        step = max(end - start, 1) if window is None else window
        for first in range(start, end, step):
            here = slice(first, min(first + step, end))
            args = [x[rows, here] for x in (q, k, v, g, beta)]
            for n in range(passes):
                o, S_i = one_pass(*args, S_i, scale, rule)  # type: ignore[call-arg, arg-type]
                if n == (0 if output_pass == "first" else passes - 1):
                    outputs.append(o)
        final_states.append(S_i)
    return DeltaRuleOutput(torch.cat(outputs, 1), torch.cat(final_states))


def gated_delta_rule_reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options) -> DeltaRuleOutput:
    """One pass over the tokens: S <- exp(g_t) S;  S <- S + k_t (beta_t (v_t - S^T k_t))^T;  o_t = scale S^T q_t.

    With rule="hebbian" the write is k_t (beta_t v_t)^T. Takes the options of `sleep_gated_delta_rule_reference`, with
    its `passes` fixed to 1.
    """
    return sleep_gated_delta_rule_reference(q, k, v, g, beta, passes=1, **options)
