"""`sleep-ops sweep`: the runs of a figure, one after another, each taken up where it stands; and their table."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sleep_ops.bench.harness import environment
from sleep_ops.checks import expect
from sleep_ops.experiments.figures import Figure
from sleep_ops.experiments.presets import preset, run_config, set_value
from sleep_ops.files import check_folder, read_csv, read_table, write_csv
from sleep_ops.training import RunConfig, Trainer, TrainResult
from sleep_ops.training.trainer import EVAL_FILE

RESULTS_FILE, CURVES_FILE = "results.csv", "curves.csv"


def read_results(out: Path) -> list[dict[str, str]]:
    """The rows of a sweep's table. ValueError where there is none."""
    path = Path(out) / RESULTS_FILE
    expect(path.is_file(), "out", f"the folder of a sweep, with {RESULTS_FILE}", str(out))
    return read_table(path, "figure", "preset", "run")


class Results:
    """The tables of a sweep in the folder `out`: a row for each run, and every run's evaluations on the way.

    keep: rows that are there already stay, until their run is reported again. Those of another form, and of runs that
    are gone, are dropped.
    """

    def __init__(self, out: Path, *, keep: bool):
        self._out = Path(out)
        rows = read_results(out) if keep and (self._out / RESULTS_FILE).is_file() else []
        self._rows: dict[str, dict] = {r["run"]: r for r in rows if (self._folder(r["run"]) / EVAL_FILE).is_file()}

    def add(self, name: str, row: dict, folder: Path, *, trained: bool) -> None:
        """Report the run `name`, whose folder is `folder`; one that was not `trained` now keeps the row it has."""
        curve = read_csv(folder / EVAL_FILE)
        row = {"run": name, **row} | curve[-1]
        if trained or self._rows.get(name, {}).keys() != row.keys():
            self._rows[name] = row
        self._rows = {run: r for run, r in self._rows.items() if r.keys() == row.keys()}
        write_csv(self._out / RESULTS_FILE, list(self._rows.values()))
        curves = []
        for run in self._rows:
            curves += [{"run": run, **point} for point in read_csv(self._folder(run) / EVAL_FILE)]
        write_csv(self._out / CURVES_FILE, curves)

    def _folder(self, run: str) -> Path:
        """A run's own folder; that of the second phase where it was fine-tuned."""
        full = self._out / run / "full"
        return full if full.is_dir() else self._out / run


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
    """Runs a "train" figure in the folder `out`, run by run; after each, writes OUT/results.csv and OUT/curves.csv.

    Stopped, the same call goes on: finished runs are not run again. Returns the result of a run that a signal stopped,
    else None. Raises ValueError for settings that can't be, before anything is written, and as `Trainer` does.
    """
    expect(figure.kind == "train", "figure", "one of runs from scratch", figure.name)
    console, out = console or Console(), Path(out)
    runs = train_runs(figure, size, baselines=baselines, changes=changes)
    check_folder("out", out)
    results = Results(out, keep=resume)
    for number, (name, values, run) in enumerate(runs, 1):
        label = f"{figure.name} {number}/{len(runs)} {name}"
        trainer = Trainer(run, out / name, resume=resume, label=label, console=console)
        begun = trainer.step
        result = trainer.fit()
        if result.signal is not None:
            return result
        if trainer.world.main:
            row = {"figure": figure.name, "preset": size, **values, "seconds": round(result.seconds, 1)}
            results.add(name, row | environment(trainer.device), out / name, trained=result.step > begun)
    return None
