"""The demo: the same hybrid, the same data in the same order, with N = 1 and with more passes over evicted context.

Before it, in a second, what passes do for one memory without any training (`sleep_ops.experiments.recall`).
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sleep_ops.experiments import recall
from sleep_ops.files import pyplot, read_csv, write_csv
from sleep_ops.model.hybrid import HybridConfig
from sleep_ops.tasks import Rule110
from sleep_ops.training import RunConfig, TrainConfig, Trainer, load_run, resolve_device
from sleep_ops.training.trainer import EVAL_FILE, autocast

LAYERS = ("attn", "gdn", "attn", "gdn")
FINAL_SAMPLES = 4096


@dataclass(frozen=True)
class Scale:
    """The demo's size on one kind of machine. Every N trains on the same tokens."""

    task: Rule110
    hidden_size: int
    num_heads: int
    init_std: float
    train: TrainConfig
    passes: tuple[int, ...]

    def run_config(self, passes: int) -> RunConfig:
        model = HybridConfig(
            vocab_size=self.task.vocab_size,
            hidden_size=self.hidden_size,
            layers=LAYERS,
            window=self.task.window,
            passes=passes,
            num_heads=self.num_heads,
            initializer_range=self.init_std,
        )
        return RunConfig(self.task.to_dict(), model.to_dict(), self.train)


# Some minutes on two cores: small enough for that, hard enough that one pass does not get there.
CPU = Scale(
    task=Rule110(t=4, strings=2, bits=12, held_out=0.125),
    hidden_size=64,
    num_heads=4,
    init_std=(3 * 64) ** -0.5,  # that of torch's nn.Linear; with 0.02 a model this narrow idles at the chance level
    train=TrainConfig(
        steps=240,
        batch_size=128,
        lr_muon=5e-3,
        lr_adamw=2e-3,
        eval_every=20,
        eval_samples=1024,
        checkpoint_every=20,
        device="cpu",
    ),
    passes=(1, 2),  # N = 4 gets there too, but at this width often later than these steps
)
# The paper's model and data: 800 steps of 512 sequences of 100 tokens are 41M tokens.
CUDA = Scale(
    task=Rule110(t=8, strings=4, bits=24, held_out=0.125),
    hidden_size=256,
    num_heads=4,
    init_std=0.02,
    train=TrainConfig(steps=800, batch_size=512, eval_every=50, eval_samples=2048, checkpoint_every=100, device="cuda"),
    passes=(1, 4),
)


def choose_scale(device: str, seed: int, passes: tuple[int, ...] | None = None, steps: int | None = None) -> Scale:
    """The machine's scale with these settings. ValueError for passes that are not distinct integers >= 1."""
    scale = CUDA if resolve_device(device).type == "cuda" else CPU
    passes = scale.passes if passes is None else tuple(passes)
    if not passes or min(passes) < 1 or len(set(passes)) != len(passes):
        raise ValueError(f"passes: expected distinct integers >= 1, got {passes!r}")
    changes: dict = (
        {"seed": seed} | ({"device": device} if device != "auto" else {}) | ({} if steps is None else {"steps": steps})
    )
    return replace(scale, train=replace(scale.train, **changes), passes=passes)


def run_demo(scale: Scale, out: Path, *, resume: bool = True, console: Console | None = None) -> int | None:
    """Recall without training; then train every N of `scale` and evaluate on held-out strings. Print tables and write

        OUT/recall.csv     error of recall against N, also as recall.png
        OUT/passes-N/      a run folder for each N (checkpoints, metrics.csv, eval.csv)
        OUT/demo.csv       the table
        OUT/curves.csv     exact accuracy against steps and tokens
        OUT/demo.png       the same, drawn, with the chance level

    An interrupted demo goes on where it stopped. Returns the signal that stopped it, or None.
    """
    console = console or Console()
    trainers = []
    for passes in scale.passes:  # all of them first: a folder of another demo is refused before any work
        trainers.append(
            Trainer(
                scale.run_config(passes), out / f"passes-{passes}", resume=resume, label=f"N={passes}", console=console
            )
        )
    _recall(scale.train.seed, out, console)
    task, chance = scale.task, scale.task.chance()
    tokens = scale.train.steps * scale.train.batch_size * task.seq_len
    console.print(
        f"Rule 110: {task.strings} strings of {task.bits} bits, first bit after {task.t} steps. "
        f"{'-'.join(LAYERS)} of width {scale.hidden_size}, window {task.window}, on {trainers[0].device}. "
        f"{tokens / 1e6:.1f}M tokens for each N; evaluated on strings that training never shows."
    )
    rows = []
    for passes, trainer in zip(scale.passes, trainers, strict=True):
        result = trainer.fit()
        if not result.finished:
            console.print(f"stopped at step {result.step} of N={passes}; the same command goes on from there")
            return result.signal
        rows.append({"passes": passes, "steps": result.step, "tokens": tokens, "train_seconds": result.seconds})
        rows[-1] |= _final(trainer.out, scale, console)
    write_csv(out / "demo.csv", rows)
    curves = {n: read_csv(out / f"passes-{n}" / EVAL_FILE) for n in scale.passes}
    write_csv(out / "curves.csv", [{"passes": n, **row} for n, curve in curves.items() for row in curve])
    plot(curves, chance["majority"], scale, out / "demo.png")
    console.print(_table(rows, chance))
    console.print(
        f"chance: {chance['majority']:.1%} exact (always the commoner bit), {chance['uniform']:.1%} (guessing)"
    )
    console.print(f"wrote {out / 'demo.csv'}, {out / 'curves.csv'}, {out / 'demo.png'} and {out / 'passes-*'}")
    return None


def _recall(seed: int, out: Path, console: Console) -> None:
    # A second on any CPU, so the same figures on every machine.
    rows = recall.RecallExperiment(seed=seed, device="cpu").run()
    write_csv(out / "recall.csv", rows)
    recall.plot(rows, out / "recall.png")
    console.print(
        "Replay without training: pairs of keys and values written into a memory, recalled after N passes over them."
    )
    console.print(recall.table([row for row in rows if row["passes"] in (1, 2, 4, 16, 64, math.inf)]))
    console.print(f"wrote {out / 'recall.csv'} and {out / 'recall.png'}")


def _final(folder: Path, scale: Scale, console: Console) -> dict[str, float]:
    """Accuracy of the saved run, as anyone who loads the checkpoint would measure it."""
    _, task, model, _ = load_run(folder, device=scale.train.device, warn=console.print)
    device = next(model.parameters()).device
    with autocast(scale.train.precision, device):
        return task.evaluate(model, samples=FINAL_SAMPLES, batch_size=scale.train.batch_size, seed=1, device=device)


def _table(rows: list[dict], chance: dict[str, float]) -> Table:
    table = Table(title="exact accuracy on held-out strings, at equal tokens")
    for name in ("N", "exact", "+/-", "per label", "loss", "training s"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["passes"]),
            f"{row['exact']:.1%}",
            f"{row['exact_stderr']:.1%}",
            f"{row['per_label']:.1%}",
            f"{row['loss']:.4f}",
            f"{row['train_seconds']:.0f}",
        )
    table.add_row("chance", f"{chance['majority']:.1%}", "", f"{max(chance['ones'], 1 - chance['ones']):.1%}", "", "")
    return table


def plot(curves: dict[int, list[dict]], chance: float, scale: Scale, path: Path) -> None:
    """Exact accuracy against tokens, one line per N."""
    plt = pyplot()

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    colours = plt.get_cmap("viridis")
    for i, (passes, curve) in enumerate(curves.items()):
        axes.plot(
            [row["tokens"] / 1e6 for row in curve],
            [100 * row["exact"] for row in curve],
            marker="o",
            markersize=3,
            color=colours(0.85 * i / max(len(curves) - 1, 1)),
            label=f"N = {passes}",
        )
    axes.axhline(100 * chance, color="grey", linestyle=":", label="chance")
    task = scale.task
    axes.set(
        xlabel="training tokens (millions)",
        ylabel="exact accuracy on held-out strings (%)",
        ylim=(0, 102),
        title=f"Rule 110, t = {task.t}, {task.strings} strings of {task.bits} bits",
    )
    axes.grid(alpha=0.3)
    axes.legend(title="passes per sleep")
    figure.savefig(path, dpi=150)
    plt.close(figure)
