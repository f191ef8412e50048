"""Some of the random cases of fuzz.py, fuzz_models.py and fuzz_commands.py, and that they notice what is wrong."""

import fuzz_commands
import fuzz_models
import pytest
from fuzz import GATES, draw, fault

from sleep_ops import SleepHybridModel, SleepSession
from sleep_ops.cli.options import Fields
from sleep_ops.ops import chunk_torch

SEEDS = range(60)
MODELS = [seed for seed in range(55) if fuzz_models.draw(seed)["entry"] != "sleepify"]
SLEEPIFIED = [seed for seed in range(50) if fuzz_models.draw(seed)["entry"] == "sleepify"]
COMMANDS = range(20)


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


@pytest.mark.parametrize("seed", MODELS)
def test_random_model(seed):
    assert fuzz_models.fault(seed) == "", fuzz_models.draw(seed)


@pytest.mark.parametrize("seed", SLEEPIFIED)
def test_random_sleepified_model(seed):
    pytest.importorskip("transformers", reason="the adapters' tests need transformers (extra: hf)")
    assert fuzz_models.fault(seed) == "", fuzz_models.draw(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1100))
def test_more_random_models(seed):
    pytest.importorskip("transformers", reason="the adapters' tests need transformers (extra: hf)")
    assert fuzz_models.fault(seed) == "", fuzz_models.draw(seed)


def test_the_models_are_of_every_kind():
    cases = [fuzz_models.draw(seed) for seed in MODELS]
    assert {case["padding"] for case in cases} == {"", "right", "left", "mixed", "packed"}
    assert {case["sleep_kind"] for case in cases} == {"refine", "replay"}
    assert {kind for case in cases for kind in case["layers"]} == {"attn", "swa", "gdn", "jet"}
    assert any(0 in case["lengths"] for case in cases) and any(case["pieces"] > 1 for case in cases)
    assert {fuzz_models.draw(seed)["family"] for seed in SLEEPIFIED} >= {"qwen3_5", "qwen3_next", "olmo_hybrid"}


def noticed(seeds, entry):
    """What the cases of an entry say is wrong."""
    found = (fuzz_models.fault(seed) for seed in seeds if fuzz_models.draw(seed)["entry"] == entry)
    return next((why for why in found if why), "")


def test_wrong_logits_of_a_model_are_noticed(monkeypatch):
    predict = SleepHybridModel.predict
    monkeypatch.setattr(SleepHybridModel, "predict", lambda self, h: 0.999999 * predict(self, h))
    assert noticed(MODELS[:8], "model").startswith("logits: error")


def test_a_sleep_that_is_left_out_is_noticed(monkeypatch):
    stack = SleepHybridModel.stack.fget

    def sleepless(self):
        found = stack(self)
        found.sleep = lambda state, **_: state
        return found

    monkeypatch.setattr(SleepHybridModel, "stack", property(sleepless))
    assert noticed(MODELS, "model") and noticed(MODELS, "session")


def test_a_file_of_another_place_is_noticed(monkeypatch):
    load = SleepSession.load.__func__

    def shifted(cls, path, model):
        session = load(cls, path, model)
        session.state = session.state._replace(position=tuple(n + 1 for n in session.state.position))
        return session

    monkeypatch.setattr(SleepSession, "load", classmethod(shifted))
    assert noticed(MODELS, "session")


@pytest.mark.parametrize("seed", COMMANDS)
def test_random_command(seed):
    assert fuzz_commands.fault(seed) == "", fuzz_commands.draw(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 180))
def test_more_random_commands(seed):
    assert fuzz_commands.fault(seed) == "", fuzz_commands.draw(seed)


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x")], ids=["KeyError", "RuntimeError"])
def test_a_traceback_is_noticed(monkeypatch, error):
    def broken(self, values):
        raise error

    monkeypatch.setattr(Fields, "take", broken)
    seed = next(
        n for n in range(100) if fuzz_commands.draw(n)["entry"] == "recall" and not fuzz_commands.draw(n)["bad"]
    )
    assert "traceback" in fuzz_commands.fault(seed)


def test_bad_arguments_that_are_accepted_are_noticed(monkeypatch):
    take = Fields.take
    monkeypatch.setattr(Fields, "take", lambda *arguments: take(*arguments) | {"loads": (0.5, 1.0)})
    monkeypatch.setattr(
        "fuzz_commands.draw",
        lambda seed: {"entry": "recall", "arguments": SMALL_RECALL, "bad": True, "twice": False, "damage": ""},
    )
    assert fuzz_commands.fault(0) == "accepted"


SMALL_RECALL = "recall --loads=nan --passes=1 --key-dim=4 --memories=2 --codewords=4 --device=cpu --out=out".split()
