"""`sleep-ops sweep`: the runs of a figure, one after another, each taken up where it stands; and their table."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from sleep_ops.config import expect
from sleep_ops.experiments.figures import Figure
from sleep_ops.experiments.presets import preset, run_config, set_value
from sleep_ops.training import RunConfig, Trainer, TrainResult
from sleep_ops.training.logs import read_csv, write_csv
from sleep_ops.training.trainer import EVAL_FILE

RESULTS_FILE = "results.csv"


def folder_name(point: dict[str, object], baseline: str | None = None) -> str:
    """A run's folder within the sweep's, such as "t=8,passes=4"."""
    parts = [f"{name.rpartition('.')[2]}={value}" for name, value in point.items()]
    return ",".join(parts if baseline is None else [*parts, baseline])


def check_changes(figure: Figure, changes: dict[str, object] | None) -> None:
    """ValueError for a change of what the grid varies: the runs would not be what their names say."""
    for name in changes or {}:
        expect(name not in figure.grid, "set", f"a setting that {figure.name} does not vary itself", name)


def train_runs(
    figure: Figure, size: str, *, baselines: Sequence[str] = (), changes: dict[str, object] | None = None
) -> list[tuple[str, dict, RunConfig]]:
    """(folder, values of what varies, run) of a "train" figure: its grid, and its baselines for the largest N.

    changes: settings of every run, over the preset's and the figure's. ValueError for settings that can't be.
    """
    check_changes(figure, changes)
    runs = []
    largest = max(figure.grid["model.passes"])
    for point, baseline in [
        *((point, None) for point in figure.points()),
        *((p, b) for b in baselines for p in figure.points() if p["model.passes"] == largest),
    ]:
        settings = preset(figure.task, size)
        settings["task"]["name"] = figure.task
        for name, value in (figure.set | point | (changes or {})).items():
            set_value(settings, name, value)
        run = run_config(figure.task, settings, baseline)
        runs.append((folder_name(point, baseline), point | {"baseline": baseline or ""}, run))
    return runs


def sweep(
    figure: Figure,
    size: str,
    out: Path,
    *,
    baselines: Sequence[str] = (),
    changes: dict[str, object] | None = None,
    resume: bool = True,
    console: Console | None = None,
) -> TrainResult | None:
    """Runs a "train" figure in the folder `out`, run by run; after each, writes OUT/results.csv.

    Stopped, the same call goes on: finished runs are not run again. Returns the result of a run that a signal stopped,
    else None. Raises ValueError for settings that can't be, before anything is written, and as `Trainer` does.
    """
    expect(figure.kind == "train", "figure", "one of runs from scratch", figure.name)
    console, out = console or Console(), Path(out)
    runs = train_runs(figure, size, baselines=baselines, changes=changes)
    expect(not out.exists() or out.is_dir(), "out", "a folder", str(out))
    rows = []
    for number, (name, values, run) in enumerate(runs, 1):
        label = f"{figure.name} {number}/{len(runs)} {name}"
        trainer = Trainer(run, out / name, resume=resume, label=label, console=console)
        result = trainer.fit()
        if result.signal is not None:
            return result
        last = read_csv(out / name / EVAL_FILE)[-1]
        row = {"figure": figure.name, "preset": size, "run": name, **values, "seconds": round(result.seconds, 1)}
        rows.append(row | {"device": device_name(trainer.device), "torch": torch.__version__} | last)
        if trainer.world.main:
            write_csv(out / RESULTS_FILE, rows)
    return None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
