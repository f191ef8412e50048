"""What the trainer, the command line and the demo ask of a task."""

from typing import NamedTuple, Protocol

import torch
from torch import nn

IGNORE_INDEX = -100


class Batch(NamedTuple):
    """One batch of sequences.

    input_ids  int64 [B, T].
    labels     int64 [B, T]; labels[b, t] is what position t must predict (already shifted), -100 where nothing is.
    loss_mask  bool [B, T]; where the loss is taken. Always on the CPU: which windows sleep is decided from it, and a
               copy on the device would have to be waited for.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """Copy input_ids and labels to `device`, without waiting where the source is pinned."""
        return Batch(
            self.input_ids.to(device, non_blocking=True), self.labels.to(device, non_blocking=True), self.loss_mask
        )

    def split(self, size: int) -> list["Batch"]:
        """Its rows, `size` at a time."""
        return [Batch(*part) for part in zip(*(x.split(size) for x in self), strict=True)]

    def pin_memory(self) -> "Batch":
        return Batch(self.input_ids.pin_memory(), self.labels.pin_memory(), self.loss_mask)


class Task(Protocol):
    """A source of training and evaluation batches with its own measure of success.

    `batch` is a pure function of (seed, step, split): a resumed run sees exactly the batches it would have seen.
    Training and evaluation draw from streams that never meet, whatever their seeds.
    """

    name: str
    vocab_size: int
    seq_len: int
    window: int | None  # the natural one, if there is one
    metric: str  # the key of `evaluate`'s result that the run is judged by

    def batch(
        self, seed: int, step: int, size: int, device: torch.device | str = "cpu", *, split: str = "train"
    ) -> Batch: ...

    def evaluate(
        self,
        model: nn.Module,
        *,
        samples: int,
        batch_size: int,
        seed: int = 0,
        passes: int | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]: ...

    def chance(self, samples: int = 16384) -> dict[str, float]: ...

    def to_dict(self) -> dict: ...
