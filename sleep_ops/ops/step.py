"""One token of the gated delta rule: the operator that reads and writes a memory token by token."""

import torch
from torch import Tensor

from sleep_ops.checks import check_flags
from sleep_ops.ops.dispatch import choose_rule_impl
from sleep_ops.ops.gates import log_decay_gradient
from sleep_ops.ops.launching import contiguous, differentiable, on_device
from sleep_ops.ops.precision import full_precision
from sleep_ops.ops.rule import RuleOptions, check_query, check_tokens
from sleep_ops.reference import (
    L2_NORM_EPS,
    DeltaRuleOutput,
    gated_delta_rule_reference,
    l2_normalise,
    log_decay,
    state_dtype,
)
from sleep_ops.validation import check_no_tangents, check_state


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    rule: str = "delta",
    use_qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    impl: str = "auto",
    inplace: bool = False,
) -> DeltaRuleOutput:
    """`gated_delta_rule` over one token: q, k [B, H, K], v [B, HV, V], g, beta [B, HV], state [B, HV, K, V].

    Returns output [B, HV, V] in v's dtype and a new state, float32 (float64 for float64 inputs); sums are float32 too.
    Options, dtypes, errors and "auto" are those of `gated_delta_rule`. Differentiable in every tensor.

    inplace: write the new state into `state` and return that, for whoever alone holds it. ValueError where gradients
    are recorded, and for a state that is not contiguous or not of the new one's dtype.
    """
    options = RuleOptions(rule, use_qk_l2norm, A_log, dt_bias, use_beta_sigmoid, allow_neg_eigval)
    check_query(q, "B")
    check_tokens(q, k, v, g, beta, options, lead="B", scale=scale, impl=impl)
    check_state("state", state, (*v.shape[:2], k.shape[2], v.shape[2]), k)
    check_flags(inplace=inplace)
    inputs = (q, k, v, g, beta, state)
    if inplace:
        _check_inplace(state, (*inputs, A_log, dt_bias), state_dtype(v, state))
    impl = choose_rule_impl(impl, k) if k.shape[0] else "torch"
    scale = k.shape[2] ** -0.5 if scale is None else float(scale)
    with full_precision(k):
        if impl == "triton":
            check_no_tangents("gated_delta_rule_step", *inputs, A_log, dt_bias)
            args = (*inputs, A_log, dt_bias, scale, rule, use_qk_l2norm, options.beta_scale)
            return DeltaRuleOutput(step_inplace(*args), state) if inplace else DeltaRuleOutput(*step(*args))
        if impl == "torch":
            o, new_state = _step_torch(*inputs, options, scale)
        else:
            tokens = [x[:, None] for x in (q, k, v, g, beta)]
            o, new_state = gated_delta_rule_reference(*tokens, initial_state=state, scale=scale, **options._asdict())
            o = o[:, 0].to(v.dtype)
        return DeltaRuleOutput(o, state.copy_(new_state) if inplace else new_state)


def _check_inplace(state: Tensor, inputs: tuple[Tensor | None, ...], dtype: torch.dtype) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise ValueError("inplace: expected False where an input requires grad (outside torch.no_grad), got True")
    if not state.is_contiguous():
        raise ValueError(f"state: expected a contiguous tensor with inplace, got strides {list(state.stride())}")
    if state.dtype != dtype:
        raise ValueError(f"state: expected dtype {dtype} with inplace, got {state.dtype}")


def _step_torch(q, k, v, g, beta, state, options: RuleOptions, scale: float) -> DeltaRuleOutput:
    """S1 = e^g S + k (beta (v - (e^g S)^T k))^T,  o = scale S1^T q."""
    dtype = state_dtype(v, state)
    groups = v.shape[1] // k.shape[1]
    g, beta = options.activate(g, beta, dtype)
    q, k, write = q.to(dtype), k.to(dtype), v.to(dtype)
    if options.use_qk_l2norm:
        q, k = l2_normalise(q), l2_normalise(k)
    if groups > 1:
        q, k = q.repeat_interleave(groups, 1), k.repeat_interleave(groups, 1)
    S = g.exp()[..., None, None] * state.to(dtype)
    if options.rule == "delta":
        write = write - (k[..., None, :] @ S).squeeze(-2)
    S = S + k[..., None] * (beta[..., None] * write)[..., None, :]
    return DeltaRuleOutput((scale * (q[..., None, :] @ S).squeeze(-2)).to(v.dtype), S)


def _backward(d_output, d_new_state, q, k, v, g, beta, state, A_log, dt_bias, scale, rule, use_qk_l2norm, beta_scale):
    """In closed form. With D = e^g S, r = v - D^T k, w = beta r and S1 = D + k w^T:

        dS1 += scale q do^T    dq = scale S1 do    dw = dS1^T k    dr = dv = beta dw    dbeta = <dw, r>
        dD = dS1 - k dr^T      dk = dS1 w - D dr   dS = e^g dD     dg = <dD, D>

    For the Hebbian rule r = v, and the terms of dr in dD and dk are absent.
    """
    batch, heads, key_dim = k.shape
    groups = v.shape[1] // heads
    log_g = log_decay(g.float(), A_log, dt_bias)
    active_beta = (beta_scale * beta.float().sigmoid() if beta_scale else beta.float())[..., None]
    x = torch.stack([q, k]).float()
    y = l2_normalise(x) if use_qk_l2norm else x
    key_q, key_k = y.repeat_interleave(groups, 2)

    D = log_g.exp()[..., None, None] * state
    r = v.float()
    if rule == "delta":
        r = r - _row(key_k, D)
    w = active_beta * r
    dS = torch.zeros_like(D) if d_new_state is None else d_new_state
    dq = torch.zeros_like(key_q)
    if d_output is not None:
        d_output = scale * d_output.float()
        dq = _column(D + key_k[..., None] * w[..., None, :], d_output)
        dS = dS + key_q[..., None] * d_output[..., None, :]
    dw = _row(key_k, dS)
    dk = _column(dS, w)
    dv = active_beta * dw
    if rule == "delta":
        dk = dk - _column(D, dv)
        dS = dS - key_k[..., None] * dv[..., None, :]
    dbeta = (dw * r).sum(-1)
    dg = (dS * D).sum((-1, -2))
    d_start = log_g.exp()[..., None, None] * dS

    dx = torch.stack([dq, dk]).reshape(2, batch, heads, groups, key_dim).sum(3)
    if use_qk_l2norm:
        inverse_norm = torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_NORM_EPS)
        dx = inverse_norm * (dx - y * (y * dx).sum(-1, keepdim=True))
    if beta_scale:
        dbeta = dbeta * active_beta[..., 0] * (1 - active_beta[..., 0] / beta_scale)
    dA_log, d_dt_bias = None, None
    if A_log is not None:
        dg, dA_log, d_dt_bias = log_decay_gradient(dg, g, A_log, dt_bias)
    dq, dk = dx.to(q.dtype).unbind()
    return dq.clone(), dk.clone(), dv.to(v.dtype), dg.to(g.dtype), dbeta.to(beta.dtype), d_start, dA_log, d_dt_bias


def _shapes(q, k, v, g, beta, state, *options):
    return v.new_empty(v.shape), state.new_empty(state.shape)


@differentiable(
    "gated_delta_rule_step",
    outputs="output new_state",
    gradients="q k v g beta state A_log dt_bias",
    shapes=_shapes,
    backward=_backward,
)
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float,
    rule: str,
    use_qk_l2norm: bool,
    beta_scale: float,
) -> tuple[Tensor, Tensor]:
    """The step by `kernels/step.py`; arguments as in `gated_delta_rule_step`, already checked."""
    return _launch(q, k, v, g, beta, state.contiguous(), A_log, dt_bias, scale, rule, use_qk_l2norm, beta_scale)


@torch.library.custom_op("sleep_ops::step_inplace", mutates_args=("state",))
def step_inplace(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    scale: float,
    rule: str,
    use_qk_l2norm: bool,
    beta_scale: float,
) -> Tensor:
    """The output of `step`, its new state written into `state`, which is contiguous."""
    with on_device(k):
        args = (q, k, v, g, beta, state, A_log, dt_bias, scale, rule, use_qk_l2norm, beta_scale)
        return _launch(*args, inplace=True)[0]


@step_inplace.register_fake
def _(q, k, v, *others):
    return v.new_empty(v.shape)


def _launch(q, k, v, g, beta, state, A_log, dt_bias, scale, rule, use_qk_l2norm, beta_scale, *, inplace=False):
    from sleep_ops.kernels.arguments import Gates, Tokens
    from sleep_ops.kernels.step import step

    tokens, gates = Tokens(*contiguous(q, k, v)), Gates(*contiguous(g, beta, A_log, dt_bias))
    options = {"scale": scale, "rule": rule, "use_qk_l2norm": use_qk_l2norm, "beta_scale": beta_scale}
    return step(tokens, gates, state, inplace=inplace, **options)


def _row(x: Tensor, S: Tensor) -> Tensor:
    return (x[..., None, :] @ S).squeeze(-2)


def _column(S: Tensor, x: Tensor) -> Tensor:
    return (S @ x[..., None]).squeeze(-1)
