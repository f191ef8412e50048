"""What the synthetic tasks share: batches, and a model's answers scored place by place."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sleep_ops.tasks.base import IGNORE_INDEX, Batch, Task


def as_batch(input_ids: np.ndarray, labels: np.ndarray, device: torch.device | str) -> Batch:
    """A batch of int64 arrays [B, T]; the loss is taken wherever there is a label."""
    # Compared in numpy: torch would wake its threads for it, which on a busy machine takes longer than all the rest.
    return Batch(*map(torch.from_numpy, (input_ids, labels, labels != IGNORE_INDEX))).to(device)  # type: ignore[arg-type]


class Scores(NamedTuple):
    """What a model made of evaluation sequences, on the CPU.

    input_ids, labels: int64 [samples, T]. asked: bool [samples, T], where there is a label. right: bool [samples, T],
    asked and predicted by the largest logit. nats: float64 [samples, T], the loss there, zero elsewhere.
    """

    input_ids: Tensor
    labels: Tensor
    asked: Tensor
    right: Tensor
    nats: Tensor

    def summary(self) -> dict[str, float]:
        """exact (all labels of a sequence right), exact_stderr (its binomial standard error), per_label, loss (nats
        per label) and samples."""
        samples, labels = len(self.asked), self.asked.sum().item()
        exact = (self.right | ~self.asked).all(1).double().mean().item()
        return {
            "exact": exact,
            "exact_stderr": (exact * (1 - exact) / samples) ** 0.5,
            "per_label": self.right.sum().item() / labels,
            "loss": self.nats.sum().item() / labels,
            "samples": float(samples),
        }


@torch.no_grad()
def score(
    task: Task,
    model: nn.Module,
    *,
    samples: int,
    batch_size: int,
    seed: int,
    passes: int | float | None,
    device: torch.device | str,
) -> Scores:
    """Run `model` over `samples` sequences of the evaluation stream.

    Answers that are part of the input are fed as they should be, which changes nothing in `exact`: greedy decoding is
    right everywhere exactly when it is right everywhere given the right prefix.
    """
    if samples < 1 or batch_size < 1:
        raise ValueError(f"samples and batch_size: expected integers >= 1, got {samples} and {batch_size}")
    was_training, found = model.training, []
    model.eval()
    try:
        for step, start in enumerate(range(0, samples, batch_size)):
            batch = task.batch(seed, step, min(batch_size, samples - start), split="eval")
            sent, asked = batch.to(device), batch.loss_mask
            out = model(sent.input_ids, **sent.arguments(), passes=passes, return_state=False)
            column = torch.zeros(asked.shape[1], dtype=torch.long)
            column[out.positions.cpu()] = torch.arange(len(out.positions))
            row, place = asked.nonzero(as_tuple=True)
            logits = out.logits[row.to(out.logits.device), column[place].to(out.logits.device)].float()
            target = batch.labels[asked]
            right, nats = torch.zeros_like(asked), torch.zeros(asked.shape, dtype=torch.float64)
            right[asked] = logits.argmax(-1).cpu() == target
            nats[asked] = F.cross_entropy(logits, target.to(logits.device), reduction="none").double().cpu()
            found.append((batch.input_ids, batch.labels, asked, right, nats))
    finally:
        model.train(was_training)
    return Scores(*(torch.cat(part) for part in zip(*found, strict=True)))


def by_level(name: str, values: Tensor, levels: Tensor, choices: Sequence[int]) -> dict[str, float]:
    """The mean of `values` at each of the `levels` (same shape), as name_level; NaN where a level did not occur."""
    return {f"{name}_{level}": values[levels == level].double().mean().item() for level in choices}
