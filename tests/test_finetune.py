"""Fine-tuning of tiny random checkpoints: what learns, what stays, what comes out, and going on after any stop."""

import importlib.metadata
import json
import math
import re
import shutil
import signal
import sys
from dataclasses import replace

import pytest
import torch
from cases import slow_unless
from commands import run as invoke
from hf_models import build, tokens
from rich.console import Console
from test_adapter_loading import plain, word_tokenizer

from sleep_ops import SleepSession
from sleep_ops.adapters.checkpoint import read_config
from sleep_ops.adapters.hf import from_pretrained, sleepify
from sleep_ops.adapters.loading import load_model
from sleep_ops.adapters.ouro import Ouro
from sleep_ops.files import read_csv
from sleep_ops.model.sleeping import sleeping
from sleep_ops.tasks import Rule110
from sleep_ops.tokenizer import load_tokenizer
from sleep_ops.training import RunConfig, TrainConfig, Trainer, load_run
from sleep_ops.training import finetune as module
from sleep_ops.training.finetune import FinetuneConfig, finetune
from sleep_ops.training.run import build_model

QUIET = Console(quiet=True)
TASK = Rule110(t=1, strings=2, bits=8)
SLEEP = dict(window=8, passes=2, eviction="sliding")
TRAIN = TrainConfig(steps=3, batch_size=4, lr_muon=1e-3, eval_every=0, eval_samples=8, checkpoint_every=2, device="cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: plain(root / family, family) for family in ("qwen3_5", "llama", "ouro", "jet_nemotron")}


def config(folder, *, warm_steps=2, train=TRAIN, task=TASK, **settings):
    return FinetuneConfig(str(folder), task.to_dict(), SLEEP | settings, train, warm_steps)


def weights(folder):
    return load_model(folder).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(out):
    return [[(row["step"], row["loss"]) for row in read_csv(out / phase / "metrics.csv")] for phase in ("warm", "full")]


FAMILIES = {"qwen3_5": {}, "llama": {"insert": (1, 3)}, "ouro": {"insert": (0, 2)}, "jet_nemotron": {}}
FAST_WEIGHTS = {"qwen3_5": "linear_attn", "jet_nemotron": r"layers\.(0|3)\.self_attn"}  # else inserted ones


@pytest.mark.parametrize("family", FAMILIES)
def test_both_phases_of_every_family(family, folders, tmp_path):
    result = finetune(config(folders[family], **FAMILIES[family]), tmp_path, console=QUIET)
    assert (result.step, result.finished, result.signal) == (3, True, None)
    first = build_model(RunConfig.load(tmp_path / "warm")).state_dict()
    warm, full = weights(tmp_path / "warm/model"), weights(tmp_path / "model")
    fast = {name for name in warm if re.search(FAST_WEIGHTS.get(family, "fast_weights"), name)}
    learnt = {name for name in warm if not torch.equal(warm[name], first[name])}
    assert learnt <= fast  # everything else is as it was, bit for bit
    assert {name for name in fast if name.endswith(("o_proj.weight", "out_proj.weight"))} <= learnt
    assert {name for name in full if name.endswith("mlp.up_proj.weight")} <= {
        name for name in full if not torch.equal(full[name], warm[name])
    }
    warm_model, model = load_model(tmp_path / "warm/model"), load_model(tmp_path / "model")
    assert [sleeping(m).settings.eviction for m in (warm_model, model)] == ["hard", "sliding"]
    assert [sleeping(m).settings.passes for m in (warm_model, model)] == [2, 2]
    _, _, trained, step = load_run(tmp_path / "full", device="cpu")
    assert step == 3 and same(trained.state_dict(), full)


def test_the_model_is_an_ordinary_folder_that_sleeps(folders, tmp_path):
    finetune(config(folders["qwen3_5"]), tmp_path, console=QUIET)
    model, (_, _, trained, _) = from_pretrained(tmp_path / "model"), load_run(tmp_path / "full", device="cpu")
    assert set(model.state_dict()) == set(build("qwen3_5").state_dict())
    ids = tokens(1, 20)
    with torch.no_grad():
        expected = trained(ids).logits
        assert torch.equal(model.eval()(ids).logits, expected)
        assert not torch.allclose(model(ids, passes=1).logits, expected)
    torch.testing.assert_close(SleepSession(model).read(ids), expected[:, -1], rtol=1e-4, atol=1e-5)
    more = config(tmp_path / "model", warm_steps=0, train=replace(TRAIN, steps=1))
    again = finetune(more, tmp_path / "more", console=QUIET)
    assert again.finished and not (tmp_path / "more/warm").exists()


def test_ouro_keeps_its_layout(folders, tmp_path):
    finetune(config(folders["ouro"], insert=(0, 2)), tmp_path, console=QUIET)
    model = Ouro.from_pretrained(tmp_path / "model")
    assert model.config.jet_layers == (0, 2) and model.config.eviction == "sliding"
    before = Ouro.from_pretrained(folders["ouro"], window=8, jet_layers=()).state_dict()
    assert {name for name in model.state_dict() if "fast_weights" not in name} == set(before)


@pytest.mark.slow
def test_the_loss_falls_while_only_the_fast_weights_learn(folders, tmp_path):
    recipe = dict(steps=30, batch_size=16, lr_adamw=1e-3, lr_muon=2e-2, checkpoint_every=0)
    train = replace(TRAIN, trainable="fast_weights", **recipe)
    run = RunConfig(TASK.to_dict(), {"folder": str(folders["qwen3_5"]), **SLEEP}, train)
    trainer = Trainer(run, tmp_path, console=QUIET)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    groups = [group for optimizer in trainer.optimizers.values() for group in optimizer.param_groups]
    assert {p for group in groups for p in group["params"]} == {
        p for name, p in trainer.model.named_parameters() if "linear_attn" in name
    }
    trainer.fit()
    found = [row["loss"] for row in read_csv(tmp_path / "metrics.csv")]
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("linear_attn" in name), name


@pytest.fixture(scope="module")
def straight(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    finetune(config(folders["qwen3_5"]), out, console=QUIET)
    return out


def agree(a, b, *models):
    assert losses(a) == losses(b)
    for name in models or ("warm/model", "model"):
        assert same(weights(a / name), weights(b / name))
        assert read_config(a / name) == read_config(b / name)


@pytest.mark.parametrize(
    "stop", slow_unless(["warm", "full"], [1, 2, 3, 4], ids=["warm", "border", "full", "full-late"])
)
def test_stopped_it_goes_on_to_the_same_bits(stop, folders, straight, tmp_path):
    settings = config(folders["qwen3_5"])
    first = finetune(settings, tmp_path, until=stop, console=QUIET)
    assert first.step == (stop if stop <= 2 else stop - 2)
    assert (tmp_path / "warm/model").exists() == (stop >= 2) and not (tmp_path / "model").exists()
    assert finetune(settings, tmp_path, until=1, console=QUIET) is None or stop == 1
    torch.manual_seed(123)  # whatever happens in between
    assert finetune(settings, tmp_path, console=QUIET).finished
    agree(tmp_path, straight)
    assert finetune(settings, tmp_path, console=QUIET) is None


@pytest.mark.parametrize("phase, step, last", [("warm", 1, False), ("warm", 2, True), ("full", 2, False)])
def test_a_signal_stops_either_phase(phase, step, last, folders, straight, tmp_path, monkeypatch):
    take, calls = Trainer.take, []

    def interrupted(self, batch):
        if (self.label, self.step + 1) == (phase, step) and not calls:
            calls.append(signal.raise_signal(signal.SIGTERM))
        return take(self, batch)

    monkeypatch.setattr(Trainer, "take", interrupted)
    settings = config(folders["qwen3_5"])
    result = finetune(settings, tmp_path, console=QUIET)
    assert (result.signal, result.step, result.finished) == (signal.SIGTERM, step, last)
    assert (tmp_path / "full").exists() == (phase == "full")
    finetune(settings, tmp_path, console=QUIET)
    agree(tmp_path, straight)


@pytest.mark.parametrize("which", ["warm", "full"])
def test_a_half_written_model_is_never_used(which, folders, straight, tmp_path, monkeypatch):
    save, calls = module.save_model, []

    def killed(model, folder, source):
        calls.append(folder)
        save(model, folder, source)
        if len(calls) == ("warm", "full").index(which) + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_model", killed)
    settings = config(folders["qwen3_5"])
    with pytest.raises(KeyboardInterrupt):
        finetune(settings, tmp_path, console=QUIET)
    unfinished = tmp_path / ("warm/model" if which == "warm" else "model")
    assert not unfinished.exists() and (tmp_path / "warm/model").exists() == (which == "full")
    (unfinished.parent / ".partial-killed").mkdir()  # what a kill leaves
    finetune(settings, tmp_path, console=QUIET)
    agree(tmp_path, straight)
    assert not list(tmp_path.rglob(".partial-*"))


def test_other_settings_are_refused_and_fresh_begins_anew(folders, straight, tmp_path):
    finetune(config(folders["qwen3_5"], warm_steps=1), tmp_path, until=2, console=QUIET)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for other, message in (
        (config(folders["qwen3_5"]), "warm: holds a run with other settings.*train.steps: 1 -> 2"),
        (config(folders["qwen3_5"], warm_steps=1, eviction="hard"), "full: holds .*eviction: 'sliding' -> 'hard'"),
        (config(folders["jet_nemotron"], warm_steps=1), "warm: holds .*model.folder"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(other, tmp_path, console=QUIET)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="window: expected at most"):
        finetune(config(folders["qwen3_5"], window=513), tmp_path, resume=False, console=QUIET)
    train = replace(TRAIN, passes_schedule="random")
    random = config(folders["qwen3_5"], sleep_kind="replay", passes=math.inf, train=train)
    with pytest.raises(ValueError, match="passes_schedule: expected 'fixed'"):
        finetune(random, tmp_path, resume=False, console=QUIET)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    finetune(config(folders["qwen3_5"]), tmp_path, resume=False, console=QUIET)
    agree(tmp_path, straight)


def test_other_models_are_left_alone(folders, tmp_path):
    mine = plain(tmp_path / "model", "qwen3_5")
    before = (mine / "model.safetensors").read_bytes()
    for folder, resume in ((folders["qwen3_5"], True), (folders["qwen3_5"], False), (mine, False)):
        with pytest.raises(ValueError, match="model: expected a folder to write the model to"):
            finetune(config(folder), tmp_path, resume=resume, console=QUIET)
    assert (mine / "model.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"warm_steps": -1}, "warm_steps: expected"),
        ({"train": replace(TRAIN, trainable="fast_weights")}, "trainable: expected 'all'"),
        ({"eviction": "soft"}, "eviction: expected"),
        ({"passes": 0}, "passes: expected"),
        ({"layers": 3}, "values: expected known"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_settings_are_refused_before_the_first_phase(changes, message, folders, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(folders["qwen3_5"], **changes)


def test_a_vocabulary_too_small_for_the_task(tmp_path):
    build("qwen3_5", vocab_size=2, pad_token_id=0, bos_token_id=1, eos_token_id=1).save_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match="model: expected a vocabulary of at least 3 tokens for rule110, got 2"):
        finetune(config(tmp_path / "tiny"), tmp_path / "out", console=QUIET)
    assert not (tmp_path / "out").exists()


def test_a_run_loads_its_own_weights_only(folders, straight, monkeypatch):
    run = RunConfig.load(straight / "full")
    monkeypatch.setattr("sleep_ops.adapters.hf.from_pretrained", lambda *a, **k: pytest.fail("read the weights again"))
    assert load_run(straight / "full", device="cpu")[3] == 3
    assert same(build_model(run, weights=False).state_dict(), build_model(run, weights=False).state_dict())


SMALL = "--passes 2 --batch 4 --steps 2 --warm-steps 1 --device cpu --eval-samples 8 --eval-every 0 --window 8".split()


def test_the_command_on_your_own_text(folders, tmp_path):
    folder = plain(tmp_path / "ouro", "ouro")
    word_tokenizer(folder, "abcdefgh")
    lines = [{"prompt": " ".join("abcdefgh"[i:] + "ab"), "answer": "abcdefgh"[i]} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["finetune", folder, "--task", "text", "--data", tmp_path / "data.jsonl", "--held-out", 0.25, *SMALL]
    text = invoke(*command, "--insert", "0,2", "--eviction", "sliding", "--out", tmp_path / "out")
    assert "training never shows" in text and "chance" in text
    assert "nothing to do" in invoke(*command, "--insert", "0,2", "--eviction", "sliding", "--out", tmp_path / "out")
    assert "trained with N=2 to step 2" in invoke("eval", tmp_path / "out/full", "--passes", "1,2", "--device", "cpu")
    run, task, _, _ = load_run(tmp_path / "out/full", device="cpu")
    assert run.train.batch_size == 4 and task.tokenizer == str(folder)
    assert load_tokenizer(tmp_path / "out/model")("c a")["input_ids"] == [4, 2]


def test_the_command_on_a_task(folders, tmp_path):
    task = "--task rule110 --bits 8 --strings 2 --task-option t=1 --task-option boundary=zero".split()
    invoke("finetune", folders["llama"], *task, *SMALL, "--insert", "1,3", "--loop", "1:3", "--out", tmp_path / "out")
    settings = load_model(tmp_path / "out/model").model.sleep.chosen
    assert (settings.loop, settings.window, settings.passes, settings.eviction) == ((1, 3), 8, 2, "hard")
    run = RunConfig.load(tmp_path / "out/full")
    assert run.task == replace(TASK, boundary="zero").to_dict()
    assert run.train == replace(FinetuneConfig.train, steps=2, batch_size=4, eval_samples=8, eval_every=0, device="cpu")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--task sums", "task: expected one of rule110"),
        ("--task text", "data: expected a file"),
        ("--task text --data nowhere", "tokenizer: expected a folder"),
        ("--task rule110 --data nowhere", "data: expected no such option for the task rule110"),
        ("--task rule110 --task-option bits", "task_option: expected NAME=VALUE"),
        ("--task rule110 --task-option nodes=3", "nodes: expected no such option"),
        ("--task word-problem --task-option nodes=3", "nodes: expected no such option for the task word_problem"),
        ("--task rule110 --until 0", "until: expected"),
        ("--task rule110 --insert one", "insert: expected integers"),
        ("--task rule110 --insert 99", "insert: expected distinct layer numbers from 0 to"),
        ("--task rule110 --eviction soft", "eviction: expected"),
        ("--task rule110 --micro-batch 0", "micro_batch: expected"),
        ("--task rule110 --window 0", "window: expected"),
        ("--task rule110", "insert_fast_weights"),
    ],
)
def test_the_command_refuses(arguments, message, folders, tmp_path):
    command = ("finetune", folders["llama"], *SMALL, *arguments.split(), "--out", tmp_path / "out")
    assert message in invoke(*command, code=2)
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_what_is_no_checkpoint(tmp_path):
    text = invoke("finetune", tmp_path, "--task", "rule110", *SMALL, "--out", tmp_path / "out", code=2)
    assert "folder: expected a checkpoint folder" in text


def test_a_missing_extra_is_named(folders, tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    monkeypatch.delitem(sys.modules, "sleep_ops.adapters.hf")
    monkeypatch.delattr("sleep_ops.adapters.hf")
    text = invoke("finetune", folders["qwen3_5"], "--task", "rule110", *SMALL, "--out", tmp_path / "out", code=1)
    assert "pip install 'sleep-ops[hf]'" in text and not (tmp_path / "out").exists()


@pytest.mark.parametrize("warm_steps", (0, 3))
def test_an_eviction_that_is_not_given_is_as_the_folder_remembers_it(warm_steps, tmp_path):
    model = sleepify(build("qwen3_5"), window=8, passes=2, eviction="sliding", loop=(1, 2))
    model.save_pretrained(tmp_path / "model")
    task = Rule110(t=1, strings=2, bits=8).to_dict()
    for given, expected in ((None, "sliding"), ("hard", "hard")):
        config = FinetuneConfig(str(tmp_path / "model"), task, {"eviction": given}, warm_steps=warm_steps)
        *warm, full = config.phases(tmp_path / "out")
        assert all(phase.run.model["eviction"] == "hard" for phase in warm) and len(warm) == bool(warm_steps)
        # With no warm-up the folder itself says so.
        assert full.run.model.get("eviction", "sliding") == expected
    at_once = {"sleep_kind": "replay", "windows_at_once": True}
    if warm_steps:  # else the model is built before anything is trained
        with pytest.raises(ValueError, match="eviction: expected 'hard' with windows_at_once, got 'sliding'"):
            FinetuneConfig(str(tmp_path / "model"), task, at_once, warm_steps=warm_steps).phases(tmp_path / "out")


def test_a_finished_run_needs_its_first_phase_no_longer(folders, tmp_path):
    settings = config(folders["qwen3_5"], warm_steps=1, train=replace(TRAIN, steps=1))
    finetune(settings, tmp_path, console=QUIET)
    shutil.rmtree(tmp_path / "warm")
    assert finetune(settings, tmp_path, console=QUIET) is None and not (tmp_path / "warm").exists()
