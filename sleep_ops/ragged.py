"""Rows of different lengths: packed to the left of one padded tensor, and where they stand in an input.

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


def subtract(a: Sequence[int], b: Sequence[int]) -> Lengths:
    """Row by row difference."""
    return tuple(x - y for x, y in zip(a, b, strict=True))


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
    return take(x, subtract(lengths, keep), keep)


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


class Rows:
    """Where each row's real tokens stand in the input.

    lengths: real tokens of every row. index: int64 `[rows, max(lengths)]` into the flattened input, or None where the
    input is already left-aligned and full.
    """

    def __init__(self, shape: tuple[int, int], lengths: Lengths, index: Tensor | None, device: torch.device):
        self.shape, self.lengths, self.index, self.device = shape, lengths, index, device

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> "Rows":
        """Rows of input_ids `[B, T]`. Waits for the device once if there is a mask or cu_seqlens.

        Raises ValueError for both at once, wrong shapes, cu_seqlens that do not ascend from 0 to T, or no real token.
        """
        batch, width = input_ids.shape
        device = input_ids.device
        if attention_mask is None and cu_seqlens is None:
            return cls((batch, width), (width,) * batch, None, device)
        if attention_mask is not None and cu_seqlens is not None:
            raise ValueError("attention_mask: expected None with cu_seqlens, got both")
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask: expected shape {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
                )
            order, lengths = left_align(attention_mask.to(device))
            index = order + width * torch.arange(batch, device=device)[:, None]
        else:
            if batch != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype.is_floating_point:
                got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)} with B = {batch}"
                raise ValueError(f"cu_seqlens: expected integers [num_seqs + 1] with B = 1, got {got}")
            bounds = cu_seqlens.tolist()
            lengths = subtract(bounds[1:], bounds[:-1])
            if bounds[0] != 0 or bounds[-1] != width or min(lengths) < 0:
                raise ValueError(f"cu_seqlens: expected to ascend from 0 to {width}, got {bounds}")
            column = torch.arange(max(lengths), device=device)
            index = (tensor(bounds[:-1], device)[:, None] + column).clamp(max=width - 1)
        if max(lengths) == 0:
            raise ValueError("attention_mask: expected at least one real token, got none")
        if attention_mask is not None and min(lengths) == width:
            return cls((batch, width), lengths, None, device)
        return cls((batch, width), lengths, index[:, : max(lengths)], device)

    def pack(self, x: Tensor) -> Tensor:
        """x `[B, T]` -> left-aligned `[rows, max(lengths)]`, zero beyond the real entries."""
        if self.index is None:
            return x
        return x.flatten()[self.index].masked_fill(~self.real(self.lengths, x.device), 0)

    def real(self, lengths: Lengths, device: torch.device) -> Tensor:
        """Mask `[rows, max(lengths)]` of the real entries; `[1, width]` where all are."""
        column = torch.arange(max(lengths), device=device)
        if uniform(lengths):
            return (column < lengths[0])[None]
        return column < tensor(lengths, device)[:, None]

    def counts(self, mask: Tensor | None) -> list[Sequence[int]]:
        """Of each row: how many of its first t tokens are marked in mask `[B, T]`, for t = 0, ..., its length.

        Waits for the device once if the mask is on one.
        """
        if mask is None:
            return [[0] * (n + 1) for n in self.lengths]
        rows = self.pack(mask.to(self.device)).cpu() if self.index is not None else mask.cpu()
        rows = rows.bool() & self.real(self.lengths, rows.device)
        return torch.nn.functional.pad(rows.cumsum(1), (1, 0)).tolist()

    def unpack(self, pieces: list[tuple[Lengths, Lengths, Tensor]]) -> tuple[Tensor | None, Tensor | None]:
        """(starts, parts, values `[rows, max(parts), D]`) of some stretches -> (values `[B, T', D]`, columns `[T']`).

        A full batch gives the stretches one after another; padded or packed input all T columns, zero where there is no
        value.
        """
        if not pieces:
            return None, None
        if self.index is None and all(uniform(s) and uniform(n) for s, n, _ in pieces):
            columns = [torch.arange(s[0], s[0] + n[0], device=self.device) for s, n, _ in pieces]
            return torch.cat([x for _, _, x in pieces], dim=1), torch.cat(columns)
        size = self.shape[0] * self.shape[1]
        where, values = [], []
        for starts, parts, x in pieces:
            keep = self.real(parts, x.device).expand(x.shape[:2])
            index = self.index if self.index is not None else torch.arange(size, device=x.device).view(self.shape)
            where.append(take(index, starts, parts)[keep])
            values.append(x[keep])
        flat = values[0].new_zeros(size, values[0].shape[-1]).index_copy(0, torch.cat(where), torch.cat(values))
        return flat.view(*self.shape, -1), torch.arange(self.shape[1], device=self.device)
