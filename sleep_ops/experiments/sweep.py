"""`sleep-ops sweep`: the runs of a figure for every seed, each taken up where it stands; and their tables."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console

from sleep_ops.bench.harness import environment
from sleep_ops.checks import check_count, check_distinct, expect
from sleep_ops.experiments import statistics
from sleep_ops.experiments.figures import PASSES, Figure
from sleep_ops.experiments.parallel import Ended, Outcome, Run, run_all, shares
from sleep_ops.experiments.presets import preset, run_config, set_value
from sleep_ops.files import check_folder, read_csv, read_table, write_csv
from sleep_ops.training import RunConfig, Trainer, resolve_device
from sleep_ops.training.config import CONFIG_FILE
from sleep_ops.training.parallel import World, local_device
from sleep_ops.training.run import EVAL_FILE

RESULTS_FILE, CURVES_FILE, SUMMARY_FILE, PAIRED_FILE = "results.csv", "curves.csv", "summary.csv", "paired.csv"


def read_results(out: Path) -> list[dict[str, str]]:
    """The rows of a sweep's table. ValueError where there is none."""
    path = Path(out) / RESULTS_FILE
    expect(path.is_file(), "out", f"the folder of a sweep, with {RESULTS_FILE}", str(out))
    return read_table(path, "figure", "preset", "run")


class Results:
    """The tables of a sweep of `figure` in the folder `out`: every run, its evaluations on the way, and what seeds say.

    names: the runs, in the order of their rows. keep: rows that are there already stay, behind these, until their run
    is reported again. Those of runs that are gone are dropped.
    """

    def __init__(self, figure: Figure, out: Path, names: Sequence[str], *, keep: bool):
        self._figure, self._out, self._order = figure, Path(out), {name: place for place, name in enumerate(names)}
        rows = read_results(out) if keep and (self._out / RESULTS_FILE).is_file() else []
        self._rows: dict[str, dict] = {r["run"]: r for r in rows if (self._folder(r["run"]) / EVAL_FILE).is_file()}

    def add(self, name: str, row: dict, *, trained: bool) -> None:
        """Report the run `name`; one that was not `trained` now keeps the row it has."""
        row = {"run": name, **row} | read_csv(self._folder(name) / EVAL_FILE)[-1]
        if trained or not row.keys() <= self._rows.get(name, {}).keys():
            self._rows[name] = row
        rows = sorted(self._rows.values(), key=lambda r: self._order.get(r["run"], len(self._order)))
        write_csv(self._out / RESULTS_FILE, _filled(rows))
        curves: list[dict] = []
        for r in rows:
            curves += [{"run": r["run"], **point} for point in read_csv(self._folder(r["run"]) / EVAL_FILE)]
        write_csv(self._out / CURVES_FILE, _filled(curves))
        write_csv(self._out / SUMMARY_FILE, summary_table(self._figure, rows))
        if pairs := paired_table(self._figure, rows):
            write_csv(self._out / PAIRED_FILE, pairs)
        else:
            (self._out / PAIRED_FILE).unlink(missing_ok=True)

    def _folder(self, run: str) -> Path:
        """A run's own folder; that of the second phase where it was fine-tuned."""
        full = self._out / run / "full"
        return full if full.is_dir() else self._out / run


def _filled(rows: list[dict]) -> list[dict]:
    """The same with all columns that any has: runs of other tasks are evaluated on other things."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name, "") for name in columns} for row in rows]


def levels_of(figure: Figure, *rows: dict) -> list[int]:
    """The figure's levels of difficulty that any of these runs was evaluated on: a changed task may lack some."""
    return [level for level in figure.levels if any(row.get(f"{figure.metric}_{level}", "") != "" for row in rows)]


def by_setting(figure: Figure, rows: Iterable[dict]) -> dict[tuple, dict[str, dict]]:
    """{(values of what varies, baseline): {seed: row}} in the order of the rows, whose values are texts or not.

    Of two rows for one seed the first.
    """
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        point = tuple(str(row[name]) for name in figure.grid)
        found.setdefault((point, row.get("baseline") or ""), {}).setdefault(str(row.get("seed", "")), row)
    return found


def _measured(figure: Figure, rows: list[dict]) -> list[tuple[dict, str]]:
    """(columns that say what, the column of `rows` with its values): the metric, or at each level."""
    if figure.x != "level":
        return [({"metric": figure.metric}, figure.metric)]
    name = figure.metric
    return [({"level": level, "metric": name}, f"{name}_{level}") for level in levels_of(figure, *rows)]


def _values(runs: dict[str, dict], column: str) -> dict[str, float]:
    """By seed, of the runs that have one."""
    return {seed: float(row[column]) for seed, row in runs.items() if row.get(column, "") != ""}


def summary_table(figure: Figure, rows: list[dict]) -> list[dict]:
    """A row for each setting (and level): the metric's mean over seeds, with its interval."""
    table = []
    for (point, baseline), runs in by_setting(figure, rows).items():
        about = {"figure": figure.name, "preset": rows[0]["preset"]}
        about |= dict(zip(figure.grid, point, strict=True)) | {"baseline": baseline}
        for what, column in _measured(figure, rows):
            if values := _values(runs, column):
                table.append(about | what | statistics.summary([*values.values()]))
    return table


def paired_table(figure: Figure, rows: list[dict]) -> list[dict]:
    """A row for every two N of otherwise equal settings, the larger less the smaller, and for N less its baseline.

    At each level, if the figure has any. Differences are those of runs with the same seed.
    """
    found = by_setting(figure, rows)
    groups: dict[tuple, list[tuple]] = {}
    for point, baseline in found:
        setting = dict(zip(figure.grid, point, strict=True))
        passes = setting.pop(PASSES)
        groups.setdefault(tuple(setting.items()), []).append((float(passes), passes, baseline, (point, baseline)))
    table = []
    for setting, members in groups.items():
        plain = sorted(member for member in members if not member[2])
        pairs = [(b, a, f"N={a[1]}") for a, b in itertools.combinations(plain, 2)]
        pairs += [(a, b, b[2]) for a in plain for b in members if b[2] and b[0] == a[0]]
        for (_, passes, _, first), (_, _, _, second), against in pairs:
            about = {"figure": figure.name, "preset": rows[0]["preset"], **dict(setting)}
            about |= {"first": f"N={passes}", "second": against}
            for what, column in _measured(figure, rows):
                difference = statistics.paired(_values(found[first], column), _values(found[second], column))
                if difference is not None:
                    table.append(about | what | difference)
    return table


def folder_name(point: dict[str, object], baseline: str | None = None, seed: int | None = None) -> str:
    """A run's folder within the sweep's, such as "t=8,passes=4"; with a seed, where there are several, "...,seed=3"."""
    parts = [f"{name.rpartition('.')[2]}={value}" for name, value in point.items()]
    parts += [] if baseline is None else [baseline]
    return ",".join(parts if seed is None else [*parts, f"seed={seed}"])


def check_seeds(seeds: Sequence[int]) -> None:
    """ValueError for none, for what is no seed, and for one that is there twice."""
    expect(len(seeds) > 0, "seeds", "at least one", seeds)
    for seed in seeds:
        check_count("seeds", seed, 0)
    check_distinct("seeds", seeds)


def each_seed(
    seeds: Sequence[int] | None, changes: dict[str, object] | None
) -> list[tuple[int | None, dict[str, object]]]:
    """(seed in a run's name, settings of every run with it), seed by seed; None where there is but one.

    seeds: None for the one that `changes` and the preset give. ValueError for both, and for seeds that can't be.
    """
    changes = changes or {}
    if seeds is None:
        return [(None, changes)]
    check_seeds(seeds)
    expect("train.seed" not in changes, "set", "no train.seed beside seeds", changes.get("train.seed"))
    return [(seed if len(seeds) > 1 else None, changes | {"train.seed": seed}) for seed in seeds]


def check_changes(figure: Figure, changes: dict[str, object] | None) -> None:
    """ValueError for a change of what the grid varies: the runs would not be what their names say."""
    for name in changes or {}:
        expect(name not in figure.grid, "set", f"a setting that {figure.name} does not vary itself", name)


def train_runs(
    figure: Figure,
    size: str,
    *,
    seeds: Sequence[int] | None = None,
    baselines: Sequence[str] = (),
    changes: dict[str, object] | None = None,
) -> list[tuple[str, dict, RunConfig]]:
    """(folder, values of what varies, run) of a "train" figure: its grid, and its baselines for the largest N.

    seeds: of the runs, all of the first one, then those of the next. changes: settings of every run, over the preset's
    and the figure's. ValueError for settings that can't be.
    """
    check_changes(figure, changes)
    check_distinct("baselines", baselines)
    points = figure.points()
    largest = max(figure.grid[PASSES], key=float)
    chosen: list[tuple[dict, str | None]] = [(point, None) for point in points]
    chosen += [(p, b) for b in baselines for p in points if p[PASSES] == largest]
    runs = []
    for seed, changed in each_seed(seeds, changes):
        for point, baseline in chosen:
            settings = preset(figure.task, size)
            settings["task"]["name"] = figure.task
            for name, value in (figure.set | point | changed).items():
                set_value(settings, name, value)
            run = run_config(figure.task, settings, baseline)
            values = point | {"baseline": baseline or "", "seed": run.train.seed}
            runs.append((folder_name(point, baseline, seed), values, run))
    return runs


def train_run(config: RunConfig, folder: Path, resume: bool, values: dict, *, label: str, console: Console) -> Outcome:
    """One run from where it stands to its end; its row begins with `values`."""
    trainer = Trainer(config, folder, resume=resume, label=label, console=console)
    begun = trainer.step
    result = trainer.fit()
    row = values | {"seconds": round(result.seconds, 1)} | environment(trainer.device)
    return Outcome(result.signal, result.step > begun, row if trainer.world.main else None)


def check_going_on(configs: Iterable[tuple[RunConfig, Path]]) -> None:
    """ValueError where one of these folders holds another run."""
    for config, folder in configs:
        if (folder / CONFIG_FILE).exists():
            config.check_resumable(folder)


def check_alike(figure: Figure, out: Path, expected: Callable[[Path], Iterable[tuple[RunConfig, Path]]]) -> None:
    """ValueError where a run in the table of `out` has other settings than expected, but for what may vary.

    expected: a run's folder -> (its settings, where they are kept), several if it is in phases. Runs of baselines, and
    those that are gone, are not looked at.
    """
    varied = (*figure.grid, "train.seed")
    for row in read_results(out) if (out / RESULTS_FILE).is_file() else ():
        for config, folder in () if row.get("baseline") else expected(out / row["run"]):
            if (folder / CONFIG_FILE).is_file():
                found = RunConfig.load(folder).differences(config)
                found = [text for text in found if text.partition(":")[0] not in varied]
                got = f"{folder} with {'; '.join(found)}"
                expect(not found, "out", "a folder of runs with the same settings", got)


def sweep(
    figure: Figure,
    size: str,
    out: Path,
    *,
    seeds: Sequence[int] | None = None,
    baselines: Sequence[str] = (),
    changes: dict[str, object] | None = None,
    jobs: int | None = 1,
    resume: bool = True,
    console: Console | None = None,
) -> Ended:
    """Runs a "train" figure in the folder `out`; after each run writes the tables there.

        OUT/results.csv  a row for each run        OUT/summary.csv  the mean over seeds for each setting
        OUT/curves.csv   their evaluations         OUT/paired.csv   differences between settings, seed by seed

    seeds: those of every run, such as range(10); None for the one of the settings. jobs: runs at a time, in processes
    of their own where they are more than one (which need `if __name__ == "__main__"` around a script's call); None for
    one on each core of a CPU. Threads are shared out among them.

    Stopped, the same call goes on: finished runs are not run again. Returns the signal that stopped it, if one did, and
    the runs that failed, which do not keep the others from being run. Raises ValueError for settings that can't be,
    before anything is written.
    """
    expect(figure.kind == "train", "figure", "one of runs from scratch", figure.name)
    console, out = console or Console(markup=False), Path(out)
    chosen = train_runs(figure, size, seeds=seeds, baselines=baselines, changes=changes)
    device = resolve_device(local_device(chosen[0][2].train.device))
    world = World.join(device)
    jobs, threads = shares(jobs, len(chosen), device, world.size)
    check_folder("out", out)
    if resume:
        check_going_on((config, out / name) for name, _, config in chosen)
        check_alike(figure, out, lambda folder: [(chosen[0][2], folder)])
    runs = []
    for number, (name, values, config) in enumerate(chosen, 1):
        row = {"figure": figure.name, "preset": size, **values}
        label = f"{figure.name} {number}/{len(chosen)} {name}"
        runs.append(Run(name, label, train_run, (config, out / name, resume, row)))
    report = reporter(Results(figure, out, [run.name for run in runs], keep=resume))
    return run_all(runs, report, jobs=jobs, threads=threads, console=console, alone=world.size == 1)


def reporter(results: Results):
    """What `run_all` reports to: the tables, in the process that writes them."""

    def report(run: Run, outcome: Outcome) -> None:
        if outcome.row is not None:
            results.add(run.name, outcome.row, trained=outcome.trained)

    return report
