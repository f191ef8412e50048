"""The gated delta rule and its sleep: the public operators, their checks, and replay over windows.

Shapes: q, k [B, T, H, K]; v [B, T, HV, V], all of one float dtype; g, beta [B, T, HV] in any float dtype; states
[N, HV, K, V] float32 (float64 for float64 inputs) with N = B, or the number of packed sequences.
"""

import math

import torch
from torch import Tensor

from sleep_ops.affine import Transition, segment_transition
from sleep_ops.ops.dispatch import run_pass
from sleep_ops.ops.gates import CLOSED
from sleep_ops.ops.packed import PaddedSequences
from sleep_ops.reference import DeltaRuleOutput
from sleep_ops.validation import check_delta_rule, check_passes


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rule: str = "delta",
    use_qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    impl: str = "auto",
) -> DeltaRuleOutput:
    """One pass: S <- exp(g_t) S;  S <- S + k_t (beta_t (v_t - S^T k_t))^T;  o_t = scale S^T q_t, per value head.

    The delta rule of Gated DeltaNet (arXiv 2412.06464); rule="hebbian" writes k_t (beta_t v_t)^T instead, equation (3)
    of arXiv 2605.26099. Value head h reads q/k head h // (HV // H).

    Args:
        q, k: [B, T, H, K], float16, bfloat16, float32 or float64.
        v: [B, T, HV, V] in the same dtype; HV a multiple of H.
        g: natural-log decay <= 0, finite (values are not checked), [B, T, HV], any float dtype. With `A_log` and
            `dt_bias` ([HV]) it is the raw gate input and the decay is -exp(A_log) * softplus(g + dt_bias).
        beta: write strength in [0, 2], [B, T, HV], any float dtype; with `use_beta_sigmoid` a logit, its sigmoid
            doubled by `allow_neg_eigval` (an error without the sigmoid).
        scale: factor on the outputs, K ** -0.5 when None.
        initial_state: [N, HV, K, V], zeros when None.
        cu_seqlens: int32 or int64 [num_seqs + 1], borders 0 ... T of the sequences packed into B = 1; one may be
            empty. Values are checked only on the CPU and outside torch.compile.
        use_qk_l2norm: divide q and k by sqrt(sum x^2 + 1e-6) over K.
        impl: "auto" (Triton for CUDA tensors of up to 32 bits, PyTorch otherwise), "triton", "torch" (chunked, for
            every dtype), or "reference" (the token recurrence in float32/float64). float64 is not for Triton.

    Returns output [B, T, HV, V] in v's dtype and the final state. Differentiable in every float tensor, once (with
    impl="reference" more often); autocast has no effect inside. Raises ValueError for a wrong shape, dtype, device or
    option.
    """
    options = {
        "scale": scale,
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
        "rule": rule,
        "use_qk_l2norm": use_qk_l2norm,
        "A_log": A_log,
        "dt_bias": dt_bias,
        "use_beta_sigmoid": use_beta_sigmoid,
        "allow_neg_eigval": allow_neg_eigval,
        "impl": impl,
    }
    _check_query(q)
    check_delta_rule(q, k, v, g, beta, **options)
    options["scale"] = k.shape[-1] ** -0.5 if scale is None else float(scale)
    return DeltaRuleOutput(*run_pass(q, k, v, g, beta, **options))


def sleep_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    passes: int | float,
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
    impl: str = "auto",
) -> DeltaRuleOutput:
    """`passes` replay passes over each window of at most `window` tokens, in turn, carrying the state.

    Windows are counted from the start of each sequence; a shorter last one is replayed like the others, and without
    `window` the whole sequence is one. The final state is that of the last pass; outputs are those of each window's
    last pass, or of its first (output_pass="first": causal, the state a window starts from has slept). passes=math.inf
    replays to convergence, (I - P)^-1 R of `Transition.fixed_point`. Other arguments as in `gated_delta_rule`. The host
    waits for the device once with packed sequences and a window, and per window with math.inf; never under
    torch.compile, where convergence is not checked.

    Raises ValueError as `gated_delta_rule` does, for passes < 1, window < 1 and an unknown output_pass, and for
    passes=math.inf where some window's passes don't converge.
    """
    _check_query(q)
    return DeltaRuleOutput(
        *_sleep(
            q,
            k,
            v,
            g,
            beta,
            passes,
            window,
            output_pass,
            scale=scale,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            rule=rule,
            use_qk_l2norm=use_qk_l2norm,
            A_log=A_log,
            dt_bias=dt_bias,
            use_beta_sigmoid=use_beta_sigmoid,
            allow_neg_eigval=allow_neg_eigval,
            impl=impl,
        )
    )


def delta_rule_state(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    passes: int | float = 1,
    window: int | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rule: str = "delta",
    use_qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    impl: str = "auto",
) -> Tensor:
    """The final state [N, HV, K, V] of `sleep_gated_delta_rule`, for callers that need no output."""
    return _sleep(
        None,
        k,
        v,
        g,
        beta,
        passes,
        window,
        "last",
        scale=None,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        rule=rule,
        use_qk_l2norm=use_qk_l2norm,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid=use_beta_sigmoid,
        allow_neg_eigval=allow_neg_eigval,
        impl=impl,
    )[1]


def _check_query(q: object) -> None:
    if not isinstance(q, Tensor):
        raise ValueError(f"q: expected a tensor [B, T, H, K], got {type(q).__name__}")


def _sleep(q, k, v, g, beta, passes, window, output_pass, **options) -> tuple[Tensor | None, Tensor]:
    check_passes(passes, window, output_pass)
    check_delta_rule(q, k, v, g, beta, **options)
    options["scale"] = k.shape[-1] ** -0.5 if options["scale"] is None else float(options["scale"])
    state, cu_seqlens = options.pop("initial_state"), options.pop("cu_seqlens")
    tokens = v.shape[1]
    if cu_seqlens is not None and (window is None or window >= tokens):
        asleep = cu_seqlens[1:] > cu_seqlens[:-1]
        return _replay(q, k, v, g, beta, state, passes, output_pass, asleep, cu_seqlens=cu_seqlens, **options)

    sequences = None
    if cu_seqlens is not None:
        # A window of packed sequences is one slice of them laid out side by side, filled up with tokens that change
        # nothing.
        sequences = PaddedSequences(cu_seqlens, tokens)
        g_off = CLOSED if options["A_log"] is not None else 0.0
        beta_off = CLOSED if options["use_beta_sigmoid"] else 0.0
        k, v, g, beta = sequences.pad(k), sequences.pad(v), sequences.pad(g, g_off), sequences.pad(beta, beta_off)
        q = None if q is None else sequences.pad(q)
        tokens = v.shape[1]
    window = tokens if window is None else window
    outputs = []
    for first in range(0, tokens, window):
        q_j, k_j, v_j, g_j, beta_j = (None if x is None else x[:, first : first + window] for x in (q, k, v, g, beta))
        asleep = None if sequences is None else sequences.lengths > first
        o, state = _replay(q_j, k_j, v_j, g_j, beta_j, state, passes, output_pass, asleep, cu_seqlens=None, **options)
        outputs.append(o)
    if q is None:
        return None, state
    output = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
    return output if sequences is None else sequences.unpad(output), state


def _replay(q, k, v, g, beta, state, passes, output_pass, asleep, **options) -> tuple[Tensor | None, Tensor]:
    """The passes over one window. `asleep` (bool [N], None = all) marks the sequences with tokens in it."""
    if passes == math.inf:
        start = state
        state = _converged(k, v, g, beta, state, asleep, options)
        if q is None:
            return None, state
        return run_pass(q, k, v, g, beta, initial_state=start if output_pass == "first" else state, **options)[0], state
    output = None
    for n in range(passes):
        wanted = n == (0 if output_pass == "first" else passes - 1)
        o, state = run_pass(q if wanted else None, k, v, g, beta, initial_state=state, **options)
        output = o if wanted else output
    return output, state


def _converged(k, v, g, beta, state, asleep, options) -> Tensor:
    """The state after infinitely many passes; that of a sequence without tokens stays."""
    P, R = segment_transition(k, v, g, beta, **{name: x for name, x in options.items() if name != "scale"})
    if asleep is not None:
        still = ~asleep[:, None, None, None]
        P = P.masked_fill(still, 0.0)
        R = R.masked_fill(still, 0.0) if state is None else torch.where(still, state.to(R.dtype), R)
    try:
        return Transition(P, R).fixed_point()
    except ValueError as error:
        raise ValueError(f"passes: expected passes that converge for math.inf; {error}") from error
