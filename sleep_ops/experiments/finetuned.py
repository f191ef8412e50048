"""The figures that start from a checkpoint: GSM-Infinite problems in its own tokens, then one fine-tuning run per N."""

import json
import os
from dataclasses import fields, replace
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.progress import track

from sleep_ops.bench.harness import environment
from sleep_ops.checks import check_count, expect
from sleep_ops.experiments.figures import Figure
from sleep_ops.experiments.sweep import Results, check_changes, folder_name
from sleep_ops.files import check_folder, write_atomically
from sleep_ops.model.config import SleepSettings
from sleep_ops.tasks import Text
from sleep_ops.tasks.gsm_infinite.problem import Generator, write_jsonl
from sleep_ops.tokenizer import load_tokenizer
from sleep_ops.training import TrainResult
from sleep_ops.training.config import RECIPE, FinetuneConfig, TrainConfig, resolve_device
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

    resume: keep files that are there already, which were written whole; ValueError where they are of other settings.
    """
    counts = {split: data[name] for split, name in (("train", "problems"), ("eval", "eval_problems"))}
    for name in ("problems", "eval_problems"):
        check_count(f"data.{name}", data[name])
    settings = {"seed": seed, "checkpoint": str(checkpoint.resolve())} | data
    paths, about = [folder / f"{split}.jsonl" for split in counts], folder / "settings.json"
    kept = resume and about.exists() and any(path.exists() for path in paths)
    if kept:
        known = json.loads(about.read_text(encoding="utf-8"))
        expected = f"{known}, which the problems in {folder} were made with (or another folder, or --fresh)"
        expect(known == settings, "data", expected, settings)
    tokenizer = load_tokenizer(str(checkpoint))

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    generator = Generator(data["ops"], data["lengths"], count)
    if not kept:
        for path in paths:
            path.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(about, json.dumps(settings).encode() + b"\n")
    for path, (split, number) in zip(paths, counts.items(), strict=True):
        if not path.exists():
            partial = path.with_suffix(".partial")
            numbers = track(range(number), description=f"writing problems: {split}", console=console)
            write_jsonl(partial, (generator.problem(seed, i, split) for i in numbers))
            os.replace(partial, path)
    return paths[0], paths[1]


def sweep_finetuned(
    figure: Figure,
    size: str,
    out: Path,
    checkpoint: Path,
    *,
    changes: dict[str, object] | None = None,
    resume: bool = True,
    console: Console | None = None,
) -> TrainResult | None:
    """Runs a "finetune" figure from the folder `checkpoint` in the folder `out`; after each run writes OUT/results.csv.

    Stopped, the same call goes on. Returns the result of a run that a signal stopped, else None. Raises ValueError for
    settings that can't be, and as `finetune` does.
    """
    expect(figure.kind == "finetune", "figure", "one of fine-tuning", figure.name)
    check_changes(figure, changes)
    check_folder("out", out)
    console, out, results = console or Console(), Path(out), Results(out, keep=resume)
    chosen: dict = grouped(figure.set | (changes or {}))
    recipe = {name: value for name, value in chosen["train"].items() if name != "warm_steps"}
    train = replace(RECIPE, **recipe)
    device = resolve_device(local_device(train.device))
    world, data = World.join(device), DATA | chosen["data"]
    paths = world.on_main(lambda: write_problems(out / "data", checkpoint, train.seed, data, console, resume=resume))
    task = Text(str(paths[0].resolve()), str(Path(checkpoint).resolve()), str(paths[1].resolve()), level="op")
    for point in figure.points():
        name = folder_name(point)
        settings = chosen["model"] | {"passes": point["model.passes"]}
        config = FinetuneConfig(str(checkpoint), task.to_dict(), settings, train, chosen["train"].get("warm_steps", 0))
        console.print(f"{figure.name}: {name}")
        result = finetune(config, out / name, resume=resume, task=task, console=console)
        if result is not None and result.signal is not None:
            return result
        if world.main:
            row = {"figure": figure.name, "preset": size, **point, "baseline": "", "model": str(checkpoint)}
            row |= environment(device)
            results.add(name, row, out / name / "full", trained=result is not None)
    return None
