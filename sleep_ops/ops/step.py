"""One token of the gated delta rule: the operator that reads and writes a memory token by token."""

import torch
from torch import Tensor

from sleep_ops.ops.dispatch import choose_rule_impl, full_precision
from sleep_ops.ops.gates import beta_scale, log_decay_gradient
from sleep_ops.ops.launching import on_device
from sleep_ops.reference import (
    L2_NORM_EPS,
    DeltaRuleOutput,
    gated_delta_rule_reference,
    l2_normalise,
    log_decay,
    state_dtype,
    write_strength,
)
from sleep_ops.validation import (
    IMPLS,
    RULES,
    check_choice,
    check_flags,
    check_full,
    check_gates,
    check_heads,
    check_no_tangents,
    check_scale,
    check_state,
    check_tensor,
)


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
    check_full("k", k, 3, "[B, H, K]", 1)
    check_full("v", v, 3, "[B, HV, V]", 1)
    batch, key_heads, key_dim = k.shape
    value_heads, value_dim = v.shape[1:]
    check_tensor("q", q, k.shape, "[B, H, K] of k", k.device, (k.dtype,))
    check_tensor("v", v, (batch, value_heads, value_dim), "[B, HV, V]", k.device, (k.dtype,))
    check_heads(key_heads, value_heads)
    check_tensor("g", g, (batch, value_heads), "[B, HV]", k.device)
    check_tensor("beta", beta, (batch, value_heads), "[B, HV]", k.device)
    check_state("state", state, (batch, value_heads, key_dim, value_dim), k)
    check_scale(scale)
    check_choice("rule", rule, RULES)
    check_choice("impl", impl, IMPLS)
    check_flags(use_qk_l2norm=use_qk_l2norm, inplace=inplace)
    check_gates(value_heads, k.device, A_log, dt_bias, use_beta_sigmoid, allow_neg_eigval)
    if inplace:
        _check_inplace(state, (q, k, v, g, beta, state, A_log, dt_bias), state_dtype(v, state))
    impl = choose_rule_impl(impl, k) if batch else "torch"
    if impl == "triton":
        check_no_tangents("gated_delta_rule_step", q, k, v, g, beta, state, A_log, dt_bias)
    scale = key_dim**-0.5 if scale is None else float(scale)
    gates = {"A_log": A_log, "dt_bias": dt_bias}
    betas = {"use_beta_sigmoid": use_beta_sigmoid, "allow_neg_eigval": allow_neg_eigval}
    common = {"scale": scale, "rule": rule, "use_qk_l2norm": use_qk_l2norm}
    with full_precision(k):
        if impl == "triton" and inplace:
            return DeltaRuleOutput(_step_inplace(q, k, v, g, beta, state, **gates, **common, **betas), state)
        if impl == "triton":
            return DeltaRuleOutput(*_step(q, k, v, g, beta, state, **gates, **common, **betas))
        if impl == "torch":
            o, new_state = _step_torch(q, k, v, g, beta, state, **gates, **common, **betas)
        else:
            tokens = [x[:, None] for x in (q, k, v, g, beta)]
            o, new_state = gated_delta_rule_reference(*tokens, initial_state=state, **gates, **common, **betas)  # type: ignore[misc, arg-type]
            o = o[:, 0].to(v.dtype)
        return DeltaRuleOutput(o, state.copy_(new_state) if inplace else new_state)


def _check_inplace(state: Tensor, inputs: tuple[Tensor | None, ...], dtype: torch.dtype) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise ValueError("inplace: expected False where an input requires grad (outside torch.no_grad), got True")
    if not state.is_contiguous():
        raise ValueError(f"state: expected a contiguous tensor with inplace, got strides {list(state.stride())}")
    if state.dtype != dtype:
        raise ValueError(f"state: expected dtype {dtype} with inplace, got {state.dtype}")


def _step_torch(
    q, k, v, g, beta, state, *, A_log, dt_bias, scale, rule, use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval
) -> DeltaRuleOutput:
    """S1 = e^g S + k (beta (v - (e^g S)^T k))^T,  o = scale S1^T q."""
    dtype = state_dtype(v, state)
    groups = v.shape[1] // k.shape[1]
    g = log_decay(g.to(dtype), A_log, dt_bias)
    beta = write_strength(beta.to(dtype), use_beta_sigmoid, allow_neg_eigval)
    q, k, write = q.to(dtype), k.to(dtype), v.to(dtype)
    if use_qk_l2norm:
        q, k = l2_normalise(q), l2_normalise(k)
    if groups > 1:
        q, k = q.repeat_interleave(groups, 1), k.repeat_interleave(groups, 1)
    S = g.exp()[..., None, None] * state.to(dtype)
    if rule == "delta":
        write = write - (k[..., None, :] @ S).squeeze(-2)
    S = S + k[..., None] * (beta[..., None] * write)[..., None, :]
    return DeltaRuleOutput((scale * (q[..., None, :] @ S).squeeze(-2)).to(v.dtype), S)


@torch.library.custom_op("sleep_ops::gated_delta_rule_step", mutates_args=())
def _step(
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
    use_beta_sigmoid: bool,
    allow_neg_eigval: bool,
) -> tuple[Tensor, Tensor]:
    """The step by `kernels/step.py`; arguments as in `gated_delta_rule_step`, already checked."""
    options = (scale, rule, use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval)
    return _launch(q, k, v, g, beta, state.contiguous(), A_log, dt_bias, *options, inplace=False)


@torch.library.custom_op("sleep_ops::gated_delta_rule_step_inplace", mutates_args=("state",))
def _step_inplace(
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
    use_beta_sigmoid: bool,
    allow_neg_eigval: bool,
) -> Tensor:
    """The output of `_step`, its new state written into `state`, which is contiguous."""
    options = (scale, rule, use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval)
    return _launch(q, k, v, g, beta, state, A_log, dt_bias, *options, inplace=True)[0]


@_step_inplace.register_fake
def _(q, k, v, g, beta, state, *options):
    return v.new_empty(v.shape)


def _launch(
    q, k, v, g, beta, state, A_log, dt_bias, scale, rule, use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval, *, inplace
):
    from sleep_ops.kernels.arguments import Gates, Tokens
    from sleep_ops.kernels.step import step

    tokens = Tokens(q.contiguous(), k.contiguous(), v.contiguous())
    gates = Gates(*(None if x is None else x.contiguous() for x in (g, beta, A_log, dt_bias)))
    factor = beta_scale(use_beta_sigmoid, allow_neg_eigval)
    options = {"scale": scale, "rule": rule, "use_qk_l2norm": use_qk_l2norm, "beta_scale": factor}
    with on_device(k):
        return step(tokens, gates, state, inplace=inplace, **options)


@_step.register_fake
def _(q, k, v, g, beta, state, A_log, dt_bias, scale, rule, use_qk_l2norm, use_beta_sigmoid, allow_neg_eigval):
    return v.new_empty(v.shape), state.new_empty(state.shape)


@torch.library.custom_op("sleep_ops::gated_delta_rule_step_backward", mutates_args=())
def _step_backward(
    d_output: Tensor | None,
    d_state: Tensor | None,
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
    use_beta_sigmoid: bool,
    allow_neg_eigval: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta, state, A_log and dt_bias (empty where there is none), in closed form.

    With D = e^g S, r = v - D^T k, w = beta r and S1 = D + k w^T:
        dS1 += scale q do^T    dq = scale S1 do    dw = dS1^T k    dr = dv = beta dw    dbeta = <dw, r>
        dD = dS1 - k dr^T      dk = dS1 w - D dr   dS = e^g dD     dg = <dD, D>
    For the Hebbian rule r = v, and the terms of dr in dD and dk are absent.
    """
    batch, heads, key_dim = k.shape
    groups = v.shape[1] // heads
    log_g = log_decay(g.float(), A_log, dt_bias)
    active_beta = write_strength(beta.float(), use_beta_sigmoid, allow_neg_eigval)[..., None]
    x = torch.stack([q, k]).float()
    y = l2_normalise(x) if use_qk_l2norm else x
    key_q, key_k = y.repeat_interleave(groups, 2)

    D = log_g.exp()[..., None, None] * state
    r = v.float()
    if rule == "delta":
        r = r - _row(key_k, D)
    w = active_beta * r
    dS = torch.zeros_like(D) if d_state is None else d_state
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
    if use_beta_sigmoid:
        top = 2.0 if allow_neg_eigval else 1.0
        dbeta = dbeta * active_beta[..., 0] * (1 - active_beta[..., 0] / top)
    dA_log, d_dt_bias = k.new_empty(0), k.new_empty(0)
    if A_log is not None:
        dg, dA_log, d_dt_bias = log_decay_gradient(dg, g, A_log, dt_bias)
    dq, dk = dx.to(q.dtype).unbind()
    return dq.clone(), dk.clone(), dv.to(v.dtype), dg.to(g.dtype), dbeta.to(beta.dtype), d_start, dA_log, d_dt_bias


@_step_backward.register_fake
def _(d_output, d_state, q, k, v, g, beta, state, A_log, dt_bias, *options):
    inputs = (q, k, v, g, beta, state, A_log, dt_bias)
    return tuple(k.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_output, d_state):
    if d_output is None and d_state is None:
        return (None,) * 13
    inputs = ctx.saved_tensors  # once: under activation checkpointing a second look is an error
    grads = _step_backward(d_output, d_state, *inputs, *ctx.options)
    return (*(None if x is None else d for x, d in zip(inputs, grads, strict=True)), *(None,) * 5)


_step.register_autograd(_differentiate, setup_context=_save_inputs)


def _row(x: Tensor, S: Tensor) -> Tensor:
    return (x[..., None, :] @ S).squeeze(-2)


def _column(S: Tensor, x: Tensor) -> Tensor:
    return (S @ x[..., None]).squeeze(-1)
