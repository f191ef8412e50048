"""What the trainer, the command line and the demo ask of a task."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import nn

IGNORE_INDEX = -100


class Batch(NamedTuple):
    """One batch of sequences.

    input_ids       int64 [B, T].
    labels          int64 [B, T]; labels[b, t] is what position t must predict (already shifted), -100 where nothing is.
    loss_mask       bool [B, T]; where the loss is taken. Always on the CPU: which windows sleep is decided from it, and
                    a copy on the device would have to be waited for.
    attention_mask  bool [B, T], which tokens are real; None where all are.
    windows_by      "tokens" or "positions": what fills a window, see `SleepingModel.forward`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    attention_mask: torch.Tensor | None = None
    windows_by: str = "tokens"

    def to(self, device: torch.device | str) -> "Batch":
        """Copy all but loss_mask to `device`, without waiting where the source is pinned."""
        return self._each(lambda x: x if x is self.loss_mask else x.to(device, non_blocking=True))

    def split(self, size: int) -> list["Batch"]:
        """Its rows, `size` at a time."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self.input_ids), size)]

    def rows(self, which: slice) -> "Batch":
        return self._each(lambda x: x[which])

    def columns(self, which: slice) -> "Batch":
        return self._each(lambda x: x[:, which])

    def pin_memory(self) -> "Batch":
        return self._each(lambda x: x if x is self.loss_mask else x.pin_memory())

    def arguments(self) -> dict:
        """All but input_ids, as a model takes it; what only some models take is left out where it says nothing."""
        given: dict = {"labels": self.labels, "loss_mask": self.loss_mask}
        if self.attention_mask is not None:
            given["attention_mask"] = self.attention_mask
        if self.windows_by != "tokens":
            given["windows_by"] = self.windows_by
        return given

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return Batch(*(change(x) if isinstance(x, torch.Tensor) else x for x in self))  # type: ignore[arg-type]


class Task(Protocol):
    """A source of training and evaluation batches with its own measure of success.

    `batch` is a pure function of (seed, step, split): a resumed run sees exactly the batches it would have seen.
    Training and evaluation draw from streams that never meet, whatever their seeds.

    A task may have `stages` of difficulty, so many, that training rises through; its `batch` then takes stage=, 0 ..
    stages - 1, that of a training batch, and None is the last.
    """

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def seq_len(self) -> int: ...

    @property
    def window(self) -> int | None:
        """The natural one, if there is one."""

    @property
    def metric(self) -> str:
        """The key of `evaluate`'s result that the run is judged by; larger is better, but for "loss"."""

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
        passes: int | float | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]: ...

    def chance(self, samples: int = 16384) -> dict[str, float]: ...

    def to_dict(self) -> dict: ...
