"""Peaks of memory that `sleep-ops plan` predicts, beside those of training steps on a CPU.

    python benchmarks/memory.py --out benchmarks/results/plan-cpu/plan.csv

Of each setting the first step makes the optimisers' states, and the second is measured: bytes of
live tensors, counted by `LiveBytes`, and how far the process's resident memory rose above what it
was before there was a model. Two processes speak by gloo.
"""

import argparse
import ctypes
import gc
import itertools
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from sleep_ops.files import write_csv
from sleep_ops.model.config import HybridConfig
from sleep_ops.tasks import Batch
from sleep_ops.training import RunConfig, TrainConfig, Trainer
from sleep_ops.training.config import PARAM_DTYPES
from sleep_ops.training.memory import LiveBytes
from sleep_ops.training.rehearsal import Step, rehearse, watched
from sleep_ops.training.run import build_model

ROWS, TOKENS = 2, 256  # of a process
SLEEP = dict(window=128, passes=2)
HYBRID = dict(vocab_size=4096, hidden_size=384, layers=("attn", "gdn", "gdn", "attn"), **SLEEP)
QWEN = dict(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
)
WEIGHTS = ("parameters", "gathered", "gradients", "optimizer")
KINDS = (*WEIGHTS, "activations", "updates")
MODELS = ("hybrid", "qwen3_5")
LEFT_OUT = ((2, "ddp"), (2, "fsdp"))  # of the second model
CHECKPOINTING = {
    "off": {},
    "pass": dict(activation_checkpointing=True),
    "block": dict(activation_checkpointing=True, recompute="block"),
}
WAYS = {
    "ddp": {},
    "fsdp": dict(parallel="fsdp"),
    "fsdp, call": dict(parallel="fsdp", reshard="call"),
}


@dataclass(frozen=True)
class Tokens:
    """Random tokens, all with loss."""

    name, vocab_size, seq_len, window, metric = "tokens", 4096, TOKENS, None, "loss"

    def batch(self, seed, step, size, device="cpu", *, split="train"):
        ids = torch.randint(self.vocab_size, (size, TOKENS + 1))
        return Batch(ids[:, :-1], ids[:, 1:], torch.ones(size, TOKENS, dtype=torch.bool))


def settings(processes: int, qwen: Path, models: Sequence[str] = MODELS) -> list[tuple[dict, RunConfig]]:
    """What is measured, and what it is called."""
    found = []
    for model, way, dtype, checkpointing in itertools.product(models, WAYS, PARAM_DTYPES, CHECKPOINTING):
        if processes == 1 and way != "ddp":
            continue
        if processes == 2 and checkpointing != "block" and (way, checkpointing) != ("fsdp", "off"):
            continue
        if model == "qwen3_5" and (dtype == "float32" or checkpointing == "pass" or (processes, way) in LEFT_OUT):
            continue
        changes = SLEEP | CHECKPOINTING[checkpointing]
        described = (
            {"folder": str(qwen)} | changes if model == "qwen3_5" else HybridConfig(**HYBRID | changes).to_dict()
        )
        train = TrainConfig(batch_size=ROWS * processes, param_dtype=dtype, device="cpu", **WAYS[way])
        name = dict(model=model, processes=processes, way=way, param_dtype=dtype, checkpointing=checkpointing)
        found.append((name, RunConfig({}, described, train)))
    return found


def predicted(config: RunConfig, processes: int) -> Step:
    return rehearse(
        lambda: build_model(config, weights=False), config.train, tokens=TOKENS, processes=processes, kernels=False
    )


def resident(field: str) -> int:
    """Bytes, of VmRSS or VmHWM."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measured(config: RunConfig, folder: Path) -> tuple[dict, int]:
    """Phases, as of a `Step`, and the peak of resident memory above what it is without a model."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    run = Trainer(config, folder, task=Tokens(), console=Console(quiet=True))
    run.model.train()
    run.take(run._make_batch(0))
    batch, count = run._make_batch(1), LiveBytes()
    with watched(run, count):
        run.take(batch)
    Path("/proc/self/clear_refs").write_text("5")
    run.take(run._make_batch(2))
    return count.most, resident("VmHWM") - before


def worker(rank: int, port: int, processes: int, folder: Path, models: Sequence[str]) -> None:
    """Measures all settings of so many processes; what the first saw goes into a file."""
    torch.set_num_threads(1)
    if processes > 1:
        torchrun = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ |= {name: str(value) for name, value in torchrun.items()}
    configs = [config for _, config in settings(processes, folder / "qwen", models)]
    for name, config in (("first", configs[0]), ("last", configs[-1])):  # libraries are loaded
        measured(config, folder / f"{processes}-{name}")
    found = [measured(config, folder / f"{processes}-{i}") for i, config in enumerate(configs)]
    if rank == 0:
        torch.save(found, folder / f"{processes}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def row(name: dict, config: RunConfig, expected: Step, phases: dict, risen: int) -> dict:
    seen = Step(phases, 0, 0, 0)
    parameters = sum(p.numel() for p in build_model(config, device="meta").parameters())
    ratios = {"counted/predicted": seen.peak / expected.peak, "resident/predicted": risen / expected.peak}
    weights = max(sum(n for kind, n in kinds.items() if kind in WEIGHTS) for kinds in phases.values())
    found = name | dict(parameters=parameters, predicted=expected.peak, counted=seen.peak, resident=risen)
    found |= {key: round(value, 4) for key, value in ratios.items()}
    found |= {f"predicted_{kind}": expected.kinds.get(kind, 0) for kind in KINDS}
    found |= {f"counted_{kind}": seen.kinds.get(kind, 0) for kind in KINDS}
    return found | {"weights_bytes_per_parameter": round(weights / parameters, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/plan/plan.csv"), help="CSV file")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="how many processes, in turn")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    options = parser.parse_args()
    # Every tensor of some size in pages of its own, which go back when it is gone.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        Qwen3_5ForCausalLM(Qwen3_5TextConfig(**QWEN)).save_pretrained(folder / "qwen")
        for processes in options.processes:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            mp.spawn(worker, args=(port, processes, folder, options.models), nprocs=processes)
            seen = torch.load(folder / f"{processes}.pt")
            for (name, config), (phases, risen) in zip(
                settings(processes, folder / "qwen", options.models), seen, strict=True
            ):
                rows.append(row(name, config, predicted(config, processes), phases, risen))
                print(*list(rows[-1].values())[:11], rows[-1]["weights_bytes_per_parameter"], flush=True)
                write_csv(options.out, rows)


if __name__ == "__main__":
    main()
