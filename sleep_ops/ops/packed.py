"""Packed sequences laid out side by side: [1, T, ...] with `cu_seqlens` <-> [num_seqs, M, ...]."""

import torch
from torch import Tensor


def longest_sequence(cu_seqlens: Tensor, tokens: int) -> int:
    """Length of the longest sequence; `tokens` where values can't be read (torch.compile, CUDA graph capture)."""
    if torch.compiler.is_compiling() or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return tokens
    return int(cu_seqlens.diff().max())


class PaddedSequences:
    """Index between a packed row of `tokens` tokens and a padded batch whose rows are its sequences.

    Rows are `longest` long, a bound on the sequences' lengths; without one they are as long as the longest sequence,
    which the host reads from `cu_seqlens` ([num_seqs + 1]), waiting for the device (see `longest_sequence`).
    """

    def __init__(self, cu_seqlens: Tensor, tokens: int, longest: int | None = None) -> None:
        borders = cu_seqlens.long()
        self.lengths = borders[1:] - borders[:-1]
        longest = longest_sequence(cu_seqlens, tokens) if longest is None else longest
        place = torch.arange(longest, device=cu_seqlens.device)
        self._token = (borders[:-1, None] + place).clamp(max=tokens - 1)
        self._filler = place >= self.lengths[:, None]
        token = torch.arange(tokens, device=cu_seqlens.device)
        self._row = torch.searchsorted(borders, token, right=True) - 1
        self._place = token - borders[self._row]

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:
        """[1, T, ...] -> [num_seqs, M, ...], `value` where a row has no token."""
        return x[0][self._token].masked_fill(self._filler.reshape(*self._filler.shape, *(1,) * (x.ndim - 2)), value)

    def unpad(self, x: Tensor) -> Tensor:
        """[num_seqs, M, ...] -> [1, T, ...]."""
        return x[self._row, self._place][None]
