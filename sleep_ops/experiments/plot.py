"""A figure's plots from what its sweep left behind: the metric against x, the paper's numbers, and learning curves.

Of several seeds: their mean in a band, which is its 95 % interval, and each seed as a faint dot.
"""

from pathlib import Path

from matplotlib.ticker import MaxNLocator

from sleep_ops.checks import expect
from sleep_ops.experiments.figures import PASSES, Figure
from sleep_ops.experiments.statistics import interval
from sleep_ops.experiments.sweep import RESULTS_FILE, by_setting, levels_of, read_results
from sleep_ops.files import pyplot, read_csv
from sleep_ops.tasks import build_task
from sleep_ops.training import RunConfig
from sleep_ops.training.run import EVAL_FILE

_NAMES = {"model.passes": "N", "model.eviction": "eviction", "task.t": "t", "window": "L", "level": "level"}
_LABELS = {
    "model.passes": "passes N",
    "task.t": "steps of the automaton t",
    "window": "window L (tokens)",
    "level": "level of difficulty",
    "exact": "exact accuracy",
    "tokens_per_second": "tokens per second",
}


def plot(figure: Figure, out: Path, path: Path) -> None:
    """Draws `figure` from the sweep in the folder `out` into the image `path`. ValueError for a table of another's."""
    rows = _rows(figure, out)
    curves, plt = figure.kind == "train", pyplot()
    image, axes = plt.subplots(1, 1 + curves, figsize=(6.4 * (1 + curves), 4.4), squeeze=False, layout="constrained")
    _against_x(axes[0, 0], figure, rows)
    if curves:
        _against_tokens(axes[0, 1], figure, rows, Path(out))
    image.suptitle(_title(figure, rows), fontsize="large" if curves else "medium")  # one panel is narrow
    path.parent.mkdir(parents=True, exist_ok=True)
    image.savefig(path, dpi=120)
    plt.close(image)


def plot_seeds(figure: Figure, out: Path, path: Path) -> bool:
    """Draws the pairs behind a claim: each seed a line against N, baselines beside; a panel for each other setting.

    False, and nothing is drawn, where no setting was run with several seeds.
    """
    rows, plt = _rows(figure, out), pyplot()
    if all(len(runs) < 2 for runs in by_setting(figure, rows).values()):
        return False
    others = tuple(name for name in figure.grid if name != PASSES)
    panels: dict[str, tuple[str, list[dict[str, str]]]] = {}
    for row in rows:
        for level in levels_of(figure, row) if figure.x == "level" else [None]:
            label = [] if level is None else [f"{figure.x_label or 'level'} = {level}"]
            label += [f"{_NAMES.get(name, name)} = {row[name]}" for name in others]
            metric = figure.metric if level is None else f"{figure.metric}_{level}"
            panels.setdefault(", ".join(label), (metric, []))[1].append(row)
    image, axes = plt.subplots(
        1, len(panels), figsize=(1.2 + 3.6 * len(panels), 4.4), squeeze=False, sharey=True, layout="constrained"
    )
    for place, (label, (metric, chosen)) in zip(axes[0], panels.items(), strict=True):
        _against_passes(place, metric, chosen)
        place.set(title=label, xlabel=_LABELS[PASSES], ylim=(0, None))
        place.grid(alpha=0.3)
    axes[0, 0].set_ylabel(_LABELS.get(figure.metric, figure.metric))
    axes[0, 0].legend(fontsize="small")
    image.suptitle(f"{_title(figure, rows)}, each seed", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.savefig(path, dpi=120)
    plt.close(image)
    return True


def _against_passes(axes, metric: str, rows: list[dict[str, str]]) -> None:
    counts = sorted({row[PASSES] for row in rows if not row.get("baseline")}, key=float)
    names = [*counts, *dict.fromkeys(row["baseline"] for row in rows if row.get("baseline"))]
    lines: dict[str, dict[str, float]] = {}
    for row in rows:
        lines.setdefault(row.get("seed", ""), {})[row.get("baseline") or row[PASSES]] = float(row[metric])
    for seed, found in lines.items():
        points = [(names.index(n), found[n]) for n in counts if n in found]
        x, y = zip(*points, strict=True) if points else ((), ())
        (line,) = axes.plot(
            x, y, marker="o", markersize=4, alpha=0.6, label=f"seed {seed}" if len(lines) <= 10 else None
        )
        beside = [(names.index(n), found[n]) for n in names[len(counts) :] if n in found]
        if beside:
            axes.plot(*zip(*beside, strict=True), "x", color=line.get_color(), alpha=0.6)
    means = [(n, [found[n] for found in lines.values() if n in found]) for n in names]
    axes.plot(
        [names.index(n) for n, _ in means], [sum(y) / len(y) for _, y in means], "k_", markersize=16, label="mean"
    )
    axes.set_xticks(range(len(names)), labels=names)


def _rows(figure: Figure, out: Path) -> list[dict[str, str]]:
    rows = read_results(out)
    found = {row["figure"] for row in rows}
    expect(found == {figure.name}, "out", f"the sweep of {figure.name}", ", ".join(sorted(found)))
    values = () if figure.x == "level" else (figure.x, figure.metric)
    missing = sorted({*figure.grid, *figure.series, *values} - rows[0].keys())
    expect(not missing, RESULTS_FILE, f"a table with what {figure.name} varies", f"one without {', '.join(missing)}")
    return rows


def _title(figure: Figure, rows: list[dict[str, str]]) -> str:
    size = rows[0]["preset"]
    return figure.title if size == "paper" else f"{figure.title} (preset {size})"


def draw_means(axes, points: dict[float, list[float]], *, dots: bool, **style) -> None:
    """A line through the means of the values at each x; of several, their 95 % intervals as a band, and faint dots."""
    x = sorted(points)
    found = [interval(points[at]) for at in x]
    (line,) = axes.plot(x, [mean for mean, _, _ in found], **style)
    if any(len(values) > 1 for values in points.values()):
        low, high = ([ends[side] for ends in found] for side in (1, 2))
        if len(x) > 1:
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        else:  # a band has no width there
            axes.vlines(x, low, high, color=line.get_color(), alpha=0.5)
        if dots:
            seeds = [(at, y) for at in x for y in points[at]]
            axes.plot(*zip(*seeds, strict=True), ".", color=line.get_color(), alpha=0.35)


def _label(figure: Figure, row: dict[str, str], names: tuple[str, ...]) -> str:
    parts = [f"{_NAMES.get(name, name)} = {row[name]}" for name in names]
    baseline = f"({row['baseline']})" if row.get("baseline") else ""
    return f"{', '.join(parts)} {baseline}".strip() or "sleep"


def _against_x(axes, figure: Figure, rows: list[dict[str, str]]) -> None:
    lines: dict[str, dict[float, list[float]]] = {}
    levels = levels_of(figure, *rows)
    for runs in by_setting(figure, rows).values():
        for row in runs.values():
            points = lines.setdefault(_label(figure, row, figure.series), {})
            if figure.x == "level":
                for level in levels_of(figure, row):
                    points.setdefault(level, []).append(float(row[f"{figure.metric}_{level}"]))
            else:
                points.setdefault(float(row[figure.x]), []).append(float(row[figure.metric]))
    for label, points in lines.items():
        draw_means(axes, points, dots=True, marker="o", label=label)
    # Answers are skewed, so that a guess is worth much: the same problems in every run.
    guesses = [
        (level, float(rows[0][f"majority_{level}"])) for level in levels if rows[0].get(f"majority_{level}", "") != ""
    ]
    if guesses:
        axes.plot(*zip(*guesses, strict=True), ":", color="grey", label="commonest answer")
    for label in dict.fromkeys(mark[2] if len(mark) > 2 else "" for mark in figure.reference):
        marks = [mark[:2] for mark in figure.reference if (mark[2] if len(mark) > 2 else "") == label]
        axes.plot(*zip(*marks, strict=True), "k*", markersize=11, label=f"paper {label}".strip())
    if figure.x == "level":
        axes.set_xscale("log", base=2)
        axes.set_xticks(levels, labels=[str(level) for level in levels], minor=False)
        axes.minorticks_off()
    if figure.x in ("model.passes", "task.t"):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=figure.x_label or _LABELS.get(figure.x, figure.x), ylabel=_LABELS.get(figure.metric, figure.metric))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _against_tokens(axes, figure: Figure, rows: list[dict[str, str]], out: Path) -> None:
    for runs in by_setting(figure, rows).values():
        points: dict[float, list[float]] = {}
        for row in runs.values():
            for point in read_csv(out / row["run"] / EVAL_FILE, "tokens", figure.metric):
                points.setdefault(point["tokens"], []).append(point[figure.metric])
        draw_means(axes, points, dots=False, label=_label(figure, row, tuple(figure.grid)))
    run = RunConfig.load(out / rows[-1]["run"])
    found = build_task(run.task).chance()
    chance = found.get(figure.metric, found.get("majority"))
    if chance is not None:
        axes.axhline(chance, linestyle=":", color="grey", label="chance")
    axes.set(xlabel="training tokens", ylabel=_LABELS.get(figure.metric, figure.metric))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
