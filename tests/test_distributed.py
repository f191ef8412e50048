"""A run in two processes, whole models or shards, against one process: the same losses, weights and checkpoints."""

import json
import math
import os
import signal
import socket
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from test_adapter_loading import plain, word_tokenizer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from sleep_ops import HybridConfig
from sleep_ops.adapters.loading import load_model
from sleep_ops.experiments import finetuned, sweep
from sleep_ops.experiments.figures import load_figure
from sleep_ops.files import read_csv
from sleep_ops.tasks import Rule110
from sleep_ops.training import (
    RunConfig,
    TrainConfig,
    Trainer,
    TrainingDiverged,
    checkpoint,
    graph,
    load_run,
    sharded,
    trainer,
)
from sleep_ops.training.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, load_newest
from sleep_ops.training.finetune import FinetuneConfig, finetune
from sleep_ops.training.muon import SteppedMuon
from sleep_ops.training.optim import build_optimizers, split_parameters
from sleep_ops.training.parallel import World, local_device

QUIET = Console(quiet=True)
WAYS = {
    "ddp": {},
    "fsdp": dict(parallel="fsdp"),
    "fsdp-call": dict(parallel="fsdp", reshard="call", async_checkpoints=True),
    "hsdp": dict(parallel="fsdp", replicas=2),
}


class Ragged(Rule110):
    """Padded sequences, of which some have no loss: in every third batch those of the second process."""

    def batch(self, seed, step, size, *args, **kwargs):
        batch = super().batch(seed, step, size, *args, **kwargs)
        real = torch.arange(self.seq_len) >= torch.arange(size)[:, None] * 2 % 7
        labels = batch.labels.clone()
        labels[1 :: 2 if step % 3 == 0 else 4] = -100
        return batch._replace(labels=labels, loss_mask=labels != -100, attention_mask=real)


TASK = Rule110(t=2, strings=2, bits=6)
MODEL = dict(vocab_size=3, hidden_size=18, layers=("attn", "gdn", "attn"), window=6, num_heads=3, passes=2)
TRAIN = TrainConfig(
    steps=4, batch_size=7, lr_adamw=1e-4, eval_every=2, eval_samples=8, checkpoint_every=0, warmup=0, device="cpu"
)
SWEPT = {"train.steps": 1, "train.batch_size": 2, "train.eval_samples": 4, "train.device": "cpu"}
BY_COLUMNS = ("ddp", "fsdp-call")
CASES = {
    "refine": (TASK, dict(activation_checkpointing=True, loop_gate=True, tie_embeddings=True), dict(micro_batch=3)),
    "replay": (TASK, dict(sleep_kind="replay", passes=3, activation_checkpointing=True), {}),
    "random-passes": (TASK, dict(passes=3, reinject=True), dict(passes_schedule="random")),
    "ragged": (Ragged(t=2, strings=2, bits=6), dict(eviction="sliding"), {}),
    "fast-weights": (TASK, {}, dict(trainable="fast_weights")),
    "at-once": (Rule110(t=2, strings=2, bits=11), dict(sleep_kind="replay", passes=3, windows_at_once=True), {}),
    "rounded": (
        TASK,
        dict(activation_checkpointing=True, recompute="block"),
        dict(param_dtype="bf16", offload=True, micro_batch=2),
    ),
}


def make(out, case="refine", *, ahead=None, resume=True, task=None, **recipe):
    """A trainer of a case; ahead(calls, loss) changes the losses of training, `calls` counting forwards."""
    own, model, train = CASES[case]
    task = task or own
    settings = HybridConfig(**MODEL | model)
    config = RunConfig(task.to_dict(), settings.to_dict(), replace(TRAIN, **train | recipe))
    run = Trainer(config, out, task=task, console=QUIET, resume=resume)
    if ahead is not None:
        forward, calls = run.model.forward, []

        def changed(*args, **kwargs):
            result = forward(*args, **kwargs)
            if run.model.training:
                calls.append(None)
                result = result._replace(loss=ahead(len(calls), result.loss))
            return result

        run.model.forward = changed
    return run


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(run):
    """Loss and gradients of the first batch, whole."""
    loss = run._loss_and_gradients(run._make_batch(0))
    found = {name: whole(p.grad) for name, p in run.model.named_parameters()}
    for p in run.model.parameters():
        p.grad = None
    return loss, found


TUNED = {"ouro": dict(insert=(0, 2)), "qwen3_5": dict(sleep_kind="replay", passes=3)}


def tuning(folder, family, **way):
    """Fine-tuning of a tiny checkpoint in `folder`, in two phases."""
    train = replace(TRAIN, steps=2, batch_size=4, eval_every=0, **way)
    settings = dict(window=8, passes=2, eviction="sliding") | TUNED[family]
    return FinetuneConfig(str(folder / family), Rule110(t=1, strings=2, bits=8).to_dict(), settings, train, 1)


def stepped(run, distribute):
    """The weights after two optimiser steps with gradients that are drawn."""
    for seed in range(2):
        torch.manual_seed(seed)
        for p in run.model.parameters():
            p.grad = distribute(torch.randn(p.shape), p)
        for optimizer in run.optimizers.values():
            optimizer.step()
    return {name: whole(x) for name, x in run.model.state_dict().items()}


class OneByOne(SteppedMuon):
    """What shards are to give to the bit: whole matrices, one after the other."""

    def _take_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                step = sharded._orthogonal_step(p.grad.lerp(buffer, group["momentum"]), group)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(step)


def one_by_one(run):
    rates = {name: getattr(TRAIN, name) for name in ("lr_muon", "lr_adamw", "weight_decay", "momentum")}
    run.optimizers = build_optimizers(run.model, **rates, matrix_optimizer=OneByOne)
    return run


def noted(patch, events):
    """`events` get the size of every exchange of matrices and of every matrix that is orthogonalised."""
    exchange, step = dist.all_to_all_single, sharded._orthogonal_step

    def exchanged(output, given, *args, **kwargs):
        events.append(("exchange", output.numel(), given.numel()))
        return exchange(output, given, *args, **kwargs)

    def stepped(update, group):
        events.append(("step", update.numel()))
        return step(update, group)

    patch.setattr(dist, "all_to_all_single", exchanged)
    patch.setattr(sharded, "_orthogonal_step", stepped)


def write_examples(place):
    place.mkdir(parents=True)
    for path in (paths := (place / "train.jsonl", place / "eval.jsonl")):
        path.write_text("".join(json.dumps({"prompt": "a b", "answer": "c", "op": op}) + "\n" for op in (1, 2)))
    return paths


def refusal(function):
    try:
        function()
    except (ValueError, OSError, TrainingDiverged, CheckpointError) as error:
        return f"{type(error).__name__} {error}"


def damaged(out, rank):
    """What each process reads through of its checkpoints, and what it is told of damaged ones and of a full disk."""
    find, read, told, world = checkpoint._fingerprint, [], [], World.join(torch.device("cpu"))
    recipe = dict(parallel="fsdp", async_checkpoints=True, checkpoint_every=2)

    def damage(step, shard):
        if rank == 1:
            (path,) = out.glob(f"checkpoints/step-{step:08}/shard-{shard:05}-*")
            path.write_bytes(path.read_bytes()[:-9] + b"?" * 9)
        dist.barrier()

    def newest():
        return load_newest(out / "checkpoints", told.append, world).step

    def full(path):
        if rank == 1:
            raise OSError("disk full")
        return find(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_fingerprint", lambda path: read.append(path.name) or find(path))
        make(out, "replay", **recipe).fit()
        found = {"written": read.copy()}
        read.clear()
        assert make(out, "replay", **recipe).step == 4
        found["checked"] = read.copy()
        damage(4, shard=2)
        found["one damaged"] = newest(), told.copy()
        damage(2, shard=1)
        found["both damaged"] = refusal(newest)
        patch.setattr(checkpoint, "_fingerprint", full)
        found["full"] = refusal(make(out.with_name("full"), "replay", **recipe).fit)
    return found


def worker(rank, port, folder):
    """Everything that two processes do, so that they are started once. Returns what the tests look at in files."""
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in torchrun.items()}
    torch.set_num_threads(1)
    found = {}
    for way in WAYS:
        out = folder / way
        for case in CASES:
            run = make(out / case, case, **WAYS[way])
            found[way, case, "untrained"] = run.evaluate()
            found[way, case] = gradients(run)
            found[way, case, "result"] = run.fit()
        # Stopped and taken up again: by two processes, and by another number of them.
        make(out / "parts", **WAYS[way]).fit(until=2)
        found[way, "parts"] = make(out / "parts", **WAYS[way]).fit()
        make(out / "two-then-one", **WAYS[way]).fit(until=2)
        found[way, "one-then-two"] = make(folder / f"one-then-{way}", **WAYS[way]).fit()
        found[way, "whole_model"] = run.whole_model()

        def interrupt(calls, loss):
            if rank == 1 and calls == 2:
                signal.raise_signal(signal.SIGTERM)
            return loss

        found[way, "signal"] = make(out / "signal", "replay", **WAYS[way], ahead=interrupt).fit()
        found[way, "signal-again"] = make(out / "signal", "replay", **WAYS[way]).fit()

        def spoil(calls, loss):
            return loss * math.nan if rank == 1 and calls >= 3 else loss

        spoiled = make(out / "spoiled", "replay", **WAYS[way], ahead=spoil, max_skipped=2)
        found[way, "spoiled"] = refusal(spoiled.fit), spoiled.step, spoiled.skipped
        found[way, "early"] = make(out / "early", **WAYS[way], stop_at=0.0).fit()
        found[way, "other"] = refusal(lambda out=out, way=way: make(out / "refine", **WAYS[way], seed=1))
    for way in BY_COLUMNS:
        run = make(folder / "columns" / way, "at-once", split="sequence", **WAYS[way])
        found["columns", way] = *gradients(run), run.fit()
    found["odd"] = refusal(lambda: make(folder / "odd", "replay", split="sequence"))
    found["few"] = refusal(lambda: make(folder / "few", "at-once", split="sequence", task=TASK))
    graph._record = lambda step, device: step  # eagerly, as no graph can be on the CPU
    run = make(folder / "graphed", "replay")
    run.graphs = graph.StepGraphs(run.model, nullcontext)
    found["graphed"] = gradients(run), gradients(run)
    build, devices = trainer.build_model, []
    trainer.build_model = lambda *args, **kwargs: devices.append(kwargs.get("device", "cpu")) or build(*args, **kwargs)
    for family, reshard in zip(TUNED, ("step", "call"), strict=True):
        settings = tuning(folder, family, parallel="fsdp", reshard=reshard)
        found["finetune", family] = finetune(settings, folder / f"{family}-by-two", console=QUIET)
    trainer.build_model, found["devices"] = build, devices
    for way in ("fsdp", "hsdp"):
        with pytest.MonkeyPatch.context() as patch:
            noted(patch, events := [])
            found["stepped", way] = stepped(
                make(folder / f"{way}-stepped", **WAYS[way]),
                lambda x, p: distribute_tensor(x, p.device_mesh, p.placements),
            )
        found["events", way] = [kind for kind, *_ in events]
    found["damaged"] = damaged(folder / "damaged", rank)
    found["one by one"] = stepped(one_by_one(make(folder / "one-by-one")), lambda x, p: x)
    wrote = []
    sweep.write_csv = lambda path, rows: wrote.append(path.name)
    finetuned.write_problems = lambda place, *args, **kwargs: wrote.append("problems") or write_examples(place)
    figure = replace(load_figure("fig2b", "tiny"), grid={"model.passes": [1]})
    sweep.sweep(figure, "tiny", folder / "sweep", changes=SWEPT, console=QUIET)
    settings = {"model.window": 8, "model.insert": (0, 2)}
    figure = replace(load_figure("fig5", "tiny"), set=settings, grid=figure.grid)
    words, changes = folder / "words", SWEPT | {"train.batch_size": 4}
    finetuned.sweep_finetuned(figure, "tiny", folder / "sweep-tuned", words, changes=changes, console=QUIET)
    found["sweeps"] = wrote
    found["other-way"] = refusal(lambda: make(folder / "ddp/refine", parallel="fsdp").fit())
    found["small"] = refusal(lambda: make(folder / "small", batch_size=1))
    found["device"] = refusal(lambda: local_device("cuda:0"))
    world = World.join(torch.device("cpu"))
    found["world"] = world.all_gather(rank), world.max([rank, -rank]), world.on_main(lambda: rank)
    found["together"] = world.together(lambda: rank), refusal(lambda: world.together(lambda: rank or int("x")))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def one_of_four(rank, port, folder):
    """A run of two groups of two processes, in each of which the model is shared out."""
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in torchrun.items()}
    torch.set_num_threads(1)
    run = make(folder / "four", "refine", parallel="fsdp", replicas=2)
    first = gradients(run)
    torch.save((first, run.fit().finished), folder / f"four-{rank}.pt")
    dist.destroy_process_group()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process does, then what two do."""
    folder = tmp_path_factory.mktemp("runs")
    for case in CASES:
        run = make(folder / "one" / case, case)
        torch.save((run.evaluate(), gradients(run)), folder / f"one-{case}.pt")
        run.fit()
    for way in WAYS:
        make(folder / f"one-then-{way}").fit(until=2)
    for family in TUNED:
        plain(folder / family, family)
        finetune(tuning(folder, family), folder / f"{family}-by-one", console=QUIET)
    word_tokenizer(plain(folder / "words", "ouro"))
    mp.spawn(worker, args=(free_port(), folder), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def metrics(out, *names):
    return [
        tuple(row[name] for name in names or ("step", "loss", "grad_norm")) for row in read_csv(out / "metrics.csv")
    ]


def last(out):
    return load_checkpoint(list_checkpoints(out / "checkpoints")[-1])


def assert_same_bits(a, b):
    assert metrics(a) == metrics(b)
    for x, y in ((last(a).read("model."), last(b).read("model.")), (states(last(a)), states(last(b)))):
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def states(checkpoint):
    return checkpoint.read("optimizer.")


def assert_same_losses(found, expected, rtol):
    torch.testing.assert_close(torch.tensor(metrics(found)), torch.tensor(metrics(expected)), rtol=rtol, atol=0)


def assert_same_run(found, expected):
    """The same losses, weights and optimiser states but for rounding, which Muon's bfloat16 magnifies where gradients
    are nearly singular: one process that sums parts of its batch in another order is as far off."""
    assert_same_losses(found, expected, 2e-3)
    case = expected.name
    start = make(found.parent / "begun" / found.name, case).model.state_dict()
    weights, moved, apart = last(found).read("model."), 0.0, 0.0
    for name, x in last(expected).read("model.").items():
        distance, way = (weights[name] - x).norm(), (x - start[name]).norm()
        assert distance <= 0.2 * way, name
        moved, apart = moved + way**2, apart + distance**2
    assert apart**0.5 <= 0.1 * moved**0.5
    a, b = states(last(found)), states(last(expected))
    assert a.keys() == b.keys()
    for key, x in b.items():
        assert a[key].shape == x.shape and (a[key] - x).norm() <= 0.1 * x.norm(), key


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
class TestTwoProcesses:
    @pytest.mark.parametrize("case", CASES)
    def test_loss_gradients_and_evaluation_are_those_of_one(self, way, case, folder, ranks):
        evaluation, (loss, expected) = torch.load(folder / f"one-{case}.pt")
        rounding = 2**-6 if case == "rounded" else 1e-4  # of a process's rows and their sums, in bfloat16
        for rank in ranks:
            torch.testing.assert_close(rank[way, case][0], loss, rtol=rounding / 10, atol=0)
            found = rank[way, case, "untrained"]
            assert found == ranks[0][way, case, "untrained"] and found["samples"] == evaluation["samples"]
            assert found["loss"] == pytest.approx(evaluation["loss"], rel=rounding / 10)
        found = ranks[0][way, case][1]
        for name, x in expected.items():
            assert (found[name] is None) == (x is None), name
            if x is not None:
                assert found[name].dtype == torch.float32 and (found[name] - x).norm() <= rounding * x.norm(), name

    @pytest.mark.parametrize("case", CASES)
    def test_runs_are_those_of_one(self, way, case, folder, ranks):
        if case == "rounded":  # sums of 4 and 3 rows, each rounded to bfloat16, aren't one of 7
            assert_same_losses(folder / way / case, folder / "one" / case, 2e-2)
            assert_same_run(folder / way / case, folder / "ddp" / case)
        else:
            assert_same_run(folder / way / case, folder / "one" / case)
        names = ("step", "tokens", "lr_muon", "passes", "skipped")
        assert metrics(folder / way / case, *names) == metrics(folder / "one" / case, *names)
        results = [rank[way, case, "result"] for rank in ranks]
        assert all(r.finished and r.evaluation == results[0].evaluation for r in results)
        assert [row["step"] for row in read_csv(folder / way / case / "eval.csv")] == [2, 4]

    def test_a_stopped_run_goes_on_to_the_same_bits(self, way, folder, ranks):
        assert all(rank[way, "parts"].finished for rank in ranks)
        assert_same_bits(folder / way / "parts", folder / way / "refine")

    def test_one_process_goes_on_where_two_stopped(self, way, folder):
        run = make(folder / way / "two-then-one", **WAYS[way])
        assert run.step == 2 and run.fit().finished
        assert_same_run(folder / way / "two-then-one", folder / "one" / "refine")
        assert load_run(folder / way / "refine", device="cpu")[3] == 4

    def test_two_go_on_where_one_stopped(self, way, folder, ranks):
        assert all(rank[way, "one-then-two"].finished for rank in ranks)
        assert metrics(folder / f"one-then-{way}")[:2] == metrics(folder / "one" / "refine")[:2]
        assert_same_run(folder / f"one-then-{way}", folder / "one" / "refine")

    def test_a_signal_to_one_stops_both(self, way, folder, ranks):
        for rank in ranks:
            stopped, again = rank[way, "signal"], rank[way, "signal-again"]
            assert (stopped.step, stopped.finished, stopped.signal) == (2, False, signal.SIGTERM)
            assert again.finished and again.signal is None
        assert_same_bits(folder / way / "signal", folder / way / "replay")

    def test_a_loss_spoiled_in_one_is_skipped_by_both(self, way, folder, ranks):
        for rank in ranks:
            message, step, skipped = rank[way, "spoiled"]
            assert message.startswith("TrainingDiverged train: 2 steps in a row up to step 4")
            assert (step, skipped) == (4, 2)
        assert metrics(folder / way / "spoiled")[:2] == metrics(folder / way / "replay")[:2]
        assert metrics(folder / way / "spoiled", "skipped") == [(0,), (0,), (1,), (2,)]

    def test_both_end_early(self, way, ranks):
        assert [(r[way, "early"].step, r[way, "early"].finished) for r in ranks] == [(2, True)] * 2

    def test_a_refusal_of_the_first_is_everyones(self, way, ranks):
        for rank in ranks:
            assert "train.seed: 0 -> 1" in rank[way, "other"] and rank[way, "other"].startswith("ValueError")

    def test_the_whole_model_is_the_first_processs(self, way, folder, ranks):
        first, second = (rank[way, "whole_model"] for rank in ranks)
        assert second is None
        expected = last(folder / way / list(CASES)[-1]).read("model.")
        found = first.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.slow
def test_two_groups_of_two_learn_as_one_process(folder):
    mp.spawn(one_of_four, args=(free_port(), folder), nprocs=4)
    _, (loss, expected) = torch.load(folder / "one-refine.pt")
    for rank in range(4):
        (found, of), finished = torch.load(folder / f"four-{rank}.pt")
        assert finished
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
        for name, x in expected.items():
            assert (of[name] - x).norm() <= 1e-4 * x.norm(), name
    assert_same_losses(folder / "four", folder / "one" / "refine", 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("way", BY_COLUMNS)
def test_texts_in_parts_are_learnt_from_as_whole_ones(way, folder, ranks):
    _, (loss, expected) = torch.load(folder / "one-at-once.pt")
    for rank in ranks:
        assert rank["columns", way][2].finished
        torch.testing.assert_close(rank["columns", way][0], loss)
    found = ranks[0]["columns", way][1]
    for name, x in expected.items():
        assert (found[name] is None) == (x is None), name
        if x is not None:
            assert (found[name] - x).norm() <= 1e-4 * x.norm(), name
    assert_same_losses(folder / "columns" / way, folder / "one" / "at-once", 2e-3)


@pytest.mark.slow
def test_texts_that_cannot_be_parted_are_refused(ranks):
    for rank in ranks:
        assert "split: expected 'batch', or a model that reads windows_at_once" in rank["odd"]
        assert "split: expected texts of a multiple of 12 tokens" in rank["few"] and rank["few"].endswith("got 14")


@pytest.mark.slow
def test_a_graphed_step_has_the_same_gradients(folder, ranks):
    _, (loss, expected) = torch.load(folder / "one-replay.pt")
    for found, gradients in (rank["graphed"][i] for rank in ranks for i in range(2)):
        torch.testing.assert_close(found, loss)
        for name, x in expected.items():
            assert (gradients[name] is None) == (x is None), name
            if x is not None:
                torch.testing.assert_close(gradients[name], x, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", TUNED)
def test_finetuning_writes_the_model_of_one_process(family, folder, ranks):
    assert all(rank["finetune", family].finished for rank in ranks)
    names = f"{family}-by-two", f"{family}-by-one"
    found, expected = (load_model(folder / name / "model").state_dict() for name in names)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    for phase in ("warm", "full"):
        one, two = (metrics(folder / name / phase) for name in names)
        torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=2e-3, atol=0)


@pytest.mark.slow
def test_one_process_alone_builds_a_model_with_values(ranks):
    # What the first puts a whole model together in has none at first either.
    assert set(ranks[0]["devices"]) == {"cpu", "meta"} and set(ranks[1]["devices"]) == {"meta"}


@pytest.mark.slow
def test_one_process_of_a_sweep_writes_its_table_and_data(ranks):
    tables = ["results.csv", "curves.csv", "summary.csv"]
    assert [rank["sweeps"] for rank in ranks] == [[*tables, "problems", *tables], []]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp", "hsdp"])
def test_optimisers_of_shards_are_those_of_whole_matrices(way, folder, ranks):
    run = make(folder / f"whole-{way}-stepped")
    expected, matrices = stepped(run, lambda x, p: x), split_parameters(run.model)[0]
    for rank in ranks:
        for name, x in rank["stepped", way].items():
            torch.testing.assert_close(x, expected[name], rtol=1e-6, atol=1e-7)
            assert name not in matrices or torch.equal(x, rank["one by one"][name]), name


@pytest.mark.slow
def test_processes_orthogonalise_at_the_same_time(folder, ranks):
    matrices = len(split_parameters(make(folder / "counted").model)[0])
    rounds = 2 * -(-matrices // 2)  # of two steps
    first, second = (rank["events", "fsdp"] for rank in ranks)
    assert first == ["exchange", "step", "exchange"] * rounds
    assert (
        second.count("step") == 2 * (matrices // 2) and [x for x in second if x != "step"] == ["exchange"] * 2 * rounds
    )


@pytest.mark.parametrize("rank", range(3))
def test_matrices_are_exchanged_before_and_after_all_have_stepped(rank, monkeypatch):
    """Three processes, of which this is one, take three at a time, largest first; it holds no more than one as a whole.

    Nothing is sent, so the values are not looked at."""
    dist.init_process_group("fake", rank=rank, world_size=3, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("shard",))
        shapes = [(2, 3), (7, 5), (4, 2), (7, 5), (1, 4), (5, 5), (6, 6)]
        model = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)
        for layer in model:
            fully_shard(layer, mesh=mesh)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        noted(monkeypatch, events := [])
        sharded.ShardedMuon(model.parameters()).step()
        expected = []
        for together in ([(6, 6), (7, 5), (7, 5)], [(5, 5), (4, 2), (2, 3)], [(1, 4)]):
            parts = sum(len(range(rows)[rank * -(-rows // 3) :][: -(-rows // 3)]) * n for rows, n in together)
            own = together[rank][0] * together[rank][1] if rank < len(together) else 0
            expected += [("exchange", own, parts), *([("step", own)] if own else []), ("exchange", parts, own)]
        assert events == expected
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_each_reads_through_files_of_its_own_and_all_know_what_is_damaged(folder, ranks):
    first, second = (rank["damaged"] for rank in ranks)
    one, two = (f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2))
    assert first["written"] == [one, "state.json"] * 2 and second["written"] == [two] * 2
    assert first["checked"] == [one, "state.json"] and second["checked"] == [two]
    for rank in (first, second):
        step, (text,) = rank["one damaged"]
        assert step == 2 and f"step-00000004/{two}: damaged" in text
        assert (
            rank["both damaged"].startswith("CheckpointError") and "none of its 2 checkpoints" in rank["both damaged"]
        )
        assert rank["full"] == "OSError disk full"
    assert not any((folder / "full/checkpoints").iterdir())


@pytest.mark.slow
def test_what_processes_tell_one_another(ranks):
    assert [rank["together"][0] for rank in ranks] == [0, 1]
    for rank in ranks:
        assert rank["world"] == ([0, 1], [1, 0], 0)
        assert rank["together"][1].startswith("ValueError invalid literal")
        assert rank["other-way"] is None  # how the work is shared out is free to change
        assert "batch_size: expected at least 2, one per process, got 1" in rank["small"]
        assert "device: expected auto, cuda or cpu with several processes" in rank["device"]


def test_one_process_alone(monkeypatch):
    world = World.join(torch.device("cpu"))
    assert (world.rank, world.size, world.main) == (0, 1, True)
    assert (world.all_gather(3), world.max([1, 2]), world.on_main(lambda: 4)) == ([3], [1, 2], 4)
    assert world.together(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        world.together(lambda: 1 // 0)
    tensor = torch.ones(2)
    assert world.sum(tensor) is tensor and local_device("cuda:1") == "cuda:1"
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True))
    assert [local_device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
