"""Evaluation without the logits of a text: the same answers and losses, however few tokens the head sees at a time."""

import pytest
import torch
import torch.nn.functional as F
from small import hybrid
from test_adapter_loading import plain

from sleep_ops.adapters.loading import load_model
from sleep_ops.model import loss
from sleep_ops.tasks.base import Batch
from sleep_ops.tasks.common import score_batch

VOCAB = 11


def batch(rows=3, columns=17):
    """Padding at the left of one row, labels here and there, one row without any."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(0, VOCAB, (2, rows, columns), generator=generator)
    mask = torch.ones(rows, columns, dtype=torch.bool)
    mask[1, :4] = False
    asked = (torch.rand(rows, columns, generator=generator) < 0.4) & mask
    asked[2] = False
    labels[~asked] = -100
    return Batch(ids, labels, asked, mask)


@pytest.mark.parametrize("family", ["hybrid", "qwen3_5", "ouro"])
def test_scores_are_those_of_the_logits(family, tmp_path, monkeypatch):
    if family == "hybrid":
        model = hybrid(vocab_size=VOCAB, passes=2).float()
    else:
        model = load_model(plain(tmp_path, family), passes=2, window=6)
    given = batch()
    model.eval()
    logits = model(given.input_ids, attention_mask=given.attention_mask, return_state=False).logits.double()
    asked = given.loss_mask
    expected = F.cross_entropy(logits[asked], given.labels[asked], reduction="none")
    seen, head = [], loss.scored

    def counted(predict, h, targets, *, vocab_size):
        def spy(x):
            seen.append(len(x))
            return predict(x)

        return head(spy, h, targets, vocab_size=vocab_size)

    monkeypatch.setattr("sleep_ops.tasks.common.scored", counted)
    for tokens in (10**6, 5):
        vocabulary = logits.shape[-1]
        monkeypatch.setattr(loss, "CHUNK_BYTES", tokens * vocabulary * 4)
        seen.clear()
        right, nats = score_batch(model, given, passes=None, device="cpu")
        assert sum(seen) == asked.sum() and max(seen) <= tokens  # no logits but of tokens with a label
        torch.testing.assert_close(nats[asked], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(right[asked], logits[asked].argmax(-1) == given.labels[asked])
        assert not right[~asked].any() and not nats[~asked].any()


def test_a_batch_without_labels_has_no_scores():
    empty = batch()._replace(loss_mask=torch.zeros(3, 17, dtype=torch.bool), labels=torch.full((3, 17), -100))
    right, nats = score_batch(hybrid(vocab_size=VOCAB).float().eval(), empty, passes=None, device="cpu")
    assert not right.any() and not nats.any() and right.shape == nats.shape == (3, 17)


def test_a_head_of_ones_own():
    """`predict` makes logits and loss; the identity gives what the model's head would see."""
    model, given = hybrid(vocab_size=VOCAB, passes=2), batch()
    sent = {"attention_mask": given.attention_mask, "return_state": False}
    h = model(given.input_ids, predict=lambda h: h, **sent).logits
    assert h.shape == (3, 17, model.config.hidden_size)
    logits = model(given.input_ids, **sent).logits
    real = given.attention_mask
    torch.testing.assert_close(model.predict(h)[real], logits[real])
    halved = model(given.input_ids, given.labels, given.loss_mask, predict=lambda h: model.predict(h) / 2, **sent)
    expected = F.cross_entropy(logits[given.loss_mask] / 2, given.labels[given.loss_mask])
    torch.testing.assert_close(halved.loss, expected)
    alone = model(
        given.input_ids, given.labels, given.loss_mask, predict=lambda h: model.predict(h) / 2,
        return_logits=False, **sent,
    )  # fmt: skip
    torch.testing.assert_close(alone.loss, expected)
