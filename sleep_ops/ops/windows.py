"""Windows of every sequence, laid out as sequences of their own so that all of them run at once.

A tensor [B, T, ...] (or [1, T, ...] packed by `cu_seqlens`) becomes rows of which every window is one sequence: a batch
of windows where they are all full, a packed row with the windows' borders where they are not. No token is copied.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sleep_ops.ops.packed import longest_sequence


class Windows:
    """Windows of at most `window` tokens (None: one per sequence), counted from each sequence's start.

    num_seqs: sequences. cu_seqlens: borders of the windows, None where they lie as a batch. longest: a bound on their
    tokens, None where none is known but T. steps: the most windows a sequence has. present: bool [num_seqs, steps],
    which of them have tokens, or None where all have. With packed sequences of more than one window the host reads the
    longest one's length, waiting for the device; where it can't (torch.compile, CUDA graph capture) steps is the bound
    T allows.
    """

    cu_seqlens: Tensor | None
    _present: Tensor | None
    _table: Tensor | None

    def __init__(self, batch: int, tokens: int, window: int | None, cu_seqlens: Tensor | None, device: torch.device):
        self.shape, self.cu_seqlens, self._present, self._table = (batch, tokens), None, None, None
        packed = cu_seqlens is not None
        self.num_seqs = cu_seqlens.shape[0] - 1 if packed else batch
        self.window = tokens if window is None else min(window, tokens)
        self.steps = -(-tokens // self.window)
        self.longest = None if packed and self.steps == 1 else self.window
        if packed and self.steps == 1:
            self.cu_seqlens = cu_seqlens
        elif packed:
            self._divide(cu_seqlens, tokens)
        elif tokens % self.window:
            first = torch.arange(batch, device=device)[:, None] * tokens
            starts = first + torch.arange(self.steps, device=device) * self.window
            self.cu_seqlens = torch.cat([starts.flatten(), starts.new_full((1,), batch * tokens)])

    def _divide(self, cu_seqlens: Tensor, tokens: int) -> None:
        """Borders of at most T // window + num_seqs windows, unused ones empty at the end, and where each stands.

        One more is never used: it stands where a sequence has no window.
        """
        device, borders = cu_seqlens.device, cu_seqlens.long()
        num_seqs = self.num_seqs
        counts = (borders.diff() + self.window - 1) // self.window
        ends = counts.cumsum(0)
        first = ends - counts
        number = torch.arange(tokens // self.window + num_seqs + 1, device=device)
        sequence = torch.searchsorted(ends, number, right=True).clamp(max=num_seqs - 1)
        starts = borders[sequence] + (number - first[sequence]) * self.window
        starts = torch.where(number < ends[-1], starts, tokens)
        self.cu_seqlens = torch.cat([starts, starts.new_full((1,), tokens)])

        longest = longest_sequence(cu_seqlens, tokens)
        self.longest, self.steps = min(self.window, longest), -(-longest // self.window)
        step = torch.arange(self.steps, device=device)
        self._present = step < counts[:, None]
        self._table = torch.where(self._present, first[:, None] + step, number.shape[0] - 1)
        self._place = (number - first[sequence]).clamp(0, self.steps - 1), sequence

    @property
    def is_whole(self) -> bool:
        """Whether every sequence is one window, at its own place."""
        return self.steps == 1 and self._table is None

    @property
    def present(self) -> Tensor | None:
        # An ordinary pass over packed sequences never asks, and launches nothing for it. Kept, for a backward that asks
        # again: the caller may have written other borders by then.
        if self._present is None and self.is_whole and self.cu_seqlens is not None:
            self._present = (self.cu_seqlens.diff() > 0)[:, None]
        return self._present

    def split(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [windows, window, ...], or [1, B * T, ...] with this layout's cu_seqlens."""
        if self.cu_seqlens is None:
            return x.reshape(-1, self.window, *x.shape[2:])
        return x.reshape(1, -1, *x.shape[2:])

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        return x.reshape(*self.shape, *x.shape[2:])

    def by_step(self, x: Tensor) -> tuple[Tensor, ...]:
        """[windows, ...] -> the first window of every sequence, the second, ...: `steps` tensors [num_seqs, ...]."""
        if self._table is not None:
            return x[self._table].unbind(1)
        return x.unflatten(0, (-1, self.steps)).unbind(1) if self.steps > 1 else (x,)

    def by_window(self, xs: Sequence[Tensor]) -> Tensor:
        """The inverse of `by_step`; what an unused window gets is of no consequence."""
        if self._table is not None:
            return torch.stack(tuple(xs))[self._place]
        return torch.stack(tuple(xs), 1).flatten(0, 1) if self.steps > 1 else xs[0]
