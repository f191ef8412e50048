"""What chunks need before the state arrives: normalised q and k, active gates, summed decays, the rule's inverse.

With k_i, beta_i and the cumulative log decay G_i of one chunk of C tokens (Yang, Kautz, Hatamizadeh, "Gated Delta
Networks", arXiv 2412.06464, section 3.3),

    L = I + diag(beta) M,    M_ij = exp(G_i - G_j) <k_i, k_j> for i > j, else 0,    A = L^{-1},

and, where sweeps are to read it, QK_ij = exp(G_i - G_j) <q_i, k_j> for i >= j, else 0. Value heads that share queries
and keys share their products.

Backwards only the gates are at home here: g_i is the sum of what reaches G_i, ..., G_C. What reaches the keys and gates
through A is chunk_grad's.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleep_ops.kernels.arguments import (
    Chunk,
    Gates,
    Packing,
    Prepared,
    Tokens,
    load_gate,
    load_keys,
    load_queries,
    make_dims,
    store_vector,
)
from sleep_ops.kernels.configs import ChunkConfig, block_size, heads_together
from sleep_ops.kernels.primitives import (
    LOG2E,
    decay,
    inverse_norm,
    load_rows,
    load_tile,
    locate_chunk,
    masked_sum,
    pair_decay,
    softplus,
    store_tile,
)

# A token's natural log decay is no lower: its exponential is 0 in float32 already, and -inf would leave sums no value.
LOWEST_LOG_DECAY = tl.constexpr(-104.0)
BLOCK = tl.constexpr(16)  # tokens: the smallest tile of a product
GATE_BLOCK_H = 16
NORM_ROWS = 32


@triton.jit
def block_product(b_x, b_y, dtype: tl.constexpr):
    """x y of two blocks of float32  [BLOCK, BLOCK], of tensor cores where the inverse is stored in 16 bits.

    As sums of three products of parts, whose errors are about 2^-21 of the factors, and 2^-16 for bfloat16. So beside
    the rounding of an inverse they are nothing, save that of keys which repeat without decay at beta = 2. The parts in
    bfloat16 are formed here: Triton's "bf16x3" tests each sum for NaN besides.
    """
    if dtype == tl.bfloat16:
        b_x0 = b_x.to(dtype)
        b_y0 = b_y.to(dtype)
        b_x1 = (b_x - b_x0).to(dtype)
        b_y1 = (b_y - b_y0).to(dtype)
        b_xy = tl.dot(b_x1, b_y0, input_precision="ieee")  # (x - x0) y0  [BLOCK, BLOCK]
        b_xy += tl.dot(b_x0, b_y1, input_precision="ieee")  # x0 (y - y0)  [BLOCK, BLOCK]
        b_xy += tl.dot(b_x0, b_y0, input_precision="ieee")  # x0 y0  [BLOCK, BLOCK]
    else:
        precision: tl.constexpr = "ieee" if dtype == tl.float32 else "tf32x3"
        b_xy = tl.dot(b_x, b_y, input_precision=precision)  # x y  [BLOCK, BLOCK]
    return b_xy


@triton.jit
def left_blocks(b_L, level):
    """The block of a [BLOCK, BLOCK] tile left of each second diagonal block of size 2^level, zero elsewhere."""
    i_r = tl.arange(0, BLOCK)[:, None] >> level
    i_c = tl.arange(0, BLOCK)[None, :] >> level
    return tl.where((i_r % 2 == 1) & (i_c == i_r - 1), b_L, 0.0)


@triton.jit
def unit_lower_inverse(b_L, dtype: tl.constexpr):
    """Inverse of a unit lower triangular [BLOCK, BLOCK] tile, float32, by forward substitution over doubling blocks.

    Reads what is below the diagonal only.

    Let A_s hold the inverses of the diagonal blocks of size s, and X_s the block of L left of each second one. Then
    A_2s = A_s - A_s X_s A_s. Unlike the power series of L - I, no term outgrows the result (repeated keys, beta 2).
    """
    o_i = tl.arange(0, BLOCK)
    b_A = tl.where(o_i[:, None] == o_i[None, :], 1.0, 0.0) - left_blocks(b_L, 0)
    for level in tl.static_range(1, 4):
        b_XA = block_product(left_blocks(b_L, level), b_A, dtype)  # X A  [BLOCK, BLOCK]
        b_A -= block_product(b_A, b_XA, dtype)  # A - A X A  [BLOCK, BLOCK]
    return b_A


@triton.jit
def quarters(b_x):
    """The four blocks [BLOCK, BLOCK] of a tile of twice the size: x00, x01, x10, x11."""
    b_x = tl.permute(tl.reshape(b_x, [2, BLOCK, 2, BLOCK]), [1, 3, 0, 2])
    b_x0, b_x1 = tl.split(b_x)  # columns
    b_x00, b_x10 = tl.split(b_x0)
    b_x01, b_x11 = tl.split(b_x1)
    return b_x00, b_x01, b_x10, b_x11


@triton.jit
def of_quarters(b_x00, b_x01, b_x10, b_x11):
    """The inverse of `quarters`."""
    b_x = tl.join(tl.join(b_x00, b_x10), tl.join(b_x01, b_x11))  # [BLOCK, BLOCK, 2 of rows, 2 of columns]
    return tl.reshape(tl.permute(b_x, [2, 0, 3, 1]), [2 * BLOCK, 2 * BLOCK])


@triton.jit
def load_gate_input(x, stride, chunk, dims: tl.constexpr):
    """g or beta of a chunk's rows [C], float32, zero after the last one; `stride` as in Gates."""
    if stride is None:
        b_x = load_gate(x, chunk, dims)
    else:
        b_x = load_rows(x + chunk.start * stride + chunk.i_hv, tl.arange(0, dims.C), stride, chunk.num_rows)
    return b_x.to(tl.float32)


@triton.jit
def activate_gates(gates, chunk, dtype: tl.constexpr, BETA_SCALE: tl.constexpr, dims: tl.constexpr):
    """Base-2 log decay summed over a chunk's rows, and active beta; past the last row the sum stays and beta is 0.

    dtype: that of q, k and v, which decides that of the sum, see decay_dtype.
    """
    G_DTYPE: tl.constexpr = tl.float64 if dtype == tl.float32 else tl.float32
    m_i = tl.arange(0, dims.C) < chunk.num_rows
    b_g = load_gate_input(gates.g, gates.stride_g, chunk, dims)
    if gates.A_log is not None:
        b_rate = tl.exp(tl.load(gates.A_log + chunk.i_hv).to(tl.float32))
        b_g = -b_rate * softplus(b_g + tl.load(gates.dt_bias + chunk.i_hv).to(tl.float32))
    b_g = tl.where(b_g < LOWEST_LOG_DECAY, LOWEST_LOG_DECAY, b_g)
    b_G = tl.cumsum(tl.where(m_i, b_g, 0.0).to(G_DTYPE), 0) * LOG2E
    b_beta = load_gate_input(gates.beta, gates.stride_beta, chunk, dims)
    if BETA_SCALE > 0:
        b_beta = tl.where(m_i, BETA_SCALE * tl.sigmoid(b_beta), 0.0)
    return b_G, b_beta


@triton.jit
def delta_rule_inverse(b_k, b_G, b_beta, C: tl.constexpr):
    """A = L^{-1} of C tokens [C, C], float32; C is BLOCK or twice that."""
    tl.static_assert(C <= 2 * BLOCK)
    dtype: tl.constexpr = b_k.dtype
    o_i = tl.arange(0, C)
    b_kk = tl.dot(b_k, tl.trans(b_k), input_precision="ieee")  # K K^T  [C, C]
    b_L = b_beta[:, None] * b_kk * pair_decay(b_G, o_i[:, None] > o_i[None, :])
    if C == BLOCK:
        b_A = unit_lower_inverse(b_L, dtype)
    else:
        b_L00, b_L01, b_L10, b_L11 = quarters(b_L)
        b_A00 = unit_lower_inverse(b_L00, dtype)
        b_A11 = unit_lower_inverse(b_L11, dtype)
        b_XA = block_product(b_L10, b_A00, dtype)  # L10 A00  [BLOCK, BLOCK]
        b_A10 = -block_product(b_A11, b_XA, dtype)  # -A11 L10 A00  [BLOCK, BLOCK]
        b_A = of_quarters(b_A00, tl.zeros_like(b_A00), b_A10, b_A11)
    return b_A


@triton.jit
def decay_gradient(b_dg, b_g):
    """Cotangent of a log decay from that of what activate_gates sums, which is no lower than LOWEST_LOG_DECAY."""
    return tl.where(b_g < LOWEST_LOG_DECAY, 0.0, b_dg)


@triton.jit
def log_decay_gradient(b_dg, b_x, b_rate):
    """The same, of x and, token by token, of A_log, where the log decay is -exp(A_log) softplus(x)."""
    b_dg = decay_gradient(b_dg, -b_rate * softplus(b_x)) * -b_rate
    return b_dg * tl.sigmoid(b_x), b_dg * softplus(b_x)


@triton.jit
def block_of(b_x, i):
    """Block i of numbers of a chunk's tokens [C]: those of its own tokens [BLOCK]."""
    b_x = tl.reshape(b_x, [b_x.shape[0] // BLOCK, BLOCK])
    m_i = tl.arange(0, b_x.shape[0]) == i
    return tl.sum(tl.where(m_i[:, None], b_x, 0.0), 0)


@triton.jit
def row_products(b_x, keys, i):
    """Row i of the blocks of X K^T up to the diagonal, of X's block i, b_x, and K's blocks, `keys`."""
    products = ()
    for j in tl.static_range(0, i + 1):
        products = products + (tl.dot(b_x, tl.trans(keys[j]), input_precision="ieee"),)  # X_i K_j^T  [BLOCK, BLOCK]
    return products


@triton.jit
def with_row(products, i, tokens, QK, rows, block_dims: tl.constexpr):
    """Blocks of K, and rows of blocks of K K^T and, with QK, of Q K^T: those up to block i, of those before it."""
    keys, key_products, query_products = products
    keys = keys + (load_keys(tokens, rows, block_dims),)
    key_products = key_products + (row_products(keys[i], keys, i),)
    if QK is not None:
        query_products = query_products + (row_products(load_queries(tokens, rows, block_dims), keys, i),)
    return keys, key_products, query_products


@triton.jit
def row_decays(G, i):
    """Row i of the blocks [BLOCK, BLOCK] of e^{G_a - G_b} for a >= b, else 0, up to the diagonal; G in blocks."""
    o_i = tl.arange(0, BLOCK)
    decays = ()
    for j in tl.static_range(0, i):
        decays = decays + (decay(G[i][:, None] - G[j][None, :]),)
    return decays + (pair_decay(G[i], o_i[:, None] >= o_i[None, :]),)


@triton.jit
def store_block(x, b_x, i, j, number, C: tl.constexpr):
    """Store block i, j of x [chunks, HV, C, C] of the chunk and value head with that number."""
    p_x = x + number * (C * C) + i * (BLOCK * C) + j * BLOCK
    store_tile(p_x, b_x, tl.arange(0, BLOCK), tl.arange(0, BLOCK), C, BLOCK, BLOCK)


@triton.jit(do_not_specialize=["T", "num_seqs"])
def chunk_prepare_kernel(
    tokens,
    gates,
    prepared,
    packing,
    T,
    num_seqs,
    BETA_SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    dims: tl.constexpr,
    block_dims: tl.constexpr,
):
    """Gates, inverse and QK of one chunk of C tokens (dims) and HEADS value heads that share queries and keys.

    Squares are formed block by block of BLOCK tokens (block_dims); those past the diagonal are zero. With L_ij and A_ij
    the blocks of L and of its inverse, A_ij = -A_ii (L_ij A_jj + ... + L_i,i-1 A_i-1,j) for j < i. Products with keys
    are formed once for all the heads, for a single one row by row, which takes fewer registers.

    Reads
        g and beta; with BETA_SCALE > 0 beta is the logit of BETA_SCALE * sigmoid(beta),
        k, where A is wanted, and q, where QK is.
    Writes
        G and the active beta,
        A = L^{-1}, by the arithmetic of block_product; None for the Hebbian rule,
        QK, where given, as only beside A.

    Grid (chunks, HV / HEADS). Mirrors `log_decay`, `write_strength` and `l2_normalise` of sleep_ops/reference.py.
    """
    i_hv0 = tl.program_id(1) * HEADS
    i_h = i_hv0 // (dims.HV // dims.H)
    C: tl.constexpr = dims.C
    start, num_rows = locate_chunk(tl.program_id(0), packing, T, num_seqs, C)
    dtype: tl.constexpr = tokens.k.dtype.element_ty
    zero = tl.full([BLOCK, BLOCK], 0.0, tl.float32)
    shared = ((), (), ())  # see with_row
    if prepared.A is not None and HEADS > 1:
        for i in tl.static_range(0, C // BLOCK):
            rows = Chunk(start + i * BLOCK, num_rows - i * BLOCK, i_h, None, None)
            shared = with_row(shared, i, tokens, prepared.QK, rows, block_dims)
    for r in range(0, HEADS):
        i_hv = i_hv0 + r
        number = tl.program_id(0).to(tl.int64) * dims.HV + i_hv
        chunk = Chunk(start, num_rows, i_h, i_hv, number)
        b_G, b_beta = activate_gates(gates, chunk, dtype, BETA_SCALE, dims)
        store_vector(prepared.G, b_G, chunk, dims)
        store_vector(prepared.beta, b_beta, chunk, dims)
        if prepared.A is not None:
            products = shared
            G = ()
            A = ()  # its rows of blocks up to the diagonal
            for i in tl.static_range(0, C // BLOCK):
                if HEADS == 1:
                    rows = Chunk(start + i * BLOCK, num_rows - i * BLOCK, i_h, None, None)
                    products = with_row(products, i, tokens, prepared.QK, rows, block_dims)
                _, key_products, query_products = products
                G = G + (block_of(b_G, i),)
                b_beta_i = block_of(b_beta, i)
                decays = row_decays(G, i)
                L = ()
                for j in tl.static_range(0, i + 1):
                    if prepared.QK is not None:
                        store_block(prepared.QK, query_products[i][j] * decays[j], i, j, number, C)
                    L = L + (b_beta_i[:, None] * key_products[i][j] * decays[j],)
                b_A_ii = unit_lower_inverse(L[i], dtype)
                A_i = ()
                for j in tl.static_range(0, i):
                    b_LA = zero
                    for m in tl.static_range(j, i):
                        b_LA += block_product(L[m], A[m][j], dtype)
                    A_i = A_i + (-block_product(b_A_ii, b_LA, dtype),)
                    store_block(prepared.A, A_i[j], i, j, number, C)
                A = A + (A_i + (b_A_ii,),)
                store_block(prepared.A, b_A_ii, i, i, number, C)
                for j in tl.static_range(i + 1, C // BLOCK):
                    store_block(prepared.A, zero, i, j, number, C)
                    if prepared.QK is not None:
                        store_block(prepared.QK, zero, i, j, number, C)


@triton.jit(do_not_specialize=["num_rows"])
def normalise_kernel(x, y, r, num_rows, stride, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
    """y = r x [num_rows, H, K] with r = 1 / sqrt(sum x^2 + 1e-6) [num_rows, H] float32, for BR rows of a head of x.

    Grid (tiles of rows, H). Mirrors `l2_normalise` of sleep_ops/reference.py.
    """
    start = tl.program_id(0).to(tl.int64) * BR
    i_h = tl.program_id(1)
    o_r = tl.arange(0, BR)
    o_k = tl.arange(0, BK)
    left = num_rows - start
    b_x = load_tile(x + start * stride + i_h * K, o_r, o_k, stride, left, K)
    b_r = inverse_norm(b_x)
    tl.store(r + start * H + i_h + o_r * H, b_r, mask=o_r < left)
    store_tile(y + (start * H + i_h) * K, b_x.to(tl.float32) * b_r[:, None], o_r, o_k, H * K, left, K)


class GateDims(NamedTuple):
    """What gate_backward_kernel is compiled for: value heads, tokens of a chunk, heads of a program, scale of beta."""

    HV: int
    C: int
    BH: int
    BETA_SCALE: float


@triton.jit(do_not_specialize=["T", "num_seqs"])
def gate_backward_kernel(gates, active, dG, d_active, dg, dbeta, partial, packing, T, num_seqs, dims: tl.constexpr):
    """Cotangents of one chunk's gate inputs, for BH value heads, from those of G (base 2) and of the active beta.

        dg_i = log2(e) sum_{j >= i} dG_j        with A_log: da = -exp(A_log) sigmoid(a + dt_bias) dg
        dbeta = d_active, and with BETA_SCALE > 0 times active (1 - active / BETA_SCALE)

    A decay below LOWEST_LOG_DECAY gets none.
    Reads g, A_log and dt_bias of the gates, and
        active [chunks, HV, C] float32, the active beta,
        dG [chunks, HV, C] in G's dtype, d_active [chunks, HV, C] float32, the cotangents of G and of the active beta.
    Writes
        dg, dbeta [rows, HV],
        partial [chunks, 2, HV] float32, with A_log: the chunk's part of the cotangents of A_log and dt_bias (zero past
        the last chunk).

    Grid (chunks, tiles of heads). Mirrors the backward of `log_decay` and `write_strength` of sleep_ops/reference.py.
    """
    i_c = tl.program_id(0)
    start, num_rows = locate_chunk(i_c, packing, T, num_seqs, dims.C)
    o_i = tl.arange(0, dims.C)
    o_h = tl.program_id(1) * dims.BH + tl.arange(0, dims.BH)
    o_gate = start * dims.HV
    o_chunk = i_c.to(tl.int64) * dims.HV * dims.C

    b_dG = tl.trans(load_tile(dG + o_chunk, o_h, o_i, dims.C, dims.HV, num_rows))
    b_dg = (tl.cumsum(b_dG, 0, reverse=True) * LOG2E).to(tl.float32)
    b_x = load_tile(gates.g + o_gate, o_i, o_h, dims.HV, num_rows, dims.HV).to(tl.float32)
    if gates.A_log is None:
        b_dg = decay_gradient(b_dg, b_x)
    else:
        m_h = o_h < dims.HV
        b_rate = tl.exp(tl.load(gates.A_log + o_h, mask=m_h, other=0.0).to(tl.float32))
        b_x += tl.load(gates.dt_bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
        b_dg, b_drate = log_decay_gradient(b_dg, b_x, b_rate[None, :])
        p_partial = partial + i_c.to(tl.int64) * 2 * dims.HV
        m_i = (o_i < num_rows)[:, None]
        tl.store(p_partial + o_h, masked_sum(b_drate, m_i, 0), mask=m_h)
        tl.store(p_partial + dims.HV + o_h, masked_sum(b_dg, m_i, 0), mask=m_h)
    store_tile(dg + o_gate, b_dg, o_i, o_h, dims.HV, num_rows, dims.HV)

    b_dbeta = tl.trans(load_tile(d_active + o_chunk, o_h, o_i, dims.C, dims.HV, num_rows))
    if dims.BETA_SCALE > 0:
        b_beta = tl.trans(load_tile(active + o_chunk, o_h, o_i, dims.C, dims.HV, num_rows))
        b_dbeta *= b_beta * (1.0 - b_beta / dims.BETA_SCALE)
    store_tile(dbeta + o_gate, b_dbeta, o_i, o_h, dims.HV, num_rows, dims.HV)


def decay_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the summed log decays for q, k, v of dtype. A sum over a chunk of resets is near -10^4: in float32 differences
    of two then have errors of 10^-3, less than a rounding of 16 bits but not of float32."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def chunk_prepare(
    tokens: Tokens,
    gates: Gates,
    packing: Packing,
    *,
    num_chunks: int,
    rule: str,
    beta_scale: float,
    config: ChunkConfig,
) -> Prepared:
    """G in decay_dtype(k.dtype), active beta, and in k's dtype A (None for the Hebbian rule) and with q beside it QK.

    Of the tokens k is enough.
    """
    T, H, K = tokens.k.shape[1:]
    HV, C, device = gates.g.shape[2], config.chunk, tokens.k.device
    G = torch.empty(num_chunks, HV, C, dtype=decay_dtype(tokens.k.dtype), device=device)
    active = torch.empty(num_chunks, HV, C, dtype=torch.float32, device=device)
    A = QK = None
    if rule == "delta":
        A = torch.empty(num_chunks, HV, C, C, dtype=tokens.k.dtype, device=device)
        QK = None if tokens.q is None else torch.empty_like(A)
    prepared = Prepared(G, active, A, QK)
    dims = [make_dims(H, HV, K, 0, rows, config.prepare.block_v) for rows in (C, BLOCK.value)]
    heads = heads_together(num_chunks * H, HV // H, device)
    chunk_prepare_kernel[(num_chunks, HV // heads)](
        tokens, gates, prepared, packing, T, packing.num_seqs, beta_scale, heads, *dims, **config.prepare.options
    )
    return prepared


def normalise(x: Tensor, row_stride: int) -> tuple[Tensor, Tensor]:
    """Rows of q or k [B, T, H, K], L2-normalised, contiguous in x's dtype, and their inverse norms [B, T, H] float32.

    Rows of x are row_stride elements apart, heads contiguous.
    """
    B, T, H, K = x.shape
    y = torch.empty(B, T, H, K, dtype=x.dtype, device=x.device)
    r = torch.empty(B, T, H, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(B * T, NORM_ROWS), H)
    normalise_kernel[grid](x, y, r, B * T, row_stride, H=H, K=K, BK=block_size(K), BR=NORM_ROWS, num_warps=4)
    return y, r


def gate_backward(
    gates: Gates,
    active: Tensor,
    dG: Tensor,
    d_active: Tensor,
    packing: Packing,
    *,
    num_chunks: int,
    beta_dtype: torch.dtype,
    beta_scale: float,
    chunk: int,
) -> Gates:
    """Cotangents of chunk_prepare's gates, in their dtypes, from those of its G and active beta; all contiguous.

    Of the gates beta, whose dtype is beta_dtype, is not needed, but the active one.
    """
    B, T, HV = gates.g.shape
    A_log, dt_bias, device = gates.A_log, gates.dt_bias, active.device
    dg = torch.empty_like(gates.g)
    dbeta = torch.empty(B, T, HV, dtype=beta_dtype, device=device)
    partial = None if A_log is None else torch.empty(num_chunks, 2, HV, dtype=torch.float32, device=device)
    dims = GateDims(HV, chunk, min(GATE_BLOCK_H, triton.next_power_of_2(HV)), beta_scale)
    gate_backward_kernel[(num_chunks, triton.cdiv(HV, dims.BH))](
        gates, active, dG, d_active, dg, dbeta, partial, packing, T, packing.num_seqs, dims, num_warps=4
    )
    if A_log is None:
        return Gates(dg, dbeta)
    return Gates(dg, dbeta, partial[:, 0].sum(0).to(A_log.dtype), partial[:, 1].sum(0).to(dt_bias.dtype))
