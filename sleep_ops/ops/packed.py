"""Packed sequences laid out as batches: [1, T, ...] with `cu_seqlens` <-> [n, M, ...], n sequences about M long."""

from collections.abc import Sequence

import torch
from torch import Tensor

SHORT = 16  # sequences of fewer tokens share one batch: their states cost more than their filler


def _readable(cu_seqlens: Tensor) -> bool:
    """Whether the host may look at the borders: not under torch.compile, CUDA graph capture, nor on "meta"."""
    capturing = cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (torch.compiler.is_compiling() or capturing or cu_seqlens.is_meta)


def longest_sequence(cu_seqlens: Tensor, tokens: int) -> int:
    """Length of the longest sequence; `tokens` where values can't be read (torch.compile, CUDA graph capture)."""
    return int(cu_seqlens.diff().max()) if _readable(cu_seqlens) else tokens


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of the sequences, those of alike lengths together: none of a group is 1.5 times another, or all short."""

    def size(n: int) -> int:
        octave = (n - 1).bit_length()
        return 2 * octave - (n <= 3 << (octave - 2))

    groups: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        groups.setdefault(size(length) if length > SHORT else 0, []).append(number)
    return [groups[key] for key in sorted(groups)]


def _split(x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return x.split(sizes) if len(sizes) > 1 else (x,)


def _join(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


class PackedSequences:
    """Index between a packed row of `tokens` tokens and batches whose rows are its sequences.

    Sequences of alike lengths make a batch, each row as long as its longest, so that filler is at most half of the
    tokens (and what SHORT allows). The host reads the lengths from `cu_seqlens` ([num_seqs + 1]), waiting for the
    device. Where it can't (see `longest_sequence`), or `longest`, a bound on the lengths, spares a GPU the wait, there
    is one batch, with rows of `longest` or `tokens`.
    """

    def __init__(self, cu_seqlens: Tensor, tokens: int, longest: int | None = None) -> None:
        device, borders = cu_seqlens.device, cu_seqlens.long()
        starts, lengths = borders[:-1], borders.diff()
        if _readable(cu_seqlens) and (longest is None or device.type == "cpu"):
            known = lengths.tolist()
            groups = [(torch.tensor(n, device=device), max(1, *(known[i] for i in n))) for n in alike(known)]
        else:
            groups = [(torch.arange(lengths.shape[0], device=device), tokens if longest is None else longest)]
        order = torch.cat([numbers for numbers, _ in groups])
        self._sequence, self._row = order, torch.argsort(order)
        self.shapes = [(numbers.shape[0], length) for numbers, length in groups]

        places = [torch.arange(length, device=device) for _, length in groups]
        token = [(starts[n][:, None] + p).flatten() for (n, _), p in zip(groups, places, strict=True)]
        filler = [(p >= lengths[n][:, None]).flatten() for (n, _), p in zip(groups, places, strict=True)]
        token, self._filler = torch.cat(token), torch.cat(filler)
        self._token = token.clamp(max=tokens - 1)
        # where each token went; filler's notes are cut off
        number = torch.arange(token.shape[0], device=device)
        place = token.new_zeros(tokens + 1).scatter(0, token.masked_fill(self._filler, tokens), number)
        self._place = place[:tokens]

    def pad(self, x: Tensor, value: float = 0.0) -> list[Tensor]:
        """[1, T, ...] -> batches [n, M, ...], `value` where a row has no token."""
        filler = self._filler.reshape(-1, *(1,) * (x.ndim - 2))
        if len(self.shapes) == 1:  # no view: torch.compile gets the strides of its gradient wrong
            (shape,) = self.shapes
            return [x[0][self._token.unflatten(0, shape)].masked_fill(filler.unflatten(0, shape), value)]
        rows = x[0].index_select(0, self._token).masked_fill(filler, value)
        batches = _split(rows, [count * length for count, length in self.shapes])
        return [rows.unflatten(0, shape) for rows, shape in zip(batches, self.shapes, strict=True)]

    def unpad(self, batches: Sequence[Tensor]) -> Tensor:
        """Batches [n, M, ...] -> [1, T, ...]."""
        return _join([x.flatten(0, 1) for x in batches]).index_select(0, self._place)[None]

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """What each sequence has, [num_seqs, ...] -> batches [n, ...]."""
        return _split(x.index_select(0, self._sequence), [count for count, _ in self.shapes])

    def join(self, batches: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        return _join(batches).index_select(0, self._row)
