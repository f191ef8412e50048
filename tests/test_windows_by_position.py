"""Windows that end at columns, whatever of them is left padding."""

import functools

import pytest
import small
import torch
from judge import exact
from small import WINDOW as L
from small import tokens

from sleep_ops import SleepSession

T = 18

tiny = functools.partial(small.tiny, passes=3)


def padded(lengths):
    """Rows of the given real lengths, padded on the left to T: (ids, mask)."""
    ids = tokens(len(lengths), T)
    mask = torch.arange(T) >= T - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 0), mask


def by_hand(model, row, length):
    """Logits of a row's real tokens: a session that is sent to sleep at every column that ends a window."""
    session, logits = SleepSession(model), []
    for column in range(T - length, T):
        logits.append(session.step(row[column : column + 1]))
        if (column + 1) % L == 0 and session.state.in_window[0] > 0:
            session.sleep()
    return torch.cat(logits)


@pytest.mark.parametrize(
    "change", ({}, dict(eviction="sliding"), dict(loop=(1, 2)), dict(sleep_kind="replay")), ids=str
)
def test_padded_columns_count(change):
    """Rows without padding, with part of a window, with whole windows and a part, and with one real token."""
    model, lengths = tiny(**change), (18, 15, 16, 7, 1)
    ids, mask = padded(lengths)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, windows_by="positions").logits
    for b, length in enumerate(lengths):
        exact(logits[b, T - length :], by_hand(model, ids[b], length))


def test_padding_on_the_right_changes_nothing():
    model = tiny()
    ids, mask = padded((18, 9))
    wide = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    both = torch.cat([mask, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        logits = model(wide, attention_mask=both, windows_by="positions").logits
        expected = model(ids, attention_mask=mask, windows_by="positions").logits
    exact(logits[:, :T][mask], expected[mask])


def test_it_matters_and_only_where_there_is_padding():
    model = tiny()
    ids, mask = padded((18, 16))
    with torch.no_grad():
        columns = model(ids, attention_mask=mask, windows_by="positions").logits
        counted = model(ids, attention_mask=mask).logits
    exact(columns[0], counted[0])
    assert not torch.allclose(columns[1], counted[1])


def test_loss_and_checkpointed_gradients():
    ids, mask = padded((18, 9))
    labels = torch.where(mask & (torch.arange(T) >= 13), ids.roll(-1, 1), -100)
    grads = []
    for checkpointing in (False, True):
        model = tiny(activation_checkpointing=checkpointing).train()
        out = model(ids, labels=labels, attention_mask=mask, windows_by="positions", return_state=False)
        out.loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert out.loss.isfinite() and all(g is not None and bool((g == h).all()) for g, h in zip(*grads, strict=True))


def test_reading_on_keeps_the_borders():
    model = tiny()
    ids, mask = padded((18, 9))
    more = tokens(2, 8, seed=2)
    with torch.no_grad():
        first = model(ids, attention_mask=mask, windows_by="positions")
        second = model(more, state=first.state)
        wide = torch.cat([mask, torch.ones(2, 8, dtype=torch.bool)], dim=1)
        whole = model(torch.cat([ids, more], dim=1), attention_mask=wide, windows_by="positions")
    exact(second.logits, whole.logits[:, T:])


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(windows_by="columns"), "windows_by: expected one of"),
        (dict(attention_mask=torch.tensor([[1] * 9 + [0] + [1] * 8])), "attention_mask: expected no padding between"),
        (dict(cu_seqlens=torch.tensor([0, 18])), "cu_seqlens: expected None with windows_by"),
    ],
    ids=("unknown", "padding-between", "packed"),
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        tiny()(torch.ones(1, T, dtype=torch.long), **(dict(windows_by="positions") | call))
