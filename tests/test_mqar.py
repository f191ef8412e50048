"""The associative recall task: every sequence against a dictionary."""

import pytest
import torch
from answering import Answering, Guessing
from hypothesis import given, settings
from hypothesis import strategies as st
from small import PAIRS

from sleep_ops.tasks import IGNORE_INDEX, MQAR


@st.composite
def tasks(draw):
    pairs = draw(st.integers(1, 30))
    return MQAR(
        num_pairs=pairs,
        num_queries=draw(st.integers(1, pairs)),
        vocab_size=draw(st.integers(2 * pairs, 12 * pairs)),
        window=draw(st.sampled_from([n for n in range(1, 2 * pairs + 1) if 2 * pairs % n == 0])),
    )


@settings(max_examples=60, deadline=None)
@given(tasks(), st.integers(0, 2**63), st.integers(0, 10**9), st.sampled_from(["train", "eval"]))
def test_every_sequence_against_the_oracle(task, seed, step, split):
    ids, labels, mask = task.batch(seed, step, 5, split=split)[:3]
    context = 2 * task.num_pairs
    assert ids.shape == (5, task.seq_len) == (5, context + task.num_queries)
    for row, target, marked in zip(ids.tolist(), labels.tolist(), mask.tolist(), strict=True):
        remembered = {}
        for i in range(0, context, 2):
            key, value = row[i], row[i + 1]
            assert 0 <= key < task.vocab_size // 2 <= value < task.vocab_size
            remembered[key] = value
        assert len(remembered) == len(set(remembered.values())) == task.num_pairs
        assert len(set(row[context:])) == task.num_queries
        assert target == [IGNORE_INDEX] * context + [remembered[key] for key in row[context:]]
        assert marked == [False] * context + [True] * task.num_queries


@pytest.mark.parametrize("vocab_size", [16, 200], ids=["every key in use", "few keys in use"])
def test_keys_values_and_queries_are_uniform(vocab_size):
    """Each token at each place, and each pair for each query, as often as any other."""
    task = MQAR(**PAIRS | {"vocab_size": vocab_size})
    ids = task.batch(0, 0, 4096).input_ids
    keys, values, asked = ids[:, :16:2], ids[:, 1:16:2], ids[:, 16:]
    pair = (asked[:, :, None] == keys[:, None]).int().argmax(-1)
    for drawn, total in ((keys, vocab_size // 2), (values - vocab_size // 2, vocab_size // 2), (pair, 8)):
        counts = torch.stack([column.bincount(minlength=total) for column in drawn.T]).double()
        expected = 4096 / total
        surprise = ((counts - expected) ** 2 / expected).sum(1)
        assert counts.shape[1] == total
        assert (surprise < total + 6 * (2 * total) ** 0.5).all()


@pytest.mark.parametrize("trim", [0, 16], ids=["all positions", "the queries' windows"])
def test_recall_by_window(trim):
    task = MQAR(**PAIRS)

    def wrong(ids, labels):  # the pairs of the second window of 4 tokens
        return torch.stack([torch.isin(row, row[4:8:2]) & (label >= 0) for row, label in zip(ids, labels, strict=True)])

    found = task.evaluate(Answering(50, trim=trim), samples=30, batch_size=12)
    levels = [f"window_{i}" for i in range(4)]
    assert {found[key] for key in ("exact", "per_label", *levels)} == {1.0}
    assert found["loss"] < 1e-6 and found["samples"] == 30
    found = task.evaluate(Answering(50, wrong, trim), samples=400, batch_size=150)
    assert [found[key] for key in levels] == [1, 0, 1, 1]
    assert abs(found["per_label"] - 3 / 4) < 0.05
    # None of 4 queries is one of 2 pairs of 8.
    assert abs(found["exact"] - 6 * 5 * 4 * 3 / (8 * 7 * 6 * 5)) < 5 * found["exact_stderr"]


def test_a_window_that_was_never_asked_about_has_no_recall():
    found = MQAR(**PAIRS | {"num_queries": 1}).evaluate(Answering(50), samples=1)
    levels = [found[f"window_{i}"] for i in range(4)]
    assert levels.count(1.0) == 1 and sum(x != x for x in levels) == 3


def test_guessing_a_value_that_was_read():
    task = MQAR(**PAIRS)

    def any_value(ids):
        places = torch.randint(8, ids.shape, generator=torch.Generator().manual_seed(0)) * 2 + 1
        return ids.gather(1, places)

    found, chance = task.evaluate(Guessing(50, any_value), samples=2000, batch_size=500), task.chance()
    assert abs(found["per_label"] - chance["per_label"]) < 5 * (1 / 8 * 7 / 8 / 8000) ** 0.5
    assert chance == {"uniform": 25**-4, "majority": 8**-4, "per_label": 1 / 8}
    assert found["exact"] <= 5 / 2000


def test_an_instance_is_readable():
    task = MQAR(**PAIRS)
    ids, labels = task.batch(0, 0, 1)[:2]
    pairs, *queries = task.render(ids[0], labels[0]).split("\n")
    remembered = dict(pair.split(": ") for pair in pairs.split(", "))
    assert len(remembered) == 8 and len(queries) == 4
    assert all(remembered[key] == value for key, value in (query.split("? ") for query in queries))
