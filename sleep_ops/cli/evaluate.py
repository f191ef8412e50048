"""What needs no training of one's own, or comes after it: `sleep-ops eval`, `probe`, `demo` and `recall`."""

from pathlib import Path
from typing import Annotated

import typer

from sleep_ops.cli.common import exit_with, print_evaluations, run_console
from sleep_ops.cli.options import (
    Device,
    Fields,
    Jobs,
    OneSeed,
    Resume,
    Seeds,
    command,
    count_or_inf,
    integers,
    option,
    seeds_of,
)
from sleep_ops.experiments.settings import RecallSettings
from sleep_ops.training.heap import keep_freed_memory


@command
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
    console = run_console()
    from sleep_ops.checks import check_distinct
    from sleep_ops.files import check_file, write_csv
    from sleep_ops.model.sleeping import sleeping
    from sleep_ops.training import load_run
    from sleep_ops.training.run import autocast

    chosen = None if passes is None else tuple(count_or_inf("passes", text) for text in passes.split(","))
    if chosen is not None and min(chosen) < 1:
        raise ValueError(f"passes: expected integers >= 1, got {passes!r}")
    check_distinct("passes", chosen or ())
    if samples < 1 or batch < 1 or seed < 0:
        raise ValueError(f"samples, batch, seed: expected >= 1, >= 1, >= 0, got {samples}, {batch}, {seed}")
    if out is not None:
        check_file("out", out, "CSV")
    config, task, model, step = load_run(run, device=device, warn=console.print)
    trained = sleeping(model).settings.passes
    chosen = (trained,) if chosen is None else chosen
    where = next(model.parameters()).device
    found = []
    for n in chosen:
        with autocast(config.train.precision, where):
            result = task.evaluate(model, samples=samples, batch_size=batch, seed=seed, passes=n, device=where)
        found.append((n, result))
    console.print(f"{run}: {task.to_dict()}, trained with N={trained} to step {step}", highlight=False)
    print_evaluations(console, task, found)
    if out is not None:
        write_csv(out, [{"run": str(run), "step": step, "passes": n, "seed": seed, **r} for n, r in found])


@command
def probe(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of Rule 110, as written by train or sweep.")],
    passes: Annotated[str | None, option("N, or several separated by commas; 1 to the run's own by default.")] = None,
    fitted: Annotated[int, option("Strings that a probe is fitted on.")] = 256,
    judged: Annotated[int, option("Strings that it is judged on.")] = 4096,
    seed: Annotated[int, option("Seed of the strings.")] = 1,
    device: Device = "auto",
    out: Annotated[Path, option("Folder for probe.csv and probe.png.")] = Path("runs/probe"),
) -> None:
    """What the fast weights hold after each pass: linear probes for the automaton's rows between string and answer.

    Beside them the same for the string itself, and for the model before it was trained.
    """
    console = run_console()
    from rich.progress import track

    from sleep_ops.checks import check_count, check_distinct
    from sleep_ops.experiments.probe import TRAINED, UNTRAINED, plot, table
    from sleep_ops.experiments.probe import probe as probe_models
    from sleep_ops.files import check_folder, write_csv
    from sleep_ops.model.sleeping import sleeping
    from sleep_ops.training import load_run
    from sleep_ops.training.run import build_model

    chosen = None if passes is None else integers("passes", passes)
    check_distinct("passes", chosen or ())
    check_distinct("runs", [run.resolve() for run in runs])
    check_folder("out", out)
    rows = []
    for run in track(runs, "probing", console=console, transient=True):
        config, task, model, step = load_run(run, device=device, warn=console.print)
        trained = sleeping(model.eval())
        before = build_model(config).to(next(model.parameters()).device).eval()
        check_count("passes", most := trained.settings.passes if chosen is None else max(chosen))
        counts = chosen or range(1, int(most) + 1)
        models = {UNTRAINED: sleeping(before), TRAINED: trained}
        found = probe_models(models, task, passes=counts, fitted=fitted, judged=judged, seed=seed)
        rows += [{"run": str(run), "trained_steps": step, **row} for row in found]
    write_csv(out / "probe.csv", rows)
    plot(rows, out / "probe.png")
    console.print(table(rows))
    console.print(f"wrote {out / 'probe.csv'} and {out / 'probe.png'}", soft_wrap=True)


@command
def demo(
    passes: Annotated[str | None, option("Values of N, separated by commas; 1,2,4 on the CPU, 1,4 on CUDA.")] = None,
    steps: Annotated[int | None, option("Optimiser steps for each N; set for the machine by default.")] = None,
    seed: OneSeed = None,
    seeds: Seeds = None,
    jobs: Jobs = None,
    device: Device = "auto",
    out: Annotated[Path | None, option("Folder; runs/demo-cpu or runs/demo-cuda by default.")] = None,
    resume: Resume = True,
) -> None:
    """Recall against N without training; then train the same hybrid with N = 1 and larger N on the same Rule 110 data.

    Tables, CSV files, figures and checkpoints.
    """
    console = run_console()
    from sleep_ops.experiments.demo import choose_scale, run_demo

    keep_freed_memory()
    chosen = None if passes is None else integers("passes", passes)
    chosen_seeds = seeds_of(seed, seeds)
    scale = choose_scale(device, chosen_seeds[0], chosen, steps)
    place = out or Path("runs") / f"demo-{scale.train.device.partition(':')[0]}"
    ended = run_demo(scale, place, seeds=chosen_seeds, jobs=jobs, resume=resume, console=console)
    if ended.signal is not None:
        raise typer.Exit(128 + ended.signal)
    exit_with(console, ended.failed)


@command
def recall(
    settings: Annotated[dict, Fields(RecallSettings)],
    out: Annotated[Path, option("Folder for recall.csv and recall.png.")] = Path("runs/recall"),
) -> None:
    """What replay does for a memory, without training: recall of key/value pairs after N passes over them."""
    from sleep_ops.experiments.recall import RecallExperiment, plot, table
    from sleep_ops.files import check_folder, write_csv

    console, experiment = run_console(), RecallExperiment(**settings)
    check_folder("out", out)
    rows = experiment.run()
    write_csv(out / "recall.csv", rows)
    plot(rows, out / "recall.png")
    console.print(table(rows, "wrong"))
    console.print(table(rows, "error"))
    console.print(f"wrote {out / 'recall.csv'} and {out / 'recall.png'}")
