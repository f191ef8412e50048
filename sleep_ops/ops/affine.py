"""A pass over a segment of tokens as an affine map of the fast weights: S_out = P S_in + R, per head.

With k, v, g and beta fixed, every write of the gated delta rule is affine in S, so segments compose and N replay
passes are a power. For normalised keys, beta in [0, 2] and g <= 0 the norm of P is at most 1, so powers are stable as
far as P is exact (see `sleep_gated_delta_rule` on rounding).

    E_j^(0) = E_(j-1)^(N)      E_j^(n) = P_j E_j^(n-1) + R_j        states of window j before and after pass n

Windows' maps and their powers are computed for all windows at once; only the chain over windows is a sequence, of
[K, K] by [K, V] products. Everything here is differentiated by autograd.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sleep_ops.ops.dispatch import choose_rule_impl, no_tokens, prepare_pass
from sleep_ops.ops.precision import full_precision, product
from sleep_ops.ops.rule import RuleOptions, check_states, check_tokens
from sleep_ops.ops.small import flushed, least_of_map
from sleep_ops.ops.windows import Windows
from sleep_ops.validation import check_full, check_no_tangents, check_tensor

MAX_APPLICATIONS = 7  # up to as many products with a state are fewer columns than squares of the map, at K = V


class NoFixedPoint(ValueError):
    """Passes over a segment don't converge."""


class Transition(NamedTuple):
    """S -> P S + R, with P [N, HV, K, K] and R [N, HV, K, V], float32 (float64 from float64 inputs).

    Differentiable; every method returns new tensors. Products are PyTorch's, in the precision that
    `torch.set_float32_matmul_precision` asks for.
    """

    P: Tensor
    R: Tensor

    def apply(self, state: Tensor) -> Tensor:
        """The state left by the segment from `state` [N, HV, K, V], of P's dtype. ValueError for any other."""
        self._check()
        check_tensor("state", state, self.R.shape, "[N, HV, K, V]", self.P.device, (self.P.dtype,))
        with full_precision(self.P):
            return _apply(self, state)

    def then(self, later: "Transition") -> "Transition":
        """This segment, then `later`: (P2 P1, P2 R1 + R2). ValueError unless both have the same shapes and dtype."""
        self._check()
        if not isinstance(later, Transition):
            raise ValueError(f"later: expected a Transition, got {type(later).__name__}")
        for mine, other in zip(self, later, strict=True):
            check_tensor("later", other, mine.shape, "of this Transition", mine.device, (mine.dtype,))
        with full_precision(self.P):
            return _then(self, later)

    def power(self, n: int) -> "Transition":
        """n passes over the segment, by repeated squaring; n = 0 is the identity. ValueError for n < 0.

        On how errors grow with n see `sleep_gated_delta_rule`.
        """
        self._check()
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"n: expected an integer >= 0, got {n!r}")
        with full_precision(self.P):
            return _power(self, n) if n else Transition(_identity(self.P).expand_as(self.P), torch.zeros_like(self.R))

    def fixed_point(self) -> Tensor:
        """The state infinitely many passes converge to from any start, (I - P)^-1 R, [N, HV, K, V].

        Raises NoFixedPoint, a ValueError, where powers of P don't vanish, as without decay when the segment's keys
        don't span the key space, and for values that are not finite. Told apart by P^n with n = 2^18 (2^40 in
        float64), so a spectral radius within about 1 / n of 1 counts as 1. The host waits for the device; under
        torch.compile and CUDA graph capture nothing is checked.
        """
        self._check()
        with full_precision(self.P):
            return _fixed_point(self)

    def _check(self) -> None:
        check_full("R", self.R, 4, "[N, HV, K, V]", 1)
        N, HV, K, _ = self.R.shape
        check_tensor("P", self.P, (N, HV, K, K), "[N, HV, K, K] beside R", self.R.device, (self.R.dtype,))


def segment_transition(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    rule: str = "delta",
    use_qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    impl: str = "auto",
) -> Transition:
    """The map of one pass over k [B, T, H, K], v [B, T, HV, V] with g, beta [B, T, HV]; options of `gated_delta_rule`.

    One ordinary state pass over the widened values [0 | v] from the widened state [I | 0] leaves [P | R]. One map per
    batch row, or per sequence with `cu_seqlens` (an empty one is the identity). Differentiable in every tensor. Raises
    ValueError as `gated_delta_rule` does.
    """
    options = RuleOptions(rule, use_qk_l2norm, A_log, dt_bias, use_beta_sigmoid, allow_neg_eigval)
    check_tokens(None, k, v, g, beta, options, impl=impl)
    check_states(k, v, None, cu_seqlens)
    impl = choose_rule_impl(impl, k)
    if 0 in k.shape[:2]:
        _, R = no_tokens(None, k, v, g, beta, options, None, cu_seqlens)
        return Transition(_identity(R @ R.mT).expand(*R.shape[:3], -1), R)
    if impl != "reference":
        check_no_tangents("segment_transition", k, v, g, beta, A_log, dt_bias)
    with full_precision(k):
        return Transition(*prepare_pass(k, v, g, beta, options, impl=impl, cu_seqlens=cu_seqlens).transition())


def replay(
    transition: Transition, start: Tensor | None, passes: int | float, windows: Windows, output_pass: str
) -> tuple[Tensor | None, Tensor]:
    """`passes` passes over each window in turn: the states that pass 1 or N of each window starts from, and the last.

    transition: the windows' maps, P [windows, HV, K, K]; start [num_seqs, HV, K, V], None for zero. Returns states
    [windows, HV, K, V] before each window's `output_pass` ("first" or "last"; None for zero), and the final ones
    [num_seqs, HV, K, V].
    A window that changes nothing (P = I, R = 0: no tokens, or closed gates) hands on its state, however many passes.
    NoFixedPoint for passes = math.inf where those over another window don't converge.

    For the backward P, R and start are kept; the powers, up to 2 log2 N maps a window, are computed again there, and
    held together until it is through (torch.compile decides for itself what to keep).
    """
    if start is not None:
        start = start.to(transition.R.dtype)

    def run(P: Tensor, R: Tensor, start) -> tuple:  # torch.compile of torch 2.9 can't trace a type with "|" here
        return (_replay_endlessly if passes == math.inf else _replay)(
            Transition(P, R), start, passes, windows, output_pass
        )

    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*transition, start))
    if passes == math.inf or torch.compiler.is_compiling() or not differentiated:
        return run(*transition, start)
    return checkpoint(run, *transition, start, use_reentrant=False, preserve_rng_state=False)


def apply_power(transition: Transition, n: int, state: Tensor | None) -> Tensor | None:
    """n passes from `state` (None for zero): one by one where they are few, else through squares of the map."""
    if n <= MAX_APPLICATIONS:
        for _ in range(n):
            state = _apply(transition, state)
        return state
    while n:
        if n & 1:
            state = _apply(transition, state)
        n >>= 1
        if n:
            transition = _then(transition, transition)
    return state


def chain(transitions: Sequence[Transition], start: Tensor | None, present: Tensor | None = None) -> list[Tensor]:
    """States [N, HV, K, V] before each of the transitions and after the last, from `start` (None for zero).

    `present`, bool [N, steps], marks the transitions that count (default: all).
    """
    states = [torch.zeros_like(transitions[0].R) if start is None else start.to(transitions[0].R.dtype)]
    for j, transition in enumerate(transitions):
        after = _apply(transition, states[-1])
        if present is not None:
            after = torch.where(present[:, j, None, None, None], after, states[-1])
        states.append(after)
    return states


def by_step(transition: Transition, windows: Windows) -> tuple[Transition, ...]:
    """Of the maps of all windows: those of each sequence's first window, of its second, ... ([num_seqs, ...])."""
    return tuple(map(Transition, *(windows.by_step(x) for x in transition)))


def _replay(transition, start, passes, windows, output_pass):
    if windows.is_whole:
        last = apply_power(transition, passes - 1, start)
        return start if output_pass == "first" else last, chain((transition,), last, windows.present)[1]
    most = _power(transition, passes - 1)
    *firsts, final = chain(by_step(_then(most, transition), windows), start, windows.present)
    firsts = windows.by_window(firsts)
    return firsts if output_pass == "first" else _apply(most, firsts), final


def _replay_endlessly(transition, start, passes, windows, output_pass):
    """Wherever it started, a window ends in its fixed point, unless it changes nothing."""
    P, R = transition
    identity = _identity(P)
    still = ((P == identity).all(-1).all(-1) & (R == 0).all(-1).all(-1))[..., None, None]
    limits = _fixed_point(Transition(P.masked_fill(still, 0.0), R))
    *firsts, final = chain(by_step(Transition(still * identity, limits), windows), start, windows.present)
    firsts = windows.by_window(firsts)
    return firsts if output_pass == "first" else torch.where(still, firsts, limits), final


def _fixed_point(transition: Transition) -> Tensor:
    P, R = transition
    capturing = P.is_cuda and torch.cuda.is_current_stream_capturing()
    if len(P) and not torch.compiler.is_compiling() and not capturing:
        squarings = 40 if P.dtype == torch.float64 else 18
        power = P.detach()
        for _ in range(squarings):
            power = flushed(power @ power, least_of_map)
        size = torch.linalg.matrix_norm(power).amax().item()  # NaN where P is not finite, or its powers overflow
        if not size < 0.5:
            radius = size ** (0.5**squarings)
            raise NoFixedPoint(f"P: expected a spectral radius below 1 for a fixed point, got {radius:.9g}")
    return torch.linalg.solve_ex(_identity(P) - P, R).result


def _apply(transition: Transition, state: Tensor | None) -> Tensor:
    if state is None:
        return transition.R
    return product(transition.P, flushed(state)) + transition.R


def _then(earlier: Transition, later: Transition) -> Transition:
    return Transition(flushed(product(later.P, earlier.P), least_of_map), _apply(later, earlier.R))


def _power(transition: Transition, n: int) -> Transition:
    result = None
    while n:
        if n & 1:
            result = transition if result is None else _then(result, transition)
        n >>= 1
        if n:
            transition = _then(transition, transition)
    return result


def _identity(P: Tensor) -> Tensor:
    return torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
