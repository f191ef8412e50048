"""The Depo task: every sequence read back, token by token, by an oracle that walks the edges."""

from collections import Counter

import pytest
import torch
from answering import Answering, Guessing
from hypothesis import given, settings
from hypothesis import strategies as st
from small import DEPO

from sleep_ops.tasks import IGNORE_INDEX
from sleep_ops.tasks.depo import Depo


@st.composite
def tasks(draw):
    nodes, shortest = draw(st.integers(2, 12)), draw(st.integers(1, 3))
    return Depo(
        min_nodes=nodes,
        max_nodes=nodes + draw(st.integers(0, 10)),
        vocabulary=draw(st.integers(22, 40)) if shortest == 1 else draw(st.integers(5, 12)),
        shortest_name=shortest,
        longest_name=shortest + draw(st.integers(0, 2)),
        queries=draw(st.integers(1, 12)),
        max_hops=draw(st.integers(1, 20)),
        repeats=draw(st.integers(1, 3)),
        pads=draw(st.sampled_from(["masked", "tokens"])),
        window=8,
    )


def read_name(task, tokens):
    """The first name of a list of tokens, which it is taken off."""
    name = []
    while True:
        name.append(tokens.pop(0))
        if name[-1] > task.vocabulary:
            assert all(1 <= t <= task.vocabulary for t in name[:-1]) and name[-1] <= 2 * task.vocabulary
            assert task.shortest_name <= len(name) <= task.longest_name
            return tuple(name)


def read_context(task, tokens):
    """The successor of every node, from the tokens of one reading of the context."""
    after = {}
    while tokens:
        node = read_name(task, tokens)
        assert node not in after
        after[node] = read_name(task, tokens)
    return after


def read_queries(task, tokens, after):
    """(k, node) of every query, the answers checked on the way, and the labels of its tokens, shifted."""
    found, predicted = [], []
    while tokens and tokens[0] != task.pad_token:
        k = tokens.pop(0) - 2 * task.vocabulary
        assert 1 <= k <= task.max_hops
        node = read_name(task, tokens)
        found.append((k, node))
        assert tokens.pop(0) == 2 * task.vocabulary + task.max_hops + 1
        for _ in range(k):
            node = after[node]
        assert read_name(task, tokens) == node
        predicted += [IGNORE_INDEX] * (1 + len(found[-1][1])) + [task.answer_token, *node]
    assert set(tokens) <= {task.pad_token}
    return found, predicted + [IGNORE_INDEX] * len(tokens)


@settings(max_examples=60, deadline=None)
@given(tasks(), st.integers(0, 2**63), st.integers(0, 10**9), st.sampled_from(["train", "eval"]))
def test_every_sequence_against_the_oracle(task, seed, step, split):
    ids, labels, mask = task.batch(seed, step, 5, split=split)[:3]
    count = min(task.queries, task.max_nodes)
    length = task.max_nodes * 2 * task.longest_name
    assert task.context == length * task.repeats
    assert ids.shape == (5, task.seq_len) == (5, task.context + count * (2 + 2 * task.longest_name))
    for row, target, marked in zip(ids.tolist(), labels.tolist(), mask.tolist(), strict=True):
        read = [t for t in row[: task.context] if t != task.pad_token]
        once = read[: len(read) // task.repeats]
        assert row[: task.context] == [task.pad_token] * (task.context - len(read)) + once * task.repeats
        after = read_context(task, list(once))
        low = task.max_nodes if split == "eval" else task.min_nodes
        assert low <= len(after) <= task.max_nodes
        node, seen = next(iter(after)), []
        for _ in after:
            seen.append(node := after[node])
        assert len(set(seen)) == len(after)  # one cycle
        queries, predicted = read_queries(task, row[task.context :], after)
        assert len(queries) == len({node for _, node in queries}) == min(task.queries, len(after))
        assert target == [IGNORE_INDEX] * (task.context - 1) + predicted + [IGNORE_INDEX]
        assert marked == [t != IGNORE_INDEX for t in target]
        if split == "eval":
            assert {k for k, _ in queries} <= {1, 2, 4, 8, 16}


def test_the_papers_setting():
    task = Depo()
    assert task.context == 300
    assert task.test_hops == (1, 2, 4, 8, 16)
    assert (task.hop_token(1), task.hop_token(16), task.answer_token, task.pad_token) == (101, 116, 117, 118)
    ids = task.batch(0, 0, 64, split="eval").input_ids
    assert not (ids == task.pad_token).any() and task.attention_mask(ids).all()


def test_sizes_and_hops_are_drawn_as_said():
    task, size = Depo(), 4096
    ids = task.batch(3, 0, size).input_ids
    nodes = (ids[:, :300] != task.pad_token).sum(1) // 4
    weights = {n: 1 / (n + 75**0.5) for n in range(3, 76)}
    total = sum(weights.values())
    found = Counter(nodes.tolist())
    surprise = sum((found[n] - size * w / total) ** 2 / (size * w / total) for n, w in weights.items())
    assert surprise < 72 + 5 * 144**0.5  # a chi-square of 72 degrees of freedom
    hops = ids[:, 300:] - 100
    hops = Counter(hops[(hops > 0) & (hops <= 16)].tolist())
    assert sorted(hops) == list(range(1, 17))
    mean = sum(hops.values()) / 16
    assert sum((n - mean) ** 2 / mean for n in hops.values()) < 15 + 5 * 30**0.5


def test_stages_ask_for_one_hop_more_each():
    task, whole = Depo(max_hops=4, first_hops=2), Depo(max_hops=4)
    assert (task.stages, whole.stages) == (3, 1)
    for stage, most in ((0, 2), (1, 3), (2, 4), (None, 4)):
        ids = task.batch(3, 1, 64, stage=stage).input_ids
        asked = ids[(ids > task.hop_token(0)) & (ids <= task.hop_token(4))] - task.hop_token(0)
        assert asked.unique().tolist() == list(range(1, most + 1))
    assert torch.equal(task.batch(3, 1, 8).input_ids, whole.batch(3, 1, 8).input_ids)


def test_edges_come_in_random_order():
    """Where an edge stands says nothing about where the next one along the cycle does."""
    task = Depo(**DEPO | {"min_nodes": 7})
    places = Counter()
    for row in task.batch(0, 0, 2048).input_ids[:, : task.context].tolist():
        after = read_context(task, row)
        order = list(after)
        places.update((i, order.index(after[node])) for i, node in enumerate(order))
    assert len(places) == 42  # every pair of different places
    assert all(abs(count - 2048 / 6) < 5 * (2048 / 6) ** 0.5 for count in places.values())


@pytest.mark.parametrize("pads", ["masked", "tokens"])
def test_attention_mask_marks_the_padding(pads):
    task = Depo(**DEPO, longest_name=4, pads=pads)
    ids = task.batch(0, 0, 32).input_ids
    mask = task.attention_mask(ids)
    if pads == "tokens":
        assert mask is None
        return
    for row, real in zip(ids.tolist(), mask.tolist(), strict=True):
        assert real == [token != task.pad_token for token in row]
        assert not real[0] or task.pad_token not in row[: task.context]


def test_batches_mask_their_padding_and_keep_window_borders():
    """Padding at the ends of a sequence read once: windows end at the columns of a sequence without any."""
    batch = Depo(**DEPO).batch(0, 0, 64)
    assert batch.windows_by == "positions"
    assert torch.equal(batch.attention_mask, batch.input_ids != Depo(**DEPO).pad_token)
    steps = batch.attention_mask.int().diff(dim=1)
    assert bool(((steps == -1).sum(1) <= 1).all()) and bool(((steps == 1).sum(1) <= 1).all())
    twice = Depo(**DEPO, repeats=2).batch(0, 0, 64)
    assert twice.windows_by == "positions" and twice.attention_mask is not None
    plain = Depo(**DEPO, pads="tokens").batch(0, 0, 64)
    assert plain.attention_mask is None and plain.windows_by == "tokens"
    assert Depo(**DEPO).batch(0, 0, 8, split="eval").attention_mask is None  # cycles of the largest size alone


def hop_of(task, ids):
    """int64 [B, T]: k of the query a token belongs to, by reading on from left to right."""
    found = torch.zeros_like(ids)
    for b, row in enumerate(ids.tolist()):
        k = 0
        for t, token in enumerate(row):
            if 2 * task.vocabulary < token <= 2 * task.vocabulary + task.max_hops:
                k = token - 2 * task.vocabulary
            found[b, t] = k
    return found


@pytest.mark.parametrize("trim", [0, 1], ids=["all positions", "the queries' windows"])
def test_accuracy(trim):
    task = Depo(**DEPO, longest_name=3)
    trim *= task.context - 1

    def wrong(ids, labels):  # k = 2 always; of k = 4 only [=], which is no part of a name
        k = hop_of(task, ids)
        return (k == 2) & (labels != IGNORE_INDEX) | (k == 4) & (labels == task.answer_token)

    right = task.evaluate(Answering(task.vocab_size, trim=trim), samples=30, batch_size=12)
    assert {right[key] for key in ("exact", "per_label", "exact_1", "exact_2", "exact_4")} == {1.0}
    assert right["exact_stderr"] == 0 and right["loss"] < 1e-6 and right["samples"] == 30
    found = task.evaluate(Answering(task.vocab_size, wrong, trim), samples=30, batch_size=12)
    assert (found["exact_1"], found["exact_2"], found["exact_4"]) == (1, 0, 1)
    assert found["exact"] == pytest.approx(2 / 3) and found["exact_stderr"] > 0
    assert found["loss_1"] < 1e-6 and found["loss_4"] < 1e-6 and found["loss_2"] == pytest.approx(30)


def test_one_wrong_token_spoils_a_name():
    task = Depo(**DEPO)

    def wrong(ids, labels):  # the last token of the first query's answer, in the first sequence
        places = torch.zeros_like(labels, dtype=torch.bool)
        places[0, task.context + 4] = True
        return places

    found = task.evaluate(Answering(task.vocab_size, wrong), samples=6, batch_size=6)
    labels = 6 * task.queries * 3
    assert found["per_label"] == pytest.approx(1 - 1 / labels)
    # 24 queries, each of k = 1, 2, 4 eight times.
    assert found["exact"] == pytest.approx(1 - 1 / 24)
    assert sorted(found[f"exact_{k}"] for k in (1, 2, 4)) == [7 / 8, 1, 1]


def test_guessing_a_node():
    task = Depo(**DEPO | {"vocabulary": 30}, shortest_name=1, longest_name=1)

    def any_node(ids):
        places = torch.randint(task.context, ids.shape, generator=torch.Generator().manual_seed(0))
        return ids.gather(1, places)

    found = task.evaluate(Guessing(task.vocab_size, any_node), samples=2000, batch_size=500)
    chance = task.chance()["majority"]
    assert chance == 1 / 7 and abs(found["exact"] - chance) < 5 * (chance * (1 - chance) / 8000) ** 0.5


def test_masks_are_given_where_there_is_padding():
    padded, full = Depo(**DEPO, longest_name=3), Depo(**DEPO)
    for task in (padded, full):
        model = Answering(task.vocab_size)
        task.evaluate(model, samples=8, batch_size=4)
        assert [mask is None for mask in model.masks] == [task is full] * 2
    tokens = Answering(padded.vocab_size)
    Depo(**DEPO, longest_name=3, pads="tokens").evaluate(tokens, samples=8, batch_size=4)
    assert tokens.masks == [None, None]


def test_an_instance_is_readable():
    task = Depo(**DEPO, longest_name=3, repeats=2)
    batch = task.batch(0, 0, 20)
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        title, edges, *queries = task.render(ids, labels).split("\n")
        after = dict(edge.split(" > ") for edge in edges.split(", "))
        assert title == f"{len(after)} edges, read 2 times"
        assert len(queries) == min(4, len(after))
        for query in queries:
            k, node, equals, answer = query.split()
            assert equals == "[9500]"
            for _ in range(int(k[1:-1]) - 9000):
                node = after[node]
            assert node == answer
