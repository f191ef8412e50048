"""The demo: the same hybrid, the same data in the same order, with N = 1 and with more passes over evicted context.

Before it, in a second, what passes do for one memory without any training (`sleep_ops.experiments.recall`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sleep_ops.checks import check_distinct_counts
from sleep_ops.experiments import recall
from sleep_ops.experiments.parallel import Ended, Outcome, Run, run_all, shares
from sleep_ops.experiments.plot import draw_means
from sleep_ops.experiments.statistics import interval, paired
from sleep_ops.experiments.sweep import check_going_on, check_seeds, train_run
from sleep_ops.files import check_folder, pyplot, read_csv, write_csv
from sleep_ops.model.hybrid import HybridConfig
from sleep_ops.tasks import Rule110
from sleep_ops.training import RunConfig, TrainConfig, load_run, resolve_device
from sleep_ops.training.run import EVAL_FILE, autocast

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
    reinject: bool = False

    def run_config(self, passes: int, seed: int | None = None) -> RunConfig:
        """The run with so many passes; seed: None for the recipe's."""
        train = self.train if seed is None else replace(self.train, seed=seed)
        model = HybridConfig(
            vocab_size=self.task.vocab_size,
            hidden_size=self.hidden_size,
            layers=LAYERS,
            window=self.task.window,
            passes=passes,
            num_heads=self.num_heads,
            initializer_range=self.init_std,
            reinject=self.reinject,
        )
        return RunConfig(self.task.to_dict(), model.to_dict(), train)


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
    passes=(1, 2, 4),
    reinject=True,  # without it N = 4 often gets there later than these steps
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
    check_distinct_counts("passes", passes)
    changes: dict = (
        {"seed": seed} | ({"device": device} if device != "auto" else {}) | ({} if steps is None else {"steps": steps})
    )
    return replace(scale, train=replace(scale.train, **changes), passes=passes)


def demo_run(
    config: RunConfig, folder: Path, resume: bool, scale: Scale, values: dict, *, label: str, console: Console
) -> Outcome:
    """One run to its end, then the accuracy of what it saved; its row begins with `values`."""
    outcome = train_run(config, folder, resume, {}, label=label, console=console)
    if outcome.signal is not None:
        return outcome
    row = values | {"train_seconds": outcome.row["seconds"]} | _final(folder, scale, console)
    return outcome._replace(row=row)


def run_demo(
    scale: Scale,
    out: Path,
    *,
    seeds: Sequence[int] | None = None,
    jobs: int | None = 1,
    resume: bool = True,
    console: Console | None = None,
) -> Ended:
    """Recall without training; then train every N of `scale` and evaluate on held-out strings. Print tables and write

        OUT/recall.csv     error of recall against N, also as recall.png
        OUT/passes-N/      a run folder for each N (checkpoints, metrics.csv, eval.csv); passes-N,seed=S of several
        OUT/demo.csv       a row for each run
        OUT/curves.csv     exact accuracy against steps and tokens
        OUT/demo.png       the same, drawn, with the chance level

    seeds: those of every N; None for the scale's. jobs: runs at a time, as in `sweep`. An interrupted demo goes on
    where it stopped. Returns the signal that stopped it, if one did, and the runs that failed.
    """
    console, out = console or Console(markup=False), Path(out)
    seeds = (scale.train.seed,) if seeds is None else tuple(seeds)
    check_seeds(seeds)
    device, task, chance = resolve_device(scale.train.device), scale.task, scale.task.chance()
    tokens = scale.train.steps * scale.train.batch_size * task.seq_len
    runs = []
    for seed in seeds:
        for passes in scale.passes:
            several = f",seed={seed}" if len(seeds) > 1 else ""
            values = {"passes": passes, "seed": seed, "steps": scale.train.steps, "tokens": tokens}
            folder = out / f"passes-{passes}{several}"
            arguments = (scale.run_config(passes, seed), folder, resume, scale, values)
            runs.append(Run(folder.name, f"N={passes}{several}", demo_run, arguments))
    jobs, threads = shares(jobs, len(runs), device)
    check_folder("out", out)
    if resume:  # a folder of another demo is refused before any work
        check_going_on(run.arguments[:2] for run in runs)
    _recall(seeds[0], out, console)
    console.print(
        f"Rule 110: {task.strings} strings of {task.bits} bits, first bit after {task.t} steps. "
        f"{'-'.join(LAYERS)} of width {scale.hidden_size}, window {task.window}, on {device}. "
        f"{tokens / 1e6:.1f}M tokens for each run; evaluated on strings that training never shows."
    )
    found: dict[str, dict] = {}

    def report(run: Run, outcome: Outcome) -> None:
        found[run.name] = outcome.row

    ended = run_all(runs, report, jobs=jobs, threads=threads, console=console)
    if ended.signal is not None:
        console.print(f"stopped by signal {ended.signal}, saved; the same command goes on")
    if ended.signal is not None or not found:
        return ended
    rows = [found[run.name] for run in runs if run.name in found]
    write_csv(out / "demo.csv", rows)
    curves = [
        {"passes": row["passes"], "seed": row["seed"], **point}
        for run in runs
        if (row := found.get(run.name))
        for point in read_csv(out / run.name / EVAL_FILE)
    ]
    write_csv(out / "curves.csv", curves)
    plot(curves, chance["majority"], scale, out / "demo.png")
    console.print(_table(rows, chance))
    for text in _pairs(rows):
        console.print(text)
    console.print(
        f"chance: {chance['majority']:.1%} exact (always the commoner bit), {chance['uniform']:.1%} (guessing)"
    )
    console.print(f"wrote {out / 'demo.csv'}, {out / 'curves.csv'}, {out / 'demo.png'} and {out / 'passes-*'}")
    return ended


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
    """A row for each N; of several seeds the means, with the 95 % interval of the exact accuracy's."""
    several = len({row["seed"] for row in rows}) > 1
    table = Table(title="exact accuracy on held-out strings, at equal tokens")
    for name in ("N", *(["seeds"] if several else []), "exact", "+/-", "per label", "loss", "training s"):
        table.add_column(name, justify="right")
    for passes in dict.fromkeys(row["passes"] for row in rows):
        chosen = [row for row in rows if row["passes"] == passes]
        means = {name: interval([row[name] for row in chosen]) for name in chosen[0]}
        exact, low, _ = means["exact"]
        table.add_row(
            str(passes),
            *([str(len(chosen))] if several else []),
            f"{exact:.1%}",
            f"{exact - low if several else means['exact_stderr'][0]:.1%}",
            f"{means['per_label'][0]:.1%}",
            f"{means['loss'][0]:.4f}",
            f"{means['train_seconds'][0]:.0f}",
        )
    per_label = f"{max(chance['ones'], 1 - chance['ones']):.1%}"
    table.add_row("chance", *([""] if several else []), f"{chance['majority']:.1%}", "", per_label, "", "")
    return table


def _pairs(rows: list[dict]) -> list[str]:
    """What each larger N gains over the smallest, seed by seed, where there are several."""
    exact: dict[int, dict[str, float]] = {}
    for row in rows:
        exact.setdefault(row["passes"], {})[str(row["seed"])] = row["exact"]
    least, *others = sorted(exact)
    told = []
    for passes in others:
        gain = paired(exact[passes], exact[least])
        if gain is not None and gain["n"] > 1:
            half, ahead = gain["mean"] - gain["ci_low"], f"{gain['positive']} of {gain['n']} seeds"
            told.append(f"N={passes} less N={least}: {gain['mean']:+.1%} +/- {half:.1%}, ahead on {ahead}")
    return told


def plot(curves: list[dict], chance: float, scale: Scale, path: Path) -> None:
    """Exact accuracy against tokens, one line per N; of several seeds the means, in bands."""
    plt = pyplot()

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    colours = plt.get_cmap("viridis")
    lines: dict[int, dict[float, list[float]]] = {}
    for row in curves:
        lines.setdefault(row["passes"], {}).setdefault(row["tokens"] / 1e6, []).append(100 * row["exact"])
    for i, (passes, points) in enumerate(lines.items()):
        colour = colours(0.85 * i / max(len(lines) - 1, 1))
        draw_means(axes, points, dots=False, marker="o", markersize=3, color=colour, label=f"N = {passes}")
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
