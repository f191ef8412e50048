"""Passes over sequences of one chunk as differentiable PyTorch operators: one launch forwards, one launch backwards."""

import torch
from torch import Tensor

from sleep_ops.kernels.arguments import Cotangents, Gates
from sleep_ops.kernels.configs import SingleChunkConfig, architecture, single_chunk_config
from sleep_ops.kernels.single_chunk import single_chunk_backward, single_chunk_forward
from sleep_ops.kernels.single_chunk_replay import replay_backward, replay_forward
from sleep_ops.ops.chunk_triton import as_tokens
from sleep_ops.ops.launching import as_rows, contiguous, differentiable
from sleep_ops.ops.rule import RuleOptions


def _gates(g: Tensor, beta: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> Gates:
    """As the kernels read them: g and beta in place where their rows are a fixed number of elements apart."""
    (g, stride_g), (beta, stride_beta) = (as_rows(x[..., None]) for x in (g, beta))
    return Gates(g.squeeze(-1), beta.squeeze(-1), *contiguous(A_log, dt_bias), stride_g, stride_beta)


def _config(k: Tensor, v: Tensor) -> SingleChunkConfig:
    return single_chunk_config(k.shape[3], v.shape[3], k.shape[1], k.dtype, architecture(k.device))


def _backward(
    d_output, d_final_state, q, k, v, g, beta, A_log, dt_bias, initial_state, scale, rule, use_qk_l2norm, beta_scale
):
    d_output = None if q is None else d_output
    gradients, parameters, d_initial_state = single_chunk_backward(
        as_tokens(None if d_output is None else q, k, v),
        _gates(g, beta, A_log, dt_bias),
        *contiguous(initial_state),
        Cotangents(*contiguous(d_output, d_final_state)),
        scale=scale,
        rule=rule,
        use_qk_l2norm=use_qk_l2norm,
        beta_scale=beta_scale,
        config=_config(k, v),
    )
    return *gradients, *parameters, d_initial_state


def _shapes(q, k, v, *others):
    final_state = k.new_empty((k.shape[0], v.shape[2], k.shape[3], v.shape[3]), dtype=torch.float32)
    return None if q is None else v.new_empty(v.shape), final_state


@differentiable(
    "gated_delta_rule",
    outputs="output final_state",
    gradients="q k v g beta A_log dt_bias initial_state",
    shapes=_shapes,
    backward=_backward,
)
def single_chunk(
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
    """output (none without q) and final_state [B, HV, K, V] float32."""
    return single_chunk_forward(
        as_tokens(q, k, v),
        _gates(g, beta, A_log, dt_bias),
        *contiguous(initial_state),
        scale=scale,
        rule=rule,
        use_qk_l2norm=use_qk_l2norm,
        beta_scale=beta_scale,
        config=_config(k, v),
    )


def single_chunk_pass(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    options: RuleOptions,
    *,
    scale: float,
    initial_state: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """One pass over sequences short enough for `single_chunk_config`, not packed.

    Returns output [B, T, HV, V] (None without q) and final state [B, HV, K, V].

    Arguments, results and gradients are those of `gated_delta_rule`, which checks them; k and v share one of float32,
    float16 and bfloat16. Only the inputs are kept for the backward. Runs where `TritonPass` does. Deterministic.
    """
    flags = (options.rule, options.use_qk_l2norm, options.beta_scale)
    output, final_state = single_chunk(q, k, v, g, beta, options.A_log, options.dt_bias, initial_state, scale, *flags)
    return None if q is None else output, final_state


def _replay_backward(
    d_final_state, k, v, g, beta, A_log, dt_bias, initial_state, passes, rule, use_qk_l2norm, beta_scale
):
    gradients, parameters, d_initial_state = replay_backward(
        as_tokens(None, k, v),
        _gates(g, beta, A_log, dt_bias),
        *contiguous(initial_state, d_final_state),
        passes,
        rule=rule,
        use_qk_l2norm=use_qk_l2norm,
        beta_scale=beta_scale,
        chunk=_config(k, v).chunk,
    )
    return *gradients[1:], *parameters, d_initial_state


@differentiable(
    "sleep_gated_delta_rule",
    outputs="final_state",
    gradients="k v g beta A_log dt_bias initial_state",
    shapes=lambda *arguments: _shapes(None, *arguments)[1],
    backward=_replay_backward,
)
def single_chunk_replay(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    passes: int,
    rule: str,
    use_qk_l2norm: bool,
    beta_scale: float,
) -> Tensor:
    """final_state [B, HV, K, V] float32."""
    return replay_forward(
        as_tokens(None, k, v),
        _gates(g, beta, A_log, dt_bias),
        *contiguous(initial_state),
        passes,
        rule=rule,
        use_qk_l2norm=use_qk_l2norm,
        beta_scale=beta_scale,
        chunk=_config(k, v).chunk,
    )


def single_chunk_passes(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor, options: RuleOptions, passes: int, initial_state: Tensor | None
) -> Tensor:
    """State [B, HV, K, V] after `passes` >= 1 passes over sequences that `single_chunk_pass` takes, in one launch.

    Only the inputs are kept for the backward, and time grows with log2 of the passes alone.
    """
    if passes == 1:
        return single_chunk_pass(None, k, v, g, beta, options, scale=1.0, initial_state=initial_state)[1]
    flags = (options.rule, options.use_qk_l2norm, options.beta_scale)
    return single_chunk_replay(k, v, g, beta, options.A_log, options.dt_bias, initial_state, passes, *flags)
