"""What a kernel launch needs of its tensors: their device, rows that lie regularly, something for what is absent."""

import contextlib

import torch
from torch import Tensor

MAX_ROW_STRIDE = 2**31 // 64 - 2**16  # of a chunk of 64 tokens, and a row's width


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes x's GPU the current one, on which Triton launches; nothing for CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """x [B, T, heads, dim] as rows of contiguous heads a fixed number of elements apart, copied if it is not.

    Or if they are so far apart that offsets inside a chunk overflow 32 bits.
    """
    B, T, heads, dim = x.shape
    row_stride = x.stride(1) if T > 1 else x.stride(0)
    dense = (dim == 1 or x.stride(3) == 1) and (heads == 1 or x.stride(2) == dim)
    in_reach = row_stride <= MAX_ROW_STRIDE
    if dense and in_reach and (B == 1 or x.stride(0) == T * row_stride):
        return x, row_stride
    return x.contiguous(), heads * dim


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """Custom operators return tensors: an absent one is empty."""
    return like.new_empty(0) if x is None else x


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, copied where they are not contiguous; None stays None."""
    return [None if x is None else x.contiguous() for x in tensors]
