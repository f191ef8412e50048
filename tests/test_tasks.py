"""What every task promises: batches, splits, settings, evaluation."""

import dataclasses
import json

import pytest
import torch
from answering import Answering
from small import DEPO, PAIRS, VARIABLES

from sleep_ops import HybridConfig, SleepHybridModel
from sleep_ops.tasks import (
    IGNORE_INDEX,
    MQAR,
    TASKS,
    Depo,
    GSMInfinite,
    Rule110,
    Text,
    VariableTracking,
    WordProblem,
    build_task,
)

EXAMPLES = {
    "rule110": Rule110(),
    "depo": Depo(),
    "depo-tokens": Depo(**DEPO, pads="tokens", repeats=2),
    "depo-padded": Depo(**DEPO, longest_name=3),
    "mqar": MQAR(),
    "mqar-small": MQAR(**PAIRS),
    "word_problem": WordProblem(),
    "word_problem-last": WordProblem("A5", 7, "last"),
    "variable_tracking": VariableTracking(),
    "variable_tracking-variables": VariableTracking(**VARIABLES, ask="variables", order="shuffled"),
    "gsm_infinite": GSMInfinite(seq_len=384),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A task of 100 prompts of two words."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from test_adapter_loading import word_tokenizer

    folder, words = tmp_path_factory.mktemp("text"), "abcdefghij"
    word_tokenizer(folder, tuple(words))
    lines = [json.dumps({"prompt": f"{x} {y}", "answer": f"{y} {x}"}) for x in words for y in words]
    (folder / "data").write_text("\n".join(lines))
    return Text(str(folder / "data"), str(folder), held_out=0.2)


@pytest.fixture(params=[*EXAMPLES, "text"])
def task(request):
    return EXAMPLES.get(request.param) or request.getfixturevalue("text")


class Oracle(Answering):
    """With the loss that a model gives."""

    def forward(self, input_ids, labels=None, **given):
        out = super().forward(input_ids, labels, **given)
        out.loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels[:, self.trim :].flatten())
        return out


def test_every_task_is_here():
    assert {name.partition("-")[0] for name in EXAMPLES} | {"text"} == set(TASKS)


def test_batches_are_token_ids_and_marked_labels(task):
    batch = task.batch(1, 5, 8)
    assert batch.input_ids.shape == batch.labels.shape == batch.loss_mask.shape == (8, task.seq_len)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64 and batch.loss_mask.dtype == torch.bool
    assert batch.loss_mask.device.type == "cpu" and torch.equal(batch.loss_mask, batch.labels != IGNORE_INDEX)
    assert batch.loss_mask.any(1).all()
    assert 0 <= batch.input_ids.min() and max(batch.input_ids.max(), batch.labels.max()) < task.vocab_size


def test_batches_depend_on_seed_step_and_split_only(task):
    first = task.batch(1, 5, 8)
    again = build_task(json.loads(json.dumps(task.to_dict())))
    assert dataclasses.is_dataclass(task) and type(again) is type(task) and again == task
    again.batch(0, 0, 3)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again.batch(1, 5, 8)[:3], strict=True))
    for other in (task.batch(1, 6, 8), task.batch(2, 5, 8), task.batch(1, 5, 8, split="eval")):
        assert not torch.equal(first.input_ids, other.input_ids)


def test_what_is_evaluated_never_occurs_in_training(task):
    rows = {
        split: {tuple(row) for step in range(8) for row in task.batch(0, step, 64, split=split).input_ids.tolist()}
        for split in ("train", "eval")
    }
    assert not rows["train"] & rows["eval"]


def test_evaluation_of_a_model_that_knows(task):
    model = Oracle(task.vocab_size).train()
    found = task.evaluate(model, samples=8)
    assert found["exact"] == found["per_label"] == 1 and found["loss"] < 1e-6 and found["samples"] == 8
    assert model.training and task.metric in found
    assert task.chance().keys() >= ({"majority"} if isinstance(task, Text) else {"uniform", "majority"})


@pytest.mark.parametrize("kwargs", [{"samples": 0}, {"batch_size": 0}], ids=str)
def test_bad_evaluations(task, kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))}.*: expected"):
        task.evaluate(Oracle(task.vocab_size), **{"samples": 4, "batch_size": 4} | kwargs)


@pytest.mark.parametrize("kwargs", [{"split": "test"}, {"seed": -1}, {"step": -1}, {"size": 0}], ids=str)
def test_bad_batches(task, kwargs):
    with pytest.raises(ValueError, match="split: expected" if "split" in kwargs else "^seed, step, size: expected"):
        task.batch(**{"seed": 0, "step": 0, "size": 4} | kwargs)


@pytest.mark.parametrize("name", ["rule110", "depo", "mqar", "word_problem", "variable_tracking"])
@pytest.mark.parametrize("arguments", [(2**64, 0, 1), (0, 2**63, 1), (-1, 0, 1), (0, 0, 0)], ids=str)
def test_streams_that_are_none(name, arguments):
    with pytest.raises(ValueError, match="^seed, step, size: expected integers"):
        EXAMPLES[name].batch(*arguments)


def test_settings_come_back():
    for task in (Rule110(t=5, boundary="zero"), GSMInfinite(seq_len=400, shortest=300, min_op=2, max_op=5)):
        assert build_task(task.to_dict()) == task
    with pytest.raises(ValueError, match="task"):
        build_task({"name": "rule90"})


BAD = {
    Rule110: [
        {"t": -1}, {"t": 1.5}, {"strings": 0}, {"bits": 2}, {"boundary": "open"}, {"held_out": 0.9},
        {"held_out": 0.1, "bits": 5}, {"repeats": 0}, {"first_t": 9}, {"first_t": -1}, {"first_t": True},
    ],
    Depo: [
        {"min_nodes": 1}, {"max_nodes": 2}, {"vocabulary": 8}, {"shortest_name": 0}, {"longest_name": 1},
        {"longest_name": 9}, {"queries": 0}, {"max_hops": 1.5}, {"repeats": True}, {"pads": "seen"}, {"window": 0},
        {"first_hops": 0}, {"first_hops": 17},
    ],
    MQAR: [
        {"num_pairs": 0}, {"num_queries": 0}, {"num_queries": 65}, {"vocab_size": 127}, {"vocab_size": 8192.0},
        {"window": 0}, {"window": 24},
    ],
    WordProblem: [{"group": "S4"}, {"length": 0}, {"loss": "first"}, {"window": -1}, {"alphabet": "letters"}],
    VariableTracking: [
        {"chains": 0}, {"hops": -1}, {"queries": 0}, {"queries": 33}, {"queries": 5, "ask": "variables"},
        {"ask": "names"}, {"order": "backward"}, {"variables": 31}, {"values": 3}, {"window": 0}, {"window": 25},
        {"first_hops": 8}, {"first_hops": 1, "queries": 9}, {"first_hops": 3, "ask": "variables"},
    ],
    GSMInfinite: [
        {"seq_len": 200}, {"seq_len": 1000.0}, {"shortest": 200}, {"shortest": 4000}, {"min_op": 0},
        {"max_op": 4, "min_op": 5}, {"max_op": 33}, {"max_op": 8.0}, {"first_op": 9}, {"first_op": 1, "min_op": 2},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, settings",
    [pytest.param(kind, bad, id=f"{kind.name}-{bad}") for kind, found in BAD.items() for bad in found],
)
def test_bad_settings_name_the_first(kind, settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))}: expected .*got "):
        kind(**settings)


# The stream is part of what a run means: it must not drift between versions.
STREAMS = {
    "rule110": (
        Rule110(),
        (1, 5, 8),
        (100, 24, 3),
        [*map(int, "000000100011001010100001")],
    ),
    "depo": (Depo(), (0, 0, 1), (360, 75, 119), [23, 55, 17, 83, 48, 77, 45, 59, 42, 92, 25, 81]),
    "mqar": (MQAR(), (0, 0, 1), (144, 32, 8192), [47, 7708, 989, 4132, 456, 7619, 2311, 6075]),
    "word_problem": (WordProblem("A5", 10), (0, 0, 6000), (10, 16, 61), [0, 14, 6, 33, 30, 16, 56, 59, 15, 11]),
    "variable_tracking": (VariableTracking(), (0, 0, 1), (104, 24, 194), [25, 192, 178, 20, 192, 167, 62, 192, 25]),
}


@pytest.mark.parametrize("task, batch, sizes, tokens", STREAMS.values(), ids=STREAMS)
def test_published_sizes_and_streams(task, batch, sizes, tokens):
    assert (task.seq_len, task.window, task.vocab_size) == sizes
    ids = task.batch(*batch, split="eval" if isinstance(task, Depo) else "train").input_ids
    assert ids[0, : len(tokens)].tolist() == tokens


@pytest.mark.parametrize(
    "task, samples, loss",
    [
        pytest.param(Depo(**DEPO, longest_name=2), 6, (0, 30), id="depo"),
        pytest.param(Depo(**DEPO, longest_name=3), 6, (0, 30), id="depo-padded"),
        pytest.param(MQAR(**PAIRS), 40, (3, 6), id="mqar"),
        pytest.param(WordProblem(length=10, window=4), 20, (3, 7), id="word_problem"),
        pytest.param(WordProblem("A5", length=8, loss="last", window=4), 20, (3, 7), id="word_problem-last"),
        pytest.param(VariableTracking(**VARIABLES), 20, (2, 6), id="variable_tracking"),
        pytest.param(VariableTracking(**VARIABLES, ask="variables"), 20, (2, 6), id="variable_tracking-variables"),
    ],
)
def test_with_a_model(task, samples, loss):
    size = dict(vocab_size=task.vocab_size, hidden_size=16, num_heads=2)
    torch.manual_seed(0)
    model = SleepHybridModel(HybridConfig(layers=("attn", "gdn"), window=task.window, passes=2, **size))
    found = task.evaluate(model, samples=samples, batch_size=4 if samples == 6 else 16)
    assert loss[0] < found["loss"] < loss[1] and 0 <= found["exact"] < 0.5 and found["per_label"] < 0.5
