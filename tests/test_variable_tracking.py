"""Variable tracking: every sequence run as a program."""

from collections import Counter

import pytest
import torch
from answering import Answering, Guessing
from hypothesis import given, settings
from hypothesis import strategies as st
from small import VARIABLES

from sleep_ops.tasks import IGNORE_INDEX, VariableTracking


@st.composite
def tasks(draw):
    chains, hops, ask = draw(st.integers(1, 5)), draw(st.integers(0, 6)), draw(st.sampled_from(["values", "variables"]))
    statements = chains * (hops + 1)
    return VariableTracking(
        chains=chains,
        hops=hops,
        queries=draw(st.integers(1, statements if ask == "values" else chains)),
        ask=ask,
        order=draw(st.sampled_from(["forward", "shuffled"])),
        variables=draw(st.integers(statements, 6 * statements)),
        values=draw(st.integers(chains, 6 * chains)),
        window=draw(st.sampled_from([n for n in range(1, 3 * statements + 1) if 3 * statements % n == 0])),
    )


def read_program(task, tokens):
    """What each variable is assigned, in the order of the statements."""
    assigned = {}
    for i in range(0, len(tokens), 3):
        variable, equals, source = tokens[i : i + 3]
        assert 0 <= variable < task.variables and variable not in assigned
        assert equals == task.variables + task.values
        assert task.order == "shuffled" or source >= task.variables or source in assigned
        assigned[variable] = source
    return assigned


def trace(task, assigned, variable):
    """(value, assignments between variable and value)."""
    source = assigned[variable]
    if source >= task.variables:
        return source, 0
    value, hops = trace(task, assigned, source)
    return value, hops + 1


@settings(max_examples=80, deadline=None)
@given(tasks(), st.integers(0, 2**63), st.integers(0, 10**9), st.sampled_from(["train", "eval"]))
def test_every_sequence_against_the_oracle(task, seed, step, split):
    ids, labels, mask = task.batch(seed, step, 5, split=split)[:3]
    context, question = 3 * task.chains * (task.hops + 1), task.variables + task.values + 1
    width = 2 if task.ask == "values" else task.hops + 2
    assert ids.shape == (5, task.seq_len) == (5, context + task.queries * width)
    assert task.vocab_size == question + 1
    for row, target, marked in zip(ids.tolist(), labels.tolist(), mask.tolist(), strict=True):
        assigned = read_program(task, row[:context])
        traced = {variable: trace(task, assigned, variable) for variable in assigned}
        chains = {}
        for variable, (value, hops) in traced.items():
            chains.setdefault(value, {})[hops] = variable
        assert len(chains) == task.chains
        assert all(sorted(chain) == list(range(task.hops + 1)) for chain in chains.values())
        expected, asked = [IGNORE_INDEX] * context, []
        for at in range(context, len(row), width):
            assert row[at] == question
            asked.append(row[at + 1])
            if task.ask == "values":
                answer = [traced[row[at + 1]][0]]
            else:
                answer = [chains[row[at + 1]][hops] for hops in range(task.hops + 1)]
            assert row[at + 2 : at + width] == answer[:-1]
            expected += [IGNORE_INDEX, *answer]
        assert len(set(asked)) == task.queries
        assert target == expected and marked == [t != IGNORE_INDEX for t in target]


@pytest.mark.parametrize("order", ["forward", "shuffled"])
def test_every_order_is_as_likely(order):
    """Two chains of two: 6 ways to mix them forward, 24 in any order."""
    task = VariableTracking(chains=2, hops=1, queries=1, order=order, variables=4, values=2, window=12)
    seen = Counter()
    for row in task.batch(0, 0, 2400).input_ids.tolist():
        assigned = read_program(task, row[:12])
        # Chains named by the value, 4 or 5, of their first variable.
        seen[tuple(trace(task, assigned, variable) for variable in assigned)] += 1
    ways = {"forward": 6, "shuffled": 24}[order]
    assert len(seen) == ways
    assert all(abs(count - 2400 / ways) < 5 * (2400 / ways) ** 0.5 for count in seen.values())


def test_values_are_asked_at_every_depth():
    task = VariableTracking(**VARIABLES)
    depths = Counter()
    for row in task.batch(0, 0, 1000).input_ids.tolist():
        assigned = read_program(task, row[:27])
        depths.update(trace(task, assigned, variable)[1] for variable in row[28::2])
    assert sorted(depths) == [0, 1, 2] and all(abs(n - 1000) < 5 * 1000**0.5 for n in depths.values())


def test_stages_ask_for_one_hop_more_each():
    task = VariableTracking(**VARIABLES, first_hops=0)
    assert (task.stages, VariableTracking(**VARIABLES).stages) == (3, 1)
    for stage, most in ((0, 0), (1, 1), (2, 2), (None, 2)):
        depths = Counter()
        for row in task.batch(0, 0, 500, stage=stage).input_ids.tolist():
            assigned = read_program(task, row[:27])
            depths.update(trace(task, assigned, variable)[1] for variable in row[28::2])
        share = 1500 / (most + 1)
        assert sorted(depths) == list(range(most + 1)) and all(abs(n - share) < 5 * share**0.5 for n in depths.values())


def deep(task, ids, depth):
    """bool [B, T]: questions about a variable so many assignments from its value; for "variables", labels that are."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for b, row in enumerate(ids.tolist()):
        assigned = read_program(task, row[: task.context])
        named = {trace(task, assigned, variable): variable for variable in assigned}
        for at in range(task.context, len(row), 1 + task.answers):
            if task.ask == "variables":
                found[b, at + 1 + depth] = True
            else:
                found[b, at + 1] = row[at + 1] in [v for (_, hops), v in named.items() if hops == depth]
    return found


@pytest.mark.parametrize("trim", [0, 27], ids=["all positions", "the questions' windows"])
@pytest.mark.parametrize("order", ["forward", "shuffled"])
@pytest.mark.parametrize("ask", ["values", "variables"])
def test_accuracy_by_hops(ask, order, trim):
    task = VariableTracking(**VARIABLES, ask=ask, order=order)
    found = task.evaluate(Answering(task.vocab_size, trim=trim), samples=30, batch_size=12)
    levels = ["hops_0", "hops_1", "hops_2"]
    assert {found[key] for key in ("exact", "per_label", *levels)} == {1.0}
    assert found["loss"] < 1e-6 and found["samples"] == 30
    for depth, level in enumerate(levels):
        model = Answering(task.vocab_size, lambda ids, labels, depth=depth: deep(task, ids, depth), trim)
        found = task.evaluate(model, samples=40, batch_size=16)
        assert {key: found[key] for key in levels} == {key: float(key != level) for key in levels}
        assert 0.5 < found["per_label"] < 0.8 and found["exact"] < 0.5


def test_guessing_a_value_that_was_read():
    task = VariableTracking(**VARIABLES)

    def any_value(ids):
        values = [[t for t in row if task.variables <= t < task.variables + task.values] for row in ids.tolist()]
        picks = torch.randint(3, ids.shape, generator=torch.Generator().manual_seed(0))
        return torch.tensor(values).gather(1, picks)

    found, chance = task.evaluate(Guessing(task.vocab_size, any_value), samples=2000, batch_size=500), task.chance()
    assert chance == {"uniform": pytest.approx(1 / 27), "majority": pytest.approx(1 / 27), "per_label": 1 / 3}
    assert abs(found["per_label"] - 1 / 3) < 5 * (2 / 9 / 6000) ** 0.5
    assert abs(found["exact"] - 1 / 27) < 5 * (1 / 27 / 2000) ** 0.5
    asked = VariableTracking(**VARIABLES, ask="variables").chance()
    assert asked["per_label"] == 1 / 9 and asked["majority"] == pytest.approx(9**-9)


@pytest.mark.parametrize("ask", ["values", "variables"])
def test_an_instance_is_readable(ask):
    task = VariableTracking(**VARIABLES, ask=ask)
    ids, labels = task.batch(0, 0, 1)[:2]
    lines = task.render(ids[0], labels[0]).split("\n")
    known = {}
    for line in lines[:9]:
        variable, source = line.split(" = ")
        known[variable] = known.get(source, source)
    assert len(lines) == 9 + 3
    for line in lines[9:]:
        asked, answer = line.split("? ")
        if ask == "values":
            assert known[asked] == answer
        else:
            assert [variable for variable, value in known.items() if value == asked] == answer.split()
