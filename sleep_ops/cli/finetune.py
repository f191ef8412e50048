"""`sleep-ops finetune`: an existing checkpoint, taught to sleep."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sleep_ops.cli.common import named_values, print_evaluations, run_console
from sleep_ops.cli.options import (
    MODEL,
    RECIPE,
    RUN,
    TASK,
    Fields,
    Resume,
    Until,
    all_but,
    command,
    count_or_inf,
    integers,
    option,
)
from sleep_ops.model.config import SleepSettings
from sleep_ops.training.config import FinetuneConfig, TrainConfig
from sleep_ops.training.heap import keep_freed_memory

_SLEEP = all_but(SleepSettings, "passes", "attention_backend", "impl")
_LORA = ("lora", "lora_alpha", "lora_targets")
_RECIPE = all_but(TrainConfig, "trainable", "cuda_graph")


@command
def finetune(
    folder: Annotated[
        Path, typer.Argument(help="Checkpoint folder: Jet-Nemotron, Ouro, or a transformers model that can sleep.")
    ],
    task: Annotated[str, option("A task's name, or text: your own data.", TASK)],
    passes: Annotated[str, option("Passes per sleep, N; inf is for replay.", MODEL)],
    sleep: Annotated[dict, Fields(SleepSettings, _SLEEP, given=True, panel=MODEL)],
    phases: Annotated[dict, Fields(FinetuneConfig, ("warm_steps", *_LORA), panel=RECIPE)],
    recipe: Annotated[dict, Fields(FinetuneConfig.train, _RECIPE, panel=RECIPE)],
    t: Annotated[int | None, option("rule110: steps of the automaton.", TASK)] = None,
    strings: Annotated[int | None, option("rule110: strings per sequence.", TASK)] = None,
    bits: Annotated[int | None, option("rule110: bits per string.", TASK)] = None,
    boundary: Annotated[str | None, option("rule110: periodic or zero.", TASK)] = None,
    data: Annotated[
        Path | None, option('text: file of lines {"prompt": ..., "answer": ...} or {"text": ...}.', TASK)
    ] = None,
    eval_data: Annotated[Path | None, option("text: the same, to evaluate on.", TASK)] = None,
    seq_len: Annotated[int | None, option("text: tokens per row; the longest example's by default.", TASK)] = None,
    overflow: Annotated[
        str | None, option("text: a prompt that is too long is an error, or loses its oldest tokens (cut).", TASK)
    ] = None,
    end_token: Annotated[
        bool | None, option("text: whether the tokenizer's end token follows every answer and text.", TASK)
    ] = None,
    cache: Annotated[
        Path | None, option("text: folder for the tokens of files larger than memory; needs --seq-len.", TASK)
    ] = None,
    held_out: Annotated[
        float | None, option("Fraction of strings, or of lines without --eval-data, kept out of training.", TASK)
    ] = None,
    task_option: Annotated[
        list[str] | None, option("NAME=VALUE, for what has no option of its own here; can be repeated.", TASK)
    ] = None,
    insert: Annotated[
        str | None, option("Layers, separated by commas, after which to insert fast weights.", MODEL)
    ] = None,
    out: Annotated[Path, option("Folder for the runs and, in the end, the model.", RUN)] = Path("runs/finetune"),
    resume: Resume = True,
    until: Until = None,
) -> None:
    """Teach an existing checkpoint to sleep: OUT/model in the end, in the checkpoint's own layout and dtypes; with
    --lora OUT/adapter too, which is small.

    Stopped, the same command goes on. Settings of sleep that are not given are as the folder remembers them, but for
    the window of a task that has one.
    """
    from sleep_ops.training.finetune import finetune as run

    keep_freed_memory()
    if until is not None and until < 1:
        raise ValueError(f"until: expected an integer >= 1, got {until}")
    options = dict(t=t, strings=strings, bits=bits, boundary=boundary, held_out=held_out)
    options |= dict(data=data, eval_data=eval_data, seq_len=seq_len, overflow=overflow, end_token=end_token)
    options["cache"] = cache
    built = _build_task(task, folder, options | named_values("task_option", task_option or []))
    settings = {"window": built.window, "passes": count_or_inf("passes", passes)} | sleep
    if insert is not None:
        settings["insert"] = integers("insert", insert)
    config = FinetuneConfig(str(folder), built.to_dict(), settings, replace(FinetuneConfig.train, **recipe), **phases)
    console = run_console()
    result = run(config, out, resume=resume, until=until, task=built, console=console)
    if result is None:
        reached = "finished" if (out / "model").exists() else f"past step {until}"
        console.print(f"{out}: already {reached}, nothing to do")
        return
    if result.signal is not None and not (out / "model").exists():
        console.print(f"stopped by signal {result.signal} at step {result.step}, saved; the same command goes on")
        raise typer.Exit(128 + result.signal)
    if result.evaluation:
        print_evaluations(console, built, [(passes, result.evaluation)])
    if result.finished and not (out / "model").exists():
        console.print(f"{out}: the fast weights are warm; the same command goes on with everything")


def _build_task(name: str, folder: Path, options: dict):
    """The task of these options; those not given are None."""
    from sleep_ops.tasks import TASKS

    name = name.replace("-", "_")
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    given = {key: str(x.resolve()) if isinstance(x, Path) else x for key, x in options.items() if x is not None}
    known = inspect.signature(TASKS[name]).parameters
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{key}: expected no such option for the task {name}, got {value!r}")
    if name == "text":
        if "data" not in given:
            raise ValueError("data: expected a file for the task text, got none")
        given["tokenizer"] = str(folder.resolve())
    return TASKS[name](**given)
