"""What chunks need before the state arrives: active gates, summed decays, the delta rule's inverse, norms of q and k.

With k_i, beta_i and the cumulative log decay G_i of one chunk of C tokens (Yang, Kautz, Hatamizadeh, "Gated Delta
Networks", arXiv 2412.06464, section 3.3),

    L = I + diag(beta) M,    M_ij = exp(G_i - G_j) <k_i, k_j> for i > j, else 0,    A = L^{-1}.

Backwards only the gates are at home here: g_i is the sum of what reaches G_i, ..., G_C. What reaches the keys and gates
through A is chunk_grad's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleep_ops.kernels.configs import ChunkConfig, block_size
from sleep_ops.kernels.primitives import (
    LOG2E,
    inverse_norm,
    load_key_tile,
    load_rows,
    load_tile,
    locate_chunk,
    pair_decay,
    softplus,
    store_tile,
)

# A token's natural log decay is no lower: its exponential is 0 in float32 already, and -inf would leave sums no value.
LOWEST_LOG_DECAY = tl.constexpr(-104.0)
GATE_BLOCK_H = 16
NORM_ROWS = 32


@triton.jit
def left_blocks(b_L, level, C: tl.constexpr):
    """The block of a [C, C] tile left of each second diagonal block of size 2^level, zero elsewhere."""
    i_r = tl.arange(0, C)[:, None] >> level
    i_c = tl.arange(0, C)[None, :] >> level
    return tl.where((i_r % 2 == 1) & (i_c == i_r - 1), b_L, 0.0)


@triton.jit
def double_blocks(b_A, b_L, level, C: tl.constexpr, PRECISION: tl.constexpr):
    """Inverses of the diagonal blocks of size 2^(level + 1), from b_A, those of half the size."""
    b_XA = tl.dot(left_blocks(b_L, level, C), b_A, input_precision=PRECISION)
    return b_A - tl.dot(b_A, b_XA, input_precision=PRECISION)


@triton.jit
def unit_lower_inverse(b_L, C: tl.constexpr, PRECISION: tl.constexpr):
    """Inverse of a unit lower triangular [C, C] tile, float32, by forward substitution over doubling blocks.

    Let A_s hold the inverses of the diagonal blocks of size s, and X_s the block of L left of each second one. Then
    A_2s = A_s - A_s X_s A_s. Unlike the power series of L - I, no term outgrows the result (repeated keys, beta 2).
    """
    o_i = tl.arange(0, C)
    b_A = tl.where(o_i[:, None] == o_i[None, :], 1.0, 0.0) - left_blocks(b_L, 0, C)
    if C <= 32:
        for level in tl.static_range(1, 5):
            if (1 << level) < C:
                b_A = double_blocks(b_A, b_L, level, C, PRECISION)
    else:  # unrolled, C = 64 takes half a minute to compile
        for level in range(1, 6):
            b_A = double_blocks(b_A, b_L, level, C, PRECISION)
    return b_A


@triton.jit
def activate_gates(
    p_g,
    p_beta,
    A_log,
    dt_bias,
    i_hv,
    o_i,
    stride_g,
    stride_beta,
    num_rows,
    BETA_SCALE: tl.constexpr,
    G_DTYPE: tl.constexpr,
):
    """Base-2 log decay summed over a chunk's rows, and active beta; past the last row the sum stays and beta is 0."""
    m_i = o_i < num_rows
    b_g = load_rows(p_g, o_i, stride_g, num_rows).to(tl.float32)
    if A_log is not None:
        b_rate = tl.exp(tl.load(A_log + i_hv).to(tl.float32))
        b_g = -b_rate * softplus(b_g + tl.load(dt_bias + i_hv).to(tl.float32))
    b_g = tl.where(b_g < LOWEST_LOG_DECAY, LOWEST_LOG_DECAY, b_g)
    b_G = tl.cumsum(tl.where(m_i, b_g, 0.0).to(G_DTYPE), 0) * LOG2E
    b_beta = load_rows(p_beta, o_i, stride_beta, num_rows).to(tl.float32)
    if BETA_SCALE > 0:
        b_beta = tl.where(m_i, BETA_SCALE * tl.sigmoid(b_beta), 0.0)
    return b_G, b_beta


@triton.jit
def delta_rule_inverse(b_k, b_G, b_beta, C: tl.constexpr, PRECISION: tl.constexpr):
    """A = L^{-1} of a chunk, float32."""
    o_i = tl.arange(0, C)
    b_kk = tl.dot(b_k, tl.trans(b_k), input_precision="ieee")
    b_L = b_beta[:, None] * b_kk * pair_decay(b_G, o_i[:, None] > o_i[None, :])
    return unit_lower_inverse(b_L, C, PRECISION)


@triton.jit
def decay_gradient(b_dg, b_g):
    """Cotangent of a log decay from that of what activate_gates sums, which is no lower than LOWEST_LOG_DECAY."""
    return tl.where(b_g < LOWEST_LOG_DECAY, 0.0, b_dg)


@triton.jit
def log_decay_gradient(b_dg, b_x, b_rate):
    """The same, of x and, token by token, of A_log, where the log decay is -exp(A_log) softplus(x)."""
    b_dg = decay_gradient(b_dg, -b_rate * softplus(b_x)) * -b_rate
    return b_dg * tl.sigmoid(b_x), b_dg * softplus(b_x)


@triton.jit(do_not_specialize=["T", "num_seqs"])
def chunk_prepare_kernel(
    k,
    g,
    beta,
    A_log,
    dt_bias,
    G,
    beta_out,
    A,
    cu_seqlens,
    chunk_offsets,
    T,
    num_seqs,
    stride_k,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BETA_SCALE: tl.constexpr,
    USE_L2NORM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gates and inverse of one chunk and value head.

    g: log decay, or with A_log and dt_bias the gate's input a, of which -exp(A_log) softplus(a + dt_bias) is the decay.
    beta: write strength, or with BETA_SCALE > 0 the logit of BETA_SCALE * sigmoid(beta).
    Writes G [rows, HV], the base-2 log decay summed from the chunk's start to each token, float32 or float64, beta_out
    [rows, HV] float32, and for the delta rule A = L^{-1} [rows, HV, C] in A's dtype, by float32 arithmetic.

    Grid (chunks, HV). Mirrors `log_decay`, `write_strength` and `l2_normalise` of sleep_ops/reference.py.
    """
    i_c = tl.program_id(0)
    i_hv = tl.program_id(1)
    start, num_rows = locate_chunk(i_c, cu_seqlens, chunk_offsets, T, num_seqs, C)
    if num_rows <= 0:
        return
    o_i = tl.arange(0, C)
    m_i = o_i < num_rows
    o_gate = start * HV + i_hv

    G_dtype = G.dtype.element_ty
    b_G, b_beta = activate_gates(
        g + o_gate, beta + o_gate, A_log, dt_bias, i_hv, o_i, HV, HV, num_rows, BETA_SCALE, G_dtype
    )
    tl.store(G + o_gate + o_i * HV, b_G, mask=m_i)
    tl.store(beta_out + o_gate + o_i * HV, b_beta, mask=m_i)

    if A is not None:
        p_k = k + start * stride_k + i_hv // (HV // H) * K
        b_k = load_key_tile(p_k, o_i, tl.arange(0, BK), stride_k, num_rows, K, USE_L2NORM)
        b_A = delta_rule_inverse(b_k, b_G, b_beta, C, PRECISION)
        store_tile(A + o_gate * C, b_A, o_i, o_i, HV * C, num_rows, C)


@triton.jit(do_not_specialize=["num_rows"])
def inverse_norm_kernel(x, r, num_rows, stride, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
    """r = 1 / sqrt(sum x^2 + 1e-6) over the rows of x, [num_rows, H] float32, for BR rows of a head.

    Grid (tiles of rows, H). Mirrors `l2_normalise` of sleep_ops/reference.py.
    """
    start = tl.program_id(0).to(tl.int64) * BR
    i_h = tl.program_id(1)
    o_r = tl.arange(0, BR)
    left = num_rows - start
    b_r = inverse_norm(load_tile(x + start * stride + i_h * K, o_r, tl.arange(0, BK), stride, left, K))
    tl.store(r + start * H + i_h + o_r * H, b_r, mask=o_r < left)


@triton.jit(do_not_specialize=["T", "num_seqs"])
def gate_backward_kernel(
    dG,
    dbeta_out,
    g,
    beta_out,
    A_log,
    dt_bias,
    dg,
    dbeta,
    partial,
    cu_seqlens,
    chunk_offsets,
    T,
    num_seqs,
    HV: tl.constexpr,
    C: tl.constexpr,
    BH: tl.constexpr,
    BETA_SCALE: tl.constexpr,
):
    """Cotangents of one chunk's gate inputs, for BH value heads, from those of G (base 2) and of the active beta.

        dg_i = log2(e) sum_{j >= i} dG_j        with A_log: da = -exp(A_log) sigmoid(a + dt_bias) dg
        dbeta = dbeta_out, and with BETA_SCALE > 0 times beta_out (1 - beta_out / BETA_SCALE)

    A decay below LOWEST_LOG_DECAY gets none. Reads dG [rows, HV] in G's dtype, dbeta_out, beta_out [rows, HV] float32
    and g, the gate input. Writes dg, dbeta [rows, HV] and with A_log
    the chunk's part of the cotangents of A_log and dt_bias, partial [chunks, 2, HV] float32 (zero past the last chunk).

    Grid (chunks, tiles of heads). Mirrors the backward of `log_decay` and `write_strength` of sleep_ops/reference.py.
    """
    i_c = tl.program_id(0)
    start, num_rows = locate_chunk(i_c, cu_seqlens, chunk_offsets, T, num_seqs, C)
    o_i = tl.arange(0, C)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    o_gate = start * HV

    b_dG = load_tile(dG + o_gate, o_i, o_h, HV, num_rows, HV)
    b_dg = (tl.cumsum(b_dG, 0, reverse=True) * LOG2E).to(tl.float32)
    b_x = load_tile(g + o_gate, o_i, o_h, HV, num_rows, HV).to(tl.float32)
    if A_log is None:
        b_dg = decay_gradient(b_dg, b_x)
    else:
        m_h = o_h < HV
        b_rate = tl.exp(tl.load(A_log + o_h, mask=m_h, other=0.0).to(tl.float32))
        b_x += tl.load(dt_bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
        b_dg, b_drate = log_decay_gradient(b_dg, b_x, b_rate[None, :])
        p_partial = partial + i_c.to(tl.int64) * 2 * HV
        tl.store(p_partial + o_h, tl.sum(b_drate, 0), mask=m_h)
        tl.store(p_partial + HV + o_h, tl.sum(b_dg, 0), mask=m_h)
    store_tile(dg + o_gate, b_dg, o_i, o_h, HV, num_rows, HV)

    b_dbeta = load_tile(dbeta_out + o_gate, o_i, o_h, HV, num_rows, HV)
    if BETA_SCALE > 0:
        b_beta = load_tile(beta_out + o_gate, o_i, o_h, HV, num_rows, HV)
        b_dbeta *= b_beta * (1.0 - b_beta / BETA_SCALE)
    store_tile(dbeta + o_gate, b_dbeta, o_i, o_h, HV, num_rows, HV)


def decay_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the summed log decays for q, k, v of dtype. A sum over a chunk of resets is near -10^4: in float32 differences
    of two then have errors of 10^-3, less than a rounding of 16 bits but not of float32."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def chunk_prepare(
    k: Tensor,
    row_stride: int,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_offsets: Tensor | None,
    *,
    num_chunks: int,
    rule: str,
    use_qk_l2norm: bool,
    beta_scale: float,
    config: ChunkConfig,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """G [B, T, HV] in decay_dtype(k.dtype), activated beta, float32, and A [B, T, HV, C] in k's dtype (or None).

    k [B, T, H, K] with rows of contiguous heads, `row_stride` elements apart; g, beta [B, T, HV] contiguous;
    chunk_offsets int64 [num_seqs + 1], the number of chunks before each packed sequence.
    """
    B, T, H, K = k.shape
    HV = g.shape[2]
    G = torch.empty(B, T, HV, dtype=decay_dtype(k.dtype), device=k.device)
    beta_out = torch.empty(B, T, HV, dtype=torch.float32, device=k.device)
    A = torch.empty(B, T, HV, config.chunk, dtype=k.dtype, device=k.device) if rule == "delta" else None
    chunk_prepare_kernel[(num_chunks, HV)](
        k,
        g,
        beta,
        A_log,
        dt_bias,
        G,
        beta_out,
        A,
        cu_seqlens,
        chunk_offsets,
        T,
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        row_stride,
        H=H,
        HV=HV,
        K=K,
        C=config.chunk,
        BK=block_size(K),
        BETA_SCALE=beta_scale,
        USE_L2NORM=use_qk_l2norm,
        PRECISION="ieee" if k.dtype == torch.float32 else "tf32x3",
        num_warps=config.prepare.warps,
        num_stages=config.prepare.stages,
    )
    return G, beta_out, A


def inverse_norms(x: Tensor, row_stride: int) -> Tensor:
    """Inverse norms of q or k [B, T, H, K], whose rows lie as chunk_prepare's do: [B, T, H] float32."""
    B, T, H, K = x.shape
    r = torch.empty(B, T, H, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(B * T, NORM_ROWS), H)
    inverse_norm_kernel[grid](x, r, B * T, row_stride, H=H, K=K, BK=block_size(K), BR=NORM_ROWS, num_warps=4)
    return r


def gate_backward(
    dG: Tensor,
    dbeta_out: Tensor,
    g: Tensor,
    beta_out: Tensor,
    beta_dtype: torch.dtype,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_offsets: Tensor | None,
    *,
    num_chunks: int,
    beta_scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Cotangents of chunk_prepare's g, beta, A_log and dt_bias, in their dtypes, from those of its G and active beta.

    dG, dbeta_out and beta_out are [B, T, HV], the first in G's dtype, g is the gate input; all contiguous.
    """
    B, T, HV = g.shape
    dg = torch.empty_like(g)
    dbeta = torch.empty(B, T, HV, dtype=beta_dtype, device=g.device)
    partial = None
    if A_log is not None:
        partial = torch.empty(num_chunks, 2, HV, dtype=torch.float32, device=g.device)
    block_h = min(GATE_BLOCK_H, triton.next_power_of_2(HV))
    gate_backward_kernel[(num_chunks, triton.cdiv(HV, block_h))](
        dG,
        dbeta_out,
        g,
        beta_out,
        A_log,
        dt_bias,
        dg,
        dbeta,
        partial,
        cu_seqlens,
        chunk_offsets,
        T,
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        HV=HV,
        C=chunk,
        BH=block_h,
        BETA_SCALE=beta_scale,
        num_warps=4,
    )
    if A_log is None:
        return dg, dbeta, None, None
    return dg, dbeta, partial[:, 0].sum(0).to(A_log.dtype), partial[:, 1].sum(0).to(dt_bias.dtype)
