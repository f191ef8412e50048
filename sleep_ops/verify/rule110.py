"""The demo's Rule 110 for as long as there is time: does it learn? A run folder that the same command goes on with.

    python -m sleep_ops.verify.rule110 OUT [--device cpu] [--seconds 60]

Writes OUT/rule110.csv and .png from the run in OUT/rule110-run.
"""

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from rich.console import Console

from sleep_ops.experiments.demo import choose_scale
from sleep_ops.files import pyplot, read_csv, write_csv
from sleep_ops.training import Trainer
from sleep_ops.training.run import EVAL_FILE, METRICS_FILE

FILE, PLOT, FOLDER = "rule110.csv", "rule110.png", "rule110-run"
PASSES, EVERY = 2, 20  # steps from one look at the clock to the next, and from one evaluation to the next
EVALUATED = 512  # sequences
LEARNS_IN = 60  # steps after which the loss has to be lower


def run(out: Path, device: str, seconds: float) -> bool:
    """Trains for about `seconds`, at least EVERY steps; whether losses are finite and, given time to, fall."""
    begin, scale = time.monotonic(), choose_scale(device, seed=0)
    scale = replace(scale, train=replace(scale.train, eval_every=EVERY, eval_samples=EVALUATED, checkpoint_every=EVERY))
    trainer = Trainer(scale.run_config(PASSES), out / FOLDER, label=f"Rule 110, N = {PASSES}", console=Console())
    if trainer.step:
        print(f"going on from step {trainer.step}")
    before, last = 0.0, begin
    while not trainer.finished and (before == 0 or time.monotonic() - begin + before < seconds):
        if trainer.fit(trainer.step + EVERY).signal is not None:
            break
        before, last = time.monotonic() - last, time.monotonic()
    steps = read_csv(out / FOLDER / METRICS_FILE)
    losses = [row["loss"] for row in steps]
    evaluations: dict = {row["step"]: row["exact"] for row in read_csv(out / FOLDER / EVAL_FILE)}
    chance = scale.task.chance()["majority"]
    rows = [
        {"step": int(row["step"]), "tokens": int(row["tokens"]), "loss": row["loss"]}
        | {"exact": evaluations.get(row["step"], ""), "chance": chance}
        for row in steps
    ]
    write_csv(out / FILE, rows)
    plot(rows, str(trainer.device), out / PLOT)
    first, newest = fmean(losses[:EVERY]), fmean(losses[-EVERY:])
    print(f"{len(losses)} of {scale.train.steps} steps: loss {first:.4f} to {newest:.4f}")
    return math.isfinite(sum(losses)) and (len(losses) < LEARNS_IN or newest < first)


def plot(rows: list[dict], device: str, path: Path) -> None:
    """Loss of every step, and exact accuracy on strings that training never shows."""
    plt = pyplot()

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    figure.suptitle(f"Rule 110, N = {PASSES}, {device}")
    left.plot([row["step"] for row in rows], [row["loss"] for row in rows])
    left.set(xlabel="step", ylabel="training loss")
    points = [(row["step"], 100 * row["exact"]) for row in rows if row["exact"] != ""]
    right.plot(*zip(*points, strict=True), "o-")
    right.axhline(100 * rows[0]["chance"], color="grey", linestyle=":", label="chance")
    right.set(xlabel="step", ylabel="exact accuracy (%)", ylim=(0, 102))
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m sleep_ops.verify.rule110")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    sys.exit(not run(given.out, given.device, given.seconds))
