"""What kernels are given, as named tuples of tensors, None and strides, and the loads from them that kernels share.

Rows are tokens, see primitives.py. A launcher takes the same tuples of PyTorch tensors.
"""

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl

from sleep_ops.kernels.configs import block_size
from sleep_ops.kernels.primitives import load_key_tile, load_rows, load_tile, store_tile


class Tokens(NamedTuple):
    """q, k [B, T, H, K] and v [B, T, HV, V]: rows of contiguous heads.

    stride_*: elements from one row to the next; None for contiguous rows of q or k, which saves kernels registers.
    """

    q: Any = None
    k: Any = None
    v: Any = None
    stride_q: Any = None
    stride_k: Any = None
    stride_v: Any = None


class Gates(NamedTuple):
    """Inputs of the gates, or their cotangents.

    g: [B, T, HV], a log decay, or with A_log and dt_bias the input a, of which -exp(A_log) softplus(a + dt_bias) is it.
    beta: [B, T, HV], a write strength, or the logit of one.
    A_log, dt_bias: [HV], or None.
    stride_g, stride_beta: elements from one row to the next, None for contiguous ones.
    """

    g: Any = None
    beta: Any = None
    A_log: Any = None
    dt_bias: Any = None
    stride_g: Any = None
    stride_beta: Any = None


class Prepared(NamedTuple):
    """What chunk_prepare makes of tokens and gates, contiguous, and what normalised q and k were scaled by.

    G: [chunks, HV, C], the base-2 log decay summed from the chunk's start to each token, float32 or float64; past the
    last token its sum stays.
    beta: [chunks, HV, C] float32, the active write strength, zero past the last token.
    A: [chunks, HV, C, C], the delta rule's inverse; None for the Hebbian rule.
    QK: [chunks, HV, C, C], e^{G_i - G_j} <q_i, k_j> for i >= j, else 0; None where sweeps form it of q and k.
    rq, rk: [B, T, H] float32, the inverse norms of rows of q and k before `normalise`; None where they are as given.
    """

    G: Any = None
    beta: Any = None
    A: Any = None
    QK: Any = None
    rq: Any = None
    rk: Any = None


class Packing(NamedTuple):
    """Sequences of different lengths in one row of tokens; both None for B sequences of T tokens.

    cu_seqlens: [num_seqs + 1], the token before which each sequence starts, and the end of the last.
    chunk_offsets: [num_seqs + 1] int64, the number of chunks before each sequence, and in all.
    """

    cu_seqlens: Any = None
    chunk_offsets: Any = None

    @property
    def num_seqs(self) -> int:
        return 0 if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


class Cotangents(NamedTuple):
    """Of what comes out of a sweep or a chunk, each None for zero.

    output: [B, T, HV, V].
    state: the state after it, [HV, K, width] for each.
    """

    output: Any = None
    state: Any = None


class Gradients(NamedTuple):
    """Of q, k, v, and of the gates' inputs or of what chunk_prepare made of them; contiguous. q is None if absent."""

    q: Any
    k: Any
    v: Any
    g: Any
    beta: Any


class Dims(NamedTuple):
    """What kernels are compiled for.

    H, HV: heads of q and k, and of v.
    K, V: their dims.
    width: columns of a state [K, width], which are V, or with WIDENED those of [P | R], K + V.
    C: tokens of a chunk.
    BK, BV: tiles of K, and of a state's columns.
    tiles: of a state's columns, those of P and of R apart.
    USE_L2NORM: q and k are normalised as they are loaded.
    """

    H: int
    HV: int
    K: int
    V: int
    width: int
    C: int
    BK: int
    BV: int
    tiles: int
    USE_L2NORM: bool
    WIDENED: bool


@functools.cache
def make_dims(H: int, HV: int, K: int, V: int, C: int, BV: int, widened: bool = False, l2norm: bool = False) -> Dims:
    width, tiles = (K + V, triton.cdiv(K, BV)) if widened else (V, 0)
    return Dims(H, HV, K, V, width, C, block_size(K), BV, tiles + triton.cdiv(V, BV), l2norm, widened)


class Chunk(NamedTuple):
    """Where a chunk lies: row of its first token (int64), its number of tokens, its heads of q and k, and of v.

    number: of the chunk and its value head in tensors [chunks, HV, ...] (int64).
    """

    start: Any
    num_rows: Any
    i_h: Any
    i_hv: Any
    number: Any


@triton.jit
def key_stride(stride, dims: tl.constexpr):
    """stride_q or stride_k in elements."""
    if stride is None:
        elements = dims.H * dims.K
    else:
        elements = stride
    return elements


@triton.jit
def load_heads(x, stride, chunk, dims: tl.constexpr):
    """Rows of q or k [C, BK], L2-normalised with USE_L2NORM."""
    o_i = tl.arange(0, dims.C)
    o_k = tl.arange(0, dims.BK)
    elements = key_stride(stride, dims)
    p_x = x + chunk.start * elements + chunk.i_h * dims.K
    return load_key_tile(p_x, o_i, o_k, elements, chunk.num_rows, dims.K, dims.USE_L2NORM)


@triton.jit
def load_queries(tokens, chunk, dims: tl.constexpr):
    """Q [C, BK]."""
    return load_heads(tokens.q, tokens.stride_q, chunk, dims)


@triton.jit
def load_keys(tokens, chunk, dims: tl.constexpr):
    """K [C, BK]."""
    return load_heads(tokens.k, tokens.stride_k, chunk, dims)


@triton.jit
def load_values(tokens, chunk, o_v, num_rows, dims: tl.constexpr):
    """V [C, BV] float32, columns o_v, zero from num_rows on."""
    p_v = tokens.v + chunk.start * tokens.stride_v + chunk.i_hv * dims.V
    return load_tile(p_v, tl.arange(0, dims.C), o_v, tokens.stride_v, num_rows, dims.V).to(tl.float32)


@triton.jit
def load_gate(x, chunk, dims: tl.constexpr):
    """A number for each token [C] from x [rows, HV], zero after the last one."""
    o_gate = chunk.start * dims.HV + chunk.i_hv
    return load_rows(x + o_gate, tl.arange(0, dims.C), dims.HV, chunk.num_rows)


@triton.jit
def store_gate(x, b_x, chunk, dims: tl.constexpr):
    """Store what load_gate would load."""
    o_i = tl.arange(0, dims.C)
    o_gate = chunk.start * dims.HV + chunk.i_hv
    tl.store(x + o_gate + o_i * dims.HV, b_x.to(x.dtype.element_ty), mask=o_i < chunk.num_rows)


@triton.jit
def load_vector(x, chunk, dims: tl.constexpr):
    """The chunk's [C] of x [chunks, HV, C], such as G."""
    return tl.load(x + chunk.number * dims.C + tl.arange(0, dims.C))


@triton.jit
def store_vector(x, b_x, chunk, dims: tl.constexpr):
    """Store what load_vector would load."""
    tl.store(x + chunk.number * dims.C + tl.arange(0, dims.C), b_x.to(x.dtype.element_ty))


@triton.jit
def load_last(x, chunk, dims: tl.constexpr):
    """The last of what load_vector would load: of G the chunk's whole decay."""
    return tl.load(x + chunk.number * dims.C + (dims.C - 1))


@triton.jit
def load_columns(x, chunk, o_c, width, num_cols, dims: tl.constexpr):
    """Columns o_c < num_cols, of the chunk's rows and value head of x [rows, HV, width]."""
    p_x = x + (chunk.start * dims.HV + chunk.i_hv) * width
    return load_tile(p_x, tl.arange(0, dims.C), o_c, dims.HV * width, chunk.num_rows, num_cols)


@triton.jit
def store_columns(x, b_x, chunk, o_c, width, num_cols, dims: tl.constexpr):
    """Store what load_columns would load."""
    p_x = x + (chunk.start * dims.HV + chunk.i_hv) * width
    store_tile(p_x, b_x, tl.arange(0, dims.C), o_c, dims.HV * width, chunk.num_rows, num_cols)


@triton.jit
def load_square(x, chunk, dims: tl.constexpr):
    """The chunk's [C, C] of x [chunks, HV, C, C], such as A."""
    o_i = tl.arange(0, dims.C)
    return load_tile(x + chunk.number * (dims.C * dims.C), o_i, o_i, dims.C, dims.C, dims.C)


@triton.jit
def store_square(x, b_x, chunk, dims: tl.constexpr):
    """Store what load_square would load."""
    o_i = tl.arange(0, dims.C)
    store_tile(x + chunk.number * (dims.C * dims.C), b_x, o_i, o_i, dims.C, dims.C, dims.C)
