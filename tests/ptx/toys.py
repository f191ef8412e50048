"""Small kernels whose results numpy knows, for tests of the emulator itself."""

import triton
import triton.language as tl


@triton.jit
def elementwise_kernel(x, y, z, n, BLOCK: tl.constexpr):
    """z = exp(x) + y where the index is below n."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + o, mask=o < n, other=0.0)
    b = tl.load(y + o, mask=o < n, other=0.0)
    tl.store(z + o, tl.exp(a.to(tl.float32)) + b, mask=o < n)


@triton.jit
def sum_kernel(x, y, z, BLOCK: tl.constexpr):
    """Rows of z: x + y and -x, in their type."""
    o = tl.arange(0, BLOCK)
    a = tl.load(x + o)
    tl.store(z + o, a + tl.load(y + o))
    tl.store(z + BLOCK + o, -a)


@triton.jit
def unmasked_kernel(x, z, BLOCK: tl.constexpr):
    """z = x, BLOCK elements of it whatever there are."""
    o = tl.arange(0, BLOCK)
    tl.store(z + o, tl.load(x + o))


@triton.jit
def integer_kernel(x, y, z, BLOCK: tl.constexpr):
    """Rows of z: quotient, remainder, shifts, bit operations, minimum, maximum, absolute value of integers."""
    o = tl.arange(0, BLOCK)
    a, b = tl.load(x + o), tl.load(y + o)
    tl.store(z + o, a // b)
    tl.store(z + BLOCK + o, a % b)
    tl.store(z + 2 * BLOCK + o, a << (b & 7))
    tl.store(z + 3 * BLOCK + o, a >> (b & 7))
    tl.store(z + 4 * BLOCK + o, (a & b) ^ (a | 5))
    tl.store(z + 5 * BLOCK + o, tl.minimum(a, b))
    tl.store(z + 6 * BLOCK + o, tl.maximum(a, b))
    tl.store(z + 7 * BLOCK + o, tl.abs(a))


@triton.jit
def float_kernel(x, z, BLOCK: tl.constexpr):
    """Rows of z: functions of x > 0 that kernels use."""
    o = tl.arange(0, BLOCK)
    a = tl.load(x + o).to(tl.float32)
    tl.store(z + o, tl.exp2(a))
    tl.store(z + BLOCK + o, tl.log(a))
    tl.store(z + 2 * BLOCK + o, tl.sqrt(a))
    tl.store(z + 3 * BLOCK + o, tl.rsqrt(a))
    tl.store(z + 4 * BLOCK + o, 1 / a)
    tl.store(z + 5 * BLOCK + o, tl.sigmoid(a))
    tl.store(z + 6 * BLOCK + o, tl.where(a > 1, a, -a))
    tl.store(z + 7 * BLOCK + o, a.to(tl.int32).to(tl.float32))
    tl.store(z + 8 * BLOCK + o, tl.cumsum(a, 0))
    tl.store(z + 9 * BLOCK + o, a - tl.sum(a, 0))
    tl.store(z + 10 * BLOCK + o, a - tl.max(a, 0))


@triton.jit
def dot_kernel(
    a,
    b,
    c,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TRANS_A: tl.constexpr,
    TRANS_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """c = a b: [M, K] and [K, N], either stored transposed."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    if TRANS_A:
        x = tl.trans(tl.load(a + k[:, None] * M + m[None, :]))
    else:
        x = tl.load(a + m[:, None] * K + k[None, :])
    if TRANS_B:
        y = tl.trans(tl.load(b + n[:, None] * K + k[None, :]))
    else:
        y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(x, y, input_precision=PRECISION))


@triton.jit
def chained_kernel(a, b, c, o, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, D: tl.constexpr):
    """o = (a b)^T c, the product rounded: a [M, K], b [K, N], c [M, D]."""
    m, n, k, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K), tl.arange(0, D)
    x = tl.dot(tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :]))
    c_ = tl.load(c + m[:, None] * D + d[None, :])
    tl.store(o + n[:, None] * D + d[None, :], tl.dot(tl.trans(x.to(c_.dtype)), c_))


@triton.jit
def pipelined_kernel(x, y, o, s, n, C: tl.constexpr, B: tl.constexpr, BOTH: tl.constexpr):
    """o [C, C] = sum over n tiles [C, B] of x y^T; BOTH: s [C] = sum of x too, so that registers read its tile."""
    c, e = tl.arange(0, C), tl.arange(0, B)
    S = tl.zeros([C, C], tl.float32)
    r = tl.zeros([C], tl.float32)
    for i in range(0, n):
        x_ = tl.load(x + (i * C + c[:, None]) * B + e[None, :])
        y_ = tl.load(y + (i * C + c[:, None]) * B + e[None, :])
        S += tl.dot(x_, tl.trans(y_))
        if BOTH:
            r += tl.sum(x_.to(tl.float32), 1)
    tl.store(o + c[:, None] * C + c[None, :], S)
    tl.store(s + c, r)


@triton.jit
def turned_kernel(x, z, BLOCK: tl.constexpr):
    """z = x in reverse order, through the tensor itself: written by one thread, read by another."""
    o = tl.arange(0, BLOCK)
    tl.store(z + o, tl.load(x + o))
    tl.debug_barrier()
    y = tl.load(z + BLOCK - 1 - o)
    tl.debug_barrier()
    tl.store(z + o, y)


@triton.jit
def shared_place_kernel(z, BLOCK: tl.constexpr):
    """Every program writes its own number to the same place."""
    o = tl.arange(0, BLOCK)
    tl.store(z + o, o + tl.program_id(0))


@triton.jit
def counted_kernel(x, z, BLOCK: tl.constexpr):
    """Row i of z = the sum of x[j : j + BLOCK] for j up to i."""
    i, o = tl.program_id(0), tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(0, i + 1):
        total += tl.load(x + j + o)
    tl.store(z + i * BLOCK + o, total)
