"""What the synthetic tasks share: reproducible random numbers, and a model's answers scored place by place."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sleep_ops.tasks.base import IGNORE_INDEX, Batch, Task

_SPLITS = {"train": 0, "eval": 1}


def check_integers(task: object, **lowest: int) -> None:
    """ValueError unless each of these settings of `task` is an integer not below the given one."""
    for name, low in lowest.items():
        value = getattr(task, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")


class Stream:
    """The random numbers of batch `step` of the stream (seed, split): a counter-based generator keyed by the three.

    Built on Philox's raw words alone, so a stream is the same with every version of numpy.
    """

    def __init__(self, seed: int, step: int, size: int, split: str):
        if split not in _SPLITS:
            raise ValueError(f"split: expected one of {tuple(_SPLITS)}, got {split!r}")
        if not (0 <= seed < 1 << 64 and 0 <= step < 1 << 63 and size >= 1):
            expected = "integers 0 <= seed < 2^64, 0 <= step < 2^63, size >= 1"
            raise ValueError(f"seed, step, size: expected {expected}, got {seed}, {step}, {size}")
        self._source = np.random.Philox(key=np.array([seed, _SPLITS[split] << 63 | step], dtype=np.uint64))

    def uniform(self, *shape: int) -> np.ndarray:
        """float64 in [0, 1), with 53 random bits."""
        return (self._source.random_raw(shape) >> np.uint64(11)) * 2.0**-53

    def below(self, total: int, *shape: int) -> np.ndarray:
        """int64 in [0, total), uniform to within total / 2^53."""
        return (self.uniform(*shape) * total).astype(np.int64)

    def distinct(self, total: int, rows: int, count: int) -> np.ndarray:
        """int64 [rows, count]: in each row `count` different integers of [0, total), uniform over ordered choices."""
        if total <= 4 * count:
            return self.uniform(rows, total).argsort(1)[:, :count]
        # Numbers that repeat an earlier one of their row are drawn again until none does. Renaming the integers changes
        # nothing in that, and some renaming takes any choice to any other: all are equally likely.
        drawn, unsettled = self.below(total, rows, count), np.arange(rows)
        while len(unsettled):
            part = drawn[unsettled]
            order = part.argsort(1, kind="stable")
            ranked = np.take_along_axis(part, order, 1)
            i, j = (ranked[:, 1:] == ranked[:, :-1]).nonzero()
            drawn[unsettled[i], order[i, j + 1]] = self.below(total, len(i))
            unsettled = unsettled[np.unique(i)]
        return drawn


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
