"""The chunked gated delta rule in PyTorch: what runs on CPU tensors, and the yardstick of the Triton kernels.

Per chunk of C tokens, with G the cumulative log decay inside it, S0 the state before it and S1 after it:

    M_ij = e^(G_i - G_j) k_i . k_j  (i > j)     L = I + diag(beta) M     A = L^-1
    Y = V - e^G * (K S0)                        U = A (beta * Y)         (Hebbian rule: U = beta * V)
    O = scale e^G * (Q S0) + P U                P_ij = scale e^(G_i - G_j) q_i . k_j  (i >= j)
    S1 = e^G_C S0 + (e^(G_C - G) * K)^T U

after Yang et al., "Parallelizing Linear Transformers with the Delta Rule", arXiv 2406.06484, and Yang, Kautz,
Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464. Only Y, U and S1 are computed chunk by chunk; the rest is batched
over chunks.

float16 and bfloat16 inputs are computed as the kernels compute them: operands of matrix products are rounded to the
input dtype, sums, gates, the inverse and the states are float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops.ops.gates import CLOSED
from sleep_ops.ops.packed import PackedSequences
from sleep_ops.ops.rule import RuleOptions
from sleep_ops.ops.small import MAP, flushed, flushed_exp
from sleep_ops.reference import l2_normalise, state_dtype
from sleep_ops.validation import check_first_order

MAX_CHUNK = 64


class _RoundedMatmul(torch.autograd.Function):
    """x @ y with operands rounded to `dtype` and float32 sums, in the backward too."""

    @staticmethod
    def forward(ctx, x, y, dtype):
        x, y = x.to(dtype), y.to(dtype)
        ctx.save_for_backward(x, y)
        return x.float() @ y.float()

    @staticmethod
    def backward(ctx, grad):
        check_first_order("gated_delta_rule")
        x, y = ctx.saved_tensors
        grad = grad.to(x.dtype).float()
        return (grad @ y.float().mT).sum_to_size(x.shape), (x.float().mT @ grad).sum_to_size(y.shape), None


class _UnitLowerSolve(torch.autograd.Function):
    """L^-1 x for a unit lower triangular L, given its inverse A: dx = A^T du, dL = -dx u^T."""

    @staticmethod
    def forward(ctx, L, A, x, dtype):
        u = _product(A, x, dtype)
        ctx.save_for_backward(A, u)
        ctx.dtype = dtype
        return u

    @staticmethod
    def backward(ctx, grad):
        check_first_order("gated_delta_rule")
        A, u = ctx.saved_tensors
        dx = _product(A.mT, grad, ctx.dtype)
        return -_product(dx, u.mT, ctx.dtype).tril(-1), None, dx, None


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype in (torch.float16, torch.bfloat16):
        x, y = x.to(dtype).float(), y.to(dtype).float()
    return x @ y


def _matmul(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return _RoundedMatmul.apply(x, y, dtype) if dtype in (torch.float16, torch.bfloat16) else x @ y


def _split(x: Tensor) -> tuple[Tensor, ...]:
    """The chunks of a [B, heads, R, num_chunks, ...] tensor; a single one as a view whose gradient needs no copy."""
    return x.unbind(3) if x.shape[3] > 1 else (x.squeeze(3),)


def _join(chunks: list[Tensor]) -> Tensor:
    return torch.stack(chunks, 3) if len(chunks) > 1 else chunks[0].unsqueeze(3)


def _decays(g: Tensor) -> tuple[Tensor, Tensor]:
    """e^(G_i - G_j) for i >= j, else 0, [..., C, C], and e^G, [..., C, 1], from the log decays g [..., C, 1].

    G_i - G_j is summed from g_{j+1} to g_i, never a difference of sums: a decay of -1e9 or -inf costs its neighbours no
    digit, here and in the gradient, which are sums over the same pairs.
    """
    above = torch.ones(g.shape[-2], g.shape[-2], dtype=torch.bool, device=g.device).triu()
    between = g.expand(*g.shape[:-1], g.shape[-2]).masked_fill(above, 0).cumsum(-2)
    return flushed_exp(between).tril(), flushed_exp(g.cumsum(-2))


class TorchPass:
    """Passes over the same k [B, T, H, K], v [B, T, HV, V], g, beta [B, T, HV] from any state, by PyTorch operations.

    Options and shapes are those of `gated_delta_rule`, which validates them. Packed sequences are run as batches of
    alike lengths; `longest`, a bound on their tokens, spares a GPU that (see `PackedSequences`). States are float32, or
    float64 for float64 inputs. Differentiable by autograd; what passes share is computed once.
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
    ):
        self.sequences = None if cu_seqlens is None else PackedSequences(cu_seqlens, v.shape[1], longest)
        if self.sequences is None:
            self.parts = [_BatchPass(k, v, g, beta, options)]
            return
        closed = [CLOSED if raw else 0.0 for raw in (options.A_log is not None, options.use_beta_sigmoid)]
        batches = [self.sequences.pad(x, c) for x, c in zip((k, v, g, beta), (0.0, 0.0, *closed), strict=True)]
        self.parts = [_BatchPass(k, v, g, beta, options) for k, v, g, beta in zip(*batches, strict=True)]

    def run(self, q: Tensor | None, state: Tensor | None, scale: float) -> tuple[Tensor | None, Tensor]:
        """Output [B, T, HV, V] in v's dtype (None without q) and final state [N, HV, K, V]."""
        if self.sequences is None:
            return self.parts[0].run(q, state, scale)
        none = [None] * len(self.parts)
        queries = none if q is None else self.sequences.pad(q)
        states = none if state is None else self.sequences.split(state)
        outputs, states = zip(
            *(part.run(q, s, scale) for part, q, s in zip(self.parts, queries, states, strict=True)), strict=True
        )
        return None if q is None else self.sequences.unpad(outputs), self.sequences.join(states)

    def transition(self) -> tuple[Tensor, Tensor]:
        """The pass as S -> P S + R: P [N, HV, K, K] and R [N, HV, K, V]."""
        if self.sequences is None:
            return self.parts[0].transition()
        P, R = zip(*(part.transition() for part in self.parts), strict=True)
        return self.sequences.join(P), self.sequences.join(R)


class _BatchPass:
    """`TorchPass` over sequences of one length."""

    def __init__(self, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, options: RuleOptions):
        acc = state_dtype(k, v)
        self.dtype, self.out_dtype, self.options = k.dtype, v.dtype, options
        g, beta = options.activate(g, beta, acc)
        k, v = self._key(k, acc), v.to(acc)
        batch, tokens, heads, key_dim = k.shape
        value_heads, value_dim = v.shape[2:]
        self.num_chunks = -(-tokens // MAX_CHUNK)
        self.chunk = -(-tokens // self.num_chunks)  # equal chunks: the least padding
        self.tokens, self.shape = tokens, (batch, heads, value_heads // heads, key_dim, value_dim)
        k, v, g, beta = (self._chunks(x) for x in (k, v, g[..., None], beta[..., None]))
        self.k, self.v, self.beta = k, v, beta
        self.decay, self.G_exp = _decays(g)
        to_end = self.decay[..., -1:, :].mT  # e^(G_C - G_i)
        self.by_chunk = [_split(x) for x in (k, beta, (to_end * k).mT, self.G_exp, self.G_exp[..., -1:, :])]
        if options.rule == "delta":
            # the solves read L strictly below the diagonal, as unit triangular
            L = beta * self.decay * _matmul(k, k.mT, self.dtype)
            identity = torch.eye(self.chunk, dtype=L.dtype, device=L.device).expand_as(L)
            A = torch.linalg.solve_triangular(L.detach(), identity, upper=False, unitriangular=True)
            self.L, self.A = _split(L), _split(A)

    def run(self, q: Tensor | None, state: Tensor | None, scale: float) -> tuple[Tensor | None, Tensor]:
        batch, heads, groups, key_dim, value_dim = self.shape
        if state is not None:
            state = state.to(self.v.dtype).reshape(self.shape)
        starts, updates, state = self._sweep(self.v, state)
        state = state.reshape(batch, heads * groups, key_dim, value_dim)
        if q is None:
            return None, state

        q = self._chunks(self._key(q, self.v.dtype))
        o = _matmul(scale * self.decay * _matmul(q, self.k.mT, self.dtype), _join(updates), self.dtype)
        known = [s for s in starts if s is not None]
        if known:
            first = self.num_chunks - len(known)
            read = _matmul(q[:, :, :, first:], _join(known), self.dtype)
            inter = scale * self.G_exp[:, :, :, first:] * read
            o = o + inter if first == 0 else torch.cat([o[:, :, :, :1], o[:, :, :, 1:] + inter], 3)
        o = o.permute(0, 3, 4, 1, 2, 5).reshape(batch, self.num_chunks * self.chunk, heads * groups, value_dim)
        return o[:, : self.tokens].to(self.out_dtype), state

    def transition(self) -> tuple[Tensor, Tensor]:
        batch, heads, groups, key_dim, value_dim = self.shape
        widened = torch.cat([self.v.new_zeros(*self.v.shape[:-1], key_dim), self.v], -1)
        start = torch.eye(key_dim, key_dim + value_dim, dtype=self.v.dtype, device=self.v.device)
        _, _, state = self._sweep(widened, start.expand(batch, heads, groups, -1, -1))
        state = state.reshape(batch, heads * groups, key_dim, key_dim + value_dim)
        return flushed(state[..., :key_dim], MAP), state[..., key_dim:]

    def _sweep(self, v: Tensor, state: Tensor | None) -> tuple[list, list, Tensor]:
        """The states before each chunk (None for zero) and its updates U, from values [B, h, R, n, C, .]; the last."""
        starts, updates = [], []
        v_n, writes_n = _split(v), _split(self.beta * v)
        for n, (k, beta, k_end, G_exp, end) in enumerate(zip(*self.by_chunk, strict=True)):
            starts.append(state)
            u = writes_n[n]
            if self.options.rule == "delta":
                if state is not None:
                    u = beta * (v_n[n] - G_exp * _matmul(k, state, self.dtype))
                u = _UnitLowerSolve.apply(self.L[n], self.A[n], u, self.dtype)
            updates.append(u)
            write = _matmul(k_end, u, self.dtype)
            state = flushed(write if state is None else end * state + write)
        return starts, updates, state

    def _key(self, x: Tensor, acc: torch.dtype) -> Tensor:
        """q or k in the dtype of sums, normalised where asked, and then as rounded as the inputs."""
        x = x.to(acc)
        return l2_normalise(x).to(self.dtype).to(acc) if self.options.use_qk_l2norm else x

    def _chunks(self, x: Tensor) -> Tensor:
        """[B, T, heads * R, ...] -> [B, heads, R, num_chunks, chunk, ...], padded with beta = g = 0."""
        pad = self.num_chunks * self.chunk - self.tokens
        if pad:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad))
        batch, heads = self.shape[:2]
        x = x.reshape(batch, self.num_chunks, self.chunk, heads, x.shape[2] // heads, *x.shape[3:])
        return x.permute(0, 3, 4, 1, 2, *range(5, x.ndim))
