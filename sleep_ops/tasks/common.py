"""What the synthetic tasks share: batches, and a model's answers scored place by place."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sleep_ops.checks import expect
from sleep_ops.model.loss import scored
from sleep_ops.model.sleeping import find_sleeping
from sleep_ops.tasks.base import IGNORE_INDEX, Batch, Task


def as_batch(input_ids: np.ndarray, labels: np.ndarray, device: torch.device | str) -> Batch:
    """A batch of int64 arrays [B, T]; the loss is taken wherever there is a label."""
    # Compared in numpy: torch would wake its threads for it, which on a busy machine takes longer than all the rest.
    return Batch(*map(torch.from_numpy, (input_ids, labels, labels != IGNORE_INDEX))).to(device)  # type: ignore[arg-type]


def check_first(task: object, name: str, least: int, last: int) -> None:
    """ValueError unless the field `name`, where a curriculum begins, is None or an integer from `least` to `last`."""
    first = getattr(task, name)
    inside = type(first) is int and least <= first <= last
    expect(first is None or inside, name, f"None, or an integer in [{least}, {last}]", first)


def stages_from(first: int | None, last: int) -> int:
    """Stages of a curriculum that begins at `first` and ends at `last`, one more each."""
    return 1 if first is None else last - first + 1


def at_stage(stage: int | None, first: int | None, last: int) -> int:
    """Where such a curriculum is at `stage`, 0 .. stages - 1 (None: at its end). ValueError for another one."""
    stages = stages_from(first, last)
    expect(stage is None or 0 <= stage < stages, "stage", f"None, or an integer in [0, {stages - 1}]", stage)
    return last if stage is None else last - stages + 1 + stage


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
    found = []
    with evaluating(model):
        for step, start in enumerate(range(0, samples, batch_size)):
            batch = task.batch(seed, step, min(batch_size, samples - start), split="eval")
            right, nats = score_batch(model, batch, passes=passes, device=device)
            found.append((batch.input_ids, batch.labels, batch.loss_mask, right, nats))
    return Scores(*(torch.cat(part) for part in zip(*found, strict=True)))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode inside, and as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def score_batch(
    model: nn.Module, batch: Batch, *, passes: int | float | None, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """`right` and `nats` of `Scores` for a batch on the CPU.

    A model that sleeps makes logits of the tokens with a label alone, some at a time. One with a `score_batch` of its
    own is asked for it: processes may share out the rows.
    """
    if hasattr(model, "score_batch"):
        return model.score_batch(batch, passes=passes, device=device)
    asked, sent, owner = batch.loss_mask, batch.to(device), find_sleeping(model)
    right, nats = torch.zeros_like(asked), torch.zeros(asked.shape, dtype=torch.float64)
    if not asked.any():
        return right, nats
    given: dict = sent.arguments() | {"passes": passes, "return_state": False}
    if owner is not None:
        given |= {"labels": None, "predict": lambda h: h}
    out = model(sent.input_ids, **given)
    column = torch.zeros(asked.shape[1], dtype=torch.long)
    column[out.positions.cpu()] = torch.arange(len(out.positions))
    row, place = asked.nonzero(as_tuple=True)
    x = out.logits[row.to(out.logits.device), column[place].to(out.logits.device)]
    head, size = (lambda logits: logits, x.shape[-1]) if owner is None else (owner.predict, owner.vocab_size)
    found = scored(head, x, batch.labels.cpu()[asked].to(x.device), vocab_size=size)
    right[asked], nats[asked] = found[0].cpu(), found[1].double().cpu()
    return right, nats


def by_level(name: str, values: Tensor, levels: Tensor, choices: Sequence[int]) -> dict[str, float]:
    """The mean of `values` at each of the `levels` (same shape), as name_level; NaN where a level did not occur."""
    return {f"{name}_{level}": values[levels == level].double().mean().item() for level in choices}
