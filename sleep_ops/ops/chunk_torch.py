"""The chunked gated delta rule in PyTorch: what runs on CPU tensors.

Per chunk of C tokens, with G the cumulative log decay inside it, S0 the state before it and S1 after it:

    M_ij = e^(G_i - G_j) k_i . k_j  (i > j)     L = I + diag(beta) M     A = L^-1
    U = A (beta * V) - W S0                     W = A (beta e^G * K)     (Hebbian rule: U = beta * V)
    O = scale (e^G * (Q S0) + P U)              P_ij = e^(G_i - G_j) q_i . k_j  (i >= j)
    S1 = e^G_C S0 + (e^(G_C - G) * K)^T U

after Yang et al., "Parallelizing Linear Transformers with the Delta Rule", arXiv 2406.06484, and Yang, Kautz,
Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464. Only W S0 and S1 are computed chunk by chunk; the rest is batched
over chunks. float16 and bfloat16 inputs are computed in float32, and only results are rounded.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops.ops.gates import CLOSED
from sleep_ops.ops.packed import PackedSequences
from sleep_ops.ops.precision import backward_in_full_precision
from sleep_ops.ops.rule import RuleOptions
from sleep_ops.ops.small import flush_, flushed, flushed_exp2_, least_of_map
from sleep_ops.reference import l2_normalise, state_dtype
from sleep_ops.validation import check_first_order

MAX_CHUNK = 32  # tokens: the fastest on a CPU for keys of 48 to 128 dims
MAX_SHORT = 96  # tokens that are one chunk where keys have more dims, for short_windows.py
TILE = 16  # rows and columns of a matrix that is inverted at once
FEW = 16  # matrices that are not worth inverting by blocks
VANISHED = -1e4  # a log decay that leaves nothing, in every dtype
LOG2_E = math.log2(math.e)


def _over_keys(x: Tensor) -> Tensor:
    """Summed over the value heads of a key head."""
    return x.sum(2, keepdim=True) if x.shape[2] > 1 else x


class _Decays(torch.autograd.Function):
    """See `_decays`. Of a log decay g_t, the gradient sums over the pairs i >= t > j."""

    @staticmethod
    def forward(ctx, g):
        ones = g.new_ones(g.shape[-2], g.shape[-2])
        # -inf times 0 is not 0; PyTorch's exp2 takes a third of its exp's time
        g = g.clamp(min=VANISHED) * LOG2_E
        # Not returned as changed in place: torch 2.11 compiles such a result without its gradient.
        decay = flushed_exp2_((g * ones.tril(-1)).cumsum_(-2)) * ones.tril()
        G_exp = flushed_exp2_(g.cumsum(-2)).view_as(g)
        ctx.save_for_backward(decay, G_exp)
        return decay, G_exp

    @staticmethod
    @backward_in_full_precision
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
    def forward(ctx, k, beta, decay):
        gram = k @ k.mT
        ctx.save_for_backward(k, beta, decay, gram)
        return gram * decay * beta, gram  # not in place: see _Decays

    @staticmethod
    @backward_in_full_precision
    def backward(ctx, dL, d_gram):
        check_first_order("gated_delta_rule")
        k, beta, decay, gram = ctx.saved_tensors
        d_decay = dL * gram
        dbeta = (d_decay * decay).sum(-1, keepdim=True)
        d_gram = d_gram + _over_keys((dL * beta).mul_(decay))
        dk = (d_gram + d_gram.mT) @ k
        return dk, dbeta, d_decay.mul_(beta)


def unit_inverse(L: Tensor) -> Tensor:
    """The inverses of unit lower triangular matrices [n, C, C]; only what is below their diagonals is read.

    By blocks, of which products do most: MKL solves TILE rows in a fifth of the time of twice as many.
    """
    size = L.shape[-1]
    if size <= TILE or L.shape[0] < FEW:
        identity = torch.eye(size, dtype=L.dtype, device=L.device).expand_as(L)
        # From the right few rows are solved faster, and many far slower. No symbol, as sizes are under torch.compile.
        left = True if size > TILE else False
        return torch.linalg.solve_triangular(L.contiguous(), identity, upper=False, left=left, unitriangular=True)
    cut = max(size // (2 * TILE), 1) * TILE
    first, last = unit_inverse(L[:, :cut, :cut]), unit_inverse(L[:, cut:, cut:])
    A = L.new_zeros(L.shape)
    A[:, :cut, :cut], A[:, cut:, cut:] = first, last
    A[:, cut:, :cut] = -(last @ L[:, cut:, :cut] @ first)
    return A


class _Inverse(torch.autograd.Function):
    """See `inverse`: dL = -A^T dA A^T."""

    @staticmethod
    def forward(ctx, L, A):
        ctx.save_for_backward(A)
        return A.clone()

    @staticmethod
    @backward_in_full_precision
    def backward(ctx, grad):
        check_first_order("gated_delta_rule")
        (A,) = ctx.saved_tensors
        return -(A.mT @ grad @ A.mT).tril(-1), None


def inverse(L: Tensor, A: Tensor) -> Tensor:
    """The inverse A, already known, of a unit lower triangular L, with its gradient."""
    return _Inverse.apply(L, A)


class _Scan(torch.autograd.Function):
    """The outputs before `scale` (none without q) and the last state, from what passes share and the state before.

    q, k [n, N, 1, C, K] and v [n, N, R, C, V] chunk by chunk, of N = B * H key heads with R value heads each; beta,
    G_exp [n, N, R, C, 1]; decay, L and its inverse A [n, N, R, C, C], no L and A for the Hebbian rule; state
    [N, R, K, V] or None for zero.

    Backward, the last chunk first, and then all other gradients over all chunks at once:

        dU = P^T dO + (e^(G_C - G) * K) dS1     dS0 = e^G_C dS1 + Q^T (e^G * dO) - W^T dU
        dX = A^T dU     dL = -dX U^T            of X = beta * (V - e^G * K S0), of which U = A X

    Those of decays are sums over products of keys or queries with their own gradients, which cancel nothing.
    """

    @staticmethod
    def forward(ctx, q, k, v, beta, decay, G_exp, L, A, state):
        n, N, R, C, V = v.shape
        K = k.shape[-1]
        first = 1 if state is None else 0
        k_end, end = (decay[..., -1:, :].mT * k).flatten(1, 2), G_exp[..., -1:, :].flatten(1, 2)
        reads = None
        if A is None:
            updates = (beta * v).flatten(1, 2)
        else:
            written = A * beta.mT
            updates = written.flatten(1, 2) @ v.flatten(1, 2)
            if n > first:
                reads = ((written * G_exp.mT).flatten(2, 3) @ k[:, :, 0]).view(n, N * R, C, K)
        starts, final = (v.new_empty(*lead, N * R, K, V) for lead in ((n - first,), ()))
        if state is not None:
            starts[0] = state.flatten(0, 1)
        before = [None] * first + list(starts)
        for i, (start, after) in enumerate(zip(before, [*before[1:], final], strict=True)):
            update = updates[i]
            if start is None:
                torch.bmm(k_end[i].mT, update, out=after)
            else:
                if reads is not None:
                    update.baddbmm_(reads[i], start, alpha=-1)
                torch.mul(end[i], start, out=after).baddbmm_(k_end[i].mT, update)
            flush_(after)

        state = final.unflatten(0, (N, R))
        starts = starts if len(starts) else None
        ctx.shape = v.shape
        kept = [q, k, v, beta, decay, G_exp, A, starts, updates, k_end, reads]
        if q is None:
            ctx.save_for_backward(*kept, None)
            return state
        scores = q @ k.mT
        o = (decay * scores).flatten(1, 2) @ updates
        if starts is not None:
            o[first:].flatten(0, 1).baddbmm_((G_exp * q)[first:].flatten(0, 2), starts.flatten(0, 1))
        ctx.save_for_backward(*kept, scores)
        return o.view(v.shape), state

    @staticmethod
    @backward_in_full_precision
    def backward(ctx, *grads):
        check_first_order("gated_delta_rule")
        q, k, v, beta, decay, G_exp, A, starts, updates, k_end, reads, scores = ctx.saved_tensors
        n, N, R, C, V = ctx.shape
        first = n - (0 if starts is None else len(starts))
        d_updates = updates.new_empty(updates.shape)
        if q is not None:
            do = grads[0].contiguous().flatten(1, 2)
            q_read = (G_exp * q).flatten(1, 2)
            torch.matmul((decay * scores).flatten(1, 2).mT, do, out=d_updates)

        end = G_exp[..., -1:, :].flatten(1, 2)
        d_states = updates.new_empty(n + 1 - first, N * R, k.shape[-1], V)
        d_states[-1] = grads[-1].flatten(0, 1)
        around = [None] * first + list(d_states)  # of the states before and after each chunk
        for i in reversed(range(n)):
            d_update, dS = d_updates[i], around[i + 1]
            if q is None:
                torch.bmm(k_end[i], dS, out=d_update)
            else:
                d_update.baddbmm_(k_end[i], dS)
            if i < first:
                continue
            before = torch.mul(end[i], dS, out=around[i])
            if q is not None:
                before.baddbmm_(q_read[i].mT, do[i])
            if A is not None:
                before.baddbmm_(reads[i].mT, d_update, alpha=-1)
            flush_(before)

        def by_key(x):
            return x.unflatten(1, (N, R))

        dG_exp, d_decay, dq = torch.zeros_like(G_exp), torch.zeros_like(decay), None
        after = d_states[1 - first :]
        dk_end = by_key(updates @ after.mT)
        d_decay[..., -1, :] = (k * dk_end).sum(-1)
        dk = _over_keys(dk_end.mul_(decay[..., -1:, :].mT))
        if q is not None:
            d_weights = by_key(do @ updates.mT)
            d_decay.addcmul_(d_weights, scores)
            d_scores = _over_keys(d_weights.mul_(decay))
            dq, dk = d_scores @ k, dk.add_(d_scores.mT @ q)
            if starts is not None:
                read = by_key(do[first:] @ starts.mT)
                dG_exp[first:] = (q[first:] * read).sum(-1, keepdim=True)
                dq[first:] += _over_keys(read.mul_(G_exp[first:]))
        if starts is not None:
            moved = starts.flatten(2)[..., None, :] @ after[first:].flatten(2)[..., None]
            dG_exp[first:, ..., -1:, :] += by_key(moved)
        dX, dL = by_key(d_updates), None
        if A is not None:
            dX = A.mT @ dX
            dL = (dX @ by_key(updates).mT).mul_(-torch.ones_like(decay[0, 0, 0]).tril(-1))
        dbeta = (v * dX).sum(-1, keepdim=True)
        if A is not None and starts is not None:
            read = dX[first:] @ by_key(starts).mT
            d_read = (k[first:] * read).sum(-1, keepdim=True)
            dbeta[first:] -= G_exp[first:] * d_read
            dG_exp[first:] -= beta[first:] * d_read
            dk[first:] -= _over_keys(read.mul_((beta * G_exp)[first:]))
        d_start = None if first else d_states[0].unflatten(0, (N, R))
        return dq, dk, dX.mul_(beta), dbeta, d_decay, dG_exp, dL, None, d_start


class BatchPass:
    """`TorchPass` over sequences of one length; its tensors are those of `_Scan`."""

    def __init__(self, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, options: RuleOptions):
        acc = state_dtype(k, v)
        self.acc, self.out_dtype, self.options = acc, v.dtype, options
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
            self.L, self.gram = _System.apply(self.k, self.beta, self.decay)
            self.A = unit_inverse(self.L.detach().flatten(0, 2)).view_as(self.L)

    def run(self, q: Tensor | None, state: Tensor | None, scale: float) -> tuple[Tensor | None, Tensor]:
        batch, heads, groups, key_dim, value_dim = self.shape
        if state is not None:
            state = state.to(self.acc).reshape(batch * heads, groups, key_dim, value_dim)
        if q is not None:
            q = self.queries(q)
        found = self._scan(q, self.v, state)
        o, state = (None, found) if q is None else found
        state = state.reshape(batch, heads * groups, key_dim, value_dim)
        return None if o is None else self.by_token(scale * o), state

    def transition(self) -> tuple[Tensor, Tensor]:
        batch, heads, groups, key_dim, value_dim = self.shape
        widened = torch.cat([self.v.new_zeros(*self.v.shape[:-1], key_dim), self.v], -1)
        start = torch.eye(key_dim, key_dim + value_dim, dtype=self.acc, device=self.v.device)
        state = self._scan(None, widened, start.expand(batch * heads, groups, -1, -1))
        state = state.reshape(batch, heads * groups, key_dim, key_dim + value_dim)
        return flushed(state[..., :key_dim], least_of_map), state[..., key_dim:]

    def _scan(self, q: Tensor | None, v: Tensor, state: Tensor | None):
        return _Scan.apply(q, self.k, v, self.beta, self.decay, self.G_exp, self.L, self.A, state)

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
        """q or k, normalised where asked."""
        return l2_normalise(x.to(self.acc)) if self.options.use_qk_l2norm else x

    def _chunks(self, x: Tensor) -> Tensor:
        """[B, T, heads * R, ...] -> [num_chunks, B * heads, R, chunk, ...], padded with beta = g = 0."""
        pad = self.num_chunks * self.chunk - self.tokens
        if pad:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad))
        batch, heads = self.shape[:2]
        x = x.unflatten(2, (heads, -1)).unflatten(1, (self.num_chunks, self.chunk)).permute(1, 0, 3, 4, 2, 5)
        x = x.to(self.acc, memory_format=torch.contiguous_format)  # which copies nothing where the dtype is that one
        return x.contiguous().flatten(1, 2)


class TorchPass:
    """Passes over the same k [B, T, H, K], v [B, T, HV, V], g, beta [B, T, HV] from any state, by PyTorch operations.

    Options and shapes are those of `gated_delta_rule`, which validates them. Packed sequences are run as batches of
    alike lengths; `longest`, a bound on their tokens, spares a GPU that (see `PackedSequences`). States are float32, or
    float64 for float64 inputs. Differentiable by autograd; what passes share is computed once.
    """

    batch_pass = BatchPass

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
            self.parts = [self.batch_pass(k, v, g, beta, options)]
            return
        closed = [CLOSED if raw else 0.0 for raw in (options.A_log is not None, options.use_beta_sigmoid)]
        batches = [self.sequences.pad(x, c) for x, c in zip((k, v, g, beta), (0.0, 0.0, *closed), strict=True)]
        self.parts = [self.batch_pass(k, v, g, beta, options) for k, v, g, beta in zip(*batches, strict=True)]

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
