"""Some of the random cases of fuzz.py, and that they notice what is wrong."""

import pytest
from fuzz import GATES, draw, fault

from sleep_ops.ops import chunk_torch

SEEDS = range(60)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_case(seed):
    assert fault(seed) == "", draw(seed)


def test_the_cases_are_of_every_kind():
    cases = [draw(seed) for seed in SEEDS]
    assert {case["operator"] for case in cases} == {"rule", "sleep", "step", "layer"}
    assert {case["gate"] for case in cases} == set(GATES)
    assert any(case["lengths"] and 0 in case["lengths"] for case in cases)


def test_a_wrong_decay_is_noticed(monkeypatch):
    seed = next(n for n in SEEDS if draw(n)["operator"] == "rule" and not draw(n)["gated"] and draw(n)["T"] > 60)
    decays = chunk_torch._decays
    monkeypatch.setattr(chunk_torch, "_decays", lambda g: tuple(1.000001 * x for x in decays(g)))
    assert fault(seed).startswith("result 0: error")
