"""The trainer: optimisers, learning rates, checkpoints whole or refused, exact resume, bad steps, signals."""

import gzip
import json
import math
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from judge import close, identical
from rich.console import Console
from torch import nn

from sleep_ops import HybridConfig
from sleep_ops.files import read_csv, write_atomically
from sleep_ops.tasks import Rule110
from sleep_ops.training import CheckpointError, RunConfig, TrainConfig, Trainer, TrainingDiverged, build_optimizers
from sleep_ops.training.checkpoint import (
    MANIFEST_FILE,
    STATE_FILE,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)
from sleep_ops.training.config import resolve_device
from sleep_ops.training.logs import CsvLog
from sleep_ops.training.muon import StackedMuon
from sleep_ops.training.offload import Offloaded
from sleep_ops.training.optim import split_parameters

QUIET = Console(quiet=True)
SHARD = "shard-00001-model-00001-of-00001.safetensors"
TASK = Rule110(t=2, strings=2, bits=6)


class Toy(nn.Module):
    """A causal running mean and one matrix: enough of a model for the loop around it."""

    def __init__(self, at_forward=None):
        super().__init__()
        self.embed = nn.Embedding(3, 8)
        self.mix = nn.Linear(8, 8)
        self.norm = nn.RMSNorm(8)
        self.conv = nn.Conv1d(8, 8, 3, groups=8)
        self.table = nn.Parameter(torch.zeros(4, 4))
        self.mix.bias._no_weight_decay = True
        self.lm_head = nn.Linear(8, 3, bias=False)
        self.at_forward, self.calls = at_forward, 0

    def forward(self, input_ids, labels=None, loss_mask=None, passes=None, return_logits=True, return_state=True):
        h = self.embed(input_ids)
        h = h.cumsum(1) / torch.arange(1, h.shape[1] + 1)[:, None]
        h = h + self.conv(nn.functional.pad(h.mT, (2, 0))).mT + self.table.sum()
        logits = self.lm_head(self.norm(h + self.mix(h).relu()))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if self.training:
            self.calls += 1
            if self.at_forward:
                loss = self.at_forward(self.calls, loss)
        return SimpleNamespace(logits=logits, loss=loss, positions=torch.arange(input_ids.shape[1]), state=None)


def config(**train):
    defaults = {"steps": 12, "batch_size": 8, "eval_every": 4, "eval_samples": 16, "checkpoint_every": 3}
    train = {**defaults, "device": "cpu", "lr_adamw": 1e-3, **train}
    return RunConfig(TASK.to_dict(), {"toy": 1}, TrainConfig(**train))


def trainer(out, settings=None, at_forward=None, **kwargs):
    torch.manual_seed(0)
    return Trainer(settings or config(), out, model=Toy(at_forward), console=QUIET, **kwargs)


def test_steps_ask_for_the_loss_alone(tmp_path):
    run, asked = trainer(tmp_path), []

    def note(model, _, given):
        if model.training:
            asked.append((given["return_logits"], given["return_state"]))

    run.model.register_forward_pre_hook(note, with_kwargs=True)
    run.fit(until=3)
    assert asked == [(False, False)] * 3


def columns(path, *names):
    return [tuple(row[name] for name in names) for row in read_csv(path)]


def losses(out):
    return columns(out / "metrics.csv", "step", "loss", "grad_norm", "lr_muon")


def test_muon_gets_the_matrices_and_adamw_the_rest():
    muon, adamw = split_parameters(Toy())
    assert set(muon) == {"mix.weight"}
    assert set(adamw) == {
        "embed.weight",
        "mix.bias",
        "norm.weight",
        "conv.weight",
        "conv.bias",
        "table",
        "lm_head.weight",
    }


def test_tied_head_and_frozen_parameters():
    model = nn.ModuleDict({"embed": nn.Embedding(3, 8), "project": nn.Linear(8, 3, bias=False), "mix": nn.Linear(8, 8)})
    model["project"].weight = model["embed"].weight
    model["mix"].bias.requires_grad_(False)
    muon, adamw = split_parameters(model)
    assert set(muon) == {"mix.weight"} and set(adamw) == {"embed.weight"}


def test_recipe_of_the_optimisers():
    model = Toy()
    built = build_optimizers(model, lr_muon=2e-3, lr_adamw=5e-5)
    muon, adamw = built["muon"].param_groups, built["adamw"].param_groups
    assert isinstance(built["muon"], torch.optim.Muon) and isinstance(built["adamw"], torch.optim.AdamW)
    for key, value in {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "adjust_lr_fn": None, "lr": 2e-3}.items():
        assert muon[0][key] == value
    assert muon[0]["weight_decay"] == 1e-4 and adamw[0]["betas"] == (0.9, 0.95) and adamw[0]["lr"] == 5e-5
    decayed = {id(p) for g in muon + adamw if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(model.mix.weight), id(model.embed.weight), id(model.lm_head.weight)}
    everything = [id(p) for g in muon + adamw for p in g["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())


def test_matrices_orthogonalised_together_take_the_same_step():
    """As PyTorch's Muon but for bfloat16's rounding: shapes alike or alone, tall, wide, too large for a stack."""
    torch.manual_seed(0)
    shapes = [(16, 16)] * 5 + [(2, 16)] * 2 + [(40, 16)] * 3 + [(16, 40)] + [(300, 500)] * 2
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    options = dict(lr=0.01, weight_decay=0.1, adjust_lr_fn=None)
    optimizers = StackedMuon(ours, **options), torch.optim.Muon(theirs, **options)
    for step in range(3):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = None if i == step else torch.randn(a.shape)
            b.grad = None if i == step else a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    close(ours, theirs, rtol=0, atol=1e-4)
    identical(*(optimizer.state_dict()["state"] for optimizer in optimizers))


def test_learning_rate_schedule():
    c = TrainConfig(steps=100, warmup=0.1, decay=0.2)
    factors = [c.learning_rate_factor(i) for i in range(100)]
    assert 0 < factors[0] < 0.1 and all(a < b for a, b in zip(factors[:10], factors[1:11], strict=True))
    assert set(factors[10:80]) == {1.0}
    assert all(a > b for a, b in zip(factors[79:99], factors[80:], strict=True))
    assert factors[-1] == pytest.approx(1e-3)
    assert {TrainConfig(steps=5, warmup=0, decay=0).learning_rate_factor(i) for i in range(5)} == {1.0}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"lr_muon": 0.0}, "lr_muon"),
        ({"lr_adamw": math.nan}, "lr_adamw"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"momentum": 1.5}, "momentum"),
        ({"warmup": 0.6, "decay": 0.6}, "warmup"),
        ({"precision": "fp8"}, "precision"),
        ({"trainable": "some"}, "trainable"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"micro_batch": 2, "cuda_graph": True}, "micro_batch"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
        ({"cuda_graph": 1}, "cuda_graph"),
        ({"profile": (3, 2)}, "profile"),
        ({"profile": (0, 2)}, "profile"),
        ({"profile": 3}, "profile"),
        ({"stage_loss": 0.0}, "stage_loss"),
        ({"stage_loss": math.inf}, "stage_loss"),
        ({"stage_warmup": -1}, "stage_warmup"),
        *(({name: "abc"}, name) for name in ("lr_muon", "grad_clip", "weight_decay", "warmup", "curriculum")),
        ({"stop_at": "abc"}, "stop_at"),
        ({"final_lr": True}, "final_lr"),
    ],
    ids=str,
)
def test_bad_settings(settings, name):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**settings)


@pytest.mark.parametrize("name", ["lr_adamw", "grad_clip", "weight_decay", "stop_at"])
def test_numbers_too_large_for_a_float_are_refused(name):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: 10**400})


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99"])
def test_bad_device(device):
    with pytest.raises(ValueError, match="device"):
        resolve_device(device)


def tensors(seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(4, 4)
    return {"a": weight, "tied": weight, "b": torch.randn(3).bfloat16()}


def saved(folder, step, values, state=None, **options):
    return save_checkpoint(folder, step, values, state or {}, **options).wait()


def test_checkpoint_round_trip(tmp_path):
    given = tensors() | {"x.one": torch.tensor(2.5), "x.none": torch.empty(0, 3), "rng": torch.get_rng_state()}
    saving = save_checkpoint(tmp_path, 7, given, {"n": [1, {"x": 2.5}], "best": None})
    expected = {name: x.clone() for name, x in given.items()}
    for x in given.values():
        x.zero_()  # they were copied
    loaded = load_checkpoint(saving.wait())
    assert loaded.step == 7 and loaded.state == {"n": [1, {"x": 2.5}], "best": None}
    found = loaded.read()
    assert found.keys() == expected.keys() and loaded.read("x.").keys() == {"one", "none"}
    for name, value in expected.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name


@pytest.mark.parametrize("wanted", [{"a": torch.zeros(4)}, {"c": torch.zeros(4, 4)}], ids=["shape", "name"])
def test_what_a_checkpoint_does_not_hold_is_named(tmp_path, wanted):
    (name,) = wanted
    with pytest.raises(CheckpointError, match=rf"step-00000001: expected {name} of shape \[4"):
        load_checkpoint(saved(tmp_path, 1, tensors())).fill(wanted)


def test_only_the_newest_are_kept_and_leftovers_removed(tmp_path):
    (tmp_path / ".partial-killed").mkdir()
    for step in (1, 2, 3):
        saved(tmp_path, step, tensors(), keep=2)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] and len(list(tmp_path.iterdir())) == 2
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("file", [SHARD, STATE_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damaged_checkpoint_is_refused(tmp_path, file, damage):
    saved(tmp_path, 1, tensors(1), {"n": 1})
    path = saved(tmp_path, 2, tensors(2), {"n": 2}) / file
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else data[:-9] + b"?" + data[-8:])
    with pytest.raises(CheckpointError, match="step-00000002"):
        load_checkpoint(path.parent)
    told = []
    assert load_newest(tmp_path, told.append).step == 1
    assert len(told) == 1 and "step-00000002" in told[0]


def test_all_damaged_is_an_error_and_none_is_none(tmp_path):
    assert load_newest(tmp_path / "nowhere", print) is None
    (saved(tmp_path, 1, tensors()) / SHARD).unlink()
    with pytest.raises(CheckpointError, match="none of its 1"):
        load_newest(tmp_path, lambda text: None)


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path, 1, tensors(1))

    def crash(*_args, **_kwargs):
        raise OSError("disk full")

    for place, error in (
        ("torch.distributed.checkpoint.HuggingFaceStorageWriter.write_data", CheckpointError),
        ("torch.distributed.checkpoint.async_save", OSError),
        ("sleep_ops.training.checkpoint._fingerprint", OSError),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, crash)
            for step in (1, 2):
                with pytest.raises(error, match="disk full"):
                    saved(tmp_path, step, tensors(2))
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
        assert torch.equal(load_newest(tmp_path, print).read()["a"], tensors(1)["a"])


def test_write_atomically(tmp_path):
    write_atomically(tmp_path / "a", b"one")
    write_atomically(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two" and len(list(tmp_path.iterdir())) == 1


def test_csv_log_drops_later_and_torn_rows(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n1,0.5\n2,0.25\n3,0.125\n4")
    log = CsvLog(path, ["step", "loss"], 2)
    log.write({"step": 3, "loss": 1 / 3})
    log.close()
    assert columns(path, "step", "loss") == [(1, 0.5), (2, 0.25), (3, 1 / 3)]


def test_a_run_leaves_its_records(tmp_path):
    result = trainer(tmp_path).fit()
    assert result.finished and result.step == 12 and result.signal is None and result.skipped == 0
    assert columns(tmp_path / "metrics.csv", "step", "tokens") == [(i, i * 8 * 14) for i in range(1, 13)]
    assert columns(tmp_path / "eval.csv", "step") == [(4,), (8,), (12,)]
    assert RunConfig.load(tmp_path) == config()
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000009", "step-00000012"]
    assert result.evaluation["exact"] == columns(tmp_path / "eval.csv", "exact")[-1][0]


def test_same_seed_same_bits(tmp_path):
    runs = [trainer(tmp_path / name) for name in "ab"]
    for run in runs:
        run.fit()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(a, b)
    trainer(tmp_path / "c", config(seed=1)).fit()
    assert losses(tmp_path / "c") != losses(tmp_path / "a")


@pytest.mark.parametrize("stop", [1, 6, 11])
def test_resume_is_exact(tmp_path, stop):
    straight = trainer(tmp_path / "straight")
    straight.fit()
    first = trainer(tmp_path / "parts").fit(until=stop)
    assert first.step == stop and not first.finished
    torch.manual_seed(123)  # whatever happens in between
    second = trainer(tmp_path / "parts")
    assert second.step == stop
    assert second.fit().finished
    assert losses(tmp_path / "straight") == losses(tmp_path / "parts")
    assert (tmp_path / "straight/eval.csv").read_text() == (tmp_path / "parts/eval.csv").read_text()
    for a, b in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    trainer(tmp_path / "straight").fit()

    def die(calls, loss):
        if calls == 8:
            raise RuntimeError("power cut")
        return loss

    with pytest.raises(RuntimeError, match="power cut"):
        trainer(tmp_path / "killed", at_forward=die).fit()
    again = trainer(tmp_path / "killed")
    assert again.step == 6  # checkpoint_every=3; step 8 was never finished
    again.fit()
    assert losses(tmp_path / "straight") == losses(tmp_path / "killed")


def test_a_finished_run_is_not_run_again(tmp_path):
    trainer(tmp_path).fit()
    before = (tmp_path / "metrics.csv").read_text()
    result = trainer(tmp_path).fit()
    assert result.finished and result.step == 12
    assert (tmp_path / "metrics.csv").read_text() == before


def test_a_second_trainer_leaves_the_logs_of_the_first(tmp_path):
    def second(calls, loss):
        if calls == 5:
            with pytest.raises(ValueError, match="another process trains in"):
                other.fit()
        return loss

    first = trainer(tmp_path, at_forward=second)
    other = trainer(tmp_path)
    assert first.fit().finished
    assert columns(tmp_path / "metrics.csv", "step") == [(float(i),) for i in range(1, 13)]


@pytest.mark.parametrize("name", ["metrics.csv", "eval.csv"])
@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "step,loss\nx,1\n", "step,loss\n" + 200000 * "\0"], ids=["foreign", "word", "nul"]
)
def test_a_damaged_log_is_noticed_before_anything_is_trained(name, text, tmp_path):
    trainer(tmp_path).fit(until=5)
    (tmp_path / name).write_text(text)
    again, before = trainer(tmp_path), {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=f"{name}: expected"):
        again.fit()
    assert again.step == 5 and before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("left", [b"x,1,2\n", 200000 * b"\0", b"\xff\xfe"], ids=["word", "nul", "bytes"])
def test_what_a_power_cut_leaves_behind_the_last_step_is_dropped(left, tmp_path):
    trainer(tmp_path / "straight").fit()
    trainer(tmp_path / "cut").fit(until=5)
    with (tmp_path / "cut" / "metrics.csv").open("ab") as file:
        file.write(left)
    trainer(tmp_path / "cut").fit()
    assert losses(tmp_path / "straight") == losses(tmp_path / "cut")


def test_a_run_that_was_half_deleted_begins_anew(tmp_path, monkeypatch):
    trainer(tmp_path / "straight").fit()
    trainer(tmp_path / "run").fit(until=2)
    with monkeypatch.context() as patch:
        patch.setattr("sleep_ops.training.run.remove", killed := Mock(side_effect=[None, KeyboardInterrupt]))
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path / "run", resume=False)
    shutil.rmtree(killed.call_args_list[0].args[0])
    trainer(tmp_path / "run").fit()
    assert losses(tmp_path / "straight") == losses(tmp_path / "run")


def test_fresh_deletes_the_old_run_and_nothing_else(tmp_path):
    trainer(tmp_path).fit()
    (tmp_path / "notes.txt").write_text("mine")
    again = trainer(tmp_path, config(seed=5), resume=False)
    assert again.step == 0 and not list_checkpoints(tmp_path / "checkpoints")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resume_with_other_settings_is_refused(tmp_path):
    trainer(tmp_path).fit(until=3)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"train.lr_muon: 0.002 -> 0.001.*--fresh"):
        trainer(tmp_path, config(lr_muon=1e-3))
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    trainer(tmp_path, config(checkpoint_every=5))  # how often to save is no part of what a run computes


def test_a_run_older_than_a_setting_is_resumed_with_its_default(tmp_path):
    model = HybridConfig(vocab_size=3, hidden_size=8, layers=("gdn",), window=6, num_heads=2)

    def resumed(task=TASK, model=model, **train):
        settings = RunConfig(task.to_dict(), model.to_dict(), TrainConfig(device="cpu", steps=2, batch_size=2, **train))
        return Trainer(settings, tmp_path, console=QUIET)

    resumed().fit(until=1)
    data = json.loads((tmp_path / "config.json").read_text())
    for part, key in (("task", "held_out"), ("model", "sleep_kind"), ("train", "momentum"), ("train", "cuda_graph")):
        del data[part][key]
    (tmp_path / "config.json").write_text(json.dumps(data))
    others = {
        "task.held_out: 0.0 -> 0.25": {"task": replace(TASK, bits=10, held_out=0.25)},
        "model.sleep_kind: 'refine' -> 'replay'": {"model": replace(model, sleep_kind="replay")},
        "train.momentum: 0.95 -> 0.5": {"momentum": 0.5},
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            resumed(**other)
    assert resumed().step == 1


def test_damaged_run_configuration(tmp_path):
    trainer(tmp_path).fit(until=3)
    (tmp_path / "config.json").write_text('{"version": 1, "task"')
    with pytest.raises(ValueError, match="damaged"):
        trainer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"version": 9}))
    with pytest.raises(ValueError, match="version"):
        trainer(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json"):
        trainer(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves(tmp_path, number):
    trainer(tmp_path / "straight").fit()
    handlers = signal.getsignal(number)

    def interrupt(calls, loss):
        if calls == 5:
            signal.raise_signal(number)
        return loss

    result = trainer(tmp_path / "stopped", at_forward=interrupt).fit()
    assert (result.step, result.finished, result.signal) == (5, False, number)
    assert signal.getsignal(number) is handlers
    again = trainer(tmp_path / "stopped")
    assert again.step == 5
    again.fit()
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, bad):
    weights = []

    def poison(calls, loss):
        weights.append(run.model.mix.weight.detach().clone())
        return loss * bad if calls == 4 else loss

    run = trainer(tmp_path, at_forward=poison)
    result = run.fit()
    assert result.finished and result.skipped == 1
    assert torch.equal(weights[3], weights[4]) and not torch.equal(weights[4], weights[5])
    assert columns(tmp_path / "metrics.csv", "skipped") == [(float(i >= 4),) for i in range(1, 13)]
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_training_stops_after_too_many_bad_steps(tmp_path):
    run = trainer(
        tmp_path, config(max_skipped=3), at_forward=lambda calls, loss: loss * math.nan if calls > 4 else loss
    )
    with pytest.raises(TrainingDiverged, match="3 steps in a row up to step 7"):
        run.fit()
    assert run.step == 7
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_gradients_are_clipped(tmp_path):
    seen = []
    run = trainer(tmp_path, config(grad_clip=1e-3, steps=2))
    step = run.optimizers["adamw"].step
    run.optimizers["adamw"].step = lambda: (seen.append([p.grad.norm() for p in run.parameters]), step())
    run.fit()
    assert all(torch.stack(norms).norm() <= 1.01e-3 for norms in seen) and len(seen) == 2
    assert all(norm > 1e-3 for (norm,) in columns(tmp_path / "metrics.csv", "grad_norm"))


HYBRID = HybridConfig(vocab_size=3, hidden_size=8, layers=("attn", "gdn"), window=6, num_heads=2, passes=2)


def hybrid(out, **train):
    settings = RunConfig(TASK.to_dict(), HYBRID.to_dict(), replace(config().train, steps=3, **train))
    return Trainer(settings, out, console=QUIET)


def test_only_the_fast_weights_learn(tmp_path):
    run = hybrid(tmp_path / "a", trainable="fast_weights")
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.fit(until=1)
    again = hybrid(tmp_path / "a", trainable="fast_weights")
    assert again.step == 1 and again.fit().finished
    run.fit()
    for (name, p), q in zip(run.model.named_parameters(), again.model.parameters(), strict=True):
        learns = name.startswith("blocks.1.mixer.")
        assert p.requires_grad == learns and torch.equal(p, q), name
        assert learns or torch.equal(p, before[name]), name
    with pytest.raises(ValueError, match="trainable: expected 'all' for a model without fast weights"):
        trainer(tmp_path / "b", config(trainable="fast_weights"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("size", [1, 3, 8, 9])
def test_parts_of_a_batch_add_up(size, tmp_path):
    """Whatever share of the loss tokens each part has, one of which has none."""

    class Uneven(Rule110):
        def batch(self, *args, **kwargs):
            batch = super().batch(*args, **kwargs)
            batch.labels[1:3, -1], batch.labels[3] = -100, -100
            return batch._replace(loss_mask=batch.labels != -100)

    runs = [hybrid(tmp_path / "whole"), hybrid(tmp_path / "parts", micro_batch=size)]
    for run in runs:
        run.task = Uneven(t=2, strings=2, bits=6)
        run.loss = run._loss_and_gradients(run._make_batch(0))
    torch.testing.assert_close(runs[1].loss, runs[0].loss)
    for a, b in zip(runs[0].parameters, runs[1].parameters, strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)
    runs[1].task = TASK
    assert runs[1].fit().finished


def test_parts_of_a_batch_are_summed_in_float32(tmp_path):
    """Rounded parameters' gradients too, whose sum over many parts would otherwise be further off than of one batch."""

    def gradients(name, **train):
        run = hybrid(tmp_path / name, batch_size=32, **train)
        run._loss_and_gradients(run._make_batch(0))
        assert {p.grad.dtype for p in run.parameters} == {torch.float32}
        return torch.cat([p.grad.flatten() for p in run.parameters])

    exact = gradients("exact")
    whole, parts = (gradients(f"{n}", param_dtype="bf16", micro_batch=n) - exact for n in (None, 1))
    assert parts.norm() <= whole.norm() < 0.05 * exact.norm()


def test_the_loss_falls(tmp_path):
    trainer(tmp_path, config(steps=60, batch_size=64, lr_muon=2e-2, lr_adamw=1e-2, checkpoint_every=0)).fit()
    found = [loss for _, loss, *_ in losses(tmp_path)]
    assert sum(found[-5:]) < 0.9 * sum(found[:5])


class Padded(Rule110):
    """Rule 110 with sequences of different lengths, padded at their left."""

    def batch(self, *args, **kwargs):
        batch = super().batch(*args, **kwargs)
        real = torch.arange(self.seq_len) >= torch.arange(len(batch.input_ids))[:, None] % 5
        return batch._replace(attention_mask=real, windows_by="positions")


@pytest.mark.parametrize("size", [None, 3], ids=["whole", "parts"])
def test_padding_reaches_the_model(size, tmp_path):
    run = hybrid(tmp_path, micro_batch=size)
    run.task = Padded(t=2, strings=2, bits=6)
    batch = run._make_batch(0)
    loss = run._loss_and_gradients(batch)
    named = batch._asdict()
    ids = named.pop("input_ids")
    expected = run.model(ids, **named).loss
    torch.testing.assert_close(loss, expected.detach())
    assert not torch.isclose(loss, run.model(ids, labels=batch.labels).loss)
    assert run.fit().finished
    moved = batch.to("meta")
    assert moved.attention_mask.device == moved.labels.device == torch.device("meta")
    assert moved.loss_mask is batch.loss_mask and moved.windows_by == "positions"


def test_what_was_just_written_is_kept_behind_a_damaged_one(tmp_path):
    saved(tmp_path, 6, tensors(1))
    (saved(tmp_path, 8, tensors(2)) / SHARD).write_bytes(b"")
    path = saved(tmp_path, 7, tensors(3), keep=1)
    assert list_checkpoints(tmp_path) == [path] and load_newest(tmp_path, print).step == 7
    saved(tmp_path, 9, tensors(4), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000007", "step-00000009"]


@pytest.mark.parametrize("change", [{"step": 2}, {"files": {}}], ids=["step", "files"])
def test_a_manifest_of_something_else_is_passed_over(tmp_path, change):
    saved(tmp_path, 1, tensors(1))
    manifest = saved(tmp_path, 3, tensors(2)) / MANIFEST_FILE
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    told = []
    assert load_newest(tmp_path, told.append).step == 1
    assert len(told) == 1 and "step-00000003: damaged (its manifest" in told[0]


@pytest.mark.parametrize("changes", [dict(reshard="call"), dict(replicas=2)])
def test_what_only_sharded_runs_have_is_refused_in_others(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"^{name}: expected .* but with parallel 'fsdp'"):
        TrainConfig(**changes)
    TrainConfig(parallel="fsdp", **changes)


def test_a_checkpoint_of_another_version_is_named(tmp_path):
    path = saved(tmp_path, 1, tensors())
    manifest = path / MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(CheckpointError, match="step-00000001: expected checkpoint version 2, got 1"):
        load_checkpoint(path)


def test_parameters_are_rounded_for_forward_and_backward_alone(tmp_path):
    seen = []

    def look(calls, loss):
        seen.append({p.dtype for p in run.model.parameters()})
        return loss

    run = trainer(tmp_path, config(param_dtype="bf16", steps=4), look)
    before = {name: p for name, p in run.model.named_parameters()}
    run.fit()
    assert seen and all(dtypes == {torch.bfloat16} for dtypes in seen)
    assert all(p is before[name] for name, p in run.model.named_parameters())
    assert any(not torch.equal(p, p.bfloat16()) for p in run.parameters)  # changes too small for bfloat16 are kept
    again = trainer(tmp_path, config(param_dtype="bf16", steps=4))
    assert all(torch.equal(p, q) for p, q in zip(run.parameters, again.parameters, strict=True))


def test_tied_parameters_are_rounded_together(tmp_path):
    model = Toy()
    model.lm_head.weight = model.embed.weight
    run = Trainer(config(param_dtype="bf16"), tmp_path, model=model, console=QUIET)
    with run.layout.gathered() as rounded:
        assert model.lm_head.weight is model.embed.weight and model.embed.weight.dtype == torch.bfloat16
        assert len(rounded) == len(run.layout.parameters)
    assert model.lm_head.weight is model.embed.weight and model.embed.weight.dtype == torch.float32


@pytest.mark.parametrize("stop", [None, 3], ids=["whole", "stopped"])
def test_some_steps_are_traced(stop, tmp_path):
    run = trainer(tmp_path / "traced", config(steps=5, profile=(3, 4)))
    run.fit(stop)
    (file,) = (tmp_path / "traced/profile").iterdir()
    assert file.name == f"steps-3-{stop or 4}.0.pt.trace.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert {x for x in names if x.startswith("ProfilerStep#")} == {
        f"ProfilerStep#{n}" for n in range(3, (stop or 4) + 1)
    }
    assert "aten::addmm" in names
    again = trainer(tmp_path / "traced", config(steps=5))  # to look is no part of what a run computes
    again.fit()
    trainer(tmp_path / "plain", config(steps=5)).fit()
    assert losses(tmp_path / "traced") == losses(tmp_path / "plain")
    trainer(tmp_path / "traced", config(steps=5), resume=False)
    assert not (tmp_path / "traced/profile").exists()


def test_an_error_in_the_first_traced_step_leaves_no_trace(tmp_path):
    def fail(calls, loss):
        raise RuntimeError("first")

    with pytest.raises(RuntimeError, match="first"):
        trainer(tmp_path, config(profile=(1, 2)), fail).fit()
    assert not (tmp_path / "profile").exists()


def test_a_checkpoint_is_written_while_training_goes_on(tmp_path, monkeypatch):
    settings = config(checkpoint_every=2, keep_checkpoints=9)
    ahead = replace(settings, train=replace(settings.train, async_checkpoints=True))
    run, waited = trainer(tmp_path, ahead), []
    saved = run._saved
    monkeypatch.setattr(run, "_saved", lambda: waited.append(run.step) or saved())
    run.fit()
    plain = trainer(tmp_path / "plain", settings)
    plain.fit()
    names = [
        [path.name for path in list_checkpoints(folder / "checkpoints")] for folder in (tmp_path, tmp_path / "plain")
    ]
    assert names[0] == names[1] and len(names[0]) > 2
    for name in names[0]:
        a, b = (load_checkpoint(folder / "checkpoints" / name).read() for folder in (tmp_path, tmp_path / "plain"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert waited[0] == 2  # before the first one there was none to wait for


def test_what_the_backward_needs_is_kept_by_the_host_but_not_parameters():
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3), torch.randn(4, 5, requires_grad=True)
    kept = Offloaded(layer.parameters())
    with kept:
        y = layer(x).tanh()
    saved = [kept._pack(t) for t in (x, y, layer.weight, layer.weight.mT)]
    assert [isinstance(s, tuple) for s in saved] == [True, True, False, False]
    assert saved[1][1] is not y and torch.equal(saved[1][1], y)
    plain = torch.autograd.grad(layer(x).tanh().sum(), [x, layer.weight])
    found = torch.autograd.grad(y.sum(), [x, layer.weight])
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
