"""What the kernels share: where a chunk lies, tiles with masked edges, gates and decays, and row normalisation.

Tokens are flattened to rows: a [B, T, ...] tensor is B sequences of T rows each, and a packed one (B = 1 with
`cu_seqlens`) is num_seqs sequences of different lengths. Cumulative log decays are kept in base 2, so that kernels
use exp2 directly.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
L2_NORM_EPS = tl.constexpr(1e-6)


@triton.jit
def sequence_bounds(i_n, packing, T):
    """First token row (int64) and length (int32) of sequence i_n."""
    if packing.cu_seqlens is None:
        start = i_n.to(tl.int64) * T
        length = T
    else:
        start = tl.load(packing.cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(packing.cu_seqlens + i_n + 1).to(tl.int64) - start).to(tl.int32)
    return start, length


@triton.jit
def first_chunk(i_n, packing, T, C: tl.constexpr):
    """Number of chunks (int64) before sequence i_n."""
    if packing.chunk_offsets is None:
        first = i_n.to(tl.int64) * tl.cdiv(T, C)
    else:
        first = tl.load(packing.chunk_offsets + i_n).to(tl.int64)
    return first


@triton.jit
def locate_chunk(i_c, packing, T, num_seqs, C: tl.constexpr):
    """First token row of chunk i_c (int64) and its number of tokens; none (<= 0) for a chunk past the last one.

    The sequence is the last one with chunk_offsets[n] <= i_c, found by bisection, so empty sequences are skipped.
    """
    if packing.cu_seqlens is None:
        num_chunks = tl.cdiv(T, C)
        i_n = i_c // num_chunks
        i_t = i_c % num_chunks
        start, length = sequence_bounds(i_n, packing, T)
    else:
        low = i_c * 0
        high = low + num_seqs
        while high - low > 1:
            middle = (low + high) // 2
            past = tl.load(packing.chunk_offsets + middle) > i_c
            low = tl.where(past, low, middle)
            high = tl.where(past, middle, high)
        i_t = i_c - tl.load(packing.chunk_offsets + low).to(tl.int32)
        start, length = sequence_bounds(low, packing, T)
    return start + i_t * C, tl.minimum(length - i_t * C, C)


@triton.jit
def state_columns(i_v, dims: tl.constexpr):
    """Tile i_v of a state's columns: their numbers, how many there are, where they start, and whether they hold values.

    A widened state [K, K + V] is [P | R]: tiles of the K columns of P, which no value is written to, then those of R.
    """
    o_v = tl.arange(0, dims.BV)
    if dims.WIDENED:
        i_r = i_v - tl.cdiv(dims.K, dims.BV)
        has_values = i_r >= 0
        o_v += tl.where(has_values, i_r, i_v) * dims.BV
        num_cols = tl.where(has_values, dims.V, dims.K)
        column0 = tl.where(has_values, dims.K, 0)
    else:
        has_values = i_v >= 0
        o_v += i_v * dims.BV
        num_cols = dims.V
        column0 = 0
    return o_v, num_cols, column0, has_values


@triton.jit
def load_tile(p, o_r, o_c, stride, num_rows, num_cols):
    """Tile p[o_r * stride + o_c], zero outside num_rows x num_cols."""
    m = (o_r[:, None] < num_rows) & (o_c[None, :] < num_cols)
    return tl.load(p + o_r[:, None] * stride + o_c[None, :], mask=m, other=0.0)


@triton.jit
def store_tile(p, b_x, o_r, o_c, stride, num_rows, num_cols):
    """Store a tile at p[o_r * stride + o_c], in p's dtype, inside num_rows x num_cols."""
    m = (o_r[:, None] < num_rows) & (o_c[None, :] < num_cols)
    tl.store(p + o_r[:, None] * stride + o_c[None, :], b_x.to(p.dtype.element_ty), mask=m)


@triton.jit
def masked_sum(b_x, m, axis: tl.constexpr):
    """Sums where m, outside of which b_x is zero anyway.

    Without m a product would be fused with the first addition between threads, which then hold different last bits of
    what should be one sum, and with Triton 3.8 all store theirs in one place.
    """
    return tl.sum(tl.where(m, b_x, 0.0), axis)


@triton.jit
def load_rows(p, o_r, stride, num_rows):
    """Vector p[o_r * stride], zero from num_rows on."""
    return tl.load(p + o_r * stride, mask=o_r < num_rows, other=0.0)


@triton.jit
def decay(b_x):
    """exp2 of a summed base-2 log decay, or of a difference of two, float32; differences are taken in their dtype."""
    return tl.exp2(b_x.to(tl.float32))


@triton.jit
def pair_decay(b_g, m):
    """exp2(G_i - G_j) where m, else 0: masked before the exponential, which m must restrict to i >= j."""
    return decay(tl.where(m, b_g[:, None] - b_g[None, :], float("-inf")))


@triton.jit
def pair_decay_transposed(b_g, m):
    """exp2(G_i - G_j) at [j, i] where m, else 0; m must restrict to i >= j."""
    return decay(tl.where(m, b_g[None, :] - b_g[:, None], float("-inf")))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) without overflow, and with small results exact to rounding."""
    e = tl.exp(-tl.abs(x))
    log1p = tl.where(e < 1e-2, e * (1.0 - e * (0.5 - e * (1.0 / 3.0 - e * 0.25))), tl.log(1.0 + e))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def inverse_norm(b_x):
    """1 / sqrt(sum x^2 + 1e-6) of each row, float32."""
    b_x = b_x.to(tl.float32)
    return tl.rsqrt(tl.sum(b_x * b_x, 1) + L2_NORM_EPS)


@triton.jit
def load_key_tile(p, o_r, o_c, stride, num_rows, num_cols, USE_L2NORM: tl.constexpr):
    """Rows of q or k, L2-normalised where asked, in their own dtype."""
    b_x = load_tile(p, o_r, o_c, stride, num_rows, num_cols)
    if USE_L2NORM:
        b_x = (b_x.to(tl.float32) * inverse_norm(b_x)[:, None]).to(b_x.dtype)
    return b_x


@triton.jit
def l2norm_gradient(b_y, b_r, b_dy):
    """Cotangent of x from that of y = r x, r = 1 / sqrt(sum x^2 + eps): r (dy - y <y, dy>), float32."""
    return b_r[:, None] * (b_dy - b_y * tl.sum(b_y * b_dy, 1)[:, None])
