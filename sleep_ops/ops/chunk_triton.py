"""The chunked gated delta rule as differentiable PyTorch custom operators over the Triton kernels.

Two operators, so that passes over the same tokens share what they have in common:

    normalise        q or k with rows of unit norm, where asked for
    chunk_prepare    gates and triangular inverse of every chunk: G, active beta, A, and where few programs sweep QK
    chunk_scan       one sweep over the chunks from a given state: outputs and final state, or (widened) the map [P | R]

The backward of a sweep computes its states again, sweeps their cotangents back (chunk_reverse), and forms all gradients
at once (chunk_grad, or chunk_grad_long for chunks of 64), what reaches the keys through A among them; chunk_prepare's
turns those of G and beta into those of the gate inputs. Between forward and backward only the inputs, their norms, the
gates, the inverse and QK are kept, no states.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops.kernels import chunk_prepare as prepare_kernels
from sleep_ops.kernels import chunk_scan as scan_kernels
from sleep_ops.kernels.arguments import Cotangents, Gates, Packing, Prepared, Tokens
from sleep_ops.kernels.chunk_grad import chunk_grad
from sleep_ops.kernels.chunk_grad_long import chunk_grad_long
from sleep_ops.kernels.configs import ChunkConfig, architecture, chunk_config, few_programs
from sleep_ops.ops.launching import as_rows, contiguous, differentiable, operator
from sleep_ops.ops.rule import RuleOptions


def _config(k: Tensor, head_v_dim: int, longest: int) -> ChunkConfig:
    return chunk_config(k.shape[3], head_v_dim, longest, k.dtype, architecture(k.device))


def as_tokens(q: Tensor | None, k: Tensor, v: Tensor) -> Tokens:
    """As the kernels read them, in place where they can."""
    (k, stride_k), (v, stride_v) = _key_rows(k), as_rows(v)
    q, stride_q = (None, None) if q is None else _key_rows(q)
    return Tokens(q, k, v, stride_q, stride_k, stride_v)


def _key_rows(x: Tensor) -> tuple[Tensor, int | None]:
    """`as_rows` of q or k, with None for the stride of contiguous ones."""
    x, stride = as_rows(x)
    return x, None if stride == x.shape[2] * x.shape[3] else stride


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


def _cleared(x: Tensor | None, borders: Tensor | None) -> Tensor | None:
    """x [1, T, ...] with zeros behind the last border, where kernels write nothing; without a look at the device."""
    if x is None or borders is None:
        return x
    behind = torch.arange(x.shape[1], device=x.device) >= borders[-1]
    return x.masked_fill_(behind.view(-1, *(1,) * (x.ndim - 2)), 0)


def _prepare_backward(
    d_G, d_active, active, k, g, beta, A_log, dt_bias, cu_seqlens, chunk_offsets, longest, head_v_dim, beta_scale
):
    """Those of A and QK are always None: chunk_scan's backward has taken their parts into the other gradients."""
    chunk = _config(k, head_v_dim, longest).chunk
    dg, dbeta, *parameters = prepare_kernels.gate_backward(
        Gates(g.contiguous(), None, A_log, dt_bias),
        active,
        d_G.contiguous(),
        d_active.contiguous(),
        Packing(cu_seqlens, chunk_offsets),
        num_chunks=_num_chunks(g, cu_seqlens, chunk),
        beta_dtype=beta.dtype,
        beta_scale=beta_scale,
        chunk=chunk,
    )
    return _cleared(dg, cu_seqlens), _cleared(dbeta, cu_seqlens), *parameters[:2]


def _prepare_shapes(q, k, g, beta, A_log, dt_bias, cu_seqlens, chunk_offsets, longest, head_v_dim, rule, beta_scale):
    chunk = _config(k, head_v_dim, longest).chunk
    shape = (_num_chunks(k, cu_seqlens, chunk), g.shape[2], chunk)
    G = k.new_empty(shape, dtype=prepare_kernels.decay_dtype(k.dtype))
    active = k.new_empty(shape, dtype=torch.float32)
    A = k.new_empty((*shape, chunk)) if rule == "delta" else None
    return G, active, A, None if q is None or A is None else k.new_empty(A.shape)


@differentiable(
    "gated_delta_rule",
    outputs="G active A QK",
    gradients="g beta A_log dt_bias",
    shapes=_prepare_shapes,
    backward=_prepare_backward,
)
def chunk_prepare(
    q: Tensor | None,
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
    beta_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """G [chunks, HV, C] in decay_dtype(k.dtype), active beta, float32, and A [chunks, HV, C, C] in k's dtype (or none).

    With q, and where there is an A, QK too.
    longest: tokens of the longest sequence, which with the head dims decides the chunk's length.
    """
    config = _config(k, head_v_dim, longest)
    (k, stride_k), (q, stride_q) = _key_rows(k), (None, None) if q is None else _key_rows(q)
    prepared = prepare_kernels.chunk_prepare(
        Tokens(q, k, stride_q=stride_q, stride_k=stride_k),
        Gates(g.contiguous(), beta.contiguous(), A_log, dt_bias),
        Packing(cu_seqlens, chunk_offsets),
        num_chunks=_num_chunks(k, cu_seqlens, config.chunk),
        rule=rule,
        beta_scale=beta_scale,
        config=config,
    )
    return prepared[:4]


@operator(shapes=lambda x: (x.new_empty(x.shape), x.new_empty(x.shape[:3], dtype=torch.float32)))
def normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """y = r x of x [B, T, H, K], contiguous, and r = 1 / sqrt(sum x^2 + 1e-6), [B, T, H] float32."""
    return prepare_kernels.normalise(*as_rows(x))


class _Normalised(torch.autograd.Function):
    """`normalise`, for chunk_scan alone: given r beside y it answers with the cotangent of x in the place of y's."""

    @staticmethod
    def forward(ctx, x):
        y, r = normalise(x.detach())
        ctx.mark_non_differentiable(r)
        return y, r

    @staticmethod
    def backward(ctx, dx, _):
        return dx


def _scan_backward(
    d_output,
    d_final_state,
    q,
    k,
    v,
    rq,
    rk,
    G,
    beta,
    A,
    QK,
    initial_state,
    cu_seqlens,
    chunk_offsets,
    longest,
    scale,
    widened,
):
    """The gradients of q, k, G and beta are A's and QK's too."""
    config = _config(k, v.shape[3], longest)
    num_chunks = _num_chunks(k, cu_seqlens, config.chunk)
    d_output = None if q is None else d_output
    d_output, d_final_state, initial_state = contiguous(d_output, d_final_state, initial_state)
    inputs = (
        as_tokens(None if d_output is None else q, k, v),
        Prepared(G, beta, A, QK, rq, rk),
        Packing(cu_seqlens, chunk_offsets),
    )
    common = {"scale": scale, "config": config}
    _, states = scan_kernels.chunk_scan(*inputs, initial_state, widened=widened, num_chunks=num_chunks, **common)
    d_states, d_initial_state = scan_kernels.chunk_reverse(
        *inputs,
        Cotangents(d_output, d_final_state),
        width=states.shape[3],
        need_initial=initial_state is not None,
        num_chunks=num_chunks,
        **common,
    )
    gradient = chunk_grad_long if config.chunk == 64 else chunk_grad
    dq, dk, dv, dG, dbeta = gradient(*inputs, states, Cotangents(d_output, d_states), widened=widened, **common)
    dq, dk, dv = (_cleared(x, cu_seqlens) for x in (dq, dk, dv))
    dG, dbeta = (_cleared(x[None], chunk_offsets)[0] for x in (dG, dbeta))
    return dq, dk, dv, dG, dbeta, d_initial_state


def _scan_shapes(q, k, v, rq, rk, G, beta, A, QK, initial_state, cu_seqlens, chunk_offsets, longest, scale, widened):
    K, (HV, V) = k.shape[3], v.shape[2:]
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = k.new_empty((N, HV, K, K + V if widened else V), dtype=torch.float32)
    return None if q is None else v.new_empty(v.shape), final_state


@differentiable(
    "gated_delta_rule",
    outputs="output final_state",
    gradients="q k v G beta initial_state",
    shapes=_scan_shapes,
    backward=_scan_backward,
)
def chunk_scan(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    rq: Tensor | None,
    rk: Tensor | None,
    G: Tensor,
    beta: Tensor,
    A: Tensor | None,
    QK: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_offsets: Tensor | None,
    longest: int,
    scale: float,
    widened: bool,
) -> tuple[Tensor, Tensor]:
    """output (none without q) and final_state [N, HV, K, V] float32; with `widened` [P | R], [N, HV, K, K + V].

    rq, rk: inverse norms of q and k before they were normalised; the gradients are then those of them before.
    """
    output, final_state = scan_kernels.chunk_scan(
        as_tokens(q, k, v),
        Prepared(G, beta, A, QK, rq, rk),
        Packing(cu_seqlens, chunk_offsets),
        *contiguous(initial_state),
        scale=scale,
        widened=widened,
        config=_config(k, v.shape[3], longest),
    )
    return _cleared(output, cu_seqlens), final_state


class TritonPass:
    """Passes over the same k [B, T, H, K], v [B, T, HV, V], g, beta [B, T, HV] from any state, by the Triton kernels.

    Options and shapes are those of `gated_delta_rule`, which validates them; k and v share one of float32, float16 and
    bfloat16. `longest`: a bound on the tokens of a sequence (default T). `q`: that of every `run` that gets one, where
    it is known already: its products with k may then be kept for the sweeps.

    Runs on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1 (not in bfloat16, which the interpreter
    multiplies wrongly). Deterministic. Source: arXiv 2412.06464, section 3.3; sleep_ops/reference.py.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        options: RuleOptions,
        *,
        cu_seqlens: Tensor | None = None,
        longest: int | None = None,
        q: Tensor | None = None,
    ):
        self.v, self.use_qk_l2norm = v, options.use_qk_l2norm
        A_log, dt_bias, cu_seqlens = contiguous(options.A_log, options.dt_bias, cu_seqlens)
        self.longest = k.shape[1] if longest is None else longest
        config = _config(k, v.shape[3], self.longest)
        self.packing = (cu_seqlens, _chunk_offsets(cu_seqlens, config.chunk))
        self.k, rk = self._normalised(k)
        self.queries = None if q is None else self._normalised(q)
        has_inverse = options.rule == "delta"
        num_states = (k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1) * v.shape[2]
        keeps_QK = q is not None and has_inverse and few_programs(config.scan, num_states, v.shape[3], k.device)
        inputs = (self.queries[0] if keeps_QK else None, self.k, g, beta, A_log, dt_bias, *self.packing)
        settings = (self.longest, v.shape[3], options.rule, options.beta_scale)
        G, active, A, QK = chunk_prepare(*inputs, *settings)
        self.factors = (rk, G, active, A if has_inverse else None)
        self.QK = QK if keeps_QK else None

    def _normalised(self, x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return _Normalised.apply(x) if self.use_qk_l2norm and x is not None else (x, None)

    def run(self, q: Tensor | None, state: Tensor | None, scale: float) -> tuple[Tensor | None, Tensor]:
        """Output [B, T, HV, V] in v's dtype (None without q) and final state [N, HV, K, V] float32."""
        if q is None:
            rq = QK = None
        else:
            q, rq = self._normalised(q) if self.queries is None else self.queries
            QK = self.QK
        sweep = (self.longest, scale, False)
        output, final_state = chunk_scan(q, self.k, self.v, rq, *self.factors, QK, state, *self.packing, *sweep)
        return None if q is None else output, final_state

    def transition(self) -> tuple[Tensor, Tensor]:
        """The pass as S -> P S + R: P [N, HV, K, K] and R [N, HV, K, V], float32."""
        sweep = (self.longest, 1.0, True)
        _, widened = chunk_scan(None, self.k, self.v, None, *self.factors, None, None, *self.packing, *sweep)
        K = self.k.shape[3]
        return widened[..., :K], widened[..., K:]
