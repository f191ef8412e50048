"""A CUDA-graph training step against eager ones: the same run twice, from the same seed, and their losses.

    python -m sleep_ops.verify.graph OUT [--device cuda]

Writes OUT/graph.csv. Wrong where losses differ by more than TOLERANCE of themselves; the same bits are hoped for.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from sleep_ops.experiments.demo import choose_scale
from sleep_ops.files import read_csv, write_csv
from sleep_ops.training import Trainer, resolve_device
from sleep_ops.training.run import METRICS_FILE

FILE, FOLDER = "graph.csv", "graph-runs"
STEPS, BATCH, PASSES = 12, 64, 2
TOLERANCE = 1e-3


def run(out: Path, device: str, steps: int = STEPS) -> bool:
    """Writes the losses of both; whether they agree."""
    scale, losses = choose_scale(device, seed=0), {}
    for name, graph in (("eager", False), ("graph", resolve_device(device).type == "cuda")):
        recipe = {"steps": steps, "batch_size": BATCH, "eval_every": 0, "eval_samples": BATCH, "checkpoint_every": 0}
        config = replace(scale, train=replace(scale.train, **recipe, cuda_graph=graph)).run_config(PASSES)  # type: ignore[arg-type]
        folder = out / FOLDER / name
        trainer = Trainer(config, folder, resume=False, label=name, console=Console())
        trainer.fit()
        if trainer.graphs is not None and not len(trainer.graphs):
            print("WRONG: no step was recorded")
            return False
        rows = read_csv(folder / METRICS_FILE)
        losses[name] = [row["loss"] for row in rows]
    pairs = list(zip(losses["eager"], losses["graph"], strict=True))
    rows = [{"step": i, "eager": a, "graph": b, "same_bits": a == b} for i, (a, b) in enumerate(pairs, 1)]
    write_csv(out / FILE, rows)
    worst = max(abs(a - b) / abs(a) for a, b in pairs)
    print(f"losses of {steps} steps: " + ("the same bits" if worst == 0 else f"up to {worst:.1e} of themselves apart"))
    return worst <= TOLERANCE


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m sleep_ops.verify.graph")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    sys.exit(not run(given.out, given.device))
