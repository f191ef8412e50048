"""GSM-Infinite: every problem against an evaluator that reads its words, lengths, streams, the vocabulary, accuracy."""

import ast
import json
import math
import re
import time
from collections import Counter
from functools import cache

import pytest
import torch
from answering import Answering
from hypothesis import given, settings
from hypothesis import strategies as st

from sleep_ops import HybridConfig, SleepHybridModel
from sleep_ops.tasks import IGNORE_INDEX, Text
from sleep_ops.tasks.gsm_infinite import Generator, GSMInfinite, count_tokens, evaluate, write_jsonl
from sleep_ops.tasks.gsm_infinite.evaluator import Reading
from sleep_ops.tasks.gsm_infinite.problem import prompt_of, words
from sleep_ops.tasks.gsm_infinite.structure import LIMIT, Quantity, Rule
from sleep_ops.tasks.gsm_infinite.task import PAD, VOCABULARY, decode, encode
from sleep_ops.tasks.gsm_infinite.worlds import MARKETS, SCHOOLS, WILDLIFE, WORLDS
from sleep_ops.tokenizer import load_tokenizer

SMALL = Generator(lengths=(350, 500))
BY_NAME = {world.name: world for world in WORLDS}


@st.composite
def problems(draw):
    ops = sorted(draw(st.tuples(*[st.integers(1, 8)] * 2)))
    generator = Generator(ops, (draw(st.integers(330, 700)),) * 2)
    index = draw(st.integers(0, 2**63 - 1))
    return generator, generator.problem(
        draw(st.integers(0, 2**64 - 1)), index, draw(st.sampled_from(["train", "eval"]))
    )


def core_of(problem):
    return {i for i, needed in enumerate(problem.core) if needed}


def without(problem, removed):
    kept = (sentence for i, sentence in enumerate(problem.sentences) if i not in removed)
    return " ".join((problem.note, *kept))


def longest_sentence(world):
    place = max(range(world.places), key=lambda i: count_tokens(world.place(i)))
    known = [Quantity(form, place, kind) for form in ("count", "rate", "total", "parts") for kind in range(16)]
    longest = max(known, key=lambda q: count_tokens(world.phrase(q)))
    return count_tokens(world.state(longest, Rule((longest,) * 3, "sum", "fewer", 9)))


def question_about(problem, i):
    """The question that sentence i answers, in words."""
    world = BY_NAME[problem.template]
    before, between, _ = re.split(r"\{\w+\}", world.statement)
    quantity = problem.sentences[i].removeprefix(before).split(between)[0]
    return world.question.format(quantity=quantity[0].lower() + quantity[1:])


@settings(max_examples=100, deadline=None)
@given(problems())
def test_answer_and_operations_are_those_of_the_text(drawn):
    generator, problem = drawn
    found = evaluate(problem.problem, problem.question)
    assert (found.answer, found.op) == (problem.answer, problem.op)
    assert found.needed == core_of(problem)
    assert 0 <= problem.answer <= LIMIT and generator.ops[0] <= problem.op <= generator.ops[1]


@settings(max_examples=25, deadline=None)
@given(problems())
def test_nothing_that_is_needed_follows_from_a_distractor(drawn):
    _, problem = drawn
    distractors = set(range(len(problem.sentences))) - core_of(problem)
    assert distractors
    for removed in [distractors, *({i} for i in distractors)]:
        found = evaluate(without(problem, removed), problem.question)
        assert (found.answer, found.op) == (problem.answer, problem.op)


@settings(max_examples=25, deadline=None)
@given(problems())
def test_every_quantity_is_small_and_every_distractor_follows_from_the_core(drawn):
    _, problem = drawn
    reading, core = Reading(problem.problem), core_of(problem)
    for i in range(len(problem.sentences)):
        found = reading.evaluate(question_about(problem, i))
        assert 0 <= found.answer <= LIMIT
        assert found.needed & core and (i not in core or found.needed <= core)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_length_is_reached_within_a_sentence_and_the_question_comes_first(drawn):
    generator, problem = drawn
    assert problem.length == count_tokens(problem.prompt) <= generator.lengths[1]
    assert problem.length > generator.lengths[1] - longest_sentence(BY_NAME[problem.template])
    assert problem.prompt == f"Question: {problem.question} Problem: {problem.problem} Answer:"


@settings(max_examples=50, deadline=None)
@given(problems())
def test_solution_is_the_working(drawn):
    """Its arithmetic is right, ends in the answer, and has exactly `op` operations and constants."""
    _, problem = drawn
    steps = [re.findall(r"= ([^=]+)", step) for step in problem.solution.rstrip(".").split(". ")]
    assert int(steps[-1][-1]) == problem.answer
    for step in steps:
        assert all(eval(text) == int(step[-1]) for text in step)
    nodes = [node for step in steps for node in ast.walk(ast.parse(step[0].strip()))]
    assert sum(isinstance(node, ast.BinOp) for node in nodes) + sum(len(s) == 1 for s in steps) == problem.op


@settings(max_examples=50, deadline=None)
@given(problems())
def test_vocabulary_round_trip(drawn):
    _, problem = drawn
    ids = encode(f"{problem.prompt} {problem.answer}")
    assert decode(ids) == f"{problem.prompt} {problem.answer}"
    assert PAD not in ids and len(ids) == len(words(problem.prompt)) + 1


WILD = [
    "The number of bears in Pine Lake equals 4.",
    "The number of otters in Pine Lake equals 3 more than the number of bears in Pine Lake.",
    "The number of young per bear in Pine Lake equals 2 fewer than the number of otters in Pine Lake.",
    "The number of young per otter in Pine Lake equals the difference between the number of young per bear in Pine "
    "Lake and the number of bears in Pine Lake.",
    "The number of swans in Oak Ridge equals 2 times the sum of the number of bears in Pine Lake, the number of otters "
    "in Pine Lake and the number of all animals in Pine Lake.",
]
SCHOOL = [
    "The count of chess clubs at Oak Hall is 6.",
    "The count of film clubs at Oak Hall is 2 added to the count of chess clubs at Oak Hall.",
    "The membership of each film club at Elder Tower is 3 taken away from the gap between the count of clubs "
    "altogether at Oak Hall and the count of chess clubs at Oak Hall.",
    "The count of choir clubs at Elder Tower is 2 multiplied by the total of the count of chess clubs at Oak Hall, the "
    "membership of each film club at Elder Tower and the count of chess clubs at Oak Hall.",
]
SHOP = [
    "The jars of River Store are as many as 3.",
    "The apples inside one jar of River Store are as many as 2 on top of the product of the jars of River Store and "
    "the apples inside one tub of River Store.",
    "The apples inside one tub of River Store are as many as 5.",
    "The trays of Misty Farm are as many as 1 short of the sum of the jars of River Store and the apples everywhere in "
    "River Store.",
]


@pytest.mark.parametrize(
    ("world", "sentences", "quantity", "expected"),
    [
        (WILDLIFE, WILD, "the number of bears in Pine Lake", (4, 1, {0})),
        (WILDLIFE, WILD, "the number of young per bear in Pine Lake", (5, 3, {0, 1, 2})),
        (WILDLIFE, WILD, "the number of all animals in Pine Lake", (11, 3, {0, 1})),
        (WILDLIFE, WILD, "the number of all young in Pine Lake", (27, 7, {0, 1, 2, 3})),
        (WILDLIFE, WILD, "the number of swans in Oak Ridge", (44, 6, {0, 1, 4})),
        (SCHOOLS, SCHOOL, "the count of clubs altogether at Oak Hall", (14, 3, {0, 1})),
        (SCHOOLS, SCHOOL, "the count of clubs altogether at Elder Tower", (34, 8, {0, 1, 2, 3})),
        (MARKETS, SHOP, "the apples everywhere in River Store", (51, 5, {0, 1, 2})),
        (MARKETS, SHOP, "the trays of Misty Farm", (53, 7, {0, 1, 2, 3})),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_evaluator_by_hand(world, sentences, quantity, expected):
    for order in (sentences, sentences[::-1]):
        found = evaluate(" ".join((world.note, *order)), world.question.format(quantity=quantity))
        assert (found.answer, found.op) == expected[:2]
        assert {sentences.index(order[i]) for i in found.needed} == expected[2]


@pytest.mark.parametrize(
    ("sentences", "quantity", "message"),
    [
        (WILD[1:], "the number of otters in Pine Lake", "a statement of"),
        (WILD[:1], "the number of all animals in Oak Lake", "a count for Oak Lake"),
        (WILD[:2], "the number of all young in Pine Lake", "a statement of"),
        (["The number of owls in Oak Lake equals 2 times the number of owls in Oak Lake."],
         "the number of owls in Oak Lake", "need itself"),
        (WILD + WILD[:1], "the number of bears in Pine Lake", "stated once"),
        (["The number of all animals in Oak Lake equals 2."], "the number of all animals in Oak Lake", "stated once"),
        (["The number of cats in Oak Lake equals 2."], "the number of owls in Oak Lake", "a quantity of wildlife"),
        (["There are 2 owls in Oak Lake."], "the number of owls in Oak Lake", "statements of wildlife"),
        (SCHOOL, "the number of owls in Oak Lake", "statements of wildlife"),
    ],
    ids=["missing", "empty place", "no rate", "cycle", "twice", "stated whole", "no such kind", "no statement",
         "mixed"],
)  # fmt: skip
def test_evaluator_refuses(sentences, quantity, message):
    with pytest.raises(ValueError, match=message):
        evaluate(" ".join((WILDLIFE.note, *sentences)), f"What is {quantity}?")


def test_evaluator_refuses_what_has_no_world_or_no_question():
    with pytest.raises(ValueError, match="problem: expected the note"):
        evaluate(WILD[0], "What is the number of bears in Pine Lake?")
    with pytest.raises(ValueError, match="question"):
        evaluate(f"{WILDLIFE.note} {WILD[0]}", "How many bears?")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("the difference between {0}, {0} and {0}", "another number of quantities"),
        ("the sum of {0}", "another number of quantities"),
        ("2 more than the sum of 3 more than {0} and {0}", "a quantity of wildlife"),
        ("{0} and {0}", "a quantity of wildlife"),
    ],
    ids=["three in a difference", "one in a sum", "nested", "no join"],
)
def test_evaluator_refuses_other_expressions(expression, message):
    quantity = "the number of bears in Pine Lake"
    sentence = f"The number of swans in Oak Ridge equals {expression.format(quantity)}."
    with pytest.raises(ValueError, match=message):
        evaluate(f"{WILDLIFE.note} {WILD[0]} {sentence}", f"What is {quantity}?")


def test_ops_worlds_and_answers():
    """Uniform within four standard deviations; no answer of any op is so common that guessing it would do."""
    n = 4000
    drawn = [SMALL.answer(3, i) for i in range(n)]
    ops = Counter(op for op, _ in drawn)
    assert sorted(ops) == list(range(1, 9))
    assert all(abs(count - n / 8) < 4 * (n / 8 * 7 / 8) ** 0.5 for count in ops.values())
    assert all(0 <= answer <= LIMIT for _, answer in drawn)
    assert max(Counter(drawn).values()) < 0.2 * n / 8
    assert {answer for _, answer in drawn} >= set(range(LIMIT))
    n = 300
    worlds = Counter(Generator(lengths=None).problem(3, i).template for i in range(n))
    assert set(worlds) == {"wildlife", "schools", "markets"}
    assert all(abs(count - n / 3) < 4 * (n / 3 * 2 / 3) ** 0.5 for count in worlds.values())


def test_every_form_occurs():
    """Wholes asked for and used, all heads, joins and lengths of sums, in the sentences that are needed."""
    kinds = Counter()
    for i in range(900):
        problem = Generator(lengths=None).problem(5, i)
        reading = Reading(problem.problem)
        for _, expression in reading.stated.values():
            kinds[expression.head, expression.join, len(expression.names)] += 1
            kinds.update(name[0] for name in expression.names)
        kinds["asked"] += problem.question not in {question_about(problem, j) for j in range(len(problem.sentences))}
    shapes = {(head, join, n) for head in ("more", "fewer", "times", None) for join, n in
              [(None, 1), ("sum", 2), ("sum", 3), ("difference", 2), ("product", 2)]} - {(None, None, 1)}  # fmt: skip
    assert shapes | {(None, None, 0), "count", "rate", "total", "parts", "asked"} == set(kinds)
    assert 150 < kinds["asked"] < 300


def test_answer_alone_is_that_of_the_problem():
    for i in range(50):
        problem = SMALL.problem(9, i, "eval")
        assert SMALL.answer(9, i, "eval") == (problem.op, problem.answer)


def test_problems_depend_on_seed_index_and_split_only():
    records = [
        SMALL.problem(seed, i, split).record() for split in ("train", "eval") for seed in (0, 1) for i in range(9)
    ]
    assert len({record["id"] for record in records}) == len({record["prompt"] for record in records}) == 36
    assert SMALL.problem(1, 8, "eval").record() == records[-1]
    # The stream is part of what a run means: it must not drift between versions.
    first = Generator(lengths=(160, 160)).problem(0, 2)
    assert (first.id, first.op, first.template, first.answer) == ("train-0-2", 7, "wildlife", 41)
    assert first.core == (True, True, True, False, True, True)
    assert first.sentences == (
        "The number of bears in Harbor Marsh equals 4.",
        "The number of hedgehogs in Harbor Marsh equals 7.",
        "The number of young per turtle in Golden Heath equals 1 fewer than the number of all animals in Harbor Marsh.",
        "The number of stoats in Golden Heath equals 9 fewer than the number of hedgehogs in Crystal Canyon.",
        "The number of eagles in Hazel Lake equals the sum of the number of young per turtle in Golden Heath, the "
        "number of hedgehogs in Crystal Canyon and the number of all animals in Harbor Marsh.",
        "The number of hedgehogs in Crystal Canyon equals 2 times the number of young per turtle in Golden Heath.",
    )


def test_paper_setting():
    lengths = []
    for i in range(30):
        problem = Generator().problem(0, i)
        assert count_tokens(problem.prompt) == problem.length <= 3300
        lengths.append(problem.length)
        found = evaluate(problem.problem, problem.question)
        assert (found.answer, found.op) == (problem.answer, problem.op)
    assert min(lengths) > 1940 and max(lengths) - min(lengths) > 600


def test_counted_tokens():
    assert count_tokens("Tell me: 12 elephants, mathematical.") == 1 + 1 + 1 + 2 + 2 + 1 + 2 + 1


@pytest.mark.parametrize(
    "count",
    [len, lambda text: 1 + len(words(text)), lambda text: len(text) // 4, lambda text: len(text) ** 2 // 2000],
    ids=["characters", "one more for every text", "rounded", "superadditive"],
)
def test_any_tokenizer_has_the_last_word_on_lengths(count):
    for i in range(20):
        target = 2 * count(Generator(lengths=None).problem(0, i).prompt) + 900
        problem = Generator(lengths=(target, target), count=count).problem(0, i)
        assert problem.length == count(problem.prompt) <= target
        longer = f"{problem.problem} {max(problem.sentences, key=len)} {'x' * 60}"
        assert count(prompt_of(problem.question, longer)) > target


def test_without_distractors():
    problem = Generator(lengths=None).problem(0, 0)
    assert all(problem.core) and problem.length == count_tokens(problem.prompt)


@pytest.mark.parametrize("length", [10, 10**6], ids=["too short", "too long"])
def test_lengths_that_cannot_be(length):
    with pytest.raises(ValueError, match="lengths:"):
        Generator(lengths=(length, length)).problem(0, 0)


@pytest.mark.parametrize("op", [1, 3, 8])
def test_needed_is_enough_for_any_problem(op):
    generator = Generator((op, op), None, lambda text: len(words(text)))
    assert max(generator.problem(0, i).length for i in range(500)) <= generator.needed()


def test_jsonl(tmp_path):
    problems = [SMALL.problem(0, i) for i in range(5)]
    assert write_jsonl(tmp_path / "data.jsonl", problems) == 5
    lines = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    keys = {"prompt", "answer", "problem", "question", "solution", "op", "id", "template", "length"}
    for line, problem in zip(lines, problems, strict=True):
        assert line == problem.record() and set(line) == keys
        assert line["answer"] == f" {problem.answer}" and line["prompt"].startswith(f"Question: {line['question']}")
        assert line["problem"] in line["prompt"] and line["solution"] not in line["prompt"]


TASK = GSMInfinite(seq_len=384)


def test_layout_of_a_sequence():
    ids, labels, mask, *_ = TASK.batch(seed=7, step=3, size=6)
    assert ids.shape == labels.shape == mask.shape == (6, 384)
    assert ids.dtype == labels.dtype == torch.int64 and mask.dtype == torch.bool
    assert mask.device.type == "cpu" and torch.equal(mask, labels != IGNORE_INDEX) and mask.sum(1).tolist() == [1] * 6
    assert int(ids.max()) < TASK.vocab_size == len(VOCABULARY) == len(set(VOCABULARY))
    for row, (prompt, target) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
        problem = TASK.generator.problem(7, (3 << 32) + row)
        end = mask[row].nonzero().item()
        assert decode(prompt) == problem.prompt and len(words(problem.prompt)) == end + 1
        assert prompt[end + 1 :] == [PAD] * (383 - end) and 383 - end < 40
        assert VOCABULARY[target[end]] == str(problem.answer)


def test_a_smaller_batch_is_the_first_rows():
    whole, part = TASK.batch(1, 5, 8), TASK.batch(1, 5, 3)
    assert all(torch.equal(a[:3], b) for a, b in zip(whole[:3], part[:3], strict=True))


def test_shorter_problems():
    task = GSMInfinite(seq_len=600, shortest=300, max_op=4)
    lengths = (task.batch(0, 0, 64).input_ids != PAD).sum(1)
    assert 260 < lengths.min() < 340 and 560 < lengths.max() <= 600
    problems = [task.generator.problem(0, i) for i in range(64)]
    assert {problem.op for problem in problems} == {1, 2, 3, 4}


def test_stages_take_one_operation_more_each():
    sizes = dict(seq_len=160, min_op=1, max_op=3)
    task, whole = GSMInfinite(**sizes, first_op=1), GSMInfinite(**sizes)
    assert (task.stages, whole.stages) == (3, 1)
    for stage, most in ((0, 1), (1, 2), (2, 3), (None, 3)):
        easier = GSMInfinite(**sizes | {"max_op": most})
        batch = task.batch(3, 1, 64, stage=stage)
        assert torch.equal(batch.input_ids, easier.batch(3, 1, 64).input_ids)
        assert torch.equal(batch.labels, easier.batch(3, 1, 64).labels)
    assert torch.equal(task.batch(3, 1, 8, split="eval").input_ids, whole.batch(3, 1, 8, split="eval").input_ids)


def test_a_batch_in_well_under_a_second():
    task = GSMInfinite(seq_len=512)
    start = time.perf_counter()
    task.batch(0, 0, 32)
    assert time.perf_counter() - start < 1


def test_render():
    ids, labels, *_ = TASK.batch(0, 0, 2)
    problem = TASK.generator.problem(0, 1)
    assert TASK.render(ids[1], labels[1]) == f"{problem.prompt} {problem.answer}"


@pytest.mark.parametrize("text", ["What is love?", "What is 51?"], ids=["word", "number"])
def test_words_outside_the_vocabulary(text):
    with pytest.raises(ValueError, match="vocabulary"):
        encode(text)


@pytest.mark.parametrize("batch_size", [32, 12], ids=["one batch", "uneven batches"])
@pytest.mark.parametrize("trim", [0, 192], ids=["all positions", "last windows"])
def test_accuracy(trim, batch_size):
    """Of a model that is wrong about every third problem or so."""

    def wrong(input_ids, labels):
        return (input_ids.sum(1, keepdim=True) % 3 == 0).expand_as(labels)

    def asked_of(step, row):
        return TASK.generator.problem(0, (step << 32) + row, "eval")

    result = TASK.evaluate(Answering(TASK.vocab_size, wrong, trim), samples=32, batch_size=batch_size)
    problems = [asked_of(i // batch_size, i % batch_size) for i in range(32)]
    right = [sum(encode(problem.prompt)) % 3 > 0 for problem in problems]
    assert 0 < sum(right) < 32
    assert result["exact"] == result["per_label"] == sum(right) / 32 and result["samples"] == 32
    commonest = {op: commonest_answer(op) for op in range(1, 9)}
    guessed = [problem.answer == commonest[problem.op] for problem in problems]
    assert result["majority"] == sum(guessed) / 32
    for op in range(1, 9):
        rows = [i for i, problem in enumerate(problems) if problem.op == op]
        for name, hits in (("op", right), ("majority_op", guessed)):
            value = result[f"{name}_{op}"]
            assert value == sum(hits[i] for i in rows) / len(rows) if rows else math.isnan(value)


def test_chance_levels():
    chance = TASK.chance()
    assert set(chance) == {"uniform", "majority", *(f"majority_op_{op}" for op in range(1, 9))}
    assert chance["uniform"] == 1 / 51
    assert 0.03 < chance["majority"] < 0.07 and 1 / 9 - 0.05 < chance["majority_op_1"] < 1 / 9 + 0.05
    assert all(value < 0.16 for value in chance.values())


@cache
def commonest_answer(op):
    seen = [answer for found, answer in (TASK.generator.answer(0, i) for i in range(4096)) if found == op]
    return max(seen, key=seen.count)


def test_majority_is_the_commonest_answer_of_training():
    drawn = [TASK.generator.answer(0, i, "eval") for i in range(4096)]
    asked = [answer for op, answer in drawn if op == 8]
    assert TASK.chance()["majority_op_8"] == pytest.approx(asked.count(commonest_answer(8)) / len(asked))


def test_windows():
    assert (GSMInfinite(seq_len=400).window, GSMInfinite().window) == (100, 512)


@pytest.mark.parametrize(
    "options", [{"ops": 8}, {"ops": (0, 8)}, {"ops": (3, 2)}, {"lengths": (0, 9)}, {"lengths": (9.0, 10)}], ids=str
)
def test_bad_generator_settings(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}:"):
        Generator(**options)


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_names_are_distinct_and_sentences_read_back(world):
    assert len({world.place(i) for i in range(world.places)}) == world.places
    assert len(set(world.kinds)) == 16
    assert all(set(words(text)) <= {*VOCABULARY, "0"} for text in world.texts())


def test_exported_problems_are_a_text_task(tmp_path):
    """Lengths in tokens of the tokenizer that is then trained with."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from test_adapter_loading import word_tokenizer

    plain = [Generator(lengths=None).problem(0, i) for i in range(400)]
    pieces = {piece for problem in plain for piece in f"{problem.prompt} {problem.answer}".split()}
    word_tokenizer(tmp_path, sorted(pieces))
    tokenizer = load_tokenizer(str(tmp_path))
    generator = Generator(lengths=(300, 300), count=lambda text: len(tokenizer(text)["input_ids"]))
    problems = [generator.problem(0, i) for i in range(20)]
    write_jsonl(tmp_path / "data.jsonl", problems)
    task = Text(str(tmp_path / "data.jsonl"), str(tmp_path), end_token=False, held_out=0.5)
    assert task.seq_len == max(problem.length for problem in problems) and 270 < task.seq_len <= 300
    assert len(task.splits["train"].answers) == len(task.splits["eval"].answers) == 10


def test_a_model_trains_on_it():
    torch.manual_seed(0)
    task = GSMInfinite(seq_len=128, max_op=1)
    model = SleepHybridModel(
        HybridConfig(
            vocab_size=task.vocab_size, hidden_size=32, num_heads=2, layers=("attn", "gdn"), window=32, passes=2
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(20):
        ids, labels, mask, *_ = task.batch(0, step, 16)
        losses.append(model(ids, labels=labels, loss_mask=mask).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 4 and losses[-1] < 3  # from any token to one of nine numbers
    assert set(task.evaluate(model, samples=16, batch_size=8)) >= {"op_1", "majority_op_1", "exact", "loss"}
