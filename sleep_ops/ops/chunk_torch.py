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
input dtype, sums, gates, the inverse and the states are float32; gates that could follow a product are multiplied into
an operand already rounded, so that products add up in place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops.ops.gates import CLOSED
from sleep_ops.ops.packed import PackedSequences
from sleep_ops.ops.rule import RuleOptions
from sleep_ops.ops.small import MAP, flush_, flushed, flushed_exp_
from sleep_ops.reference import l2_normalise, state_dtype
from sleep_ops.validation import check_first_order

MAX_CHUNK = 32  # tokens: the fastest on a CPU for keys of 48 to 128 dims
MAX_SHORT = 96  # tokens that are one chunk where keys have more dims, for short_windows.py
VANISHED = -1e4  # a log decay that leaves nothing, in every dtype


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).float() if dtype in (torch.float16, torch.bfloat16) else x


def _over_keys(x: Tensor) -> Tensor:
    """Summed over the value heads of a key head."""
    return x.sum(2, keepdim=True) if x.shape[2] > 1 else x


class _Decays(torch.autograd.Function):
    """See `_decays`. Of a log decay g_t, the gradient sums over the pairs i >= t > j."""

    @staticmethod
    def forward(ctx, g):
        ones = g.new_ones(g.shape[-2], g.shape[-2])
        g = g.clamp(min=VANISHED)  # -inf times 0 is not 0
        # Not returned as changed in place: torch 2.11 compiles such a result without its gradient.
        decay = flushed_exp_((g * ones.tril(-1)).cumsum_(-2)) * ones.tril()
        G_exp = flushed_exp_(g.cumsum(-2)).view_as(g)
        ctx.save_for_backward(decay, G_exp)
        return decay, G_exp

    @staticmethod
    def backward(ctx, d_decay, dG_exp):
        check_first_order("gated_delta_rule")
        decay, G_exp = ctx.saved_tensors
        ones = decay.new_ones(decay.shape[-2:])
        pairs = (decay * d_decay) @ ones.triu(1)  # [i, t]: over j < t
        return pairs.mul_(ones.tril()).sum(-2)[..., None] + (G_exp * dG_exp).flip(-2).cumsum(-2).flip(-2)


def _decays(g: Tensor) -> tuple[Tensor, Tensor]:
    """e^(G_i - G_j) for i >= j, else 0, [..., C, C], and e^G, [..., C, 1], from the log decays g [..., C, 1].

    G_i - G_j is summed from g_{j+1} to g_i, never a difference of sums: a decay of -1e9 or -inf costs its neighbours no
    digit, here and in the gradient, which are sums over the same pairs.
    """
    return _Decays.apply(g)


class _System(torch.autograd.Function):
    """L = beta * decay * (K K^T), and K K^T."""

    @staticmethod
    def forward(ctx, k, beta, decay, dtype):
        k = _rounded(k, dtype)
        gram = k @ k.mT
        ctx.save_for_backward(k, beta, decay, gram)
        ctx.dtype = dtype
        return gram * decay * beta, gram  # not in place: see _Decays

    @staticmethod
    def backward(ctx, dL, d_gram):
        check_first_order("gated_delta_rule")
        k, beta, decay, gram = ctx.saved_tensors
        d_decay = dL * gram
        dbeta = (d_decay * decay).sum(-1, keepdim=True)
        d_gram = d_gram + _over_keys((dL * beta).mul_(decay))
        dk = _rounded(d_gram + d_gram.mT, ctx.dtype) @ k
        return dk, dbeta, d_decay.mul_(beta), None


class _Inverse(torch.autograd.Function):
    """See `inverse`: dL = -A^T dA A^T."""

    @staticmethod
    def forward(ctx, L, A):
        ctx.save_for_backward(A)
        return A.clone()

    @staticmethod
    def backward(ctx, grad):
        check_first_order("gated_delta_rule")
        (A,) = ctx.saved_tensors
        return -(A.mT @ grad @ A.mT).tril(-1), None


def inverse(L: Tensor, A: Tensor) -> Tensor:
    """The inverse A, already known, of a unit lower triangular L, with its gradient."""
    return _Inverse.apply(L, A)


class _Scan(torch.autograd.Function):
    """The outputs (none without q) and the last state, from what passes share and the state before the first chunk.

    q, k [n, N, 1, C, K] and v [n, N, R, C, V] chunk by chunk, of N = B * H key heads with R value heads each; beta,
    G_exp [n, N, R, C, 1]; decay, L and its inverse A [n, N, R, C, C], no L and A for the Hebbian rule; state
    [N, R, K, V] or None for zero.

    Backward, the last chunk first, with X for beta * Y:

        dU = P^T dO + (e^(G_C - G) * K) dS1     dX = A^T dU     dL = -dX U^T
        dS0 = e^G_C dS1 + scale Q^T (e^G * dO) - K^T (beta e^G * dX)

    and all other gradients over all chunks at once. Those of decays are sums over products of keys or queries with
    their own gradients, which cancel nothing.
    """

    @staticmethod
    def forward(ctx, q, k, v, beta, decay, G_exp, L, A, state, scale, dtype):
        def low(x):
            return _rounded(x, dtype)

        n, N, R, C, V = v.shape
        first = 1 if state is None else 0
        k_read, k_end = (G_exp * k).flatten(1, 2), low(decay[..., -1:, :].mT * k).flatten(1, 2)
        end = G_exp[..., -1:, :].flatten(1, 2)
        starts, final = (v.new_empty(*lead, N * R, k.shape[-1], V) for lead in ((n - first,), ()))
        if state is not None:
            starts[0] = state.flatten(0, 1)
        if A is None:
            errors, updates = None, low(beta * v).flatten(1, 2)
        else:
            values, write, strength = v.flatten(1, 2), low(A).flatten(1, 2), beta.flatten(1, 2)
            errors, updates = v.new_empty(values.shape), v.new_empty(values.shape)
        for i in range(n):
            start = starts[i - first] if i >= first else None
            if A is not None:
                if start is None:
                    errors[i] = values[i]
                else:
                    torch.baddbmm(values[i], k_read[i], low(start), alpha=-1, out=errors[i])
                torch.bmm(write[i], low(strength[i] * errors[i]), out=updates[i])
                if dtype != updates.dtype:
                    updates[i] = low(updates[i])
            after = starts[i + 1 - first] if i + 1 < n else final
            if start is None:
                torch.bmm(k_end[i].mT, updates[i], out=after)
            else:
                torch.mul(end[i], start, out=after).baddbmm_(k_end[i].mT, updates[i])
            flush_(after)

        state = final.unflatten(0, (N, R))
        starts = starts if len(starts) else None
        ctx.scale, ctx.dtype, ctx.shape = scale, dtype, v.shape
        kept = [q, k, v if A is None else errors, beta, decay, G_exp, A, starts, updates, k_end]
        if q is None:
            ctx.save_for_backward(*kept, None)
            return state
        scores = q @ k.mT
        o = low(decay * scores).mul_(scale).flatten(1, 2) @ updates
        if starts is not None:
            o[first:].flatten(0, 1).baddbmm_((scale * G_exp * q)[first:].flatten(0, 2), low(starts).flatten(0, 1))
        ctx.save_for_backward(*kept, scores)
        return o.view(v.shape), state

    @staticmethod
    def backward(ctx, *grads):
        check_first_order("gated_delta_rule")
        q, k, y, beta, decay, G_exp, A, starts, updates, k_end, scores = ctx.saved_tensors
        scale = ctx.scale

        def low(x):
            return _rounded(x, ctx.dtype)

        n, N, R, C, V = ctx.shape
        heads = (N, R)
        first = n - (0 if starts is None else len(starts))
        if q is not None:
            do = low(grads[0]).contiguous().flatten(1, 2)
            scaled = scale * G_exp
            weights, q_read = low(decay * scores).mul_(scale).flatten(1, 2), (scaled * q).flatten(1, 2)

        end, strength, G_each = G_exp[..., -1:, :].flatten(1, 2), beta.flatten(1, 2), G_exp.flatten(1, 2)
        k_each = k.expand(n, N, R, C, k.shape[-1]).flatten(1, 2)
        after, d_start = updates.new_empty(n, N * R, k.shape[-1], V), None
        after[-1] = grads[-1].flatten(0, 1)
        shape = updates.shape
        d_update, d_read, dv = (updates.new_empty(s) for s in (shape[1:], shape, shape))
        inverse = None if A is None else low(A).mT.flatten(1, 2)
        for i in reversed(range(n)):
            dS = after[i]
            torch.bmm(k_end[i], low(dS), out=d_update)
            if q is not None:
                d_update.baddbmm_(weights[i].mT, do[i])
            if A is None:
                d_read[i] = d_update
            else:
                torch.bmm(inverse[i], low(d_update), out=d_read[i])
            torch.mul(strength[i], d_read[i], out=dv[i])
            if i < first:
                continue
            if i:
                before = after[i - 1]
            else:
                before = d_start = dS.new_empty(dS.shape)
            torch.mul(end[i], dS, out=before)
            if q is not None:
                before.baddbmm_(q_read[i].mT, do[i])
            if A is not None:
                before.baddbmm_(k_each[i].mT, low(G_each[i] * dv[i]), alpha=-1)
            flush_(before)

        def by_key(x):
            return x.unflatten(1, heads)

        dG_exp, d_decay, dq = torch.zeros_like(G_exp), torch.zeros_like(decay), None
        starts_low = None if starts is None else low(starts).mT
        dk_end = by_key(updates @ low(after).mT)
        d_decay[..., -1, :] = (k * dk_end).sum(-1)
        dk = _over_keys(dk_end.mul_(decay[..., -1:, :].mT))
        if q is not None:
            d_weights = by_key(do @ updates.mT).mul_(scale)
            d_decay.addcmul_(d_weights, scores)
            d_scores = low(_over_keys(d_weights.mul_(decay)))
            dq, dk = d_scores @ k, dk.add_(d_scores.mT @ q)
            if starts is not None:
                read = by_key(do[first:] @ starts_low)
                dG_exp[first:] = (q[first:] * read).sum(-1, keepdim=True).mul_(scale)
                dq[first:] += _over_keys(read.mul_(scaled[first:]))
        if starts is not None:
            moved = starts.flatten(2)[..., None, :] @ after[first:].flatten(2)[..., None]
            dG_exp[first:, ..., -1:, :] += by_key(moved)
        dL = None
        dbeta = (y * d_read if A is not None else y * by_key(d_read)).sum(-1, keepdim=True).view(beta.shape)
        if A is not None:
            d_read = low(d_read)
            dL = by_key(d_read @ updates.mT).mul_(-torch.ones_like(decay[0, 0, 0]).tril(-1))
            if starts is not None:
                read = by_key(d_read[first:] @ starts_low)
                read.mul_(beta[first:])
                dG_exp[first:] -= (k[first:] * read).sum(-1, keepdim=True)
                dk[first:] -= _over_keys(read.mul_(G_exp[first:]))
        d_start = None if d_start is None else d_start.unflatten(0, heads)
        return dq, dk, by_key(dv), dbeta, d_decay, dG_exp, dL, None, d_start, None, None


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
            self.parts = [BatchPass(k, v, g, beta, options)]
            return
        closed = [CLOSED if raw else 0.0 for raw in (options.A_log is not None, options.use_beta_sigmoid)]
        batches = [self.sequences.pad(x, c) for x, c in zip((k, v, g, beta), (0.0, 0.0, *closed), strict=True)]
        self.parts = [BatchPass(k, v, g, beta, options) for k, v, g, beta in zip(*batches, strict=True)]

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


class BatchPass:
    """`TorchPass` over sequences of one length; its tensors are those of `_Scan`."""

    def __init__(self, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, options: RuleOptions):
        acc = state_dtype(k, v)
        self.acc, self.dtype, self.out_dtype, self.options = acc, k.dtype, v.dtype, options
        g, beta = options.activate(g, beta, acc)
        batch, tokens, heads, key_dim = k.shape
        value_heads, value_dim = v.shape[2:]
        self.is_short = tokens <= MAX_SHORT and 4 * tokens <= 3 * key_dim
        self.num_chunks = 1 if self.is_short else -(-tokens // MAX_CHUNK)
        self.chunk = -(-tokens // self.num_chunks)  # equal chunks: the least padding
        self.tokens, self.shape = tokens, (batch, heads, value_heads // heads, key_dim, value_dim)
        self.k = self._chunks(self._key(k))
        self.v, self.beta, g = (self._chunks(x) for x in (v, beta[..., None], g[..., None]))
        self.decay, self.G_exp = _decays(g)
        self.L = self.A = None
        if options.rule == "delta":
            # the solves read L strictly below the diagonal, as unit triangular
            self.L, self.gram = _System.apply(self.k, self.beta, self.decay, self.dtype)
            identity = torch.eye(self.chunk, dtype=acc, device=k.device).expand_as(self.L)
            self.A = torch.linalg.solve_triangular(self.L.detach(), identity, upper=False, unitriangular=True)

    def run(self, q: Tensor | None, state: Tensor | None, scale: float) -> tuple[Tensor | None, Tensor]:
        batch, heads, groups, key_dim, value_dim = self.shape
        if state is not None:
            state = state.to(self.acc).reshape(batch * heads, groups, key_dim, value_dim)
        if q is not None:
            q = self.queries(q)
        found = self._scan(q, self.v, state, scale)
        o, state = (None, found) if q is None else found
        state = state.reshape(batch, heads * groups, key_dim, value_dim)
        return None if o is None else self.by_token(o), state

    def transition(self) -> tuple[Tensor, Tensor]:
        batch, heads, groups, key_dim, value_dim = self.shape
        widened = torch.cat([self.v.new_zeros(*self.v.shape[:-1], key_dim), self.v], -1)
        start = torch.eye(key_dim, key_dim + value_dim, dtype=self.acc, device=self.v.device)
        state = self._scan(None, widened, start.expand(batch * heads, groups, -1, -1), 1.0)
        state = state.reshape(batch, heads * groups, key_dim, key_dim + value_dim)
        return flushed(state[..., :key_dim], MAP), state[..., key_dim:]

    def _scan(self, q: Tensor | None, v: Tensor, state: Tensor | None, scale: float):
        return _Scan.apply(q, self.k, v, self.beta, self.decay, self.G_exp, self.L, self.A, state, scale, self.dtype)

    def queries(self, q: Tensor) -> Tensor:
        """[B, T, H, K] -> [num_chunks, B * H, 1, chunk, K]."""
        return self._chunks(self._key(q))

    def by_token(self, o: Tensor) -> Tensor:
        """Outputs [num_chunks, B * H, R, chunk, V] -> [B, T, H * R, V]."""
        batch, heads, groups, _, value_dim = self.shape
        o = o.unflatten(1, (batch, heads)).permute(1, 0, 4, 2, 3, 5)
        o = o.to(self.out_dtype, memory_format=torch.contiguous_format)
        return o.reshape(batch, self.num_chunks * self.chunk, heads * groups, value_dim)[:, : self.tokens]

    def _key(self, x: Tensor) -> Tensor:
        """q or k, normalised where asked, and then as rounded as the inputs."""
        return l2_normalise(x.to(self.acc)).to(self.dtype) if self.options.use_qk_l2norm else x

    def _chunks(self, x: Tensor) -> Tensor:
        """[B, T, heads * R, ...] -> [num_chunks, B * heads, R, chunk, ...], padded with beta = g = 0."""
        pad = self.num_chunks * self.chunk - self.tokens
        if pad:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad))
        batch, heads = self.shape[:2]
        x = x.unflatten(2, (heads, -1)).unflatten(1, (self.num_chunks, self.chunk)).permute(1, 0, 3, 4, 2, 5)
        return x.to(self.acc, memory_format=torch.contiguous_format).flatten(1, 2)
