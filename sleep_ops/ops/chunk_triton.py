"""The chunked gated delta rule as differentiable PyTorch custom operators over the Triton kernels.

Two operators, so that passes over the same tokens share what they have in common:

    chunk_prepare    gates and triangular inverse of every chunk: G, active beta, A (beside it inverse_norms of q and k)
    chunk_scan       one sweep over the chunks from a given state: outputs and final state, or (widened) the map [P | R]

The backward of a sweep computes its states again, sweeps their cotangents back (chunk_reverse), and forms all gradients
at once (chunk_grad, or chunk_grad_split for chunks of 64), what reaches the keys through A among them; chunk_prepare's
turns those of G and beta into those of the gate inputs. Between forward and backward only the inputs, their norms, the
gates and the inverse are kept, no states.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops.kernels import chunk_prepare as prepare_kernels
from sleep_ops.kernels.arguments import Cotangents, Gates, Packing, Prepared, Tokens
from sleep_ops.kernels.chunk_grad import chunk_grad
from sleep_ops.kernels.chunk_grad_split import chunk_grad_split
from sleep_ops.kernels.chunk_scan import chunk_reverse, chunk_scan
from sleep_ops.kernels.configs import ChunkConfig, architecture, chunk_config, scales_rows
from sleep_ops.ops.gates import beta_scale
from sleep_ops.ops.launching import as_rows, contiguous, on_device, or_empty
from sleep_ops.validation import check_first_order


def _config(k: Tensor, head_v_dim: int, longest: int) -> ChunkConfig:
    return chunk_config(k.shape[3], head_v_dim, longest, k.dtype, architecture(k.device))


def as_tokens(q: Tensor | None, k: Tensor, v: Tensor) -> Tokens:
    """As the kernels read them, in place where they can."""
    (k, stride_k), (v, stride_v) = as_rows(k), as_rows(v)
    q, stride_q = (None, None) if q is None else as_rows(q)
    return Tokens(q, k, v, stride_q, stride_k, stride_v)


def _num_chunks(k: Tensor, cu_seqlens: Tensor | None, chunk: int) -> int:
    """A bound on the number of chunks that needs no look at the device."""
    B, T = k.shape[:2]
    if cu_seqlens is None:
        return B * ((T + chunk - 1) // chunk)
    return T // chunk + cu_seqlens.shape[0] - 1


def _chunk_offsets(cu_seqlens: Tensor | None, chunk: int) -> Tensor | None:
    """Number of chunks before each packed sequence, and in all."""
    if cu_seqlens is None:
        return None
    counts = (cu_seqlens.diff().long() + (chunk - 1)) // chunk
    return F.pad(counts.cumsum(0), (1, 0))


def _cleared(x: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """x [1, T, ...] with zeros behind the last border, where kernels write nothing; without a look at the device."""
    if x is None or cu_seqlens is None:
        return x
    behind = torch.arange(x.shape[1], device=x.device) >= cu_seqlens[-1]
    return x.masked_fill_(behind.view(-1, *(1,) * (x.ndim - 2)), 0)


@torch.library.custom_op("sleep_ops::chunk_prepare", mutates_args=())
def _prepare(
    k: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_offsets: Tensor | None,
    longest: int,
    head_v_dim: int,
    rule: str,
    use_qk_l2norm: bool,
    beta_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """G [B, T, HV] in decay_dtype(k.dtype), active beta, float32, and A [B, T, HV, C] in k's dtype (or empty).

    longest: tokens of the longest sequence, which with the head dims decides the chunk's length.
    """
    config = _config(k, head_v_dim, longest)
    k, stride_k = as_rows(k)
    with on_device(k):
        G, active, A, *_ = prepare_kernels.chunk_prepare(
            Tokens(k=k, stride_k=stride_k),
            Gates(g.contiguous(), beta.contiguous(), A_log, dt_bias),
            Packing(cu_seqlens, chunk_offsets),
            num_chunks=_num_chunks(k, cu_seqlens, config.chunk),
            rule=rule,
            use_qk_l2norm=use_qk_l2norm,
            beta_scale=beta_scale,
            config=config,
        )
    return G, active, or_empty(A, k)


@_prepare.register_fake
def _(k, g, beta, A_log, dt_bias, cu_seqlens, chunk_offsets, longest, head_v_dim, rule, use_qk_l2norm, beta_scale):
    chunk = _config(k, head_v_dim, longest).chunk
    G = k.new_empty(g.shape, dtype=prepare_kernels.decay_dtype(k.dtype))
    active = k.new_empty(g.shape, dtype=torch.float32)
    return (G, active, k.new_empty((*g.shape, chunk)) if rule == "delta" else k.new_empty(0))


@torch.library.custom_op("sleep_ops::chunk_prepare_backward", mutates_args=())
def _prepare_backward(
    dG: Tensor,
    d_active: Tensor,
    g: Tensor,
    active: Tensor,
    beta_dtype: torch.dtype,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_offsets: Tensor | None,
    chunk: int,
    beta_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of g, beta, A_log and dt_bias."""
    with on_device(g):
        dg, dbeta, dA_log, d_dt_bias, *_ = prepare_kernels.gate_backward(
            Gates(g.contiguous(), None, A_log, dt_bias),
            active,
            dG.contiguous(),
            d_active.contiguous(),
            Packing(cu_seqlens, chunk_offsets),
            num_chunks=_num_chunks(g, cu_seqlens, chunk),
            beta_dtype=beta_dtype,
            beta_scale=beta_scale,
            chunk=chunk,
        )
    dg, dbeta = _cleared(dg, cu_seqlens), _cleared(dbeta, cu_seqlens)
    return dg, dbeta, or_empty(dA_log, g), or_empty(d_dt_bias, g)


@_prepare_backward.register_fake
def _(dG, d_active, g, active, beta_dtype, A_log, dt_bias, cu_seqlens, chunk_offsets, chunk, beta_scale):
    parameters = [g.new_empty(0) if x is None else x.new_empty(x.shape) for x in (A_log, dt_bias)]
    return g.new_empty(g.shape), g.new_empty(g.shape, dtype=beta_dtype), *parameters


def _save_prepared(ctx, inputs, output):
    k, g, beta, A_log, dt_bias, cu_seqlens, chunk_offsets, longest, head_v_dim, *_, ctx.beta_scale = inputs
    ctx.save_for_backward(g, output[1], A_log, dt_bias, cu_seqlens, chunk_offsets)
    ctx.beta_dtype = beta.dtype
    ctx.set_materialize_grads(False)
    ctx.chunk = _config(k, head_v_dim, longest).chunk


def _differentiate_prepared(ctx, dG, d_active, dA):
    """dA is always None: chunk_scan's backward has taken A's part into the gradients of k, G and beta."""
    if dG is None:
        return (None,) * 12
    check_first_order("gated_delta_rule")
    g, active, A_log, dt_bias, cu_seqlens, chunk_offsets = ctx.saved_tensors
    dg, dbeta, dA_log, d_dt_bias = _prepare_backward(
        dG, d_active, g, active, ctx.beta_dtype, A_log, dt_bias, cu_seqlens, chunk_offsets, ctx.chunk, ctx.beta_scale
    )
    parameters = (None, None) if A_log is None else (dA_log, d_dt_bias)
    return None, dg, dbeta, *parameters, *(None,) * 7


_prepare.register_autograd(_differentiate_prepared, setup_context=_save_prepared)


@torch.library.custom_op("sleep_ops::inverse_norms", mutates_args=())
def _inverse_norms(x: Tensor) -> Tensor:
    """1 / sqrt(sum x^2 + 1e-6) of rows of x [B, T, H, K]: [B, T, H] float32. Its gradient is part of chunk_scan's."""
    with on_device(x):
        return prepare_kernels.inverse_norms(*as_rows(x))


@_inverse_norms.register_fake
def _(x):
    return x.new_empty(x.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sleep_ops::chunk_scan", mutates_args=())
def _scan(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    rq: Tensor | None,
    rk: Tensor | None,
    G: Tensor,
    beta: Tensor,
    A: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_offsets: Tensor | None,
    longest: int,
    scale: float,
    use_qk_l2norm: bool,
    widened: bool,
) -> tuple[Tensor, Tensor]:
    """output (empty without q) and final_state [N, HV, K, V] float32; with `widened` [P | R], [N, HV, K, K + V].

    rq, rk: inverse norms, where rows of products are to be scaled by them.
    """
    with on_device(k):
        output, final_state = chunk_scan(
            as_tokens(q, k, v),
            Prepared(G, beta, A, rq, rk),
            Packing(cu_seqlens, chunk_offsets),
            *contiguous(initial_state),
            scale=scale,
            use_qk_l2norm=use_qk_l2norm,
            widened=widened,
            config=_config(k, v.shape[3], longest),
        )
    return or_empty(_cleared(output, cu_seqlens), v), final_state


@_scan.register_fake
def _(q, k, v, rq, rk, G, beta, A, initial_state, cu_seqlens, chunk_offsets, longest, scale, use_qk_l2norm, widened):
    K, (HV, V) = k.shape[3], v.shape[2:]
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    output = v.new_empty(0) if q is None else v.new_empty(v.shape)
    return output, k.new_empty((N, HV, K, K + V if widened else V), dtype=torch.float32)


@torch.library.custom_op("sleep_ops::chunk_scan_backward", mutates_args=())
def _scan_backward(
    d_output: Tensor | None,
    d_final_state: Tensor | None,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    rq: Tensor | None,
    rk: Tensor | None,
    G: Tensor,
    beta: Tensor,
    A: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_offsets: Tensor | None,
    longest: int,
    scale: float,
    use_qk_l2norm: bool,
    widened: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, G, beta and initial_state; an absent one is empty. Those of k, G and beta are A's too."""
    config = _config(k, v.shape[3], longest)
    num_chunks = _num_chunks(k, cu_seqlens, config.chunk)
    d_output, d_final_state, initial_state = contiguous(d_output, d_final_state, initial_state)
    inputs = (
        as_tokens(None if d_output is None else q, k, v),
        Prepared(G, beta, A, rq, rk),
        Packing(cu_seqlens, chunk_offsets),
    )
    common = {"scale": scale, "use_qk_l2norm": use_qk_l2norm, "config": config}
    with on_device(k):
        _, states = chunk_scan(*inputs, initial_state, widened=widened, num_chunks=num_chunks, **common)
        d_states, d_initial_state = chunk_reverse(
            *inputs,
            Cotangents(d_output, d_final_state),
            width=states.shape[3],
            need_initial=initial_state is not None,
            num_chunks=num_chunks,
            **common,
        )
        gradient = chunk_grad_split if config.chunk == 64 else chunk_grad
        dq, dk, dv, dG, dbeta = gradient(*inputs, states, Cotangents(d_output, d_states), widened=widened, **common)
    dq, dk, dv = (_cleared(x, cu_seqlens) for x in (dq, dk, dv))
    return or_empty(dq, k), dk, dv, dG, dbeta, or_empty(d_initial_state, k)


@_scan_backward.register_fake
def _(d_output, d_final_state, q, k, v, rq, rk, G, beta, A, initial_state, *options):
    inputs = (None if d_output is None else q, k, v, G, beta, initial_state)
    return tuple(k.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _save_scanned(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:11])
    ctx.options = inputs[11:]
    ctx.set_materialize_grads(False)


def _differentiate_scanned(ctx, d_output, d_final_state):
    check_first_order("gated_delta_rule")
    q, k, v, rq, rk, G, beta, A, initial_state, *packing = ctx.saved_tensors
    if q is None:
        d_output = None
    if d_output is None and d_final_state is None:
        return (None,) * 15
    dq, dk, dv, dG, dbeta, d_initial_state = _scan_backward(
        d_output, d_final_state, q, k, v, rq, rk, G, beta, A, initial_state, *packing, *ctx.options
    )
    dq = None if d_output is None else dq
    d_initial_state = None if initial_state is None else d_initial_state
    return dq, dk, dv, None, None, dG, dbeta, None, d_initial_state, *(None,) * 6


_scan.register_autograd(_differentiate_scanned, setup_context=_save_scanned)


class TritonPass:
    """Passes over the same k [B, T, H, K], v [B, T, HV, V], g, beta [B, T, HV] from any state, by the Triton kernels.

    Options and shapes are those of `gated_delta_rule`, which validates them; k and v share one of float32, float16 and
    bfloat16. `longest`: a bound on the tokens of a sequence (default T).

    Runs on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1 (not in bfloat16, which the interpreter
    multiplies wrongly). Deterministic. Source: arXiv 2412.06464, section 3.3; sleep_ops/reference.py.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        longest: int | None = None,
        rule: str = "delta",
        use_qk_l2norm: bool = False,
        A_log: Tensor | None = None,
        dt_bias: Tensor | None = None,
        use_beta_sigmoid: bool = False,
        allow_neg_eigval: bool = False,
    ):
        self.k, self.v, self.use_qk_l2norm = k, v, use_qk_l2norm
        A_log, dt_bias, cu_seqlens = (None if x is None else x.contiguous() for x in (A_log, dt_bias, cu_seqlens))
        self.longest = k.shape[1] if longest is None else longest
        config = _config(k, v.shape[3], self.longest)
        self.packing = (cu_seqlens, _chunk_offsets(cu_seqlens, config.chunk))
        self.scales_rows = use_qk_l2norm and scales_rows(config, k.dtype, architecture(k.device))
        factor = beta_scale(use_beta_sigmoid, allow_neg_eigval)
        G, active, A = _prepare(
            k, g, beta, A_log, dt_bias, *self.packing, self.longest, v.shape[3], rule, use_qk_l2norm, factor
        )
        self.factors = (self._norms(k), G, active, A if rule == "delta" else None)

    def _norms(self, x: Tensor | None) -> Tensor | None:
        return _inverse_norms(x.detach()) if self.scales_rows and x is not None else None

    def run(self, q: Tensor | None, state: Tensor | None, scale: float) -> tuple[Tensor | None, Tensor]:
        """Output [B, T, HV, V] in v's dtype (None without q) and final state [N, HV, K, V] float32."""
        options = (self.longest, scale, self.use_qk_l2norm, False)
        output, final_state = _scan(q, self.k, self.v, self._norms(q), *self.factors, state, *self.packing, *options)
        return None if q is None else output, final_state

    def transition(self) -> tuple[Tensor, Tensor]:
        """The pass as S -> P S + R: P [N, HV, K, K] and R [N, HV, K, V], float32."""
        options = (self.longest, 1.0, self.use_qk_l2norm, True)
        _, widened = _scan(None, self.k, self.v, None, *self.factors, None, *self.packing, *options)
        K = self.k.shape[3]
        return widened[..., :K], widened[..., K:]
