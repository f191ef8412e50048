"""The chunked gated delta rule as differentiable PyTorch custom operators over the Triton kernels.

Forward: gates and triangular inverse of every chunk (chunk_prepare), then one sweep for states and outputs
(chunk_scan). Backward: the states again, their cotangents (chunk_reverse), then all gradients at once (chunk_grad).
Between the two only the inputs, the gates and the inverse are kept, no states.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops.kernels.chunk_grad import chunk_grad
from sleep_ops.kernels.chunk_prepare import chunk_prepare
from sleep_ops.kernels.chunk_scan import chunk_reverse, chunk_scan
from sleep_ops.kernels.configs import chunk_config
from sleep_ops.ops.dispatch import on_device
from sleep_ops.ops.gates import beta_scale, log_decay_gradient


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x [B, T, heads, dim] as rows of contiguous heads a fixed number of elements apart, copied if it is not."""
    B, T, heads, dim = x.shape
    row_stride = x.stride(1) if T > 1 else x.stride(0)
    dense = (dim == 1 or x.stride(3) == 1) and (heads == 1 or x.stride(2) == dim)
    if dense and (B == 1 or x.stride(0) == T * row_stride):
        return x, row_stride
    return x.contiguous(), heads * dim


def _chunk_counts(k: Tensor, cu_seqlens: Tensor | None, chunk: int) -> tuple[int, Tensor | None]:
    """A bound on the number of chunks that needs no look at the device, and each packed sequence's first chunk."""
    B, T = k.shape[:2]
    if cu_seqlens is None:
        return B * ((T + chunk - 1) // chunk), None
    counts = (cu_seqlens.diff().long() + (chunk - 1)) // chunk
    return T // chunk + counts.shape[0], F.pad(counts.cumsum(0), (1, 0))


@torch.library.custom_op("sleep_ops::chunk_gated_delta_rule", mutates_args=())
def _forward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    rule: str,
    use_qk_l2norm: bool,
    beta_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """output, final_state, and what the backward keeps: G, activated beta, A. An absent tensor is an empty one."""
    config = chunk_config(k.shape[3], v.shape[3], k.shape[1], k.dtype)
    num_chunks, chunk_offsets = _chunk_counts(k, cu_seqlens, config.chunk)
    (k, stride_k), (v, stride_v) = _rows(k), _rows(v)
    q, stride_q = (None, 0) if q is None else _rows(q)
    with on_device(k):
        G, beta, A = chunk_prepare(
            k,
            stride_k,
            g.contiguous(),
            beta.contiguous(),
            A_log,
            dt_bias,
            cu_seqlens,
            chunk_offsets,
            num_chunks=num_chunks,
            rule=rule,
            use_qk_l2norm=use_qk_l2norm,
            beta_scale=beta_scale,
            config=config,
        )
        output, final_state = chunk_scan(
            q,
            k,
            v,
            (stride_q, stride_k, stride_v),
            G,
            beta,
            A,
            None if initial_state is None else initial_state.contiguous(),
            cu_seqlens,
            chunk_offsets,
            scale=scale,
            use_qk_l2norm=use_qk_l2norm,
            config=config,
        )
    return v.new_empty(0) if output is None else output, final_state, G, beta, k.new_empty(0) if A is None else A


@_forward.register_fake
def _(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, scale, rule, use_qk_l2norm, beta_scale):
    B, T, _, K = k.shape
    HV, V = v.shape[2:]
    chunk = chunk_config(K, V, T, k.dtype).chunk
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        v.new_empty(0) if q is None else v.new_empty(v.shape),
        k.new_empty((N, HV, K, V), dtype=torch.float32),
        k.new_empty((B, T, HV), dtype=torch.float32),
        k.new_empty((B, T, HV), dtype=torch.float32),
        k.new_empty((B, T, HV, chunk)) if rule == "delta" else k.new_empty(0),
    )


@torch.library.custom_op("sleep_ops::chunk_gated_delta_rule_backward", mutates_args=())
def _backward(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta_dtype: torch.dtype,
    initial_state: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    G: Tensor,
    beta: Tensor,
    A: Tensor,
    d_output: Tensor | None,
    d_final_state: Tensor | None,
    scale: float,
    rule: str,
    use_qk_l2norm: bool,
    beta_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta, initial_state, A_log, dt_bias; an absent one is an empty tensor."""
    config = chunk_config(k.shape[3], v.shape[3], k.shape[1], k.dtype)
    num_chunks, chunk_offsets = _chunk_counts(k, cu_seqlens, config.chunk)
    (k, stride_k), (v, stride_v) = _rows(k), _rows(v)
    q, stride_q = (None, 0) if d_output is None else _rows(q)
    strides = (stride_q, stride_k, stride_v)
    A = A if rule == "delta" else None
    d_output = None if d_output is None else d_output.contiguous()
    common = {"scale": scale, "use_qk_l2norm": use_qk_l2norm, "config": config}
    with on_device(k):
        start = None if initial_state is None else initial_state.contiguous()
        _, states = chunk_scan(
            None, k, v, strides, G, beta, A, start, cu_seqlens, chunk_offsets, num_chunks=num_chunks, **common
        )
        d_states, d_initial_state = chunk_reverse(
            q,
            k,
            strides,
            G,
            beta,
            A,
            d_output,
            None if d_final_state is None else d_final_state.contiguous(),
            cu_seqlens,
            chunk_offsets,
            head_v_dim=v.shape[3],
            need_initial=initial_state is not None,
            num_chunks=num_chunks,
            **common,
        )
        dq, dk, dv, dg, dbeta = chunk_grad(
            q,
            k,
            v,
            strides,
            G,
            beta,
            A,
            states,
            d_states,
            d_output,
            cu_seqlens,
            chunk_offsets,
            beta_scale=beta_scale,
            **common,
        )

    dA_log = d_dt_bias = None
    if A_log is not None:
        dg, dA_log, d_dt_bias = log_decay_gradient(dg, g, A_log, dt_bias)
    gradients = (dq, dk, dv, dg.to(g.dtype), dbeta.to(beta_dtype), d_initial_state, dA_log, d_dt_bias)
    return tuple(k.new_empty(0) if x is None else x for x in gradients)


@_backward.register_fake
def _(
    q,
    k,
    v,
    g,
    beta_dtype,
    initial_state,
    A_log,
    dt_bias,
    cu_seqlens,
    G,
    beta,
    A,
    d_output,
    d_final_state,
    scale,
    rule,
    use_qk_l2norm,
    beta_scale,
):
    def like(x, dtype=None):
        return k.new_empty(0) if x is None else x.new_empty(x.shape, dtype=dtype)

    return (
        like(None if d_output is None else q),
        like(k),
        like(v),
        like(g),
        like(beta, beta_dtype),
        like(initial_state),
        like(A_log),
        like(dt_bias),
    )


def _setup_context(ctx, inputs, output):
    q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, *options = inputs
    _, _, G, beta_active, A = output
    ctx.save_for_backward(q, k, v, g, initial_state, A_log, dt_bias, cu_seqlens, G, beta_active, A)
    ctx.beta_dtype = beta.dtype
    ctx.options = options
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_output, d_final_state, d_G, d_beta, d_A):
    q, k, v, g, initial_state, A_log, dt_bias, cu_seqlens, G, beta, A = ctx.saved_tensors
    if d_output is None and d_final_state is None:
        return (None,) * 13
    if q is None:
        d_output = None
    gradients = list(
        _backward(
            q,
            k,
            v,
            g,
            ctx.beta_dtype,
            initial_state,
            A_log,
            dt_bias,
            cu_seqlens,
            G,
            beta,
            A,
            d_output,
            d_final_state,
            *ctx.options,
        )
    )
    present = (None if d_output is None else q, k, v, g, beta, initial_state, A_log, dt_bias)
    gradients = [None if x is None else grad for x, grad in zip(present, gradients, strict=True)]
    return (*gradients, None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def chunk_gated_delta_rule_triton(
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
    """The gated delta rule (or Hebbian rule) over q, k [B, T, H, K], v [B, T, HV, V], g, beta [B, T, HV].

    Returns the output [B, T, HV, V] in v's dtype and the final state [N, HV, K, V] in float32, one per batch row or
    packed sequence. Without q only the state is computed and the output is None. Options and shapes are those of
    `gated_delta_rule`, which validates them; q, k and v share one of float32, float16 and bfloat16.

    Runs on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1 (not in bfloat16, which the interpreter
    multiplies wrongly). Deterministic. Source: arXiv 2412.06464, section 3.3; sleep_ops/reference.py.
    """
    factor = beta_scale(use_beta_sigmoid, allow_neg_eigval)
    output, final_state, *_ = _forward(
        q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, scale, rule, use_qk_l2norm, factor
    )
    return None if q is None else output, final_state
