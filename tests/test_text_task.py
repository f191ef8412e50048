"""Your own text: examples, labels, order, what does not fit, damaged lines, evaluation."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_adapter_loading import word_tokenizer

from sleep_ops import HybridConfig, SleepHybridModel
from sleep_ops.tasks import IGNORE_INDEX, Text, build_task
from sleep_ops.tasks.examples import Examples

WORDS = tuple("abcdefghij")
UNK, END = 0, 1
ID = {word: i + 2 for i, word in enumerate(WORDS)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    word_tokenizer(folder, WORDS)
    return str(folder)


def write(path, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def pair(prompt, answer, **more):
    return {"prompt": " ".join(prompt), "answer": " ".join(answer), **more}


def rows(batch):
    """Each row's tokens and what they predict."""
    return [
        (ids.tolist(), [x for x in labels.tolist() if x != IGNORE_INDEX])
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True)
    ]


def test_the_loss_is_on_the_answer(tokenizer, tmp_path):
    data = write(tmp_path / "data", pair("abc", "de", op=3), "", pair("f", "g"))
    task = Text(data, tokenizer, eval_data=data)
    assert (task.seq_len, task.vocab_size, task.window, task.metric) == (5, ID["g"] + 1, None, "exact")
    batch = task.batch(seed=0, step=0, size=2)
    a, b, c, d, e, f, g = (ID[x] for x in "abcdefg")
    assert sorted(rows(batch)) == [([a, b, c, d, e], [d, e, END]), ([f, g, 0, 0, 0], [g, END])]
    assert torch.equal(batch.loss_mask, batch.labels != IGNORE_INDEX)
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        marked = (labels != IGNORE_INDEX).nonzero()[:, 0].tolist()
        assert marked == ([2, 3, 4] if ids[0] == a else [0, 1])
    bare = Text(data, tokenizer, eval_data=data, end_token=False)
    assert bare.seq_len == 4 and END not in bare.batch(0, 0, 2).labels


def test_running_text_is_cut_into_pieces_that_predict_every_token(tokenizer, tmp_path):
    data = write(tmp_path / "data", {"text": "a b c d e f g"}, {"text": "h i"})
    task = Text(data, tokenizer, eval_data=data, seq_len=3)
    assert task.metric == "loss"
    got = sorted(rows(task.batch(0, 0, 4)))
    a, b, c, d, e, f, g, h, i = (ID[x] for x in "abcdefghi")
    assert got == sorted([([a, b, c], [b, c, d]), ([d, e, f], [e, f, g]), ([g, 0, 0], [END]), ([h, i, 0], [i, END])])
    assert Text(data, tokenizer, eval_data=data).seq_len == 7


@pytest.mark.parametrize("cached", [False, True], ids=["memory", "files"])
def test_prompts_of_one_token_are_no_running_text(cached, tokenizer, tmp_path):
    options = {"cache": str(tmp_path / "cache"), "seq_len": 3} if cached else {}
    pairs = write(tmp_path / "pairs", "", *(pair(x, "ab") for x in WORDS))
    texts = write(tmp_path / "texts", {"text": "a b"}, {"text": "c d"})
    for _ in range(2):  # the second time from the files, if there are any
        assert Text(pairs, tokenizer, **options).metric == "exact"
        assert Text(texts, tokenizer, eval_data=pairs, **options).metric == "exact"
        assert Text(pairs, tokenizer, eval_data=texts, **options).metric == "loss"


def test_epochs_see_everything_once(tokenizer, tmp_path):
    data = write(tmp_path / "data", *(pair(x + y, x) for x in WORDS for y in "ab"))
    task = Text(data, tokenizer, held_out=0.2)
    stream = [row[0] for step in range(8) for row in rows(task.batch(1, step, 4))]
    first, second = stream[:16], stream[16:]
    assert first != second and sorted(first) == sorted(second) and len({*map(tuple, first)}) == 16
    asked = [tuple(row[0]) for row in rows(task.batch(0, 0, 4, split="eval"))]
    assert len({*asked}) == 4 and not {*asked} & {*map(tuple, first)}
    assert [row[0] for row in rows(task.batch(2, 0, 16))] != first
    assert torch.equal(task.batch(0, 0, 30).input_ids[16:], task.batch(0, 0, 32).input_ids[16:30])


@pytest.mark.parametrize("cached", [False, True], ids=["memory", "files"])
def test_the_pieces_of_a_text_are_held_out_together(cached, tokenizer, tmp_path):
    data = write(tmp_path / "data", *({"text": " ".join(x * 5)} for x in WORDS))
    task = Text(data, tokenizer, seq_len=2, held_out=0.3, cache=str(tmp_path / "cache") if cached else None)
    train, asked = (task.splits[split].lines.tolist() for split in ("train", "eval"))
    assert len({*asked}) == 3 and {*train} | {*asked} == {*range(10)}
    assert all(lines.count(line) == 3 for lines in (train, asked) for line in lines)
    with pytest.raises(ValueError, match="data: expected lines for training and some to hold out, .*got '1 lines'"):
        Text(write(tmp_path / "one", {"text": "a b c d e f"}), tokenizer, seq_len=2)


def test_an_answer_is_never_cut(tokenizer, tmp_path):
    data = write(tmp_path / "data", pair("a", "b"), pair("abcdef", "gh"))
    with pytest.raises(ValueError, match="data, line 2: expected .* seq_len 5, got '6 and 3 tokens'"):
        Text(data, tokenizer, eval_data=data, seq_len=5)
    cut = Text(data, tokenizer, eval_data=data, seq_len=5, overflow="cut")
    d, e, f, g, h = (ID[x] for x in "defgh")
    assert ([d, e, f, g, h], [g, h, END]) in rows(cut.batch(0, 0, 2))
    assert Text(data, tokenizer, eval_data=data, seq_len=8).batch(0, 0, 2).input_ids.shape == (2, 8)
    with pytest.raises(ValueError, match="line 2: expected .* fit in seq_len 2"):
        Text(data, tokenizer, eval_data=data, seq_len=2, overflow="cut")


DAMAGED = {
    "json": ('{"prompt": "a", "answer"', "expected JSON"),
    "encoding": ("\udcff", "expected JSON"),
    "half an emoji": (r'{"prompt": "a\ud83d", "answer": "b"}', "expected JSON"),
    "nesting": ('{"prompt": ' + 100000 * "[", "expected JSON"),
    "list": ('["a", "b"]', 'expected {"prompt"'),
    "no-answer": ('{"prompt": "a"}', 'expected {"prompt"'),
    "both": ('{"prompt": "a", "answer": "b", "text": "c"}', 'expected {"prompt"'),
    "number": ('{"prompt": "a", "answer": 3}', 'expected {"prompt"'),
    "empty-answer": ('{"prompt": "a", "answer": ""}', "an answer of at least one token"),
    "empty-prompt": ('{"prompt": "", "answer": "a"}', "a prompt of at least one token"),
    "empty-text": ('{"text": ""}', "a text of at least two tokens"),
}


@pytest.mark.parametrize("line, message", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_named(line, message, tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    good = json.dumps(pair("a", "b"))
    path.write_bytes(f"{good}\n\n{line}\n{good}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"data.jsonl, line 3: .*{message}"):
        Text(str(path), tokenizer)


def test_what_cannot_be_is_refused(tokenizer, tmp_path):
    data, one = write(tmp_path / "data", pair("a", "b"), pair("c", "d")), write(tmp_path / "one", pair("a", "b"))
    empty = write(tmp_path / "empty", "")
    for options, message in (
        ({"seq_len": 0}, "seq_len: expected"),
        ({"overflow": "wrap"}, "overflow: expected"),
        ({"held_out": 1.0}, "held_out: expected"),
        ({"end_token": "no"}, "end_token: expected"),
        ({"cache": data, "seq_len": 3}, "cache: expected a folder"),
        ({"cache": str(tmp_path / "cache")}, "seq_len: expected an integer >= 1 with cache"),
        ({"data": str(tmp_path / "nowhere")}, "data: expected a file"),
        ({"data": empty}, "data: expected at least one line"),
        ({"data": one}, "data: expected lines for training"),
        ({"tokenizer": str(tmp_path)}, "tokenizer: expected a folder with"),
    ):
        with pytest.raises(ValueError, match=message):
            Text(**{"data": data, "tokenizer": tokenizer} | options)


@pytest.mark.parametrize("seed, step, size", [(-1, 0, 1), (2**64, 0, 1), (0, -1, 1), (0, 0, 0)])
def test_batches_that_cannot_be_are_refused(seed, step, size, tokenizer, tmp_path):
    task = Text(write(tmp_path / "data", pair("a", "b"), pair("c", "d")), tokenizer)
    with pytest.raises(ValueError, match="^seed, step, size: expected integers"):
        task.batch(seed, step, size)


def test_data_that_changed_is_noticed(tokenizer, tmp_path):
    data = write(tmp_path / "data", pair("a", "b"), pair("c", "d"))
    settings = Text(data, tokenizer).to_dict()
    write(tmp_path / "data", pair("a", "b"), pair("c", "e"))
    with pytest.raises(ValueError, match="data: expected the tokens of digest"):
        build_task(settings)


def test_a_tokenizer_without_an_end_token(tokenizer, tmp_path):
    for path in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path.__class__(tokenizer) / path).read_text()
        (tmp_path / path).write_text(text.replace('"eos_token": "<end>",', ""))
    data = write(tmp_path / "data", pair("a", "b"), pair("c", "d"))
    with pytest.raises(ValueError, match="end_token: expected False"):
        Text(data, str(tmp_path))
    assert Text(data, str(tmp_path), end_token=False).seq_len == 1


def test_evaluation_counts_whole_answers(tokenizer, tmp_path):
    """A model that always knows the next token, but for one letter."""
    answers = ("ab", "a", "cd", "c", "ad")
    data = write(tmp_path / "data", *(pair("abc"[: 1 + i % 3], x) for i, x in enumerate(answers)))
    task = Text(data, tokenizer, eval_data=data)

    def model(ids, labels, loss_mask, passes, return_state):
        assert not return_state and (passes, model.training) == (3, False)
        columns = loss_mask.any(0).nonzero()[:, 0]
        logits = torch.nn.functional.one_hot(labels.clamp(min=0), task.vocab_size).double()
        logits[labels == ID["d"]] = 0
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits[:, columns], positions=columns, loss=loss)

    model.training, model.eval, model.train = False, lambda: None, lambda mode: None
    whole = task.evaluate(model, samples=99, batch_size=99, passes=3)
    assert whole["exact"] == pytest.approx(3 / 5) and whole["samples"] == 5
    assert whole["per_label"] == pytest.approx(11 / 13)
    parts = task.evaluate(model, samples=99, batch_size=2, passes=3)
    assert parts == pytest.approx(whole)
    assert task.chance() == {"majority": pytest.approx(1 / 5)}


def test_evaluation_of_a_model_that_sleeps(tokenizer, tmp_path):
    data = write(tmp_path / "data", *(pair("abcdefgh"[i:], WORDS[i]) for i in range(8)))
    task = Text(data, tokenizer, eval_data=data)
    torch.manual_seed(0)
    size = dict(vocab_size=task.vocab_size, hidden_size=16, num_heads=2)
    model = SleepHybridModel(HybridConfig(layers=("attn", "gdn"), window=4, passes=2, **size))
    ids, labels, *_ = task.batch(0, 0, 8, split="eval")
    with torch.no_grad():
        logits = model(ids).logits
    marked = labels != IGNORE_INDEX
    expected = torch.nn.functional.cross_entropy(logits[marked], labels[marked])
    found = task.evaluate(model, samples=8, batch_size=3)
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["per_label"] == pytest.approx((logits.argmax(-1) == labels)[marked].float().mean().item())
    assert task.evaluate(model, samples=8, passes=1)["loss"] != pytest.approx(found["loss"], rel=1e-6)


LINES = [*(pair("abcdefgh"[i:], WORDS[i], op=i) for i in range(8)), pair("ab", "cd", op=2)]
STORED = {
    "held-out": dict(held_out=0.3),
    "eval-data": dict(level="op"),
    "texts": dict(seq_len=3),
    "cut": dict(seq_len=4, overflow="cut", end_token=False),
}


@pytest.mark.parametrize("options", STORED.values(), ids=STORED)
def test_tokens_in_files_give_the_same_batches(options, tokenizer, tmp_path):
    lines = [{"text": " ".join(WORDS[i:])} for i in range(6)] if options == STORED["texts"] else LINES
    options = dict(seq_len=12) | options
    data, asked = write(tmp_path / "data", *lines), write(tmp_path / "asked", *lines[:4])
    options |= {"eval_data": asked} if "level" in options else {}
    memory, cache = Text(data, tokenizer, **options), str(tmp_path / "cache")
    made = Text(data, tokenizer, cache=cache, **options)
    again = build_task(made.to_dict())
    for task in (made, again):
        assert task.to_dict() == memory.to_dict() | {"cache": cache}
        assert (task.vocab_size, task.metric, task.chance()) == (memory.vocab_size, memory.metric, memory.chance())
        assert task._levels == memory._levels
        for split in ("train", "eval"):
            assert isinstance(task.splits[split].tokens, np.memmap)
            for step in range(5):
                for a, b in zip(*(x.batch(3, step, 4, split=split)[:3] for x in (task, memory)), strict=True):
                    assert torch.equal(a, b)


def test_tokens_in_files_are_made_once(tokenizer, tmp_path, monkeypatch):
    data, options = write(tmp_path / "data", *LINES), dict(seq_len=12, cache=str(tmp_path / "cache"))
    Text(data, tokenizer, **options)
    with monkeypatch.context() as patch:
        patch.setattr(Text, "_tokenised", lambda *_: pytest.fail("read the file again"))
        patch.setattr(Examples, "hash_into", lambda *_: pytest.fail("read the tokens again"))
        settings = Text(data, tokenizer, **options).to_dict()
    with pytest.raises(ValueError, match="data: expected the tokens of digest"):
        build_task(settings | {"held_out": 0.5})
    write(tmp_path / "data", *LINES, pair("a", "b"))
    assert len(Text(data, tokenizer, **options).splits["train"].answers) == len(LINES)
    with pytest.raises(ValueError, match="data: expected the tokens of digest"):
        build_task(settings)


def test_nothing_half_made_is_read(tokenizer, tmp_path):
    data, options = write(tmp_path / "data", *LINES, "no JSON"), dict(seq_len=12, cache=str(tmp_path / "cache"))
    for _ in range(2):
        with pytest.raises(ValueError, match="data, line 10: expected JSON"):
            Text(data, tokenizer, **options)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.slow
def test_processes_wait_for_the_one_that_makes_the_files(tokenizer, tmp_path):
    data, options = write(tmp_path / "data", *LINES * 500), dict(seq_len=12, cache=str(tmp_path / "cache"))
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        digests = {pool.submit(_digest, data, tokenizer, options) for _ in range(4)}
        assert len({x.result() for x in digests}) == 1
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def _digest(data, tokenizer, options):
    return Text(data, tokenizer, **options).digest


def test_accuracy_is_reported_by_level(tokenizer, tmp_path):
    """A model that always says "b": right on every level as often as "b" is the answer there."""
    lines = [
        pair("a", "b", op=1),
        pair("c", "b", op=1),
        pair("d", "e", op=2),
        pair("f", "b", op=2),
        pair("g", "e", op=2),
    ]
    data = write(tmp_path / "data", *lines)
    task = Text(data, tokenizer, eval_data=data, end_token=False, level="op")
    config = HybridConfig(vocab_size=task.vocab_size, hidden_size=8, layers=("gdn",), window=4, num_heads=2)
    model = SleepHybridModel(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(ID["b"]), task.vocab_size).float())
    for batch_size in (2, 5):
        found = task.evaluate(model, batch_size=batch_size)
        assert (found["exact_1"], found["exact_2"]) == (1.0, 1 / 3) and found["exact"] == 3 / 5
        assert (found["majority_1"], found["majority_2"]) == (1.0, 2 / 3)
    plain = Text(data, tokenizer, eval_data=data, end_token=False)
    assert not any(name.startswith("exact_1") for name in plain.evaluate(model))
    with pytest.raises(ValueError, match="line 1: hops: expected an integer >= 0, as for `level`, got None"):
        Text(data, tokenizer, eval_data=data, level="hops")
