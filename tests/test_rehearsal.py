"""Rehearsed steps against real ones: the same bytes by phase and kind, in one process and in two."""

import io
import os
import socket
from dataclasses import dataclass

import hf_models
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console

from sleep_ops.adapters.loading import load_model
from sleep_ops.model.config import HybridConfig
from sleep_ops.ops import linear, rms_norm
from sleep_ops.tasks import Batch
from sleep_ops.training import RunConfig, TrainConfig, Trainer, rehearsal
from sleep_ops.training.memory import LiveBytes
from sleep_ops.training.rehearsal import rehearse, watched
from sleep_ops.training.run import build_model

MODEL = dict(vocab_size=64, hidden_size=32, layers=("attn", "gdn"), window=8, passes=2)
BLOCKS = dict(activation_checkpointing=True, recompute="block")
ONE = {
    "plain": ({}, {}),
    "rounded": (BLOCKS, dict(param_dtype="bf16", micro_batch=1)),
    "bf16": (dict(tie_embeddings=True), dict(precision="bf16")),
    "window": (dict(activation_checkpointing=True, recompute="window"), {}),
}
TWO = {
    "ddp": ({}, dict(param_dtype="bf16")),
    "fsdp": ({}, dict(parallel="fsdp")),
    "fsdp-call": (BLOCKS, dict(parallel="fsdp", reshard="call", param_dtype="bf16")),
    "sequence": (dict(window=5, passes=1, windows_at_once=True), dict(split="sequence")),
    "sequence-replay": (
        dict(window=5, sleep_kind="replay", windows_at_once=True),
        dict(split="sequence", parallel="fsdp"),
    ),
}


@dataclass(frozen=True)
class Tokens:
    name, vocab_size, seq_len, window, metric = "tokens", 64, 20, None, "loss"

    def batch(self, seed, step, size, device="cpu", *, split="train"):
        ids = torch.ones(size, self.seq_len, dtype=torch.int64)
        return Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool))


def run_config(model, train, processes):
    recipe = TrainConfig(batch_size=2 * processes, device="cpu", **train)
    return RunConfig({}, HybridConfig(**MODEL | model).to_dict(), recipe)


def counted(config, folder):
    """The phases of a real step, the second, by the forms that are not for CPUs alone: rehearsed are these."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (linear, rms_norm):
            patched.setattr(module, "eager_on_cpu", lambda *_: False)
        return _counted(config, folder)


def _counted(config, folder):
    run = Trainer(config, folder, task=Tokens(), console=Console(quiet=True))
    run.model.train()
    run.take(run._make_batch(0))
    batch, count = run._make_batch(1), LiveBytes()
    with watched(run, count):
        run.take(batch)
    return count.most


def rehearsed(config, processes=1, **options):
    return rehearse(lambda: build_model(config), config.train, tokens=20, processes=processes, **options)


def assert_same(phases, expected):
    """But for numbers alone, which the host makes in other ways."""
    assert phases.keys() == expected.keys() and {"backward", "updates"} <= expected.keys()
    for phase, kinds in expected.items():
        for kind in kinds.keys() | phases[phase].keys():
            assert abs(phases[phase].get(kind, 0) - kinds.get(kind, 0)) <= 512, (phase, kind)


@pytest.mark.parametrize("case", [pytest.param(x, marks=pytest.mark.slow if x != "plain" else ()) for x in ONE])
def test_one_process(case, tmp_path):
    config = run_config(*ONE[case], 1)
    assert_same(rehearsed(config, kernels=False).phases, counted(config, tmp_path / "run"))


def test_muon_makes_updates_of_a_stack_at_a_time(monkeypatch):
    config = run_config(dict(hidden_size=64, layers=("attn", "gdn") * 4), {}, 1)
    whole = 4 * sum(p.numel() for p in build_model(config).parameters())
    monkeypatch.setattr("sleep_ops.training.muon._TOGETHER", 1)
    assert 0 < rehearsed(config).phases["updates"]["updates"] < whole / 4


def test_what_processes_send():
    """Whole models: sums of gradients. Shards: gathered parameters, sums of gradients in parts, and what Muon sends."""
    size, found = 4 * sum(p.numel() for p in build_model(run_config({}, {}, 2)).parameters()), {}
    for way, train in {"ddp": {}, "fsdp": dict(parallel="fsdp"), "call": dict(parallel="fsdp", reshard="call")}.items():
        found[way] = rehearsed(run_config(BLOCKS, train, 2), 2).sent
    assert found["ddp"] == 2 * size + 2 * 4  # and the loss
    assert 2 * size < found["fsdp"] < 4 * size < found["call"]


@pytest.mark.parametrize(
    ("family", "train"),
    [
        ("qwen3_5_moe", dict(param_dtype="bf16", micro_batch=1)),
        pytest.param("qwen3_next_moe", {}, marks=pytest.mark.slow),
    ],
)
def test_experts(family, train, tmp_path):
    hf_models.build(family).save_pretrained(tmp_path / "model")
    described = {"folder": str(tmp_path / "model"), "window": 8, "passes": 2, **BLOCKS}
    config = RunConfig({}, described, TrainConfig(batch_size=2, device="cpu", **train))
    found = rehearsed(config, kernels=False)
    assert_same(found.phases, counted(config, tmp_path / "run"))


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bf16"])
def test_adapters(dtype, tmp_path):
    hf_models.build("qwen3_5").save_pretrained(tmp_path / "model")
    described = {"folder": str(tmp_path / "model"), "window": 8, "passes": 2, "lora": {"rank": 2}}
    config = RunConfig({}, described, TrainConfig(batch_size=2, device="cpu", param_dtype=dtype))
    found, expected = rehearsed(config, kernels=False).phases, counted(config, tmp_path / "run")
    assert_same(found, expected)
    parameters = sum(p.numel() for p in build_model(config, device="meta").parameters())
    assert found["backward"]["optimizer"] < parameters  # of adapters alone


def worker(rank, port, folder):
    torchrun = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in torchrun.items()}
    torch.set_num_threads(1)
    found = {way: counted(run_config(*TWO[way], 2), folder / way) for way in TWO}
    if rank == 0:
        torch.save(found, folder / "counted.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, tmp_path), nprocs=2)
    found = torch.load(tmp_path / "counted.pt")
    for way in TWO:
        assert_same(rehearsed(run_config(*TWO[way], 2), 2, kernels=False).phases, found[way])
    assert not dist.is_initialized()


GATHERED = {
    "blocks": (BLOCKS, {}, 4, ""),
    "passes": (dict(activation_checkpointing=True), {}, 4, "reshard: a pass is recomputed at a time"),
    "windows": (BLOCKS | dict(recompute="window"), {}, 4, "reshard: a window is recomputed at a time"),
    "rows": (BLOCKS, dict(micro_batch=1), 3, "reshard: rows differ between processes"),
}


@pytest.mark.parametrize(("model", "train", "rows", "told"), GATHERED.values(), ids=GATHERED)
def test_gathering_all_at_once_is_told_once(model, train, rows, told):
    config = run_config(model, dict(parallel="fsdp", reshard="call", **train), 2)
    with rehearsal._processes(2):
        run = rehearsal.Rehearsal(lambda: build_model(config), config.train, 2, rehearsal._FakeBytes())
        run.console = Console(file=io.StringIO())
        for step in range(2):
            run._alike(Tokens().batch(0, step, rows))
    text = run.console.file.getvalue()
    assert text.startswith(told) and text.count("reshard:") == bool(told)


def test_products_are_counted():
    """Six for each weight of a matrix and token: two forward, four backward, but for what is not needed."""
    config = run_config(dict(layers=("attn",), passes=1, window=None), {}, 1)
    model = build_model(config, device="meta")
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    sides = [sorted(p.shape) for p in model.blocks.parameters() if p.dim() == 2]
    optimizer = 5 * sum(4 * m * m * n + 2 * m**3 for m, n in sides)  # Newton-Schulz
    attention = 2 * 4 * 20 * 20 * 32  # forward, of two rows
    expected = 6 * 40 * weights + attention * 3.5 + optimizer
    assert rehearsed(config).flops == pytest.approx(expected, rel=0.03)


def test_products_of_experts_are_counted(tmp_path):
    few, many = (tmp_path / str(n) for n in (2, 4))
    for folder, active in ((few, 2), (many, 4)):
        hf_models.build("qwen3_5_moe", num_experts_per_tok=active).save_pretrained(folder)
    recipe = TrainConfig(batch_size=2)
    steps = [
        rehearse(lambda: load_model(folder, weights=False, window=20), recipe, tokens=20)  # noqa: B023
        for folder in (few, many)
    ]
    expert = 3 * 64 * 32  # weights; four layers have two more of them for each of 40 tokens
    assert steps[1].flops - steps[0].flops == 6 * 40 * 4 * 2 * expert


def test_kernels_keep_less_and_leave_no_trace(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = run_config(dict(impl="triton"), {}, 1)
    assert rehearsed(config).peak < rehearsed(run_config({}, {}, 1), kernels=False).peak
    assert "TRITON_INTERPRET" not in os.environ


def test_offloaded_activations_are_the_hosts():
    plain, sent = (rehearsed(run_config(dict(impl="triton"), dict(offload=x), 1)) for x in (False, True))
    gone = plain.phases["backward"]["activations"] - sent.phases["backward"]["activations"]
    assert plain.host == 0 and sent.host > gone > 0
    assert plain.moved == 0 and sent.moved == 2 * sent.host  # there, all at once at most, and back


def test_experts_one_by_one_are_refused(tmp_path):
    hf_models.build("qwen3_5_moe").save_pretrained(tmp_path)

    def build():
        model = load_model(tmp_path, weights=False, window=8, passes=1)
        model.model.set_experts_implementation("eager")
        return model

    with pytest.raises(ValueError, match="model: expected .*grouped_mm.*, got 'aten.nonzero.default'"):
        rehearse(build, TrainConfig(batch_size=1), tokens=8, kernels=False)
