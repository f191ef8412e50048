"""Types of PTX as those of numpy, and arithmetic that numpy has no operator for."""

import numpy as np

B1, B2, B4, B8 = np.uint8, np.uint16, np.uint32, np.uint64
F2, F4, F8 = np.float16, np.float32, np.float64
RAW = {1: B1, 2: B2, 4: B4, 8: B8}
TYPES = {"pred": np.bool_, "bf16": B2, "f16": F2, "f32": F4, "f64": F8, "bf16x2": B4, "f16x2": B4}
for _bits in (8, 16, 32, 64):
    TYPES |= {f"b{_bits}": RAW[_bits // 8], f"u{_bits}": RAW[_bits // 8], f"s{_bits}": np.dtype(f"i{_bits // 8}").type}


def from_bf16(x):
    return (x.astype(B4) << B4(16)).view(F4)


def to_bf16(x):
    bits = np.ascontiguousarray(x).view(B4)
    rounded = ((bits + B4(0x7FFF) + ((bits >> B4(16)) & B4(1))) >> B4(16)).astype(B2)
    return np.where(np.isnan(x), B2(0x7FFF), rounded)


def to_f16(x):
    return x.astype(F2).view(B2)


def unpacked(x, type_):
    """The two numbers of a word of bf16x2 or f16x2: [...] to float64 [..., 2]."""
    halves = np.ascontiguousarray(x)[..., None].view(B2)
    return (from_bf16(halves) if type_ == "bf16x2" else halves.view(F2)).astype(F8)


def packed(x, type_):
    """The inverse, rounded by way of float32."""
    halves = (to_bf16 if type_ == "bf16x2" else to_f16)(x.astype(F4))
    return np.ascontiguousarray(halves).view(B4)[..., 0]


def to_tf32(x):
    """To the nearest, ties away from zero."""
    return np.where(np.isfinite(x), ((x.view(B4) + B4(0x1000)) & B4(0xFFFFE000)).view(F4), x)


def to_integer(x, dtype):
    bounds = np.iinfo(dtype)
    return np.where(np.isnan(x), 0, np.clip(x.astype(F8), bounds.min, bounds.max)).astype(dtype)


def flush(x):
    """Denormal numbers to zero."""
    return np.where(np.abs(x) < F4(2.0**-126), F4(0), x)


def divide(a, b):
    """Quotient towards zero, and remainder with the sign of a."""
    b = np.where(b == 0, type(b.flat[0] if hasattr(b, "flat") else b)(1), b)
    quotient = a // b
    if a.dtype.kind == "i":
        quotient = quotient + ((a % b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)
    return quotient, a - quotient * b


def multiply_high(a, b):
    low, thirty_two = B8(0xFFFFFFFF), B8(32)
    a0, a1, b0, b1 = a & low, a >> thirty_two, b & low, b >> thirty_two
    middle = a1 * b0 + ((a0 * b0) >> thirty_two)
    return a1 * b1 + (middle >> thirty_two) + (((middle & low) + a0 * b1) >> thirty_two)


def permute_bytes(a, b, selector):
    both = (b.astype(B8) << B8(32)) | a
    result = np.zeros_like(a)
    for i in range(4):
        chosen = (selector >> B4(4 * i)) & B4(15)
        byte = ((both >> (B8(8) * (chosen & B4(7)))) & B8(255)).astype(B4)
        byte = np.where(chosen & B4(8), np.where(byte & B4(128), B4(255), B4(0)), byte)
        result |= byte << B4(8 * i)
    return result
