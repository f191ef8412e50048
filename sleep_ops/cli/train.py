"""`sleep-ops train`: a hybrid model from scratch, one command for each task, from a preset and what is set otherwise.

The commands are made from the tasks' own fields, so that a task's options and their help are its docstring's.
"""

import functools
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from sleep_ops.cli.common import (
    MODEL,
    RECIPE,
    RUN,
    TASK,
    Resume,
    Until,
    option,
    parse_loop,
    parse_passes,
    refusals,
    run_console,
)


class TaskCommands(typer.core.TyperGroup):
    """One command for each task with a preset, made when it is asked for: tasks need PyTorch, other help does not."""

    def list_commands(self, ctx):
        return list(task_commands())

    def get_command(self, ctx, cmd_name):
        return task_commands().get(cmd_name)


train_app = typer.Typer(cls=TaskCommands, help="Train a hybrid model on a task.", no_args_is_help=True)

# Option, type, field it sets, help; None leaves the preset's value. Task options come from the tasks themselves.
_SETTINGS = [
    ("layers", str, "model.layers", "Blocks, such as attn-gdn-attn-gdn."),
    ("width", int, "model.hidden_size", "Hidden size."),
    ("heads", int, "model.num_heads", "Heads, of attention and of the fast weights."),
    ("head_dim", int, "model.head_dim", "Head dim; width / heads by default."),
    ("head_v_dim", int, "model.gdn_head_v_dim", "Value head dim of the fast weights; the head dim by default."),
    ("window", int, "model.window", "Tokens before eviction, L; the task's own by default."),
    ("eviction", str, "model.eviction", "hard or sliding."),
    ("sleep_kind", str, "model.sleep_kind", "refine (Algorithm 1) or replay (the writes alone, at a cost free of N)."),
    ("sleep_on", str, "model.sleep_on", "every (full window) or unlabelled (Algorithm 1 to the letter)."),
    ("conv_boundary", str, "model.conv_boundary", "Convolution tail of later passes: snapshot or zero."),
    ("backprop_passes", int, "model.backprop_passes", "Gradients through the last so many passes of a sleep; all."),
    ("loop_gate", bool, "model.loop_gate", "A gate per channel on the loop's residual, starting closed."),
    ("reinject", bool, "model.reinject", "Add what the loop was fed awake to what every later pass is fed."),
    ("rule", str, "model.rule", "delta or hebbian."),
    ("neg_eigval", bool, "model.allow_neg_eigval", "beta in (0, 2)."),
    ("init_std", float, "model.initializer_range", "Of the weights; (3 width) ** -0.5 by default."),
    ("activation_checkpointing", bool, "model.activation_checkpointing", "Recompute each (window, pass) backward."),
    (
        "steps",
        int,
        "train.steps",
        "Optimiser steps; a finished run goes on with more, whose schedule is that of their new number.",
    ),
    ("batch", int, "train.batch_size", "Sequences per step."),
    ("micro_batch", int, "train.micro_batch", "Sequences per forward and backward; a whole batch by default."),
    ("lr_muon", float, "train.lr_muon", "Peak learning rate of the weight matrices."),
    ("lr_adamw", float, "train.lr_adamw", "Peak learning rate of everything else."),
    ("weight_decay", float, "train.weight_decay", "Decoupled, on matrices."),
    ("momentum", float, "train.momentum", "Muon's."),
    ("grad_clip", float, "train.grad_clip", "Largest gradient norm."),
    ("warmup", float, "train.warmup", "Fraction of the steps spent warming up."),
    ("decay", float, "train.decay", "Fraction of the steps spent decaying."),
    ("final_lr", float, "train.final_lr", "Last learning rate, of the peak."),
    ("precision", str, "train.precision", "auto (bf16 on CUDA), bf16 or float32."),
    ("max_skipped", int, "train.max_skipped", "Stop after so many steps in a row without a finite gradient."),
    (
        "passes_schedule",
        str,
        "train.passes_schedule",
        "N of a step: fixed, random (1..N) or curriculum (rising).",
    ),
    ("curriculum", float, "train.curriculum", "Fraction of the steps over which a curriculum's N rises."),
    ("stop_at", float, "train.stop_at", "End early once an evaluation reaches this value of the task's metric."),
    ("patience", int, "train.patience", "End early after so many evaluations in a row without a better one."),
    ("parallel", str, "train.parallel", "Under torchrun: ddp, or fsdp (parameters sharded)."),
    ("trainable", str, "train.trainable", "all, or fast_weights: the GDN mixers alone."),
    ("seed", int, "train.seed", "Random seed."),
    ("device", str, "train.device", "auto (CUDA where there is one), cpu, cuda or cuda:i."),
    ("cuda_graph", bool, "train.cuda_graph", "Record a step once and launch it as one; CUDA alone."),
    ("checkpoint_every", int, "train.checkpoint_every", "Steps between checkpoints (0: only the last)."),
    ("keep_checkpoints", int, "train.keep_checkpoints", "Newest checkpoints kept."),
    ("eval_every", int, "train.eval_every", "Steps between evaluations (0: only the last)."),
    ("eval_samples", int, "train.eval_samples", "Sequences per evaluation."),
]
_RUN_SETTINGS = ("seed", "device", "cuda_graph", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_samples")


def task_help(task: type) -> dict[str, str]:
    """What a task's docstring says of its fields: lines "name, name   text", which may run on indented."""
    text: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.getdoc(task).splitlines():
        if found := re.match(r"(\w+(?:, \w+)*) {2,}(\S.*)", line):
            names = found[1].split(", ")
            text |= {name: found[2] for name in names}
        elif names and line.startswith("  "):
            text |= {name: f"{text[name]} {line.strip()}" for name in names}
        else:
            names = []
    return text


def _parameters(task: type) -> list[inspect.Parameter]:
    """The options of a task's command."""
    made = []

    def add(name: str, kind: Any, help: str, panel: str, default: Any = None) -> None:
        annotation = Annotated[kind, option(help, panel)]
        made.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))

    add("preset", str, "paper, small or tiny: what the other options leave open.", RUN, "paper")
    add(
        "baseline",
        str | None,
        "Instead of N passes: depth, loop, repeat, state or full (docs/command-line.md).",
        RUN,
    )
    add("passes", str | None, "Passes per sleep, N; 1 is the ordinary hybrid, inf is for replay.", MODEL)
    hints, help = get_type_hints(task), task_help(task)
    own = {name for name, *_ in _SETTINGS}
    for field in fields(task):
        if field.name not in own:
            add(field.name, hints[field.name] | None, help.get(field.name, ""), TASK)
    add("loop", str | None, "Looped blocks: all, or FIRST:LAST, both included.", MODEL)
    for name, kind, place, text in _SETTINGS:
        panel = RUN if name in _RUN_SETTINGS else {"model": MODEL, "train": RECIPE}[place.partition(".")[0]]
        add(name, kind | None, text, panel)
    add("out", Path | None, "Run folder; runs/TASK by default.", RUN)
    for name, annotation, default in (("resume", Resume, True), ("until", Until, None)):
        kind = inspect.Parameter.KEYWORD_ONLY
        made.append(inspect.Parameter(name, kind, default=default, annotation=annotation))
    return made


def train(task: str, given: dict[str, Any]) -> None:
    """Trains `task` with the options of its command."""
    console = run_console()
    with refusals(Console()):
        from sleep_ops.experiments.presets import preset, run_config, set_value
        from sleep_ops.model.hybrid import HybridConfig
        from sleep_ops.tasks import TASKS, build_task
        from sleep_ops.training import Trainer

        settings = preset(task, given["preset"])
        settings["task"]["name"] = task
        places = {name: place for name, _, place, _ in _SETTINGS}
        places |= {field.name: f"task.{field.name}" for field in fields(TASKS[task]) if field.name not in places}
        for name, place in places.items():
            if given[name] is not None:
                set_value(settings, place, given[name])
        if given["passes"] is not None:
            settings["model"]["passes"] = parse_passes(given["passes"])
        if given["loop"] is not None:
            settings["model"]["loop"] = parse_loop(given["loop"])
        std, until, out = given["init_std"], given["until"], given["out"] or Path("runs") / task
        if std is not None and not 0 < std < 10:
            raise ValueError(f"init_std: expected a number in (0, 10), got {std}")
        if until is not None and until < 1:
            raise ValueError(f"until: expected an integer >= 1, got {until}")
        config = run_config(task, settings, given["baseline"])
        passes, steps = HybridConfig.from_dict(config.model).passes, config.train.steps
        label = f"{task} {given['baseline'] or f'N={passes}'}"
        trainer = Trainer(config, out, resume=given["resume"], extend=True, label=label, console=console)
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
            from sleep_ops.cli.common import print_evaluations

            print_evaluations(console, build_task(config.task), [(passes, result.evaluation)])
        state = "finished" if result.finished else f"at step {result.step} of {steps}"
        console.print(f"{out}: {state}, {result.seconds:.0f} s of training, {result.skipped} steps skipped")


def _command(name: str, task: type):
    def command(**given) -> None:
        train(name, given)

    parameters = _parameters(task)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = inspect.getdoc(inspect.getmodule(task)).splitlines()[0]
    return command


@functools.cache
def task_commands() -> dict:
    """The commands by name."""
    from importlib.resources import files

    from sleep_ops.tasks import TASKS

    presets, app = files("sleep_ops.experiments") / "presets", typer.Typer()
    for name, task in TASKS.items():
        if (presets / f"{name}.toml").is_file():
            app.command(name.replace("_", "-"))(_command(name, task))
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]
