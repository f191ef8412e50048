"""A figure's plot from what its sweep left behind: the metric against x, the paper's numbers, and learning curves."""

from pathlib import Path

from matplotlib.ticker import MaxNLocator

from sleep_ops.checks import expect
from sleep_ops.experiments.figures import Figure
from sleep_ops.experiments.sweep import RESULTS_FILE, read_results
from sleep_ops.files import pyplot, read_csv
from sleep_ops.tasks import build_task
from sleep_ops.training import RunConfig
from sleep_ops.training.trainer import EVAL_FILE

_NAMES = {"model.passes": "N", "task.t": "t", "window": "L", "level": "level"}
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
    rows = read_results(out)
    found = {row["figure"] for row in rows}
    expect(found == {figure.name}, "out", f"the sweep of {figure.name}", ", ".join(sorted(found)))
    values = () if figure.x == "level" else (figure.x, figure.metric)
    missing = sorted({*figure.grid, *figure.series, *values} - rows[0].keys())
    expect(not missing, RESULTS_FILE, f"a table with what {figure.name} varies", f"one without {', '.join(missing)}")
    curves, plt = figure.kind == "train", pyplot()
    image, axes = plt.subplots(1, 1 + curves, figsize=(6.4 * (1 + curves), 4.4), squeeze=False, layout="constrained")
    _against_x(axes[0, 0], figure, rows)
    if curves:
        _against_tokens(axes[0, 1], figure, rows, Path(out))
    size = rows[0]["preset"]
    title = figure.title if size == "paper" else f"{figure.title} (preset {size})"
    image.suptitle(title, fontsize="large" if curves else "medium")  # one panel is narrow
    path.parent.mkdir(parents=True, exist_ok=True)
    image.savefig(path, dpi=120)
    plt.close(image)


def _label(figure: Figure, row: dict[str, str], names: tuple[str, ...]) -> str:
    parts = [f"{_NAMES.get(name, name)} = {row[name]}" for name in names]
    baseline = f"({row['baseline']})" if row.get("baseline") else ""
    return f"{', '.join(parts)} {baseline}".strip() or "sleep"


def _against_x(axes, figure: Figure, rows: list[dict[str, str]]) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    # A changed task may lack some of the paper's levels.
    levels = [level for level in figure.levels if f"{figure.metric}_{level}" in rows[0]]
    for row in rows:
        points = lines.setdefault(_label(figure, row, figure.series), [])
        if figure.x == "level":
            points += [(level, float(row[f"{figure.metric}_{level}"])) for level in levels]
        else:
            points.append((float(row[figure.x]), float(row[figure.metric])))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    # Answers are skewed, so that a guess is worth much: the same problems in every run.
    guesses = [(level, float(rows[0][f"majority_{level}"])) for level in levels if f"majority_{level}" in rows[0]]
    if guesses:
        axes.plot(*zip(*guesses, strict=True), ":", color="grey", label="commonest answer")
    for label in dict.fromkeys(mark[2] if len(mark) > 2 else "" for mark in figure.reference):
        marks = [mark[:2] for mark in figure.reference if (mark[2] if len(mark) > 2 else "") == label]
        axes.plot(*zip(*marks, strict=True), "k*", markersize=11, label=f"paper {label}".strip())
    if figure.x == "level":
        axes.set_xscale("log", base=2)
        axes.set_xticks(levels, labels=[str(level) for level in levels], minor=False)
        axes.minorticks_off()
    if figure.x == "model.passes":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=figure.x_label or _LABELS.get(figure.x, figure.x), ylabel=_LABELS.get(figure.metric, figure.metric))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _against_tokens(axes, figure: Figure, rows: list[dict[str, str]], out: Path) -> None:
    for row in rows:
        curve = read_csv(out / row["run"] / EVAL_FILE, "tokens", figure.metric)
        x, y = ([point[key] for point in curve] for key in ("tokens", figure.metric))
        axes.plot(x, y, label=_label(figure, row, tuple(figure.grid)))
    run = RunConfig.load(out / rows[-1]["run"])
    chance = build_task(run.task).chance().get("majority")
    if chance is not None:
        axes.axhline(chance, linestyle=":", color="grey", label="chance")
    axes.set(xlabel="training tokens", ylabel=_LABELS.get(figure.metric, figure.metric))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
