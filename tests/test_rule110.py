"""The Rule 110 task: the automaton against a table-driven oracle, the layout of a sequence, seeds, and accuracy."""

import numpy as np
import pytest
import torch
from answering import Answering
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sleep_ops.tasks import IGNORE_INDEX, Rule110
from sleep_ops.tasks.rule110 import SEP, rule110_steps

# Wolfram's table: 111 -> 0, 110 -> 1, 101 -> 1, 100 -> 0, 011 -> 1, 010 -> 1, 001 -> 1, 000 -> 0, read as binary 110.
TABLE = {tuple(map(int, f"{n:03b}")): 110 >> n & 1 for n in range(8)}


def oracle(cells, t, boundary):
    cells = list(cells)
    for _ in range(t):
        n = len(cells)
        padded = [cells[-1], *cells, cells[0]] if boundary == "periodic" else [0, *cells, 0]
        cells = [TABLE[tuple(padded[i : i + 3])] for i in range(n)]
    return cells


@pytest.mark.parametrize("boundary", ["periodic", "zero"])
@pytest.mark.parametrize("bits", [3, 7, 24, 70])
@pytest.mark.parametrize("t", [0, 1, 5, 32])
def test_steps_match_the_table(t, bits, boundary):
    cells = np.random.default_rng(t).integers(0, 2, (5, bits))
    expected = [oracle(row.tolist(), t, boundary) for row in cells]
    assert rule110_steps(cells, t, boundary).tolist() == expected


@st.composite
def tasks(draw):
    bits = draw(st.integers(3, 40))
    held_out = draw(st.sampled_from([0.0, 0.125])) if bits >= 10 else 0.0
    counts = {name: draw(st.integers(low, high)) for name, low, high in (("t", 0, 40), ("strings", 1, 5))}
    boundary, repeats = draw(st.sampled_from(["periodic", "zero"])), draw(st.integers(1, 3))
    counts["first_t"] = draw(st.none() | st.integers(0, counts["t"]))
    return Rule110(bits=bits, boundary=boundary, held_out=held_out, repeats=repeats, **counts)


@settings(max_examples=60, deadline=None)
@example(Rule110(), 7, 3, "train")
@example(Rule110(t=3, strings=1, bits=5, boundary="zero"), 7, 3, "train")
@example(Rule110(t=2, strings=3, bits=10), 7, 3, "train")
@given(tasks(), st.integers(0, 2**63), st.integers(0, 10**9), st.sampled_from(["train", "eval"]))
def test_every_sequence_is_what_the_oracle_says(task, seed, step, split):
    ids, labels, mask, *_ = task.batch(seed, step, size=4, split=split)
    context = task.repeats * task.strings * task.bits
    assert ids.shape == labels.shape == mask.shape == (4, task.seq_len) == (4, context + task.strings)
    assert ids.dtype == labels.dtype == torch.int64 and mask.dtype == torch.bool
    assert mask.device.type == "cpu" and torch.equal(mask, labels != IGNORE_INDEX)
    for row, target in zip(ids.tolist(), labels.tolist(), strict=True):
        once = row[: task.strings * task.bits]
        strings = [once[i : i + task.bits] for i in range(0, len(once), task.bits)]
        answers = [oracle(s, task.t, task.boundary)[0] for s in strings]
        assert set(once) <= {0, 1} and row == once * task.repeats + [SEP, *answers[:-1]]
        assert target == [IGNORE_INDEX] * context + answers


def test_an_instance_is_readable():
    task = Rule110(t=3, strings=2, bits=5)
    ids, labels = task.batch(0, 0, 1)[:2]
    lines = task.render(ids[0], labels[0]).split("\n")
    assert len(lines) == 2
    for line in lines:
        string, answer = line.split(" -> ")
        assert oracle(map(int, string), 3, "periodic")[0] == int(answer)


def test_stages_are_steps_of_the_automaton():
    task = Rule110(t=6, first_t=4)
    assert (task.stages, Rule110(t=6).stages, Rule110(t=6, first_t=6).stages) == (3, 1, 1)
    for stage, t in ((0, 4), (1, 5), (2, 6), (None, 6)):
        assert torch.equal(task.batch(1, 7, 64, stage=stage).labels, Rule110(t=t).batch(1, 7, 64).labels)
    for stage in (-1, 3):
        with pytest.raises(ValueError, match=r"^stage: expected None, or an integer in \[0, 2\], got"):
            task.batch(1, 7, 64, stage=stage)


def test_paper_setting():
    task = Rule110(t=32)
    assert (task.seq_len, task.window, task.vocab_size) == (100, 24, 3)


def test_bits_are_fair_and_independent():
    ids = Rule110().batch(0, 0, 4096).input_ids[:, :96].double()
    assert abs(ids.mean().item() - 0.5) < 4 * 0.5 / ids.numel() ** 0.5
    correlation = torch.corrcoef(ids.T) - torch.eye(96)
    assert correlation.abs().max() < 6 / 4096**0.5


def strings_of(task, split, batches, size=512):
    ids = [task.batch(0, i, size, split=split).input_ids[:, : task.strings * task.bits] for i in range(batches)]
    return {tuple(row) for row in torch.cat(ids).reshape(-1, task.bits).tolist()}


@pytest.mark.parametrize("fraction", [0.125, 0.5])
def test_held_out_strings_never_occur_in_training(fraction):
    task = Rule110(t=4, strings=2, bits=10, held_out=fraction)
    train, held = strings_of(task, "train", 20), strings_of(task, "eval", 20)
    assert not train & held
    assert len(train | held) == 1024
    assert abs(len(held) / 1024 - fraction) < 0.06


def test_without_holding_out_both_splits_are_uniform_over_everything():
    task = Rule110(t=4, strings=2, bits=8)
    assert len(strings_of(task, "train", 10)) == len(strings_of(task, "eval", 10)) == 256


class Oracle(Answering):
    """Answers from the labels, wrong at the given (row, answer) places; logits from column `trim` on."""

    def __init__(self, task, wrong=(), trim=0):
        super().__init__(task.vocab_size, lambda ids, labels: self.places.expand_as(ids), trim)
        self.context, self.wrong_answers = task.strings * task.bits, wrong

    def forward(self, input_ids, *args, **given):
        self.places = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, answer in self.wrong_answers:
            self.places[row, self.context + answer] = True
        return super().forward(input_ids, *args, **given)


@pytest.mark.parametrize("trim", [0, 24], ids=["all positions", "answer window"])
def test_accuracy(trim):
    task = Rule110(t=4, strings=2, bits=12)
    wrong = [(0, 0), (0, 1), (3, 1)]
    result = task.evaluate(Oracle(task, wrong, trim), samples=8, batch_size=8)
    assert result["exact"] == 6 / 8 and result["per_label"] == 13 / 16
    assert (result["label_0"], result["label_1"]) == (7 / 8, 6 / 8)
    assert result["samples"] == 8 and result["loss"] == pytest.approx(30 * 3 / 16)  # logits of 30, three times wrong


def test_accuracy_over_uneven_batches():
    task = Rule110(t=4, strings=2, bits=12)
    result = task.evaluate(Oracle(task, [(0, 0)]), samples=10, batch_size=4)
    assert result["exact"] == 7 / 10  # the first row of each of three batches


def test_chance_levels():
    chance = Rule110(t=16).chance()
    assert chance["uniform"] == 1 / 16
    assert 0.08 < chance["majority"] < 0.13 and 0.5 < chance["ones"] < 0.65
    assert abs(Rule110(t=0).chance()["majority"] - 1 / 16) < 0.01


def test_repeated_strings_are_the_same_task_read_more_often():
    once, thrice = Rule110(t=3, strings=2, bits=6), Rule110(t=3, strings=2, bits=6, repeats=3)
    assert (thrice.seq_len, thrice.window) == (3 * 12 + 2, 6)
    a, b = once.batch(0, 1, 5), thrice.batch(0, 1, 5)
    assert torch.equal(b.input_ids[:, :36], a.input_ids[:, :12].repeat(1, 3))
    assert torch.equal(b.input_ids[:, 36:], a.input_ids[:, 12:]) and torch.equal(b.labels[:, 36:], a.labels[:, 12:])
    assert not b.loss_mask[:, :36].any() and b.loss_mask[:, 36:].all()
    assert thrice.render(b.input_ids[0], b.labels[0]) == once.render(a.input_ids[0], a.labels[0])
