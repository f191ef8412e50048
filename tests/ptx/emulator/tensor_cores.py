"""Fragments and layouts of the tensor cores' instructions, after "Warp level" and "Asynchronous warpgroup level matrix
instructions" of NVIDIA's PTX ISA."""

import numpy as np
from ptx.emulator.arithmetic import B2, B4, F2, F4, from_bf16
from ptx.emulator.parse import Unsupported


def elements(words, type_):
    """The numbers in an array of 32-bit words: [...] to float32 [..., 2], or [..., 1] for tf32 (low bits cut off)."""
    words = np.ascontiguousarray(words)
    if type_ == "tf32":
        return (words & B4(0xFFFFE000)).view(F4)[..., None]
    halves = words.view(B2).reshape(*words.shape, 2)
    return from_bf16(halves) if type_ == "bf16" else halves.view(F2).astype(F4)


def left_fragment(registers, type_):
    """A [warps, 16, k] of mma and wgmma from two registers for each half of 8 (tf32: 4) columns: rows r, then r + 8."""
    x = elements(np.stack(registers), type_)  # [2 halves of k, 2 halves of rows, warps, 8 rows, 4, 1 or 2]
    x = x.reshape(len(registers) // 2, 2, -1, 8, 4, x.shape[-1])
    return x.transpose(2, 1, 3, 0, 4, 5).reshape(x.shape[2], 16, -1)


def mma(type_, a, b, c):
    """c + a b of every warp, rows of 32-bit words: the fragments of m16n8k(4, 8, 16)."""
    left = left_fragment(a, type_)
    right = elements(np.stack(b), type_)
    right = right.reshape(len(b), -1, 8, 4, right.shape[-1]).transpose(1, 0, 3, 4, 2).reshape(len(left), -1, 8)
    sums = np.stack(c).view(F4).reshape(2, 2, -1, 8, 4)  # [2 halves of rows, 2 columns, warps, 8 rows, 4]
    product = (left @ right).reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    return (sums + product).reshape(4, -1).view(B4)


SWIZZLE = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}  # bytes of a row, and address bits from 7 on that move to 4


def descriptor_offsets(descriptor: int, rows: int, row_bytes: int, size: int, transposed: bool) -> np.ndarray:
    """Addresses [rows, k] of a wgmma operand's elements of `size` bytes, row_bytes of them in a row.

    PTX ISA, "Matrices in shared memory": eight rows of 16 bytes are a core matrix; the swizzle is of addresses.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> 16) & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    if (descriptor >> 49) & 7:
        raise Unsupported("a wgmma descriptor with a base offset")
    width, mask = SWIZZLE[descriptor >> 62]
    i, k = np.arange(rows)[:, None], np.arange(row_bytes // size)[None, :]
    if not transposed:
        k = k * size
        if mask:
            place = i % 8 * width + i // 8 * stride + k
        else:
            place = i % 8 * 16 + i // 8 * stride + k % 16 + k // 16 * leading
    else:
        per_row = width // size
        if mask:
            place = i % per_row * size + i // per_row * leading + k % 8 * width + k // 8 * stride
        else:
            place = i % per_row * size + i // per_row * stride + k % 8 * 16 + k // 8 * leading
    place = place + start
    return place ^ (((place >> 7) & mask) << 4)
