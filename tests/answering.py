"""Models of no weights for the tests of tasks."""

from types import SimpleNamespace

import torch
from torch import nn

from sleep_ops.tasks import IGNORE_INDEX


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
