"""The gated delta rule and its sleep: the public operators, their checks, and replay over windows.

Shapes: q, k [B, T, H, K]; v [B, T, HV, V], all of one float dtype; g, beta [B, T, HV] in any float dtype; states
[N, HV, K, V] float32 (float64 for float64 inputs) with N = B, or the number of packed sequences.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sleep_ops.checks import check_count
from sleep_ops.ops.affine import NoFixedPoint, Transition, by_step, chain, replay
from sleep_ops.ops.dispatch import (
    choose_rule_impl,
    is_single_chunk,
    no_tokens,
    prepare_pass,
    replay_single_chunk,
    run_pass,
)
from sleep_ops.ops.packed import longest_sequence
from sleep_ops.ops.precision import full_precision
from sleep_ops.ops.rule import RuleOptions, check_query, check_states, check_tokens
from sleep_ops.ops.short_windows import is_short, replay_short
from sleep_ops.ops.windows import Windows
from sleep_ops.reference import DeltaRuleOutput, sleep_gated_delta_rule_reference
from sleep_ops.validation import check_no_tangents, check_passes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Tokens = tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]  # q (None where only the state is wanted), k, v, g, beta
SEGMENT_MULTIPLE = 64  # tokens: segments begin where chunks of every length do


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
    segments: int | None = None,
    group: "ProcessGroup | None" = None,
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
            empty. Values are checked only on the CPU and outside torch.compile. Packing changes results by rounding
            alone, and in PyTorch costs about what the sequences cost alone; under torch.compile, which can't read their
            lengths, as if each were T long.
        use_qk_l2norm: divide q and k by sqrt(sum x^2 + 1e-6) over K.
        impl: "auto" (Triton for CUDA tensors of up to 32 bits, PyTorch otherwise), "triton", "torch" (chunked, for
            every dtype), or "reference" (the token recurrence in float32/float64). float64 is not for Triton.
        segments: how many parts, of a multiple of 64 tokens each, every sequence is cut into; they run at once, joined
            by their transitions, at about three times the work. 1 cuts nothing; None cuts long sequences where the GPU
            would have too little to do (`num_segments` of kernels/configs.py), but not packed ones: to cut those the
            host waits for their lengths.
        group: process group whose ranks hold consecutive parts of the sequences, in rank order and of any lengths >= 1.
            The ranks exchange their transitions by one all-gather, and in the backward gradients by a reduce-scatter.
            initial_state, the same on all, stands before the first rank's tokens; the final state, the same on all,
            comes after the last one's. Every rank's backward must run; what a replicated tensor (initial_state, A_log,
            dt_bias) gets there is that rank's part of the gradient, to be summed over ranks. The ranks must agree in
            everything but T and the values, in which tensors want gradients too. Not with cu_seqlens.

    Errors: in PyTorch those of float32, whatever the inputs, and the rounding of the output. In Triton in 16 bits about
    a rounding of the inputs, where keys differ or decay. Keys that repeat without any decay enlarge what a chunk's
    products are rounded by there, as beta nears 2 without bound: over 256 equal keys bfloat16 outputs err by some
    percent at beta = 1, by as much as their own size at beta = 2, and by some percent again with a decay of -0.1.
    float32 inputs, or impl="torch", do not.

    Returns output [B, T, HV, V] in v's dtype and the final state; B or T may be 0. Differentiable in every float
    tensor, once (with impl="reference" and no group more often), not by torch.func, and not in forward mode, which is a
    RuntimeError; autocast has no effect on the forward. On a GPU tokens behind the last border get zeros. Raises
    ValueError for a wrong shape, dtype, device or option.
    """
    check_query(q)
    options = RuleOptions(rule, use_qk_l2norm, A_log, dt_bias, use_beta_sigmoid, allow_neg_eigval)
    check_tokens(q, k, v, g, beta, options, scale=scale, impl=impl)
    check_states(k, v, initial_state, cu_seqlens)
    if segments is not None:
        check_count("segments", segments)
    if group is not None:
        from sleep_ops.ops.sequence_parallel import check_group

        check_group(group, cu_seqlens)
    tokens = (q, k, v, g, beta)
    return DeltaRuleOutput(*_one_pass(tokens, options, scale, initial_state, cu_seqlens, impl, segments, group))


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
    group: "ProcessGroup | None" = None,
) -> DeltaRuleOutput:
    """`passes` replay passes over each window of at most `window` tokens, in turn, carrying the state.

    Windows are counted from the start of each sequence; a shorter last one is replayed like the others, and without
    `window` the whole sequence is one. The final state is that of the last pass; outputs are those of each window's
    last pass, or of its first (output_pass="first": causal, the state a window starts from has slept). passes=math.inf
    replays to convergence, (I - P)^-1 R of `Transition.fixed_point`. Other arguments as in `gated_delta_rule`.

    Time and memory, also of the backward, do not grow with the passes but for some 2 log2 N products of [K, K] by
    [K, K + V] per window, and as many maps held in the backward: every window is swept once as a map S -> P S + R, all
    windows at once, and once for outputs from the state its last (or first) pass starts from. Two passes over a single
    window run one after the other, which is less to sweep; with impl="reference" all do. For the backward the tensors
    of one pass are kept, and P and R of each window. Short windows cost products of T x T instead, T tokens being a
    window's: in PyTorch windows of at most 96 tokens and 3/4 K, of which the backward keeps some 5 log2 N
    (`short_windows.py`); in Triton batched sequences of one window that one chunk holds (`single_chunk_config` of
    kernels/configs.py), with one launch for the pass that puts out, one for all the others, and only the inputs kept.

    Errors: one pass errs by some roundings u of its products, relative to the state: about 2^-22 in PyTorch and with
    float32 inputs, in Triton 2^-9 with bfloat16 and 2^-12 with float16 ones, several times that for windows of a
    thousand tokens. N passes err by at most about N u while that is much less than 1, and by u / (1 - |P|) where decay
    makes |P| < 1. Beyond that nothing is promised: the rounded P, or that of keys which are rounded and not normalised
    here, may have a norm above 1, and then errors grow exponentially (seen in 16 bits with beta = 2 and no decay, from
    N in the hundreds on). Long sleeps in 16 bits want some decay. Short windows err by less in Triton in 16 bits, by
    what the pass that puts out does. In float32 they err by several times more where nothing decays (in PyTorch: and
    beta = 2), and where keys repeat too by ten times, the gradient of g by two hundred (4e-3 at N = 64).

    With math.inf values err by u / (1 - |P|) too, but gradients of g and beta by its square: in float32 by 10 % where
    1 - |P| is 1e-3. On a CPU entries of maps below 1e-19 and of states below 1e-30 (float32) count as zero.

    The host waits for the device once with packed sequences and a window, and with math.inf to see that passes
    converge; never under torch.compile, where that is not checked.

    group: as in `gated_delta_rule`; ranks exchange the maps of all their passes. Windows are counted from each rank's
    first token, so all ranks but the last want whole ones.

    Raises ValueError as `gated_delta_rule` does, for passes < 1, window < 1 and an unknown output_pass, and for
    passes=math.inf where some window's passes don't converge, or with a group.
    """
    check_query(q)
    options = RuleOptions(rule, use_qk_l2norm, A_log, dt_bias, use_beta_sigmoid, allow_neg_eigval)
    sleep = (passes, window, output_pass, group)
    return DeltaRuleOutput(*_sleep((q, k, v, g, beta), options, scale, initial_state, cu_seqlens, impl, *sleep))


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
    impl: str = "auto",
    group: "ProcessGroup | None" = None,
    **options,
) -> Tensor:
    """The final state [N, HV, K, V] of `sleep_gated_delta_rule`, for callers that need no output.

    options: `rule` and those that follow it there.
    """
    sleep = (passes, window, "last", group)
    return _sleep((None, k, v, g, beta), RuleOptions(**options), None, initial_state, cu_seqlens, impl, *sleep)[1]


def _cut(k: Tensor, v: Tensor, impl: str, cu_seqlens: Tensor | None, segments: int | None) -> Windows:
    """The segments of one pass as windows."""
    batch, tokens = k.shape[:2]
    if segments is None:
        segments = 1
        if impl == "triton" and k.is_cuda and cu_seqlens is None:
            from sleep_ops.kernels.configs import architecture, num_segments

            processors, arch = torch.cuda.get_device_properties(k.device).multi_processor_count, architecture(k.device)
            segments = num_segments(batch * v.shape[2], k.shape[3], v.shape[3], tokens, k.dtype, processors, arch)
    if segments == 1:
        return Windows(batch, tokens, None, cu_seqlens, k.device)
    longest = tokens if cu_seqlens is None else longest_sequence(cu_seqlens, tokens)
    length = -(-longest // (segments * SEGMENT_MULTIPLE)) * SEGMENT_MULTIPLE
    return Windows(batch, tokens, None if length >= longest else length, cu_seqlens, k.device)


def _one_pass(
    tokens: Tokens,
    options: RuleOptions,
    scale: float | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    impl: str,
    segments: int | None = None,
    group: "ProcessGroup | None" = None,
) -> tuple[Tensor | None, Tensor]:
    q, k, v, g, beta = tokens
    impl, scale = choose_rule_impl(impl, k), k.shape[-1] ** -0.5 if scale is None else float(scale)
    if 0 in k.shape[:2]:
        if group is not None:
            raise ValueError(f"k: expected B and T >= 1 with group, got {list(k.shape)}")
        return no_tokens(*tokens, options, state, cu_seqlens)
    if impl != "reference":
        check_no_tangents("gated_delta_rule", *tokens, state, options.A_log, options.dt_bias)
    with full_precision(k):
        parts = _cut(k, v, impl, cu_seqlens, segments)
        if parts.is_whole and group is None:
            return run_pass(*tokens, options, state, scale, impl=impl, cu_seqlens=cu_seqlens)
        q, k, v, g, beta = (None if x is None else parts.split(x) for x in tokens)
        one_pass = prepare_pass(k, v, g, beta, options, impl=impl, cu_seqlens=parts.cu_seqlens, longest=parts.longest)
        transitions = by_step(Transition(*one_pass.transition()), parts)
        if group is None:
            *starts, final = chain(transitions, state, parts.present)
        else:
            from sleep_ops.ops.sequence_parallel import state_before_this_rank

            state, final = state_before_this_rank(transitions, state, group)
            *starts, _ = chain(transitions, state)
        if q is None:
            return None, final
        return parts.join(one_pass.run(q, parts.by_window(starts), scale)[0]), final


def _sleep(
    tokens: Tokens,
    options: RuleOptions,
    scale: float | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    impl: str,
    passes: int | float,
    window: int | None,
    output_pass: str,
    group: "ProcessGroup | None",
) -> tuple[Tensor | None, Tensor]:
    check_passes(passes, window, output_pass)
    q, k, v, g, beta = tokens
    check_tokens(*tokens, options, scale=scale, impl=impl)
    check_states(k, v, state, cu_seqlens)
    if group is not None:
        from sleep_ops.ops.sequence_parallel import check_group, replay_on_ranks

        check_group(group, cu_seqlens)
        if passes == math.inf:
            raise ValueError("passes: expected a number with group, got inf")
    if passes == 1:
        return _one_pass(tokens, options, scale, state, cu_seqlens, impl, group=group)
    impl, scale = choose_rule_impl(impl, k), k.shape[-1] ** -0.5 if scale is None else float(scale)
    if 0 in k.shape[:2]:
        if group is not None:
            raise ValueError(f"k: expected B and T >= 1 with group, got {list(k.shape)}")
        return no_tokens(*tokens, options, state, cu_seqlens)
    if impl != "reference":
        check_no_tangents("sleep_gated_delta_rule", *tokens, state, options.A_log, options.dt_bias)
    with full_precision(k):
        if impl == "reference" and passes != math.inf and group is None:
            output, state = sleep_gated_delta_rule_reference(
                *(k if q is None else q, *tokens[1:]),
                passes=int(passes),
                window=window,
                output_pass=output_pass,
                scale=scale,
                initial_state=state,
                cu_seqlens=cu_seqlens,
                **options._asdict(),
            )
            return None if q is None else output.to(v.dtype), state

        windows = Windows(k.shape[0], k.shape[1], window, cu_seqlens, k.device)
        if group is None and windows.is_whole and passes != math.inf and is_single_chunk(k, v, impl, cu_seqlens):
            return replay_single_chunk(*tokens, options, state, scale, int(passes), output_pass)
        q, k, v, g, beta = (None if x is None else windows.split(x) for x in tokens)
        one_pass = prepare_pass(
            k, v, g, beta, options, impl=impl, cu_seqlens=windows.cu_seqlens, longest=windows.longest
        )
        if group is not None:
            transition = Transition(*one_pass.transition())
            begin, state = replay_on_ranks(transition, state, int(passes), windows, output_pass, group)
            output = None if q is None else one_pass.run(q, begin, scale)[0]
        elif passes == 2 and windows.is_whole:
            # Two sweeps of V columns: fewer than one of K + V for the transition and one of V for outputs. From three
            # passes on the transition is no slower (measured on a CPU), and the cost no longer grows with N.
            first, state = one_pass.run(q if output_pass == "first" else None, state, scale)
            last, state = one_pass.run(q if output_pass == "last" else None, state, scale)
            output = first if output_pass == "first" else last
        elif passes != math.inf and is_short(one_pass):
            output, state = replay_short(one_pass, q, state, scale, int(passes), windows, output_pass)
        elif passes != math.inf and windows.is_whole and q is not None and output_pass == "last":
            # The last pass leaves the final state itself.
            _, begin = replay(Transition(*one_pass.transition()), state, int(passes) - 1, windows, output_pass)
            output, state = one_pass.run(q, begin, scale)
        else:
            try:
                begin, state = replay(Transition(*one_pass.transition()), state, passes, windows, output_pass)
            except NoFixedPoint as error:
                raise ValueError(f"passes: expected passes that converge for math.inf; {error}") from error
            output = None if q is None else one_pass.run(q, begin, scale)[0]
    return None if output is None else windows.join(output), state
