"""The word problem: groups against their axioms, products against permuting five things one element at a time."""

import itertools

import pytest
import torch
from answering import Answering, Guessing
from hypothesis import given, settings
from hypothesis import strategies as st

from sleep_ops.tasks import IGNORE_INDEX, WordProblem
from sleep_ops.tasks.word_problem import elements, letters, product_table


def even(p):
    """Whether a permutation of n has an even number of inversions, from its cycles: n less their number."""
    seen, cycles = set(), 0
    for i in range(len(p)):
        cycles += i not in seen
        while i not in seen:
            seen.add(i)
            i = p[i]
    return (len(p) - cycles) % 2 == 0


def numbered(group):
    """{permutation: its number}, counted in lexicographic order."""
    digits = ([n // 5**i % 5 for i in (4, 3, 2, 1, 0)] for n in range(5**5))
    found = (tuple(p) for p in digits if len(set(p)) == 5 and (group == "S5" or even(p)))
    return {p: number for number, p in enumerate(found)}


NUMBERS = {group: numbered(group) for group in ("S5", "A5")}
ORDERS = {"S5": 120, "A5": 60}


def oracle(word, group):
    """The number of the product of the first i elements, for every i."""
    named = {number: p for p, number in NUMBERS[group].items()}
    places, found = list(range(5)), []  # where each of five things is by now
    for number in word:
        places = [named[number][place] for place in places]
        found.append(NUMBERS[group][tuple(places)])
    return found


@pytest.mark.parametrize("group", ["S5", "A5"])
def test_groups(group):
    n, table = ORDERS[group], torch.from_numpy(product_table(group)).long()
    assert elements(group).shape == (n, 5) and table.shape == (n, n)
    assert [tuple(p) for p in elements(group).tolist()] == list(NUMBERS[group])
    everything = torch.arange(n)
    assert torch.equal(table[0], everything) and torch.equal(table[:, 0], everything)
    # Latin square: products can be undone. Associative: (ab)c = a(bc).
    assert torch.equal(table.sort(0).values, everything[:, None].expand(n, n))
    assert torch.equal(table.sort(1).values, everything.expand(n, n))
    assert torch.equal(table[table[:, :, None].expand(n, n, n), everything], table[everything[:, None, None], table])
    assert not torch.equal(table, table.T)


tasks = st.builds(
    WordProblem,
    group=st.sampled_from(["S5", "A5"]),
    length=st.integers(1, 40),
    loss=st.sampled_from(["every", "last"]),
    window=st.integers(1, 16),
    alphabet=st.sampled_from(["group", "generators"]),
)


@settings(max_examples=60, deadline=None)
@given(tasks, st.integers(0, 2**63), st.integers(0, 10**9), st.sampled_from(["train", "eval"]))
def test_every_word_against_the_oracle(task, seed, step, split):
    ids, labels, mask = task.batch(seed, step, 4, split=split)[:3]
    last = task.loss == "last"
    assert ids.shape == (4, task.seq_len) == (4, task.length + last)
    assert task.vocab_size == ORDERS[task.group] + 1
    for row, target, marked in zip(ids.tolist(), labels.tolist(), mask.tolist(), strict=True):
        found = oracle(row[: task.length], task.group)
        if last:
            assert row[-1] == ORDERS[task.group]
            assert target == [IGNORE_INDEX] * task.length + found[-1:]
        else:
            assert target == found
        assert marked == [t != IGNORE_INDEX for t in target]


def test_elements_are_uniform():
    words = WordProblem("A5", 10).batch(0, 0, 6000).input_ids
    counts = torch.stack([column.bincount(minlength=60) for column in words.T]).double()
    assert counts.shape == (10, 60)
    assert (((counts - 100) ** 2 / 100).sum(1) < 59 + 6 * 118**0.5).all()


@pytest.mark.parametrize("group", ["S5", "A5"])
def test_two_elements_generate_the_group(group):
    two = letters(group, "generators").tolist()
    assert len(two) == 2
    words = WordProblem(group, 20, alphabet="generators").batch(0, 0, 100).input_ids
    assert words.unique().tolist() == sorted(two)
    found, new = {0}, {0}  # the identity, and what is reached from it
    while new:
        new = {int(product_table(group)[p, x]) for p in new for x in two} - found
        found |= new
    assert len(found) == ORDERS[group]


@pytest.mark.parametrize("loss", ["every", "last"])
@pytest.mark.parametrize("group", ["S5", "A5"])
def test_chance_of_words_of_generators(group, loss):
    """Against all 64 words of 6 letters, each as likely as any other."""
    task, two = WordProblem(group, 6, loss, alphabet="generators"), letters(group, "generators").tolist()
    labels = [oracle(word, group) for word in itertools.product(two, repeat=6)]
    asked = torch.tensor(labels)[:, slice(None) if loss == "every" else slice(-1, None)]
    commonest = [column.bincount().max().item() / 64 for column in asked.T]
    answers = asked.unique(dim=0, return_counts=True)[1]
    assert task.chance() == pytest.approx(
        {
            "uniform": ORDERS[group] ** -asked.shape[1],
            "majority": answers.max().item() / 64,
            "per_label": sum(commonest) / len(commonest),
        }
    )


@pytest.mark.parametrize("trim", [0, 12], ids=["all positions", "the last window"])
def test_accuracy_at_the_end(trim):
    task = WordProblem(length=12, loss="last", window=4)
    found = task.evaluate(Answering(121, trim=trim), samples=30, batch_size=12)
    assert found["exact"] == found["per_label"] == found["length_12"] == 1 and found["loss"] < 1e-6

    def wrong(ids, labels):  # the first of each batch
        return (labels != IGNORE_INDEX) & (torch.arange(len(ids)) == 0)[:, None]

    found = task.evaluate(Answering(121, wrong, trim), samples=30, batch_size=12)
    assert found["exact"] == found["per_label"] == found["length_12"] == 27 / 30


def test_accuracy_by_length():
    task = WordProblem("A5", length=11)

    def wrong(ids, labels):  # from the fifth product on
        return torch.arange(ids.shape[1]).expand_as(ids) >= 4

    found = task.evaluate(Answering(61), samples=30, batch_size=12)
    assert found["exact"] == found["per_label"] == 1
    found = task.evaluate(Answering(61, wrong), samples=30, batch_size=12)
    levels = {key: value for key, value in found.items() if key.startswith("length")}
    assert levels == {"length_1": 1, "length_2": 1, "length_4": 1, "length_8": 0, "length_11": 0}
    assert found["exact"] == 0 and found["per_label"] == pytest.approx(4 / 11)


@pytest.mark.parametrize("loss", ["every", "last"])
def test_other_lengths(loss):
    task = WordProblem(length=6, loss=loss)

    def wrong(ids, labels):  # words of more than 8 elements
        return torch.full_like(ids, ids.shape[1] > 9, dtype=torch.bool)

    found = task.evaluate(Answering(121, wrong), samples=8, lengths=(3, 8, 20))
    assert (found["length_3"], found["length_6"], found["length_8"], found["length_20"]) == (1, 1, 1, 0)
    assert found["exact"] == 1
    with pytest.raises(ValueError, match="length:"):
        task.evaluate(Answering(121), samples=8, lengths=(0,))


def test_guessing():
    task = WordProblem("A5", length=4)

    def anything(ids):
        return torch.randint(60, ids.shape, generator=torch.Generator().manual_seed(0))

    found, chance = task.evaluate(Guessing(61, anything), samples=4000, batch_size=1000), task.chance()
    assert abs(found["per_label"] - chance["per_label"]) < 5 * (chance["per_label"] / 16000) ** 0.5
    assert chance == pytest.approx({"uniform": 60**-4, "majority": 60**-4, "per_label": 1 / 60}, rel=1e-12)
    assert WordProblem("A5", loss="last").chance()["majority"] == pytest.approx(1 / 60)
    assert WordProblem(length=5000).chance()["majority"] == 0


@pytest.mark.parametrize("loss", ["every", "last"])
def test_an_instance_is_readable(loss):
    task = WordProblem(length=5, loss=loss)
    ids, labels = task.batch(0, 0, 1)[:2]
    lines = task.render(ids[0], labels[0]).split("\n")
    places, answers = "01234", 0
    for line in lines:
        read, _, answer = line.partition(" -> ")
        if read != "[=]":
            places = "".join(read[int(place)] for place in places)
        if answer:
            answers += 1
            assert answer == places
    assert (len(lines), answers) == {"every": (5, 5), "last": (6, 1)}[loss]
