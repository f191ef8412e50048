"""Figures and the tasks' data: `sleep-ops sweep`, `plot` and `data`."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from sleep_ops.cli.common import exit_with, named_values, run_console
from sleep_ops.cli.options import Device, Jobs, OneSeed, Resume, Seed, Seeds, command, option, seeds_of
from sleep_ops.training.heap import keep_freed_memory

FigureName = Annotated[str | None, typer.Argument(help="fig2a, fig2b, eviction, ...; without one, they are listed.")]
PresetName = Annotated[str, option("paper, small or tiny.")]


@command
def sweep(
    figure: FigureName = None,
    preset: PresetName = "paper",
    baselines: Annotated[
        str | None, option("Also depth, loop, repeat, state, full (separated by commas) for the largest N.")
    ] = None,
    set: Annotated[
        list[str] | None, option("A setting of every run, such as train.steps=100 (may be given again and again).")
    ] = None,
    grid: Annotated[
        list[str] | None, option("Other values of what varies, such as task.t=[4,8] (may be given again and again).")
    ] = None,
    model: Annotated[Path | None, option("Checkpoint folder, for the figures that fine-tune one (fig4, fig5).")] = None,
    seed: OneSeed = None,
    seeds: Seeds = None,
    jobs: Jobs = None,
    device: Device = "auto",
    out: Annotated[Path | None, option("Folder; runs/FIGURE-PRESET by default.")] = None,
    resume: Resume = True,
) -> None:
    """All runs of a figure, the paper's or one beside them, for each seed; then its tables and plots.

    Stopped, the same command goes on.
    """
    console = run_console()
    from sleep_ops.experiments.figures import load_figure

    if figure is None:
        _list_figures(console)
        return
    keep_freed_memory()
    chosen = load_figure(figure, preset).narrowed(named_values("grid", grid or []))
    place = out or Path("runs") / f"{figure}-{preset}"
    changes = {"train.device": device} | named_values("set", set or [])
    chosen_seeds = seeds_of(seed, seeds)
    if seeds is None:
        changes = {"train.seed": chosen_seeds[0]} | changes
    if chosen.kind == "throughput":
        if model is not None or baselines:
            raise ValueError(f"model, baselines: expected none for {figure}, got {model or baselines}")
        if len(chosen_seeds) > 1 or jobs not in (None, 1):
            raise ValueError(
                f"seeds, jobs: expected one for {figure}, whose steps are timed, got {seeds or 1}, {jobs or 1}"
            )
        _throughput(chosen, {"train.seed": chosen_seeds[0]} | changes, place)
        return
    from sleep_ops.experiments.plot import plot, plot_seeds
    from sleep_ops.experiments.sweep import RESULTS_FILE

    options: dict = dict(changes=changes, jobs=jobs, resume=resume, console=console)
    options["seeds"] = None if seeds is None else chosen_seeds
    if chosen.kind == "finetune":
        from sleep_ops.experiments.finetuned import sweep_finetuned

        if model is None or baselines:
            got = "--baselines" if baselines else "none"
            raise ValueError(f"model: expected a checkpoint folder (and no baselines) for {figure}, got {got}")
        ended = sweep_finetuned(chosen, preset, place, model, **options)
    else:
        from sleep_ops.experiments.sweep import sweep as run

        if model is not None:
            raise ValueError(f"model: expected none for {figure}, whose runs start from scratch, got {model}")
        names = tuple(baselines.split(",")) if baselines else ()
        ended = run(chosen, preset, place, baselines=names, **options)
    if ended.signal is not None:
        console.print(f"stopped by signal {ended.signal}, saved; the same command goes on")
        raise typer.Exit(128 + ended.signal)
    if not console.quiet and (place / RESULTS_FILE).is_file():
        wrote = [place / f"{figure}.png", place / "seeds.png"]
        plot(chosen, place, wrote[0])
        if not plot_seeds(chosen, place, wrote[1]):
            wrote.pop()
        console.print(f"wrote {', '.join(map(str, [place / RESULTS_FILE, *wrote]))}", soft_wrap=True)
    exit_with(console, ended.failed)


@command
def plot(
    figure: Annotated[str, typer.Argument(help="fig2a, fig2b, ...")],
    preset: PresetName = "paper",
    out: Annotated[Path | None, option("Folder of the sweep; runs/FIGURE-PRESET by default.")] = None,
    image: Annotated[Path | None, option("PNG, PDF or SVG; FIGURE.png in the folder by default.")] = None,
) -> None:
    """A figure from what its sweep has written so far, with the paper's numbers where it gives any."""
    console = run_console()
    from sleep_ops.experiments.figures import load_figure
    from sleep_ops.experiments.plot import plot as draw
    from sleep_ops.experiments.plot import plot_seeds
    from sleep_ops.files import check_file

    chosen, place = load_figure(figure, preset), out or Path("runs") / f"{figure}-{preset}"
    if image is not None and not image.suffix:
        raise ValueError(f"image: expected a name that ends in .png, .pdf or .svg, got {image}")
    if chosen.kind == "throughput":
        check_file("image", image := image or place / "train.png", "figure")
        _draw_throughput(place, image)
    else:
        check_file("image", image := image or place / f"{figure}.png", "figure")
        draw(chosen, place, image)
        if plot_seeds(chosen, place, beside := image.with_name(f"seeds{image.suffix}")):
            console.print(f"wrote {beside}", soft_wrap=True)
    console.print(f"wrote {image}", soft_wrap=True)


@command
def data(
    task: Annotated[str, typer.Argument(help="rule110, depo, ...")],
    count: Annotated[int, option("Instances.")] = 3,
    split: Annotated[str, option("train or eval.")] = "train",
    task_option: Annotated[
        list[str] | None, option("A setting of the task, such as t=16 (may be given again and again).")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Annotated[Path | None, option("JSONL file to write instead of printing; new instances, one per line.")] = None,
) -> None:
    """Prints a task's instances with their answers, or exports them as JSONL."""
    console = run_console()
    from sleep_ops.tasks import TASKS
    from sleep_ops.training.config import resolve_device

    resolve_device(device)
    task = task.replace("-", "_")  # as `train` spells it
    made = [name for name, found in TASKS.items() if hasattr(found, "render")]  # text is what its files have
    if task not in made:
        raise ValueError(f"task: expected one of {', '.join(made)}, got {task!r}")
    if count < 1 or seed < 0:
        raise ValueError(f"count, seed: expected >= 1, >= 0, got {count}, {seed}")
    values = named_values("task_option", task_option or [])
    unknown = sorted(values.keys() - {f.name for f in fields(TASKS[task])})
    if unknown:
        raise ValueError(f"task_option: expected settings of {task}, got {', '.join(unknown)}")
    built = TASKS[task](**values)
    if out is None:
        batch = built.batch(seed, 0, count, split=split)
        for row in zip(batch.input_ids, batch.labels, strict=True):
            console.print(built.render(*row), highlight=False, markup=False, soft_wrap=True)
            console.rule()
        return
    from sleep_ops.files import check_file, write_atomically

    check_file("out", out, "JSONL")
    lines = [json.dumps(record, ensure_ascii=False) for record in records(built, seed, count, split)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, ("\n".join(lines) + "\n").encode())
    if out is not None:
        console.print(f"wrote {count} instances to {out}", soft_wrap=True)


def records(task, seed: int, count: int, split: str) -> list[dict]:
    """The first `count` instances of a stream: the task's own records, or its tokens, answers and their text."""
    if hasattr(task, "records"):
        return task.records(seed, count, split=split)
    batch = task.batch(seed, 0, count, split=split)
    return [
        {"input_ids": ids.tolist(), "labels": labels.tolist(), "text": task.render(ids, labels)}
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True)
    ]


def _list_figures(console: Console) -> None:
    from sleep_ops.experiments.figures import figure_names, load_figure

    table = Table(Column("figure", no_wrap=True), "what", "kind", "runs: paper", "small", "tiny")
    for name in figure_names():
        sizes = [load_figure(name, size) for size in ("paper", "small", "tiny")]
        table.add_row(name, sizes[0].title, sizes[0].kind, *(str(len(f.points())) for f in sizes))
    console.print(table)


def _throughput(figure, changes: dict, out: Path) -> None:
    """A figure of timed training steps is `bench train` with the figure's grid."""
    from sleep_ops.cli.bench import time_training

    known = {"train.seed": "seed", "train.device": "device", "train.batch_size": "batch", "train.repeats": "repeats"}
    unknown = sorted(changes.keys() - known.keys())
    if unknown:
        raise ValueError(f"set: expected {', '.join(known)} for {figure.name}, got {', '.join(unknown)}")
    grid = {"passes": tuple(figure.grid["model.passes"]), "windows": tuple(figure.grid["window"])}
    options = {known[name]: value for name, value in changes.items()}
    time_training({"presets": (figure.task,), "providers": ("ours",)} | grid | options, out)


def _draw_throughput(place: Path, image: Path) -> None:
    """Draws again what `bench train` measured."""
    from sleep_ops.bench.plot import plot_training
    from sleep_ops.files import read_table

    table = place / "train.csv"
    if not table.is_file():
        raise ValueError(f"out: expected the folder of a sweep, with train.csv, got {str(place)!r}")
    needed = ("preset", "provider", "mode", "checkpointing", "window", "passes", "tokens_per_second", "peak_mib")
    rows = [{name: _number(text) for name, text in row.items()} for row in read_table(table, *needed)]
    image.parent.mkdir(parents=True, exist_ok=True)
    plot_training(rows, image)


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
