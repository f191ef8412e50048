"""Models of no weights for the tests of tasks, and what every task's stream of batches must hold to."""

import dataclasses
import json
from types import SimpleNamespace

import torch
from torch import nn

from sleep_ops.tasks import IGNORE_INDEX, build_task


class Answering(nn.Module):
    """Gives the right answers, but not where `wrong(input_ids, labels)`, bool [B, T], says so.

    trim: logits from this column on only, as of a model that predicts in its last windows alone. masks: every
    attention_mask it was given.
    """

    def __init__(self, vocab_size, wrong=None, trim=0):
        super().__init__()
        self.vocab_size, self.wrong, self.trim, self.masks = vocab_size, wrong, trim, []

    def answers(self, input_ids, labels):
        answers = labels.clamp(min=0)
        if self.wrong is not None:
            answers = torch.where(self.wrong(input_ids, labels), (answers + 1) % self.vocab_size, answers)
        return answers

    def forward(
        self,
        input_ids,
        labels=None,
        loss_mask=None,
        attention_mask=None,
        windows_by="tokens",
        passes=None,
        return_state=True,
    ):
        assert not self.training
        assert loss_mask.device.type == "cpu" and torch.equal(loss_mask, labels.cpu() != IGNORE_INDEX)
        self.masks.append(attention_mask)
        logits = nn.functional.one_hot(self.answers(input_ids, labels), self.vocab_size)[:, self.trim :] * 30.0
        positions = torch.arange(self.trim, input_ids.shape[1])
        return SimpleNamespace(logits=logits, positions=positions, loss=None, state=None)


class Guessing(Answering):
    """Answers with tokens that `choose(input_ids)`, int64 [B, T], picks."""

    def __init__(self, vocab_size, choose):
        super().__init__(vocab_size)
        self.choose = choose

    def answers(self, input_ids, labels):
        return self.choose(input_ids)


def check_stream(task):
    """Shapes, dtypes and places; batches that depend on (seed, step, split) alone and differ in each; a round trip."""
    first = task.batch(1, 5, 8)
    assert first.input_ids.shape == first.labels.shape == first.loss_mask.shape == (8, task.seq_len)
    assert first.input_ids.dtype == first.labels.dtype == torch.int64 and first.loss_mask.dtype == torch.bool
    assert torch.equal(first.loss_mask, first.labels != IGNORE_INDEX)
    assert 0 <= first.input_ids.min() and max(first.input_ids.max(), first.labels.max()) < task.vocab_size
    again = build_task(json.loads(json.dumps(task.to_dict())))
    assert again == task
    again.batch(0, 0, 3)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again.batch(1, 5, 8)[:3], strict=True))
    for other in (task.batch(1, 6, 8), task.batch(2, 5, 8), task.batch(1, 5, 8, split="eval")):
        assert not torch.equal(first.input_ids, other.input_ids)
    rows = {
        split: {tuple(row) for step in range(8) for row in task.batch(0, step, 64, split=split).input_ids.tolist()}
        for split in ("train", "eval")
    }
    assert not rows["train"] & rows["eval"]
    assert dataclasses.is_dataclass(task) and task.metric in task.evaluate(Answering(task.vocab_size), samples=8)
    assert {"uniform", "majority"} <= task.chance().keys()
