"""`sleep-ops bench`: speed; every command writes a long-format CSV."""

import math
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sleep_ops.bench.settings import KernelsSettings, LaunchesSettings, PassesSettings, TrainSettings, TuneSettings
from sleep_ops.cli.common import run_console
from sleep_ops.cli.options import Fields, command, option
from sleep_ops.training.heap import keep_freed_memory

Seconds = Annotated[float | None, option("Stop after so long, with the rows that there are by then.")]

bench_app = typer.Typer(help="Measure speed; every command writes a long-format CSV.", no_args_is_help=True)


@bench_app.command("passes")
@command
def bench_passes(
    settings: Annotated[dict, Fields(PassesSettings)],
    seconds: Seconds = None,
    out: Annotated[Path, option("Folder for passes.csv and passes.png.")] = Path("runs/bench"),
) -> None:
    """Time and memory of N replay passes: ours, passes chained by hand, the layer, and other libraries."""
    from sleep_ops.bench.passes import PassesBenchmark
    from sleep_ops.bench.plot import plot_passes

    console = run_console()
    rows = _measure(console, PassesBenchmark(**settings), out / "passes.csv", seconds)
    plot_passes(rows, out / "passes.png")
    for name in dict.fromkeys(row["case"] for row in rows):
        console.print(_timings([row for row in rows if row["case"] == name]))
    console.print(f"wrote {out / 'passes.csv'} and {out / 'passes.png'}")


@bench_app.command("kernels")
@command
def bench_kernels(
    settings: Annotated[dict, Fields(KernelsSettings)],
    seconds: Seconds = None,
    out: Annotated[Path, option("Folder for kernels.csv and kernels.png (kernels-SWEEP with a sweep).")] = Path(
        "runs/bench"
    ),
) -> None:
    """The operators on sizes of models: time, memory, and how near to what an H100 needs at the least."""
    from sleep_ops.bench.kernels import KernelsBenchmark
    from sleep_ops.bench.plot import plot_kernels

    console, benchmark = run_console(), KernelsBenchmark(**settings)
    sweep = benchmark.sweep
    name = f"kernels-{sweep}" if sweep else "kernels"
    rows = _measure(console, benchmark, out / f"{name}.csv", seconds)
    plot_kernels(rows, out / f"{name}.png", sweep)
    table = Table("case", *([sweep] if sweep else []), "provider", "mode", "ms", "of the floor", "peak MiB", "error")
    for row in rows:
        floor = "" if row["floor_fraction"] == "" else f"{row['floor_fraction']:.0%}"
        memory = "" if row["peak_extra_mib"] == "" else f"{row['peak_extra_mib']:.0f}"
        size = [str(row[sweep])] if sweep else []
        error = max(row[f"error_{what}"] for what in ("output", "state", "gradient"))
        cells = (row["provider"], row["mode"], f"{row['ms_median']:.3f}", floor, memory, f"{error:.1e}")
        table.add_row(row["case"], *size, *cells)
    console.print(table)
    console.print(f"wrote {out / f'{name}.csv'} and {out / f'{name}.png'}")


@bench_app.command("train")
@command
def bench_train(
    settings: Annotated[dict, Fields(TrainSettings)],
    seconds: Seconds = None,
    out: Annotated[Path, option("Folder for train.csv and train.png.")] = Path("runs/bench"),
) -> None:
    """A training step: tokens per second and peak memory against passes and window."""
    time_training(settings, out, seconds)


def time_training(settings: dict, out: Path, seconds: float | None = None) -> None:
    """Times training steps, and writes and prints what came out."""
    from sleep_ops.bench.plot import plot_training
    from sleep_ops.bench.training import TrainBenchmark

    keep_freed_memory()
    console = run_console()
    rows = _measure(console, TrainBenchmark(**settings), out / "train.csv", seconds)
    plot_training(rows, out / "train.png")
    table = Table("preset", "provider", "mode", "checkpointing", "L", "N", "ms", "tokens/s", "peak MiB")
    for row in rows:
        memory = "" if row["peak_mib"] == "" else f"{row['peak_mib']:,.0f}"
        names = [str(row[key]) for key in ("preset", "provider", "mode", "checkpointing", "window", "passes")]
        table.add_row(*names, f"{row['ms_median']:.1f}", f"{row['tokens_per_second']:,.0f}", memory)
    console.print(table)
    console.print(f"wrote {out / 'train.csv'} and {out / 'train.png'}")


@bench_app.command("tune")
@command
def bench_tune(
    settings: Annotated[dict, Fields(TuneSettings)],
    write: Annotated[bool, option("Put the best rows into kernels/launches.py.")] = False,
    seconds: Seconds = None,
    out: Annotated[Path, option("Folder for tune.csv.")] = Path("runs/bench"),
) -> None:
    """Launch settings of the chunk kernels, measured on the GPU at hand: minutes for each case and chunk."""
    from sleep_ops.bench.tune import TABLES, TuneBenchmark, check_writable, write_rows

    if write:
        check_writable()
    console, benchmark = run_console(), TuneBenchmark(**settings)
    _measure(console, benchmark, out / "tune.csv", seconds)
    table = Table("width", "K", "V", "GPU", "kernel", "value columns, warps, stages")
    for (name, key), (tokens, *launches) in benchmark.found.items():
        for kernel, launch in zip(("tokens", *TABLES[name]), (tokens, *launches), strict=True):
            table.add_row(*map(str, key), kernel, str(launch))
    console.print(table)
    if write and benchmark.found:
        console.print(f"wrote {write_rows(benchmark.found)}", soft_wrap=True)
    console.print(f"wrote {out / 'tune.csv'}", soft_wrap=True)


@bench_app.command("launches")
@command
def bench_launches(
    settings: Annotated[dict, Fields(LaunchesSettings)],
    seconds: Seconds = None,
    out: Annotated[Path, option("Folder for launches.csv and launches.png.")] = Path("runs/bench"),
) -> None:
    """Every kernel launch of a forward and backward timed alone, beside the call as a whole; needs a GPU."""
    from sleep_ops.bench.launches import LaunchesBenchmark
    from sleep_ops.bench.plot import plot_launches

    console = run_console()
    rows = _measure(console, LaunchesBenchmark(**settings), out / "launches.csv", seconds)
    plot_launches(rows, out / "launches.png")
    table = Table("case", "direction", "kernel", "grid", "ms", "of the call")
    for row in rows:
        names = (row[key] for key in ("case", "direction", "kernel", "grid"))
        table.add_row(*names, f"{row['ms_median']:.4f}", f"{row['share']:.0%}")
    console.print(table)
    console.print(f"wrote {out / 'launches.csv'} and {out / 'launches.png'}")


def _measure(console: Console, benchmark, path: Path, seconds: float | None) -> list[dict]:
    """The rows of a benchmark, written to `path` after every step: whole however the command ends."""
    from rich.progress import Progress

    from sleep_ops.files import check_folder, write_csv

    check_folder("out", path.parent)
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"seconds: expected a number > 0, got {seconds}")
    rows, begin, done = [], time.monotonic(), 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=benchmark.steps)

        def note(text: str) -> None:
            bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

        for found in benchmark.run(note, lambda label: bar.update(task, description=label)):
            rows += found
            if found:
                write_csv(path, rows)
            bar.advance(task)
            done += 1
            if seconds is not None and time.monotonic() - begin > seconds and done < benchmark.steps:
                note(f"stopped after {seconds:g} s, at {done} of {benchmark.steps}")
                break
    if not rows:
        console.print("nothing was timed")
        raise typer.Exit(1)
    return rows


def _timings(rows: list[dict]) -> Table:
    """Median milliseconds, memory and worst error of each N and provider of one case."""
    from sleep_ops.bench.harness import MODES

    memory = "saved_mib" if rows[0]["peak_extra_mib"] == "" else "peak_extra_mib"
    table = Table("N", "provider", *(f"{mode} ms" for mode in MODES), memory, "error")
    table.title = "{case}: {batch} x {tokens} tokens, windows of {window}, {dtype}, {device}".format(**rows[0])
    found = {(row["passes"], row["provider"], row["mode"]): row for row in rows}
    for n, provider in dict.fromkeys(key[:2] for key in found):
        line = {mode: found[n, provider, mode] for mode in MODES if (n, provider, mode) in found}
        last = list(line.values())[-1]
        table.add_row(
            *(str(n), provider, *(f"{line[mode]['ms_median']:.2f}" if mode in line else "" for mode in MODES)),
            "" if last[memory] == "" else f"{last[memory]:.1f}",
            f"{max(last[f'error_{what}'] for what in ('output', 'state', 'gradient')):.1e}",
        )
    return table
