"""`sleep-ops bench`: speed; every command writes a long-format CSV."""

import math
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sleep_ops.cli.common import Device, Seed, integers, option, refusals

Seconds = Annotated[float | None, option("Stop after so long, with the rows that there are by then.")]

bench_app = typer.Typer(help="Measure speed; every command writes a long-format CSV.", no_args_is_help=True)


@bench_app.command("passes")
def bench_passes(
    passes: Annotated[str, option("Values of N, separated by commas.")] = "1,2,3,4,8,16,64,256",
    case: Annotated[str, option("mid (one window), windows (a long sequence in several), or both.")] = "mid,windows",
    providers: Annotated[
        str, option("What to measure; fla and flash-qla where installed.")
    ] = "ours,ours-chained,layer,fla,flash-qla",
    batch: Annotated[int | None, option("Sequences; like the other sizes, the case's own by default.")] = None,
    tokens: Annotated[int | None, option("Tokens per sequence.")] = None,
    heads: Annotated[int | None, option("Heads.")] = None,
    head_dim: Annotated[int | None, option("Key and value dim of a head.")] = None,
    window: Annotated[int | None, option("Tokens per window.")] = None,
    dtype: Annotated[
        str | None, option("float32, bfloat16 or float16; by default bfloat16 on CUDA, float32 on the CPU.")
    ] = None,
    max_chained: Annotated[int, option("Largest N of the providers that call a one-pass operator N times.")] = 16,
    repeats: Annotated[int | None, option("Timed repeats; 20 on CUDA, 5 on the CPU by default.")] = None,
    seconds: Seconds = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path, option("Folder for passes.csv and passes.png.")] = Path("runs/bench"),
) -> None:
    """Time and memory of N replay passes: ours, passes chained by hand, the layer, and other libraries."""
    console = Console()
    with refusals(console):
        from sleep_ops.bench.passes import PassesBenchmark
        from sleep_ops.bench.plot import plot_passes

        benchmark = PassesBenchmark(
            passes=integers("passes", passes),
            cases=tuple(case.split(",")),
            providers=tuple(providers.split(",")),
            batch=batch,
            tokens=tokens,
            heads=heads,
            head_dim=head_dim,
            window=window,
            dtype=dtype,
            max_chained=max_chained,
            repeats=repeats,
            seed=seed,
            device=device,
        )
        rows = _measure(console, benchmark, out / "passes.csv", seconds)
        plot_passes(rows, out / "passes.png")
    for name in dict.fromkeys(row["case"] for row in rows):
        console.print(_timings([row for row in rows if row["case"] == name]))
    console.print(f"wrote {out / 'passes.csv'} and {out / 'passes.png'}")


@bench_app.command("kernels")
def bench_kernels(
    case: Annotated[
        str, option("Sizes, by the model or shape they are of; small stand-ins on the CPU.")
    ] = "long,batch,mid,mid-replay,one-window,jet,depo,rule110",
    providers: Annotated[
        str, option("What to measure; fla and flash-qla where installed.")
    ] = "ours,torch,fla,flash-qla",
    sweep: Annotated[str | None, option("Vary each case's tokens, or its window (with at least 4 passes).")] = None,
    first_call: Annotated[
        bool, option("Also time our first call in a new process, with everything to compile.")
    ] = False,
    passes: Annotated[int | None, option("Replay passes; the case's own by default.")] = None,
    dtype: Annotated[
        str | None, option("float32, bfloat16 or float16; by default bfloat16 on CUDA, float32 on the CPU.")
    ] = None,
    repeats: Annotated[int | None, option("Timed repeats; 20 on CUDA, 5 on the CPU by default.")] = None,
    seconds: Seconds = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path, option("Folder for kernels.csv and kernels.png (kernels-SWEEP with a sweep).")] = Path(
        "runs/bench"
    ),
) -> None:
    """The operators on sizes of models: time, memory, and how near to what an H100 needs at the least."""
    console = Console()
    with refusals(console):
        from sleep_ops.bench.kernels import KernelsBenchmark
        from sleep_ops.bench.plot import plot_kernels

        benchmark = KernelsBenchmark(
            cases=tuple(case.split(",")),
            providers=tuple(providers.split(",")),
            sweep=sweep,
            first_call=first_call,
            passes=passes,
            dtype=dtype,
            repeats=repeats,
            seed=seed,
            device=device,
        )
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
def bench_train(
    preset: Annotated[
        str | None, option("rule110, depo, 1.4b, tiny; the first three on CUDA, tiny on the CPU by default.")
    ] = None,
    passes: Annotated[str, option("Values of N, separated by commas.")] = "1,2,4,8",
    window: Annotated[str | None, option("Values of L, separated by commas; each preset's own by default.")] = None,
    checkpointing: Annotated[str, option("Activation checkpointing: off, on, or both.")] = "off,on",
    providers: Annotated[str, option("What to measure; fla where installed.")] = "ours,fla",
    cuda_graph: Annotated[bool, option("Also with forward and backward as one recorded CUDA graph.")] = False,
    batch: Annotated[int | None, option("Sequences; the preset's own by default.")] = None,
    precision: Annotated[str, option("auto (bf16 on CUDA), bf16 or float32.")] = "auto",
    repeats: Annotated[int | None, option("Timed steps; 5 on CUDA, 3 on the CPU by default.")] = None,
    seconds: Seconds = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path, option("Folder for train.csv and train.png.")] = Path("runs/bench"),
) -> None:
    """A training step: tokens per second and peak memory against passes and window."""
    console = Console()
    with refusals(console):
        from sleep_ops.bench.plot import plot_training
        from sleep_ops.bench.training import TrainBenchmark

        benchmark = TrainBenchmark(
            presets=None if preset is None else tuple(preset.split(",")),
            passes=integers("passes", passes),
            windows=None if window is None else integers("windows", window),
            checkpointing=tuple(checkpointing.split(",")),
            providers=tuple(providers.split(",")),
            cuda_graph=cuda_graph,
            batch=batch,
            precision=precision,
            repeats=repeats,
            seed=seed,
            device=device,
        )
        rows = _measure(console, benchmark, out / "train.csv", seconds)
        plot_training(rows, out / "train.png")
    table = Table("preset", "provider", "mode", "checkpointing", "L", "N", "ms", "tokens/s", "peak MiB")
    for row in rows:
        memory = "" if row["peak_mib"] == "" else f"{row['peak_mib']:,.0f}"
        names = [str(row[key]) for key in ("preset", "provider", "mode", "checkpointing", "window", "passes")]
        table.add_row(*names, f"{row['ms_median']:.1f}", f"{row['tokens_per_second']:,.0f}", memory)
    console.print(table)
    console.print(f"wrote {out / 'train.csv'} and {out / 'train.png'}")


@bench_app.command("tune")
def bench_tune(
    case: Annotated[
        str, option("Cases of bench kernels, each of which stands for its head dims.")
    ] = "long,jet,rule110",
    chunks: Annotated[str, option("Lengths of a chunk to try, of 16, 32 and 64.")] = "16,32,64",
    kernels: Annotated[
        str, option("Kernels to vary: of long sequences the first four, of the shortest the last.")
    ] = "prepare,scan,reverse,grad,single_chunk",
    dtype: Annotated[str | None, option("float32, bfloat16 or float16; bfloat16 by default.")] = None,
    write: Annotated[bool, option("Put the best rows into kernels/launches.py.")] = False,
    repeats: Annotated[int, option("Timed repeats of every candidate.")] = 20,
    seconds: Seconds = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path, option("Folder for tune.csv.")] = Path("runs/bench"),
) -> None:
    """Launch settings of the chunk kernels, measured on the GPU at hand: minutes for each case and chunk."""
    console = Console()
    with refusals(console):
        from sleep_ops.bench.tune import TABLES, TuneBenchmark, check_writable, write_rows

        if write:
            check_writable()
        benchmark = TuneBenchmark(
            cases=tuple(case.split(",")),
            chunks=integers("chunks", chunks),
            kernels=tuple(kernels.split(",")),
            dtype=dtype,
            repeats=repeats,
            seed=seed,
            device=device,
        )
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
def bench_launches(
    case: Annotated[str, option("Cases of bench kernels.")] = "long,batch,mid,mid-replay,one-window,jet,depo,rule110",
    passes: Annotated[int | None, option("Replay passes; the case's own by default.")] = None,
    dtype: Annotated[str | None, option("float32, bfloat16 or float16; bfloat16 by default.")] = None,
    repeats: Annotated[int, option("Timed repeats of every launch.")] = 20,
    seconds: Seconds = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path, option("Folder for launches.csv and launches.png.")] = Path("runs/bench"),
) -> None:
    """Every kernel launch of a forward and backward timed alone, beside the call as a whole; needs a GPU."""
    console = Console()
    with refusals(console):
        from sleep_ops.bench.launches import LaunchesBenchmark
        from sleep_ops.bench.plot import plot_launches

        benchmark = LaunchesBenchmark(
            cases=tuple(case.split(",")), passes=passes, dtype=dtype, repeats=repeats, seed=seed, device=device
        )
        rows = _measure(console, benchmark, out / "launches.csv", seconds)
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
