"""Rows of different lengths, packed to the left of one padded tensor.

A `[B, S, ...]` tensor holds `lengths[b]` real entries of row `b` at its left; what lies right of them is filler nobody
reads. Lengths are host integers, so these helpers never wait for the device; equal lengths cost a plain slice or `cat`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Lengths = tuple[int, ...]


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`. From the CPU to a GPU through pinned memory: a copy out of any other makes the host wait."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def tensor(values: Sequence, device: torch.device) -> Tensor:
    """Host numbers as a tensor on `device`, without waiting for it (but no part of a CUDA graph)."""
    return send(torch.tensor(values), device)


def uniform(lengths: Sequence[int]) -> bool:
    """True when every row has the same length."""
    return min(lengths) == max(lengths)


def add(a: Sequence[int], b: Sequence[int]) -> Lengths:
    """Row by row sum of two tuples of lengths."""
    return tuple(x + y for x, y in zip(a, b, strict=True))


def take(x: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Entries `starts[b] : starts[b] + lengths[b]` of every row. x `[B, S, ...]` -> `[B, max(lengths), ...]`."""
    if max(lengths) == 0:
        return x.new_empty(x.shape[0], 0, *x.shape[2:])
    if uniform(starts) and uniform(lengths):
        return x[:, starts[0] : starts[0] + lengths[0]]
    width = max(lengths)
    first = tensor(starts, x.device)[:, None]
    index = (first + torch.arange(width, device=x.device)).clamp(max=x.shape[1] - 1)
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def take_last(x: Tensor, lengths: Sequence[int], keep: Sequence[int]) -> Tensor:
    """The last `keep[b]` of row b's `lengths[b]` entries. x `[B, S, ...]` -> `[B, max(keep), ...]`."""
    return take(x, tuple(n - m for n, m in zip(lengths, keep, strict=True)), keep)


def append(old: Tensor, old_lengths: Sequence[int], new: Tensor, new_lengths: Sequence[int]) -> Tensor:
    """Row by row concatenation. old `[B, S, ...]`, new `[B, T, ...]` -> `[B, max(old_lengths + new_lengths), ...]`."""
    if max(old_lengths) == 0:
        return new[:, : max(new_lengths)]
    if uniform(old_lengths) and uniform(new_lengths):
        return torch.cat([old[:, : old_lengths[0]], new[:, : new_lengths[0]]], dim=1)
    both = torch.cat([old, new], dim=1)
    held = tensor(old_lengths, old.device)[:, None]
    column = torch.arange(max(add(old_lengths, new_lengths)), device=old.device)
    index = torch.where(column < held, column, old.shape[1] + column - held).clamp(max=both.shape[1] - 1)
    return both[torch.arange(both.shape[0], device=old.device)[:, None], index]


def left_align(mask: Tensor) -> tuple[Tensor, Lengths]:
    """Order that moves every row's real tokens to its left, keeping their order.

    mask `[B, T]` (1 = real token) -> (index int64 `[B, T]`, lengths). Waits for the device once.
    """
    mask = mask.bool()
    index = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)
    return index, tuple(mask.sum(1).tolist())
