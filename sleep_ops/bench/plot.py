"""The figures: lines against passes, tokens, windows; the cases side by side with an H100's floor; kernels' shares."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sleep_ops.bench.harness import MODES, TIMES
from sleep_ops.files import pyplot

LINES = ("ours", "ours-chained", "layer", "torch", "fla", "flash-qla", "transformers")


class Panel(NamedTuple):
    """One pair of axes: `column` of the rows of `mode` (None: of all)."""

    mode: str | None
    column: str
    title: str


def plot_passes(rows: list[dict], path: Path) -> None:
    """Time of each mode, and memory, against N: a row of panels per case, a line per provider."""
    title = "{case}: {batch} x {tokens} tokens, windows of {window}, {heads} heads of {head_dim}, {dtype}, {device}"
    panels = [*map(_time, MODES), _memory(rows, MODES[-1])]
    _plot_lines(rows, path, "case", title, panels, ("passes", "passes N"), "provider")


def plot_kernels(rows: list[dict], path: Path, sweep: str | None = None) -> None:
    """Time of each mode and memory against what was swept; without a sweep the cases side by side."""
    rows = [row for row in rows if row["mode"] != "first-call"]
    if not rows:
        return
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    if sweep is None:
        _plot_cases(rows, path, modes)
        return
    title = "{case}: batch {batch}, {value_heads} heads of {key_dim} x {value_dim}, N = {passes}, {dtype}, {device}"
    panels = [*map(_time, modes), _memory(rows, MODES[-1])]
    _plot_lines(rows, path, "case", title, panels, (sweep, f"{sweep} (tokens)"), "provider")


def plot_training(rows: list[dict], path: Path) -> None:
    """Tokens per second, and peak memory on CUDA, against N, or against L where there is one N: a line per way."""
    column, other = ("passes", "window") if len({row["passes"] for row in rows}) > 1 else ("window", "passes")
    names = {"passes": "N", "window": "L"}
    way = "{provider} {mode}, checkpointing {checkpointing}, "
    rows = [row | {"line": way.format(**row) + f"{names[other]} = {row[other]}"} for row in rows]
    title = "{preset}: {batch} x {tokens} tokens, {layers} blocks of width {width}, {precision}, {device}"
    panels = [Panel(None, "tokens_per_second", "tokens/s")]
    if rows[0]["peak_mib"] != "":
        panels.append(Panel(None, "peak_mib", "peak MiB"))
    _plot_lines(rows, path, "preset", title, panels, (column, f"{column} {names[column]}"), "line")


def plot_launches(rows: list[dict], path: Path) -> None:
    """Of every case's call the share of each kernel, all its launches together, forward and backward apart."""
    plt = pyplot()
    cases, kernels = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "kernel"))
    colours = dict(zip(kernels, plt.get_cmap("tab20").colors, strict=False))
    bars = [(case, direction) for case in reversed(cases) for direction in ("backward", "forward")]
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.35 * len(bars)), layout="constrained")
    left = [0.0] * len(bars)
    for kernel in kernels:
        shares = [
            sum(row["share"] for row in rows if (row["case"], row["direction"], row["kernel"]) == (*bar, kernel))
            for bar in bars
        ]
        axes.barh(range(len(bars)), shares, left=left, label=kernel.removesuffix("_kernel"), color=colours.get(kernel))
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set(xlabel="share of the call, forward and backward", yticks=range(len(bars)))
    axes.set_yticklabels([f"{case} {direction}" for case, direction in bars])
    axes.set_title("{device}, torch {torch}, triton {triton}".format(**rows[0]))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _time(mode: str) -> Panel:
    return Panel(mode, "ms_median", f"{mode} (ms)")


def _memory(rows: list[dict], mode: str) -> Panel:
    """The peak of a forward and backward on CUDA, elsewhere what is kept for the backward."""
    if any(row["peak_extra_mib"] != "" for row in rows):
        return Panel(mode, "peak_extra_mib", "peak MiB above the inputs")
    return Panel(mode, "saved_mib", "MiB kept for the backward")


def _plot_lines(
    rows: list[dict],
    path: Path,
    group: str,
    title: str,
    panels: Sequence[Panel],
    horizontal: tuple[str, str],
    line: str,
) -> None:
    """A row of panels per value of `group`, a line per value of `line`, on logarithmic axes where there is anything.

    horizontal: column and label of the x axis. Bands are the 20th to 80th percentile of the times.
    """
    plt = pyplot()
    groups = list(dict.fromkeys(row[group] for row in rows))
    names = list(dict.fromkeys([*(LINES if line == "provider" else ()), *(row[line] for row in rows)]))
    colours = dict(zip(names, plt.get_cmap("tab20" if len(names) > 10 else "tab10").colors * len(names), strict=False))
    column, label = horizontal

    figure = plt.figure(figsize=(max(8, 3.8 * len(panels)), 4 * len(groups)), layout="constrained")
    for name, part in zip(groups, figure.subfigures(len(groups), squeeze=False)[:, 0], strict=True):
        members = [row for row in rows if row[group] == name]
        part.suptitle(title.format(**members[0]))
        for panel, axes in zip(panels, part.subplots(1, len(panels), squeeze=False)[0], strict=True):
            for one in dict.fromkeys(row[line] for row in members):
                found = [row for row in members if row[line] == one and panel.mode in (None, row["mode"])]
                found = sorted((row for row in found if row[panel.column] != ""), key=lambda row: row[column])
                x, y = [row[column] for row in found], [row[panel.column] for row in found]
                axes.plot(x, y, "o-", markersize=3, color=colours[one], label=one)
                if panel.column == "ms_median":
                    low, high = ([row[key] for row in found] for key in TIMES[1:])
                    axes.fill_between(x, low, high, color=colours[one], alpha=0.2, linewidth=0)
            axes.set(xlabel=label, title=panel.title)
            if any((line.get_ydata() > 0).any() for line in axes.lines):
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
            axes.grid(alpha=0.3, which="both")
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_cases(rows: list[dict], path: Path, modes: Sequence[str]) -> None:
    """Median time of every case and provider, a panel per mode, and an H100's floor as a stroke below each case's."""
    plt = pyplot()
    cases = list(dict.fromkeys(row["case"] for row in rows))
    providers = [name for name in LINES if any(row["provider"] == name for row in rows)]
    colours = dict(zip(LINES, plt.get_cmap("tab10").colors, strict=False))
    step = 0.6 / len(providers)
    figure, panels = plt.subplots(len(modes), 1, figsize=(9, 3 * len(modes)), layout="constrained", squeeze=False)
    figure.suptitle("{device}, torch {torch}, triton {triton}".format(**rows[0]))
    for mode, axes in zip(modes, panels[:, 0], strict=True):
        members = [row for row in rows if row["mode"] == mode]
        for i, provider in enumerate(providers):
            found = [row for row in members if row["provider"] == provider]
            x = [cases.index(row["case"]) + (i - (len(providers) - 1) / 2) * step for row in found]
            median, low, high = ([row[key] for row in found] for key in TIMES)
            axes.vlines(x, low, high, color=colours[provider], alpha=0.5)
            axes.plot(x, median, "o", color=colours[provider], label=provider)
        floors = {row["case"]: row["h100_floor_ms"] for row in members if row["h100_floor_ms"] != ""}
        if floors:
            edges = ([cases.index(case) + side for case in floors] for side in (-0.4, 0.4))
            axes.hlines(list(floors.values()), *edges, color="black", label="least on an H100")
        axes.set(title=f"{mode} (ms)", yscale="log", xticks=range(len(cases)), xticklabels=cases)
        axes.margins(y=0.2)
        axes.grid(alpha=0.3, which="both", axis="y")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
