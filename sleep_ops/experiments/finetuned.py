"""The figures that start from a checkpoint: GSM-Infinite problems in its own tokens, then one fine-tuning run per N."""

import json
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from sleep_ops.adapters.loading import model_type
from sleep_ops.bench.harness import environment
from sleep_ops.checks import check_count, expect
from sleep_ops.experiments.figures import PASSES, Figure
from sleep_ops.experiments.parallel import Ended, Outcome, Run, run_all, shares
from sleep_ops.experiments.sweep import (
    Results,
    check_alike,
    check_changes,
    check_going_on,
    each_seed,
    folder_name,
    reporter,
)
from sleep_ops.files import check_folder, write_atomically
from sleep_ops.model.config import SleepSettings
from sleep_ops.tasks import Task, Text
from sleep_ops.tasks.gsm_infinite.problem import Generator, write_jsonl
from sleep_ops.tokenizer import load_tokenizer
from sleep_ops.training.config import RECIPE, FinetuneConfig, RunConfig, TrainConfig, resolve_device
from sleep_ops.training.finetune import finetune
from sleep_ops.training.parallel import World, local_device

DATA = {"problems": 100000, "eval_problems": 2048, "lengths": [2000, 3300], "ops": [1, 8]}


def grouped(settings: dict[str, object]) -> dict[str, dict[str, object]]:
    """{"model": {...}, "train": {...}, "data": {...}} of settings named "part.field". ValueError for unknown ones."""
    known = {
        "model": {f.name for f in fields(SleepSettings)} | {"insert"},
        "train": {f.name for f in fields(TrainConfig)} | {"warm_steps"},
        "data": set(DATA),
    }
    found: dict[str, dict[str, object]] = {part: {} for part in known}
    for part, names in groupby(sorted(settings), key=lambda name: name.partition(".")[0]):
        expect(part in known, "set", f"{', '.join(known)} before the dot", part)
        for name in names:
            key = name.partition(".")[2]
            expect(key in known[part], name, f"one of {', '.join(sorted(known[part]))}", key)
            found[part][key] = settings[name]
    return found


def write_problems(
    folder: Path, checkpoint: Path, seed: int, data: dict, console: Console, *, resume: bool = True
) -> tuple[Path, Path]:
    """Training and evaluation problems as JSON lines, their lengths counted by the checkpoint's tokenizer.

    resume: keep those that are there already; ValueError where they are of other settings. They and what says so are
    replaced when new ones are whole.
    """
    counts = {split: data[name] for split, name in (("train", "problems"), ("eval", "eval_problems"))}
    for name in ("problems", "eval_problems"):
        check_count(f"data.{name}", data[name])
    settings = {"seed": seed, "checkpoint": str(checkpoint.resolve())} | data
    train, held_out = (folder / f"{split}.jsonl" for split in counts)
    about = folder / "settings.json"
    if resume and about.exists() and (train.exists() or held_out.exists()):
        known = _read_json(about)
        expected = f"{known}, which the problems in {folder} were made with (or another folder, or --fresh)"
        expect(known == settings, "data", expected, settings)
        if train.exists() and held_out.exists():
            return train, held_out
    tokenizer = load_tokenizer(str(checkpoint))

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    generator = Generator(data["ops"], data["lengths"], count)
    folder.mkdir(parents=True, exist_ok=True)
    written = {path: path.with_suffix(".partial") for path in (train, held_out)}
    try:
        for path, (split, number) in zip(written.values(), counts.items(), strict=True):
            numbers = track(range(number), description=f"writing problems: {split}", console=console)
            write_jsonl(path, (generator.problem(seed, i, split) for i in numbers))
        about.unlink(missing_ok=True)
        for path in written:
            os.replace(written[path], path)
    finally:
        for path in written.values():
            path.unlink(missing_ok=True)
    write_atomically(about, json.dumps(settings).encode() + b"\n")
    return train, held_out


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got a file that can't be read ({error})") from error


def finetune_run(
    config: FinetuneConfig, folder: Path, resume: bool, values: dict, task: Task | None, *, label: str, console: Console
) -> Outcome:
    """One run from where it stands to its end; its row begins with `values`. task: that of `config`, if it is built."""
    console.print(label)
    device = resolve_device(local_device(config.train.device))
    world = World.join(device)
    result = finetune(config, folder, resume=resume, task=task, console=console)
    row = values | environment(device)
    return Outcome(None if result is None else result.signal, result is not None, row if world.main else None)


def _phases(config: FinetuneConfig, folder: Path) -> list[tuple[RunConfig, Path]]:
    """What a run of `config` in `folder` keeps of its settings, and where."""
    return [(phase.run, phase.out) for phase in config.phases(folder)]


def sweep_finetuned(
    figure: Figure,
    size: str,
    out: Path,
    checkpoint: Path,
    *,
    seeds: Sequence[int] | None = None,
    changes: dict[str, object] | None = None,
    jobs: int | None = 1,
    resume: bool = True,
    console: Console | None = None,
) -> Ended:
    """Runs a "finetune" figure from the folder `checkpoint` in the folder `out`; tables, arguments, errors as `sweep`.

    All seeds read the same problems, which are those of the first, in an order of their own; inserted blocks begin with
    weights of their own.
    """
    expect(figure.kind == "finetune", "figure", "one of fine-tuning", figure.name)
    check_changes(figure, changes)
    by_seed = each_seed(seeds, changes)
    console, out = console or Console(markup=False), Path(out)
    chosen: dict = grouped(figure.set | by_seed[0][1])
    recipe = {name: value for name, value in chosen["train"].items() if name != "warm_steps"}
    train = replace(RECIPE, **recipe)
    device = resolve_device(local_device(train.device))
    world, data = World.join(device), DATA | chosen["data"]
    configs = []
    for named, changed in by_seed:
        seed: Any = changed.get("train.seed", train.seed)
        for point in figure.points():
            name, settings = folder_name(point, seed=named), chosen["model"] | {"passes": point[PASSES]}
            warm = chosen["train"].get("warm_steps", 0)
            config = FinetuneConfig(str(checkpoint), {}, settings, replace(train, seed=seed), warm)
            row = {"figure": figure.name, "preset": size, **point, "baseline": "", "seed": seed}
            configs.append((name, config, row | {"model": str(checkpoint)}))
    jobs, threads = shares(jobs, len(configs), device, world.size)
    check_folder("out", out)
    model_type(checkpoint)
    for name, config, _ in configs:
        config.phases(out / name)  # refused here rather than when there are problems
    paths = world.on_main(lambda: write_problems(out / "data", checkpoint, train.seed, data, console, resume=resume))
    task = Text(str(paths[0].resolve()), str(Path(checkpoint).resolve()), str(paths[1].resolve()), level="op")
    runs: list[Run] = []
    for number, (name, config, row) in enumerate(configs, 1):
        config = replace(config, task=task.to_dict())
        # A worker reads the problems itself: that is less than to send them.
        arguments = (config, out / name, resume, row, task if jobs == 1 else None)
        runs.append(Run(name, f"{figure.name} {number}/{len(configs)} {name}", finetune_run, arguments))
        if resume:
            check_going_on(_phases(config, out / name))
    if resume:
        check_alike(figure, out, partial(_phases, config))
    report = reporter(Results(figure, out, [run.name for run in runs], keep=resume))
    return run_all(runs, report, jobs=jobs, threads=threads, console=console, alone=world.size == 1)
