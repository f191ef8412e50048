"""`sleep-ops finetune`: an existing checkpoint, taught to sleep."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sleep_ops.cli.common import (
    MODEL,
    RECIPE,
    RUN,
    TASK,
    BatchSize,
    CheckpointEvery,
    Decay,
    Device,
    EvalEvery,
    EvalSamples,
    FinalLr,
    GradClip,
    KeepCheckpoints,
    LrAdamW,
    LrMuon,
    MaxSkipped,
    MicroBatch,
    Momentum,
    Precision,
    Resume,
    Seed,
    Steps,
    Until,
    Warmup,
    WeightDecay,
    integers,
    named_values,
    option,
    parse_loop,
    parse_passes,
    print_evaluations,
    refusals,
    run_console,
)


def finetune(
    folder: Annotated[
        Path, typer.Argument(help="Checkpoint folder: Jet-Nemotron, Ouro, or a transformers model that can sleep.")
    ],
    task: Annotated[str, option("A task's name, or text: your own data.", TASK)],
    passes: Annotated[str, option("Passes per sleep, N; inf is for replay.", MODEL)],
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
    held_out: Annotated[
        float | None, option("Fraction of strings, or of lines without --eval-data, kept out of training.", TASK)
    ] = None,
    task_option: Annotated[
        list[str] | None, option("NAME=VALUE, for what has no option of its own here; can be repeated.", TASK)
    ] = None,
    window: Annotated[
        int | None, option("Tokens before eviction, L; by default the task's, or as remembered.", MODEL)
    ] = None,
    eviction: Annotated[str | None, option("hard or sliding, of the second phase.", MODEL)] = None,
    loop: Annotated[str | None, option("Looped layers: all, or FIRST:LAST; the model's own by default.", MODEL)] = None,
    sleep_kind: Annotated[str | None, option("refine or replay.", MODEL)] = None,
    sleep_on: Annotated[str | None, option("every or unlabelled.", MODEL)] = None,
    conv_boundary: Annotated[str | None, option("snapshot or zero.", MODEL)] = None,
    insert: Annotated[
        str | None, option("Layers, separated by commas, after which to insert fast weights.", MODEL)
    ] = None,
    activation_checkpointing: Annotated[
        bool | None, option("Recompute each (window, pass) in the backward.", MODEL)
    ] = None,
    steps: Steps = 1000,
    warm_steps: Annotated[
        int, option("Steps before those in which only the fast weights learn, with hard eviction.", RECIPE)
    ] = 0,
    batch: BatchSize = 256,
    lr_muon: LrMuon = 1e-3,
    lr_adamw: LrAdamW = 5e-5,
    weight_decay: WeightDecay = 1e-4,
    momentum: Momentum = 0.95,
    grad_clip: GradClip = 1.0,
    warmup: Warmup = 0.05,
    decay: Decay = 0.2,
    final_lr: FinalLr = 1e-3,
    precision: Precision = "auto",
    max_skipped: MaxSkipped = 10,
    micro_batch: MicroBatch = None,
    passes_schedule: Annotated[
        str, option("N of a step: fixed, random (1..N) or curriculum (rising).", RECIPE)
    ] = "fixed",
    curriculum: Annotated[float, option("Fraction of the steps over which a curriculum's N rises.", RECIPE)] = 0.5,
    stop_at: Annotated[
        float | None, option("End early once an evaluation reaches this value of the metric.", RUN)
    ] = None,
    patience: Annotated[int | None, option("End early after so many evaluations without a better one.", RUN)] = None,
    parallel: Annotated[str, option("Under torchrun: ddp, or fsdp (parameters sharded).", RUN)] = "ddp",
    seed: Seed = 0,
    device: Device = "auto",
    out: Annotated[Path, option("Folder for the runs and, in the end, the model.", RUN)] = Path("runs/finetune"),
    resume: Resume = True,
    checkpoint_every: CheckpointEvery = 200,
    keep_checkpoints: KeepCheckpoints = 2,
    eval_every: EvalEvery = 100,
    eval_samples: EvalSamples = 2048,
    until: Until = None,
) -> None:
    """Teach an existing checkpoint to sleep: OUT/model in the end, in the checkpoint's own layout and in float32.

    Stopped, the same command goes on. Settings of sleep that are not given are as the folder remembers them.
    """
    console = run_console()
    with refusals(Console()):
        from sleep_ops.training.finetune import FinetuneConfig
        from sleep_ops.training.finetune import finetune as run

        options = dict(t=t, strings=strings, bits=bits, boundary=boundary, held_out=held_out)
        options |= dict(data=data, eval_data=eval_data, seq_len=seq_len, overflow=overflow, end_token=end_token)
        built = _build_task(task, folder, options | named_values("task_option", task_option or []))
        settings = dict(
            window=built.window if window is None else window,
            passes=parse_passes(passes),
            loop=parse_loop(loop),
            eviction=eviction,
            sleep_kind=sleep_kind,
            sleep_on=sleep_on,
            conv_boundary=conv_boundary,
            activation_checkpointing=activation_checkpointing,
            insert=None if insert is None else integers("insert", insert),
        )
        train = replace(
            FinetuneConfig.train,
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
            micro_batch=micro_batch,
            passes_schedule=passes_schedule,
            curriculum=curriculum,
            stop_at=stop_at,
            patience=patience,
            parallel=parallel,
            eval_every=eval_every,
            eval_samples=eval_samples,
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
            device=device,
        )
        if until is not None and until < 1:
            raise ValueError(f"until: expected an integer >= 1, got {until}")
        config = FinetuneConfig(str(folder), built.to_dict(), settings, train, warm_steps)
        result = run(config, out, resume=resume, until=until, task=built, console=console)
    if result is None:
        reached = "finished" if (out / "model").exists() else f"past step {until}"
        console.print(f"{out}: already {reached}, nothing to do")
        return
    if result.signal is not None:
        console.print(f"stopped by signal {result.signal} at step {result.step}, saved; the same command goes on")
        raise typer.Exit(128 + result.signal)
    if result.evaluation:
        print_evaluations(console, built, [(passes, result.evaluation)])
    if result.finished and not (out / "model").exists():
        console.print(f"{out}: the fast weights are warm; the same command goes on with everything")


def _build_task(name: str, folder: Path, options: dict):
    """The task of these options; those not given are None."""
    from sleep_ops.tasks import TASKS

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
