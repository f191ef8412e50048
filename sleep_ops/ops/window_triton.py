"""Windows of one chunk as a differentiable PyTorch custom operator: one launch forwards, one launch backwards."""

import torch
from torch import Tensor

from sleep_ops.kernels.arguments import Cotangents, Gates
from sleep_ops.kernels.configs import architecture, single_chunk_config
from sleep_ops.kernels.single_chunk import single_chunk_backward, single_chunk_forward
from sleep_ops.ops.chunk_triton import as_tokens
from sleep_ops.ops.gates import beta_scale
from sleep_ops.ops.launching import as_rows, contiguous, on_device, or_empty
from sleep_ops.validation import check_first_order


def _gates(g: Tensor, beta: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> Gates:
    """As the kernels read them: g and beta in place where their rows are a fixed number of elements apart."""
    (g, stride_g), (beta, stride_beta) = (as_rows(x[..., None]) for x in (g, beta))
    return Gates(g.squeeze(-1), beta.squeeze(-1), *contiguous(A_log, dt_bias), stride_g, stride_beta)


@torch.library.custom_op("sleep_ops::window_gated_delta_rule", mutates_args=())
def _window(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    rule: str,
    use_qk_l2norm: bool,
    beta_scale: float,
) -> tuple[Tensor, Tensor]:
    """output (empty without q) and final_state [B, HV, K, V] float32."""
    with on_device(k):
        output, final_state = single_chunk_forward(
            as_tokens(q, k, v),
            _gates(g, beta, A_log, dt_bias),
            *contiguous(initial_state),
            scale=scale,
            rule=rule,
            use_qk_l2norm=use_qk_l2norm,
            beta_scale=beta_scale,
            config=single_chunk_config(k.shape[3], v.shape[3], k.shape[1], k.dtype, architecture(k.device)),
        )
    return or_empty(output, v), final_state


@_window.register_fake
def _(q, k, v, g, beta, A_log, dt_bias, initial_state, scale, rule, use_qk_l2norm, beta_scale):
    output = v.new_empty(0) if q is None else v.new_empty(v.shape)
    return output, k.new_empty((k.shape[0], v.shape[2], k.shape[3], v.shape[3]), dtype=torch.float32)


@torch.library.custom_op("sleep_ops::window_gated_delta_rule_backward", mutates_args=())
def _window_backward(
    d_output: Tensor | None,
    d_final_state: Tensor | None,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    rule: str,
    use_qk_l2norm: bool,
    beta_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta, of A_log and dt_bias together [2, HV], and of initial_state; absent ones empty."""
    with on_device(k):
        gradients, *others = single_chunk_backward(
            as_tokens(None if d_output is None else q, k, v),
            _gates(g, beta, A_log, dt_bias),
            *contiguous(initial_state),
            Cotangents(*contiguous(d_output, d_final_state)),
            scale=scale,
            rule=rule,
            use_qk_l2norm=use_qk_l2norm,
            beta_scale=beta_scale,
            config=single_chunk_config(k.shape[3], v.shape[3], k.shape[1], k.dtype, architecture(k.device)),
        )
    return tuple(or_empty(x, k) for x in (*gradients, *others))


@_window_backward.register_fake
def _(d_output, d_final_state, q, k, v, g, beta, A_log, dt_bias, initial_state, *options):
    dq = k.new_empty(0) if d_output is None else k.new_empty(k.shape)
    d_parameters = k.new_empty(0) if A_log is None else k.new_empty((2, v.shape[2]), dtype=torch.float32)
    d_initial_state = k.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return dq, *(x.new_empty(x.shape) for x in (k, v, g, beta)), d_parameters, d_initial_state


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_output, d_final_state):
    check_first_order("gated_delta_rule")
    saved = ctx.saved_tensors  # read once: activation checkpointing allows no more
    q, *_, A_log, dt_bias, initial_state = saved
    if q is None:
        d_output = None
    if d_output is None and d_final_state is None:
        return (None,) * 12
    dq, dk, dv, dg, dbeta, d_parameters, d_initial_state = _window_backward(
        d_output, d_final_state, *saved, *ctx.options
    )
    dq = None if d_output is None else dq
    parameters = (None, None)
    if A_log is not None:
        parameters = tuple(d.to(x.dtype) for d, x in zip(d_parameters, (A_log, dt_bias), strict=True))
    d_initial_state = None if initial_state is None else d_initial_state
    return dq, dk, dv, dg, dbeta, *parameters, d_initial_state, *(None,) * 4


_window.register_autograd(_differentiate, setup_context=_save_inputs)


def window_gated_delta_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    rule: str = "delta",
    use_qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """One pass over windows short enough for `single_chunk_config`.

    Returns output [B, T, HV, V] (None without q) and final state.

    Arguments, results and gradients are those of `gated_delta_rule`, which checks them, unpacked; k and v share one of
    float32, float16 and bfloat16. Only the inputs are kept for the backward. Runs where `TritonPass` does.
    Deterministic.
    """
    factor = beta_scale(use_beta_sigmoid, allow_neg_eigval)
    output, final_state = _window(q, k, v, g, beta, A_log, dt_bias, initial_state, scale, rule, use_qk_l2norm, factor)
    return None if q is None else output, final_state
