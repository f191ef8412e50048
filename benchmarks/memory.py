"""Peaks of memory that `sleep-ops plan` predicts, beside those of training steps on a CPU.

    python benchmarks/memory.py --out benchmarks/results/plan-cpu/plan.csv

Of each setting the first step makes the optimisers' states, and the second is measured: bytes of
live tensors, counted by `LiveBytes`, and how far the process's resident memory rose above what it
was before there was a model. Two processes speak by gloo.
"""

import argparse
import ctypes
import gc
import os
import socket
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console

from sleep_ops.files import write_csv
from sleep_ops.model.config import HybridConfig
from sleep_ops.tasks import Batch
from sleep_ops.training import RunConfig, TrainConfig, Trainer
from sleep_ops.training.memory import LiveBytes
from sleep_ops.training.rehearsal import rehearse, watched
from sleep_ops.training.run import build_model

ROWS, TOKENS = 2, 384  # of a process
HYBRID = dict(vocab_size=4096, hidden_size=384, layers=("attn", "gdn", "gdn", "attn"), window=128, passes=3)
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

    vocab_size: int
    name, seq_len, window, metric = "tokens", TOKENS, None, "loss"

    def batch(self, seed, step, size, device="cpu", *, split="train"):
        ids = torch.randint(self.vocab_size, (size, TOKENS + 1))
        return Batch(ids[:, :-1], ids[:, 1:], torch.ones(size, TOKENS, dtype=torch.bool))


def settings(processes: int) -> list[tuple[dict, RunConfig]]:
    """What is measured, and how it is called."""
    found = []
    for way, chosen in WAYS.items():
        if processes == 1 and way != "ddp":
            continue
        for dtype in ("float32", "bf16"):
            for checkpointing, changes in CHECKPOINTING.items():
                if way == "fsdp, call" and checkpointing == "pass":
                    continue  # gathers the model for every pass
                train = TrainConfig(batch_size=ROWS * processes, param_dtype=dtype, device="cpu", **chosen)
                name = dict(processes=processes, way=way, param_dtype=dtype, checkpointing=checkpointing)
                found.append((name, RunConfig({}, HybridConfig(**HYBRID | changes).to_dict(), train)))
    return found


def predicted(config: RunConfig, processes: int) -> tuple[int, dict]:
    step = rehearse(lambda: build_model(config), config.train, tokens=TOKENS, processes=processes, kernels=False)
    return step.peak, step.kinds


def resident(field: str) -> int:
    """Bytes, of VmRSS or VmHWM."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measured(config: RunConfig, folder: Path) -> tuple[int, dict, int]:
    """The peak of live tensors, its kinds, and that of resident memory above what it is without a model."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    run = Trainer(config, folder, task=Tokens(HYBRID["vocab_size"]), console=Console(quiet=True))
    run.model.train()
    run._train_step(run._make_batch(0))
    batch, count = run._make_batch(1), LiveBytes()
    with watched(run, count):
        run._train_step(batch)
    Path("/proc/self/clear_refs").write_text("5")
    run._train_step(run._make_batch(2))
    return count.peak, count.at_peak, resident("VmHWM") - before


def worker(rank: int, port: int, processes: int, folder: Path) -> None:
    """Measures all settings of so many processes; what the first saw goes into a file."""
    torch.set_num_threads(1)
    if processes > 1:
        torchrun = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ |= {name: str(value) for name, value in torchrun.items()}
    chosen = settings(processes)
    measured(chosen[0][1], folder / f"{processes}-first")  # libraries are loaded
    found = [measured(config, folder / f"{processes}-{i}") for i, (_, config) in enumerate(chosen)]
    if rank == 0:
        torch.save(found, folder / f"{processes}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/plan/plan.csv"), help="CSV file")
    out = parser.parse_args().out
    # Every tensor of some size in pages of its own, which go back when it is gone.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            mp.spawn(worker, args=(port, processes, Path(folder)), nprocs=processes)
            seen = torch.load(Path(folder) / f"{processes}.pt")
            for (name, config), (peak, kinds, risen) in zip(settings(processes), seen, strict=True):
                expected, expected_kinds = predicted(config, processes)
                parameters = sum(p.numel() for p in build_model(replace(config), device="meta").parameters())
                row = name | dict(parameters=parameters, predicted=expected, measured=peak, resident=risen)
                row |= {f"predicted_{k}": v for k, v in expected_kinds.items()}
                row |= {f"measured_{k}": v for k, v in kinds.items()}
                rows.append(row)
                print(row, flush=True)
    write_csv(out, rows)


if __name__ == "__main__":
    main()
