"""A pass over a segment of tokens as an affine map of the fast weights: S_out = P S_in + R, per head.

With k, v, g and beta fixed, every write of the gated delta rule is affine in S, so segments compose and N replay
passes are a power. For normalised keys, beta in [0, 2] and g <= 0 the norm of P is at most 1, so powers are stable.

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

from sleep_ops.ops.dispatch import choose_rule_impl, full_precision, prepare_pass
from sleep_ops.ops.windows import Windows
from sleep_ops.validation import check_delta_rule, check_tensor


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
        check_tensor("state", state, self.R.shape, "[N, HV, K, V]", self.P.device, (self.P.dtype,))
        with full_precision(self.P):
            return _apply(self, state)

    def then(self, later: "Transition") -> "Transition":
        """This segment, then `later`: (P2 P1, P2 R1 + R2). ValueError unless both have the same shapes and dtype."""
        if not isinstance(later, Transition):
            raise ValueError(f"later: expected a Transition, got {type(later).__name__}")
        for mine, other in zip(self, later, strict=True):
            check_tensor("later", other, mine.shape, "of this Transition", mine.device, (mine.dtype,))
        with full_precision(self.P):
            return _then(self, later)

    def power(self, n: int) -> "Transition":
        """n passes over the segment, by repeated squaring; n = 0 is the identity. ValueError for n < 0.

        P^n errs by up to n times the rounding error of P, and by no more than 1 / (1 - |P|) times it.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"n: expected an integer >= 0, got {n!r}")
        with full_precision(self.P):
            return _power(_squares(self, n), n) if n else Transition(_identity(self.P).expand_as(self.P), 0 * self.R)

    def fixed_point(self) -> Tensor:
        """The state infinitely many passes converge to from any start, (I - P)^-1 R, [N, HV, K, V].

        Raises NoFixedPoint, a ValueError, where passes don't converge: P has an eigenvalue of modulus 1, as without
        decay when the segment's keys don't span the key space. Looking for one makes the host wait for the device;
        under torch.compile nothing is checked.
        """
        if not torch.compiler.is_compiling():
            radius = torch.linalg.eigvals(self.P.detach()).abs().amax().item()
            if not radius < 1 - self.P.shape[-1] * torch.finfo(self.P.dtype).eps:
                raise NoFixedPoint(f"P: expected a spectral radius below 1 for a fixed point, got {radius:.9g}")
        return torch.linalg.solve(_identity(self.P) - self.P, self.R)

    def by_step(self, windows: Windows) -> "tuple[Transition, ...]":
        """Of the maps of all windows: those of each sequence's first window, of its second, ... ([num_seqs, ...])."""
        return tuple(map(Transition, *(windows.by_step(x) for x in self)))


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
    options = {
        "cu_seqlens": cu_seqlens,
        "rule": rule,
        "use_qk_l2norm": use_qk_l2norm,
        "A_log": A_log,
        "dt_bias": dt_bias,
        "use_beta_sigmoid": use_beta_sigmoid,
        "allow_neg_eigval": allow_neg_eigval,
    }
    check_delta_rule(None, k, v, g, beta, scale=None, initial_state=None, impl=impl, **options)
    with full_precision(k):
        return Transition(*prepare_pass(k, v, g, beta, impl=choose_rule_impl(impl, k), **options).transition())


def replay(
    transition: Transition, start: Tensor | None, passes: int | float, windows: Windows, output_pass: str
) -> tuple[Tensor, Tensor]:
    """`passes` passes over each window in turn: the states that pass 1 or N of each window starts from, and the last.

    transition: the windows' maps, P [windows, HV, K, K]; start [num_seqs, HV, K, V], None for zero. Returns states
    [windows, HV, K, V] before each window's `output_pass` ("first" or "last") and the final ones [num_seqs, HV, K, V].
    ValueError for passes = math.inf where they don't converge.

    Kept for the backward are P, R and start alone; the powers, about log2 N of them, are computed again there.
    """
    start = torch.zeros_like(windows.by_step(transition.R)[0]) if start is None else start.to(transition.R.dtype)
    if passes == math.inf:
        return _replay_endlessly(transition, start, windows, output_pass)

    def run(P: Tensor, R: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        return _replay(Transition(P, R), start, passes, windows, output_pass)

    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return run(*transition, start)
    return checkpoint(run, *transition, start, use_reentrant=False, preserve_rng_state=False)


def apply_power(transition: Transition, n: int, state: Tensor) -> Tensor:
    """n passes from `state`, one by one or through squares of the map: whichever is fewer columns of products."""
    K, V = transition.R.shape[-2:]
    squares = (n.bit_length() - 1) * (K + V) + n.bit_count() * V
    if n * V <= squares:
        for _ in range(n):
            state = _apply(transition, state)
        return state
    return _apply_squares(_squares(transition, n), n, state)


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


def _replay(transition, start, passes, windows, output_pass):
    if windows.is_whole:
        last = apply_power(transition, passes - 1, start)
        final = chain((transition,), last, windows.present)[1]
        return start if output_pass == "first" else last, final
    squares = _squares(transition, passes)
    whole = _power(squares, passes).by_step(windows)
    *firsts, final = chain(whole, start, windows.present)
    firsts = windows.by_window(firsts)
    return firsts if output_pass == "first" else _apply_squares(squares, passes - 1, firsts), final


def _replay_endlessly(transition, start, windows, output_pass):
    """Wherever it started, a window ends in its fixed point."""
    P, R = transition
    if windows.cu_seqlens is not None:  # a window without tokens is the identity: any contraction will do in its place
        present = (windows.cu_seqlens.diff() > 0)[:, None, None, None]
        P, R = P * present, R * present
    limits = Transition(P, R).fixed_point()
    *firsts, final = chain(Transition(torch.zeros_like(P), limits).by_step(windows), start, windows.present)
    return windows.by_window(firsts) if output_pass == "first" else limits, final


def _apply(transition: Transition, state: Tensor) -> Tensor:
    return transition.P @ state + transition.R


def _then(earlier: Transition, later: Transition) -> Transition:
    return Transition(later.P @ earlier.P, _apply(later, earlier.R))


def _squares(transition: Transition, n: int) -> list[Transition]:
    """The map's powers 1, 2, 4, ... up to n."""
    squares = [transition]
    for _ in range(n.bit_length() - 1):
        squares.append(_then(squares[-1], squares[-1]))
    return squares


def _power(squares: list[Transition], n: int) -> Transition:
    chosen = [square for i, square in enumerate(squares) if n >> i & 1]
    result = chosen[0]
    for square in chosen[1:]:
        result = _then(result, square)
    return result


def _apply_squares(squares: list[Transition], n: int, state: Tensor) -> Tensor:
    for i, square in enumerate(squares):
        if n >> i & 1:
            state = _apply(square, state)
    return state


def _identity(P: Tensor) -> Tensor:
    return torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
