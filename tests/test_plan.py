"""`sleep-ops plan`: what is tried until a step fits, long texts from short ones, refusals, what is printed."""

from dataclasses import replace

import hf_models
import pytest
from commands import run

from sleep_ops import HybridConfig, SleepHybridModel
from sleep_ops.training import plan
from sleep_ops.training.config import TrainConfig
from sleep_ops.training.plan import Machine, predictions
from sleep_ops.training.rehearsal import Step, rehearse

RECIPE = TrainConfig(batch_size=4)
SLEEP = dict(window=8, passes=2)


def build(param_dtype, **sleep):
    return SleepHybridModel(HybridConfig(vocab_size=32, hidden_size=32, layers=("attn", "gdn"), **sleep))


def step(peak=100.0, flops=1e12, sent=1e9, moved=0.0):
    return Step({"backward": {"activations": peak}, "updates": {"updates": 1.0}}, 0, flops, sent, moved)


@pytest.fixture
def tried(monkeypatch):
    """The settings of every step that is rehearsed, none of which fits."""
    found = []

    def rehearsed(build, recipe, sleep, tokens, processes):
        found.append((recipe, sleep))
        return step(1e18)

    monkeypatch.setattr(plan, "_step", rehearsed)
    return found


def added(machine, given=frozenset(), recipe=RECIPE, sleep=SLEEP):
    *_, last = predictions(build, recipe, sleep, machine, tokens=20, given=given)
    assert not last.fits
    return list(last.added)


def test_settings_are_added_while_it_does_not_fit(tried):
    shared = ["micro_batch", "param_dtype", "parallel", "activation_checkpointing", "recompute", "reshard", "offload"]
    assert added(Machine(gpus=2)) == shared
    assert (tried[-1][0].parallel, tried[-1][0].precision, tried[-1][1]["recompute"]) == ("fsdp", "bf16", "block")
    assert added(Machine()) == [x for x in shared if x not in ("parallel", "reshard")]
    assert "micro_batch" not in added(Machine(gpus=4))  # a row each
    given = frozenset({"activation_checkpointing", "parallel"})
    assert added(Machine(gpus=2), given) == ["micro_batch", "param_dtype", "offload"]
    assert added(Machine(), recipe=replace(RECIPE, param_dtype="bf16"))[:2] == [
        "micro_batch",
        "activation_checkpointing",
    ]


def recomputed(tried):
    """How, from step to step."""
    found = [sleep.get("recompute", "pass") for _, sleep in tried]
    return [x for x, before in zip(found, ["pass", *found], strict=False) if x != before]


def test_windows_are_recomputed_where_that_may_help(tried):
    added(Machine())
    assert recomputed(tried) == ["block", "window", "block"]  # back for --offload
    assert tried[-1][0].offload
    tried.clear()
    added(Machine(gpus=2), recipe=replace(RECIPE, parallel="fsdp", reshard="call"))
    assert recomputed(tried) == ["block"]
    tried.clear()
    added(Machine(), sleep=dict(window=8, windows_at_once=True))
    assert recomputed(tried) == ["block"]
    tried.clear()
    added(Machine(), frozenset({"offload"}))
    assert recomputed(tried) == ["block", "window"]
    tried.clear()
    added(Machine(), frozenset({"recompute"}), sleep=SLEEP | dict(activation_checkpointing=True, recompute="window"))
    assert {sleep["recompute"] for _, sleep in tried} == {"window"} and tried[-1][0].offload


def test_the_first_that_fits_is_the_last(monkeypatch):
    monkeypatch.setattr(plan, "_step", lambda *_: step(7.2e10))
    (only,) = predictions(build, RECIPE, SLEEP, Machine(), tokens=20)
    assert only.fits and only.added == {}


def test_speed():
    machine = Machine(gpus=2, peak=100, mfu=0.5, bandwidth=10)  # 0.02 s of computation, 0.1 s of gathering
    assert plan._seconds(step(), RECIPE, machine) == pytest.approx(0.12)
    by_call = replace(RECIPE, parallel="fsdp", reshard="call")
    assert plan._seconds(step(), by_call, machine) == pytest.approx(0.1)
    # What is offloaded goes on beside nothing.
    slow = replace(machine, host_bandwidth=5)
    assert plan._seconds(step(moved=2e9), by_call, slow) == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("sleep", [dict(passes=1), dict(passes=4), dict(passes=3, sleep_kind="replay")])
def test_long_texts_from_short_ones(sleep, monkeypatch):
    sleep = dict(window=8) | sleep
    exact = plan._step(build, RECIPE, sleep, 60, 1)
    monkeypatch.setattr(plan, "_PASSES", 0)
    found = plan._step(build, RECIPE, sleep, 60, 1)
    assert found.peak == pytest.approx(exact.peak, rel=0.03)
    assert found.flops == pytest.approx(exact.flops, rel=1e-6)


def rehearsed(recipe, sleep, processes):
    def model():
        return build(recipe.param_dtype, **sleep, impl="triton", attention_backend="torch")

    return rehearse(model, recipe, tokens=8, processes=processes)


BATCHES = {
    "micro-batches": (1, dict(batch_size=6, micro_batch=1)),
    "uneven": (2, dict(batch_size=3)),
    "uneven micro-batches": (2, dict(batch_size=11, micro_batch=2, param_dtype="bf16", parallel="fsdp")),
    "gathered at once": (8, dict(batch_size=9, micro_batch=1, parallel="fsdp", reshard="call")),
    "more micro-batches, at once": (2, dict(batch_size=7, micro_batch=1, parallel="fsdp", reshard="call")),
    "more micro-batches, by call": (2, dict(batch_size=8, micro_batch=1, parallel="fsdp", reshard="call")),
    "offloaded": (1, dict(batch_size=5, micro_batch=1, offload=True)),
    "gathered by call": (2, dict(batch_size=7, micro_batch=2, parallel="fsdp", reshard="call")),
}


@pytest.mark.parametrize(("processes", "recipe"), BATCHES.values(), ids=BATCHES)
def test_what_the_fullest_process_does(processes, recipe):
    sleep, recipe = dict(window=8, passes=1), TrainConfig(**recipe)
    found, exact = plan._step(build, recipe, sleep, 8, processes), rehearsed(recipe, sleep, processes)
    assert found.phases.keys() == exact.phases.keys()
    assert (found.flops, found.sent, found.moved) == (exact.flops, exact.sent, exact.moved)
    for phase, kinds in exact.phases.items():  # but for masks and numbers of further micro-batches
        assert found.phases[phase] == pytest.approx(kinds, abs=512)


def test_texts_in_parts_are_read_by_all_processes():
    sleep, recipe = dict(window=4, passes=1, windows_at_once=True), replace(RECIPE, split="sequence")
    exact, whole = plan._step(build, recipe, sleep, 64, 2), plan._step(build, RECIPE, sleep, 64, 1)
    assert exact.kinds["activations"] < 0.6 * whole.kinds["activations"]
    assert exact.sent > 0 and exact.flops < whole.flops


BAD = [
    (dict(gpus=0), "gpus"),
    (dict(memory=0.0), "memory"),
    (dict(spare=1.0), "spare"),
    (dict(mfu=1.5), "mfu"),
    (dict(peak=-1.0), "peak"),
    (dict(bandwidth=float("inf")), "bandwidth"),
    (dict(host_bandwidth=0.0), "host_bandwidth"),
]


@pytest.mark.parametrize(("changes", "named"), BAD, ids=[named for _, named in BAD])
def test_machines_that_cannot_be(changes, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        Machine(**changes)


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("tokens", "qwen3_5 --tokens 0 --window 8 --passes 2"),
        ("window", "qwen3_5 --tokens 8 --passes 1"),
        ("passes", "qwen3_5 --tokens 8 --window 8 --passes x"),
        ("batch_size", "qwen3_5 --tokens 8 --window 8 --passes 2 --gpus 8 --batch 4"),
        ("replicas", "qwen3_5 --tokens 8 --window 8 --passes 2 --gpus 8 --parallel fsdp --replicas 3"),
        ("split", "qwen3_5 --tokens 16 --window 8 --passes 2 --gpus 2 --split sequence"),
        ("split", "qwen3_5 --tokens 24 --window 8 --passes 1 --gpus 2 --split sequence --windows-at-once"),
        ("lora", "qwen3_5 --tokens 8 --window 8 --passes 2 --lora 0"),
        ("lora_targets", "qwen3_5 --tokens 8 --window 8 --passes 2 --lora-targets q_proj"),
        ("model", "nothing --tokens 8 --window 8 --passes 2"),
    ],
)
def test_refusals(named, options):
    assert f"error {named}: expected" in run("plan", *options.split(), code=2)


def test_what_is_printed(tmp_path):
    hf_models.build("qwen3_5").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # not read
    text = run("plan", tmp_path, *"--tokens 16 --window 16 --passes 2 --batch 1".split())
    assert "predicted, GB of each of 1 GPUs" in text and "predicted: fits as it is" in text
    text = run("plan", tmp_path, *"--tokens 16 --window 16 --passes 2 --batch 1 --memory 1e-6 --no-offload".split())
    assert "whatever was tried; --lora RANK would train adapters alone" in text
    lines, _, table = text.partition("predicted, GB")
    assert "as given: 0.0 GB, does not fit" in lines and "+ recompute block: 0.0 GB" in lines
    assert "+ recompute block" in table and "+ offload" not in text and "does not fit" in text
