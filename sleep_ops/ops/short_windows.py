"""Replay over windows of fewer tokens than a key has dims: N passes as powers of a T x T matrix, in PyTorch.

With c = e^(G_T), X = diag(e^(G_T - G)) K, and of the chunk's inverse A (see chunk_torch.py) B = A diag(beta e^G) and
D = A diag(beta) V, a pass over one window is S -> c S + X^T (D - B K S), and n of them are, with F = c I - B K X^T,

    S_n = c^n S_0 + X^T Z_n               W = B K S_0
    Z_n = Sigma_n D - Gamma_n W           Sigma_n = sum_{m < n} F^m       Gamma_n = sum_{m < n} c^(n - 1 - m) F^m

Pass n + 1 writes U = D - B K X^T Z_n - c^n W, so Z_(n+1) = c Z_n + U, and puts out scale (e^G Q S_n) + P U. No state is
read or written between passes. All of it is differentiated by autograd, but for the inverse; what grows with N are some
5 log2 N matrices of T x T for each window, kept for the backward.

Hebbian rule: B = 0, D = diag(beta) V.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops.ops.chunk_torch import BatchPass, TorchPass, inverse
from sleep_ops.ops.small import flushed, least_of_map
from sleep_ops.ops.windows import Windows


def is_short(one_pass: object) -> bool:
    """Whether `replay_short` is for this pass: PyTorch's, over sequences of at most 3/4 as many tokens as key dims."""
    return isinstance(one_pass, TorchPass) and all(part.is_short for part in one_pass.parts)


def replay_short(
    one_pass: TorchPass,
    q: Tensor | None,
    state: Tensor | None,
    scale: float,
    passes: int,
    windows: Windows,
    output_pass: str,
) -> tuple[Tensor | None, Tensor]:
    """Outputs [B, T, HV, V] of the first or last of `passes` >= 2 passes over each window, and the final states.

    one_pass: over the windows as sequences, `is_short`; q laid out like them; state [num_seqs, HV, K, V] or None.
    """
    layout, chained = one_pass.sequences, not windows.is_whole
    from_zero = state is None and not chained
    parts = [_Replay(part, passes, from_zero) for part in one_pass.parts]
    final = None
    if chained:
        tokens = max(part.tokens for part in one_pass.parts)
        maps = zip(*(part.whole(tokens) for part in parts), strict=True)
        joined = [x[0] if layout is None else layout.join(x) for x in maps]
        *starts, final = _chain([windows.by_step(x) for x in joined], state, windows)
        state = windows.by_window(starts)
    alone = layout is None
    states = [None] * len(parts) if state is None else [state] if alone else layout.split(state)
    queries = [None] * len(parts) if q is None else [q] if alone else layout.pad(q)
    found = [part.run(x, s, scale, output_pass) for part, x, s in zip(parts, queries, states, strict=True)]
    outputs, states = zip(*found, strict=True)
    if final is None:
        final = states[0] if alone else layout.join(states)
    return None if q is None else outputs[0] if alone else layout.unpad(outputs), final


class _Replay:
    """`passes` passes over a batch of windows of one length. Tensors [B * H, R, T, .], those of keys with R = 1."""

    def __init__(self, part: BatchPass, passes: int, from_zero: bool):
        self.part, self.passes = part, passes
        self.k, beta, self.G_exp, self.decay = part.k[0], part.beta[0], part.G_exp[0], part.decay[0]
        self.to_end = self.decay[..., -1:, :]  # e^(G_T - G_i)
        self.c = self.G_exp[..., -1:, :]
        self.X = self.to_end.mT * self.k
        self.D = beta * part.v[0]
        if part.options.rule == "delta":
            A = inverse(part.L[0], part.A[0])
            self.B, self.D = A * (beta * self.G_exp).mT, A @ self.D
            self.BKX = self.B @ (part.gram[0] * self.to_end)
        else:
            self.B = self.BKX = torch.zeros_like(self.decay)
        self.identity = torch.eye(part.tokens, dtype=beta.dtype, device=beta.device)
        self.F = self.c * self.identity - self.BKX
        self.power, self.sigma, self.gamma = _sums_of_powers(self.F, self.c, passes - 1, self.identity, from_zero)

    def whole(self, tokens: int) -> list[Tensor]:
        """All passes as S -> c S + X^T (D - B K S): c, K, X, B, D [windows, HV, ...], filled up to `tokens`."""
        sigma, gamma = self.identity + self.F @ self.sigma, self.power * self.identity + self.F @ self.gamma
        filler, (batch, heads, groups, *_) = tokens - self.part.tokens, self.part.shape
        maps = self.power * self.c, self.k, self.X, gamma @ self.B, sigma @ self.D
        by_head = [x.expand(-1, groups, -1, -1).reshape(batch, heads * groups, *x.shape[2:]) for x in maps]
        rows, columns = (0, 1, 1, 1, 1), (0, 0, 0, 1, 0)
        return [
            F.pad(x, (0, filler * m, 0, filler * n)) if filler else x
            for x, n, m in zip(by_head, rows, columns, strict=True)
        ]

    def run(
        self, q: Tensor | None, start: Tensor | None, scale: float, output_pass: str
    ) -> tuple[Tensor | None, Tensor]:
        batch, heads, groups, key_dim, value_dim = self.part.shape
        Z = self.sigma @ self.D
        U = first = self.D
        if start is not None:
            start = flushed(start.to(Z.dtype)).reshape(batch * heads, groups, key_dim, value_dim)
            W = self.B @ (self.k @ start)
            Z = Z - self.gamma @ W
            first = self.D - W
            U = torch.addcmul(self.D, self.power, W, value=-1)
        U = U - self.BKX @ Z
        state = self.X.mT @ (self.c * Z + U)
        if start is not None:
            state = state + self.power * self.c * start
        state = flushed(state).reshape(batch, heads * groups, key_dim, value_dim)
        if q is None:
            return None, state

        q = self.part.queries(q)[0]
        scores = q @ self.k.mT
        if output_pass == "first":
            o, power = (self.decay * scores) @ first, 1.0
        else:
            o = (self.decay * scores) @ U + (self.G_exp * self.to_end * scores) @ Z
            power = self.power
        if start is not None:
            o = o + power * self.G_exp * (q @ start)
        return self.part.by_token(scale * o[None]), state


def _sums_of_powers(
    F: Tensor, c: Tensor, n: int, identity: Tensor, from_zero: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """c^n, Sigma_n and Gamma_n, by repeated squaring; no Gamma for states that start from zero.

    Sums over n + m from those over n and m:  Sigma_m + F^m Sigma_n,  c^n Gamma_m + F^m Gamma_n.
    """

    def product(x: Tensor, y: Tensor) -> Tensor:
        return x if y is identity else flushed(x @ y, least_of_map)

    def joined(sums, others, F_m):
        (c_n, sigma_n, gamma_n), (c_m, sigma_m, gamma_m) = sums, others
        gamma = None if from_zero else c_n * gamma_m + product(F_m, gamma_n)
        return flushed(c_n * c_m, least_of_map), sigma_m + product(F_m, sigma_n), gamma

    result = None
    square = (c, identity, None if from_zero else identity)
    while n:
        if n & 1:
            result = square if result is None else joined(result, square, F)
        n >>= 1
        if n:
            square, F = joined(square, square, F), product(F, F)
    return result


def _chain(maps: list[tuple[Tensor, ...]], state: Tensor | None, windows: Windows) -> list[Tensor]:
    """States [num_seqs, HV, K, V] before every window of a sequence and after the last."""
    states = []
    for j, (c, K, X, B, D) in enumerate(zip(*maps, strict=True)):
        if state is None:
            state = torch.zeros_like(X.mT @ D)
        states.append(state)
        after = flushed(c * state.to(D.dtype) + X.mT @ (D - B @ (K @ state.to(D.dtype))))
        present = windows.present
        state = after if present is None else torch.where(present[:, j, None, None, None], after, state)
    return [*states, state]
