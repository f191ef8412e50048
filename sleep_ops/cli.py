"""The command line: train, evaluate, demonstrate, measure.

Settings are checked before anything is written; a bad one is a message and exit code 2. Exit code 1 is a run that
failed, 128 + n one that signal n stopped (its checkpoint is saved).
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="sleep-ops",
    help="Sleep for language models: N passes over a window before it is evicted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(help="Train a hybrid model on a task.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure speed; every command writes a long-format CSV.", no_args_is_help=True)
app.add_typer(train_app, name="train")
app.add_typer(bench_app, name="bench")

Seed = Annotated[int, typer.Option(help="Random seed.")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:i.")]
Resume = Annotated[bool, typer.Option("--resume/--fresh", help="Go on with the run in the folder, or delete it first.")]


def option(help: str, panel: str | None = None, **kwargs):
    return typer.Option(help=help, rich_help_panel=panel, **kwargs)


@contextmanager
def _refusals(console: Console):
    """Bad settings become exit code 2, failed runs exit code 1, both with one plain line."""
    from sleep_ops.training import CheckpointError, TrainingDiverged

    try:
        yield
    except ValueError as error:
        console.print(f"[red]error[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except (CheckpointError, TrainingDiverged, OSError) as error:
        console.print(f"[red]failed[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name}: expected integers separated by commas, got {text!r}") from error


def _parse_passes(text: str) -> int | float:
    try:
        return math.inf if text == "inf" else int(text)
    except ValueError as error:
        raise ValueError(f"passes: expected an integer >= 1 or inf, got {text!r}") from error


def _parse_loads(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"loads: expected numbers separated by commas, got {text!r}") from error


def _parse_loop(text: str | None) -> tuple[int, int] | None:
    if text is None or text == "all":
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise ValueError(f"loop: expected all or FIRST:LAST (blocks, both included), got {text!r}")
    return int(first), int(last)


TASK, MODEL, RECIPE, RUN = "Task", "Model", "Recipe", "Run"


@train_app.command("rule110")
def train_rule110(
    t: Annotated[int, option("Steps of the automaton.", TASK)] = 8,
    strings: Annotated[int, option("Strings per sequence.", TASK)] = 4,
    bits: Annotated[int, option("Bits per string.", TASK)] = 24,
    boundary: Annotated[str, option("periodic or zero.", TASK)] = "periodic",
    held_out: Annotated[float, option("Fraction of all strings kept out of training, to evaluate on.", TASK)] = 0.0,
    width: Annotated[int, option("Hidden size.", MODEL)] = 256,
    heads: Annotated[int, option("Heads, of attention and of the fast weights.", MODEL)] = 4,
    head_dim: Annotated[int | None, option("Head dim; width / heads by default.", MODEL)] = None,
    layers: Annotated[str, option("Blocks, attn or gdn, joined by dashes.", MODEL)] = "attn-gdn-attn-gdn",
    passes: Annotated[str, option("Passes per sleep, N; 1 is the ordinary hybrid, inf is for replay.", MODEL)] = "4",
    window: Annotated[int | None, option("Tokens before eviction, L; the string length by default.", MODEL)] = None,
    eviction: Annotated[str, option("hard or sliding.", MODEL)] = "hard",
    loop: Annotated[str, option("Looped blocks: all, or FIRST:LAST, both included.", MODEL)] = "all",
    sleep_kind: Annotated[
        str, option("refine (Algorithm 1) or replay (the fast weights' writes alone, at a cost free of N).", MODEL)
    ] = "refine",
    sleep_on: Annotated[str, option("every (full window) or unlabelled (Algorithm 1 to the letter).", MODEL)] = "every",
    conv_boundary: Annotated[str, option("Convolution tail of later passes: snapshot or zero.", MODEL)] = "snapshot",
    rule: Annotated[str, option("delta or hebbian.", MODEL)] = "delta",
    neg_eigval: Annotated[bool, option("beta in (0, 2).", MODEL)] = False,
    init_std: Annotated[float | None, option("Of the weights; (3 width) ** -0.5 by default.", MODEL)] = None,
    activation_checkpointing: Annotated[bool, option("Recompute each (window, pass) in the backward.", MODEL)] = False,
    steps: Annotated[int, option("Optimiser steps.", RECIPE)] = 800,
    batch: Annotated[int, option("Sequences per step.", RECIPE)] = 512,
    lr_muon: Annotated[float, option("Peak learning rate of the weight matrices.", RECIPE)] = 2e-3,
    lr_adamw: Annotated[float, option("Peak learning rate of everything else.", RECIPE)] = 5e-5,
    weight_decay: Annotated[float, option("Decoupled, on matrices.", RECIPE)] = 1e-4,
    momentum: Annotated[float, option("Muon's.", RECIPE)] = 0.95,
    grad_clip: Annotated[float, option("Largest gradient norm.", RECIPE)] = 1.0,
    warmup: Annotated[float, option("Fraction of the steps spent warming up.", RECIPE)] = 0.05,
    decay: Annotated[float, option("Fraction of the steps spent decaying.", RECIPE)] = 0.2,
    final_lr: Annotated[float, option("Last learning rate, of the peak.", RECIPE)] = 1e-3,
    precision: Annotated[str, option("auto (bf16 on CUDA), bf16 or float32.", RECIPE)] = "auto",
    max_skipped: Annotated[int, option("Stop after this many steps in a row without a finite gradient.", RECIPE)] = 10,
    seed: Seed = 0,
    device: Device = "auto",
    cuda_graph: Annotated[bool, option("Record a step once and launch it as one, on CUDA.", RUN)] = False,
    out: Annotated[Path, option("Run folder.", RUN)] = Path("runs/rule110"),
    resume: Resume = True,
    checkpoint_every: Annotated[int, option("Steps between checkpoints (0: only the last).", RUN)] = 200,
    keep_checkpoints: Annotated[int, option("Newest checkpoints kept.", RUN)] = 2,
    eval_every: Annotated[int, option("Steps between evaluations (0: only the last).", RUN)] = 100,
    eval_samples: Annotated[int, option("Sequences per evaluation.", RUN)] = 2048,
    until: Annotated[
        int | None, option("Stop (and save) at this step; the schedule stays that of --steps.", RUN)
    ] = None,
) -> None:
    """Rule 110: the first bit of each evicted string after t steps of the automaton."""
    console = Console()
    with _refusals(console):
        from sleep_ops.model import HybridConfig
        from sleep_ops.tasks import Rule110
        from sleep_ops.training import RunConfig, TrainConfig, Trainer

        task = Rule110(t=t, strings=strings, bits=bits, boundary=boundary, held_out=held_out)
        if init_std is not None and not 0 < init_std < 10:
            raise ValueError(f"init_std: expected a number in (0, 10), got {init_std}")
        model = HybridConfig(
            vocab_size=task.vocab_size,
            hidden_size=width,
            num_heads=heads,
            head_dim=head_dim,
            layers=tuple(layers.split("-")),
            window=task.window if window is None else window,
            passes=_parse_passes(passes),
            loop=_parse_loop(loop),
            sleep_kind=sleep_kind,
            eviction=eviction,
            sleep_on=sleep_on,
            conv_boundary=conv_boundary,
            rule=rule,
            allow_neg_eigval=neg_eigval,
            initializer_range=(3 * max(width, 1)) ** -0.5 if init_std is None else init_std,
            activation_checkpointing=activation_checkpointing,
        )
        recipe = TrainConfig(
            steps=steps,
            batch_size=batch,
            seed=seed,
            lr_muon=lr_muon,
            lr_adamw=lr_adamw,
            weight_decay=weight_decay,
            momentum=momentum,
            grad_clip=grad_clip,
            warmup=warmup,
            decay=decay,
            final_lr=final_lr,
            precision=precision,
            max_skipped=max_skipped,
            eval_every=eval_every,
            eval_samples=eval_samples,
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
            device=device,
            cuda_graph=cuda_graph,
        )
        if until is not None and until < 1:
            raise ValueError(f"until: expected an integer >= 1, got {until}")
        config = RunConfig(task.to_dict(), model.to_dict(), recipe)
        trainer = Trainer(config, out, resume=resume, label=f"rule110 N={passes}", console=console)
        if trainer.step and trainer.step >= min(until or steps, steps):
            console.print(f"{out}: already at step {trainer.step}, nothing to do")
            return
        if trainer.step:
            console.print(f"{out}: going on from step {trainer.step}")
        result = trainer.fit(until)
    if result.signal is not None:
        console.print(f"stopped by signal {result.signal} at step {result.step}, saved; the same command goes on")
        raise typer.Exit(128 + result.signal)
    if result.evaluation:
        _print_evaluations(console, task, [(model.passes, result.evaluation)])
    state = "finished" if result.finished else f"at step {result.step} of {steps}"
    console.print(f"{out}: {state}, {result.seconds:.0f} s of training, {result.skipped} steps skipped")


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder, as written by train.")],
    passes: Annotated[
        str | None, option("N, or several separated by commas (inf with replay); the run's own by default.")
    ] = None,
    samples: Annotated[int, option("Sequences.")] = 8192,
    batch: Annotated[int, option("Sequences per batch.")] = 512,
    seed: Annotated[int, option("Seed of the evaluation sequences, drawn apart from the training ones.")] = 1,
    device: Device = "auto",
    out: Annotated[Path | None, option("CSV file (not a folder) to write the table to.")] = None,
) -> None:
    """Accuracy of a saved run on fresh sequences, of held-out strings if it has any, with any number of passes."""
    console = Console()
    with _refusals(console):
        from sleep_ops.training import load_run
        from sleep_ops.training.logs import write_csv
        from sleep_ops.training.trainer import autocast

        chosen = None if passes is None else tuple(map(_parse_passes, passes.split(",")))
        if chosen is not None and min(chosen) < 1:
            raise ValueError(f"passes: expected integers >= 1, got {passes!r}")
        if samples < 1 or batch < 1 or seed < 0:
            raise ValueError(f"samples, batch, seed: expected >= 1, >= 1, >= 0, got {samples}, {batch}, {seed}")
        if out is not None and out.is_dir():
            raise ValueError(f"out: expected a CSV file, got the folder {out}")
        config, task, model, step = load_run(run, device=device, warn=console.print)
        chosen = (model.config.passes,) if chosen is None else chosen
        where = next(model.parameters()).device
        found = []
        for n in chosen:
            with autocast(config.train.precision, where):
                result = task.evaluate(model, samples=samples, batch_size=batch, seed=seed, passes=n, device=where)
            found.append((n, result))
        console.print(f"{run}: {task.to_dict()}, trained with N={model.config.passes} to step {step}", highlight=False)
        _print_evaluations(console, task, found)
        if out is not None:
            write_csv(out, [{"run": str(run), "step": step, "passes": n, "seed": seed, **r} for n, r in found])


@app.command()
def demo(
    passes: Annotated[str | None, option("Values of N, separated by commas; 1,2 on the CPU, 1,4 on CUDA.")] = None,
    steps: Annotated[int | None, option("Optimiser steps for each N; set for the machine by default.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path | None, option("Folder; runs/demo-cpu or runs/demo-cuda by default.")] = None,
    resume: Resume = True,
) -> None:
    """Recall against N without training; then train the same hybrid with N = 1 and larger N on the same Rule 110 data.

    Tables, CSV files, figures and checkpoints.
    """
    console = Console()
    with _refusals(console):
        from sleep_ops.demo import choose_scale, run_demo

        chosen = None if passes is None else _integers("passes", passes)
        scale = choose_scale(device, seed, chosen, steps)
        kind = scale.train.device.partition(":")[0]
        stopped = run_demo(scale, out or Path("runs") / f"demo-{kind}", resume=resume, console=console)
    if stopped is not None:
        raise typer.Exit(128 + stopped)


@app.command()
def recall(
    loads: Annotated[str, option("Pairs per key dim, n/K, separated by commas.")] = "0.5,0.75,0.9,1,1.25",
    passes: Annotated[
        str, option("Values of N, separated by commas; infinity is added.")
    ] = "1,2,4,8,16,32,64,128,256,512,1024",
    key_dim: Annotated[int, option("Key dim of the memory, K.")] = 64,
    value_dim: Annotated[int, option("Value dim of the memory, V.")] = 32,
    codewords: Annotated[int, option("What a value can be: one of so many random vectors.")] = 1024,
    memories: Annotated[int, option("Memories averaged over.")] = 32,
    beta: Annotated[float, option("Write strength, in (0, 2).")] = 1.0,
    decay: Annotated[float, option("Of the state at each token, as minus its log.")] = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path, option("Folder for recall.csv and recall.png.")] = Path("runs/recall"),
) -> None:
    """What replay does for a memory, without training: recall of key/value pairs after N passes over them."""
    console = Console()
    with _refusals(console):
        from sleep_ops.recall import RecallExperiment, plot, table
        from sleep_ops.training.logs import write_csv

        experiment = RecallExperiment(
            loads=_parse_loads(loads),
            passes=_integers("passes", passes),
            key_dim=key_dim,
            value_dim=value_dim,
            codewords=codewords,
            memories=memories,
            beta=beta,
            decay=decay,
            seed=seed,
            device=device,
        )
        if out.exists() and not out.is_dir():
            raise ValueError(f"out: expected a folder, got the file {out}")
        rows = experiment.run()
        write_csv(out / "recall.csv", rows)
        plot(rows, out / "recall.png")
    console.print(table(rows, "wrong"))
    console.print(table(rows, "error"))
    console.print(f"wrote {out / 'recall.csv'} and {out / 'recall.png'}")


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
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path, option("Folder for passes.csv and passes.png.")] = Path("runs/bench"),
) -> None:
    """Time and memory of N replay passes: ours, passes chained by hand, the layer, and other libraries."""
    console = Console()
    with _refusals(console):
        from sleep_ops.bench.passes import PassesBenchmark
        from sleep_ops.bench.plot import plot_passes

        benchmark = PassesBenchmark(
            passes=_integers("passes", passes),
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
        rows = _measure(console, benchmark, out / "passes.csv")
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
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path, option("Folder for kernels.csv and kernels.png (kernels-SWEEP with a sweep).")] = Path(
        "runs/bench"
    ),
) -> None:
    """The operators on sizes of models: time, memory, and how near to what an H100 needs at the least."""
    console = Console()
    with _refusals(console):
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
        rows = _measure(console, benchmark, out / f"{name}.csv")
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
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path, option("Folder for train.csv and train.png.")] = Path("runs/bench"),
) -> None:
    """A training step: tokens per second and peak memory against passes and window."""
    console = Console()
    with _refusals(console):
        from sleep_ops.bench.plot import plot_training
        from sleep_ops.bench.training import TrainBenchmark

        benchmark = TrainBenchmark(
            presets=None if preset is None else tuple(preset.split(",")),
            passes=_integers("passes", passes),
            windows=None if window is None else _integers("windows", window),
            checkpointing=tuple(checkpointing.split(",")),
            providers=tuple(providers.split(",")),
            cuda_graph=cuda_graph,
            batch=batch,
            precision=precision,
            repeats=repeats,
            seed=seed,
            device=device,
        )
        rows = _measure(console, benchmark, out / "train.csv")
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
    ] = "prepare,scan,reverse,grad,window",
    dtype: Annotated[str | None, option("float32, bfloat16 or float16; bfloat16 by default.")] = None,
    write: Annotated[bool, option("Put the best rows into kernels/launches.py.")] = False,
    repeats: Annotated[int, option("Timed repeats of every candidate.")] = 20,
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path, option("Folder for tune.csv.")] = Path("runs/bench"),
) -> None:
    """Launch settings of the chunk kernels, measured on the GPU at hand: minutes for each case and chunk."""
    console = Console()
    with _refusals(console):
        from sleep_ops.bench.tune import TABLES, TuneBenchmark, write_rows

        benchmark = TuneBenchmark(
            cases=tuple(case.split(",")),
            chunks=_integers("chunks", chunks),
            kernels=tuple(kernels.split(",")),
            dtype=dtype,
            repeats=repeats,
            seed=seed,
            device=device,
        )
        _measure(console, benchmark, out / "tune.csv")
        table = Table("width", "K", "V", "GPU", "kernel", "value columns, warps, stages")
        for (name, key), (tokens, *launches) in benchmark.found.items():
            for kernel, launch in zip(("tokens", *TABLES[name]), (tokens, *launches), strict=True):
                table.add_row(*map(str, key), kernel, str(launch))
        console.print(table)
        if write and benchmark.found:
            console.print(f"wrote {write_rows(benchmark.found)}", soft_wrap=True)
    console.print(f"wrote {out / 'tune.csv'}", soft_wrap=True)


def _measure(console: Console, benchmark, path: Path) -> list[dict]:
    """The rows of a benchmark, written to `path` after every step: whole however the command ends."""
    from rich.progress import Progress

    from sleep_ops.training.logs import write_csv

    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"out: expected a folder, got the file {path.parent}")
    rows = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=benchmark.steps)

        def note(text: str) -> None:
            bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

        for found in benchmark.run(note, lambda label: bar.update(task, description=label)):
            rows += found
            if found:
                write_csv(path, rows)
            bar.advance(task)
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


def _print_evaluations(console: Console, task, found: list[tuple[int | float, dict]]) -> None:
    title, chance = "held-out strings" if task.held_out else "fresh sequences", task.chance()
    table = Table("N", "exact", "+/-", "per label", "loss", "sequences", title=f"accuracy on {title}")
    percent: Callable[[float], str] = "{:.2%}".format
    for n, r in found:
        cells = (percent(r["exact"]), percent(r["exact_stderr"]), percent(r["per_label"]), f"{r['loss']:.4f}")
        table.add_row(str(n), *cells, f"{r['samples']:.0f}")
    table.add_row("chance", percent(chance["majority"]), "", percent(max(chance["ones"], 1 - chance["ones"])), "", "")
    console.print(table)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
