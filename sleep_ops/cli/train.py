"""`sleep-ops train`: a hybrid model from scratch, one command a task, from a preset and what is set otherwise."""

import functools
import inspect
from pathlib import Path
from typing import Annotated

import typer

from sleep_ops.cli.common import print_evaluations, run_console
from sleep_ops.cli.options import MODEL, RECIPE, RUN, TASK, Fields, Resume, Until, all_but, command, option
from sleep_ops.model.config import HybridConfig
from sleep_ops.training.config import TrainConfig
from sleep_ops.training.heap import keep_freed_memory


class TaskCommands(typer.core.TyperGroup):
    """One command for each task with a preset, made when it is asked for: tasks need PyTorch, other help does not."""

    def list_commands(self, ctx):
        return list(task_commands())

    def get_command(self, ctx, cmd_name):
        return task_commands().get(cmd_name)


train_app = typer.Typer(cls=TaskCommands, help="Train a hybrid model on a task.", no_args_is_help=True)

# The model's fields that have an option; the others are the presets' and the figures' alone.
MODEL_FIELDS = (
    *("layers", "hidden_size", "num_heads", "head_dim", "gdn_head_v_dim", "window", "passes", "loop", "eviction"),
    *("sleep_kind", "sleep_on", "conv_boundary", "backprop_passes", "loop_gate", "reinject", "rule"),
    *("allow_neg_eigval", "initializer_range", "windows_at_once", "activation_checkpointing", "recompute"),
)


def _command(name: str, task: type):
    own = all_but(task, *MODEL_FIELDS, *all_but(TrainConfig))

    def train(
        chosen: Annotated[dict, Fields(task, own, given=True, panel=TASK)],
        model: Annotated[dict, Fields(HybridConfig, MODEL_FIELDS, given=True, panel=MODEL)],
        recipe: Annotated[dict, Fields(TrainConfig, given=True, panel=RECIPE)],
        preset: Annotated[str, option("paper, small or tiny: what the other options leave open.", RUN)] = "paper",
        baseline: Annotated[
            str | None, option("Instead of N passes: depth, loop, repeat, state or full (docs/command-line.md).", RUN)
        ] = None,
        out: Annotated[Path, option("Run folder.", RUN)] = Path("runs") / name,
        resume: Resume = True,
        until: Until = None,
    ) -> None:
        given = {"task": chosen, "model": model, "train": recipe}
        _train(name, preset, given, baseline, out, resume=resume, until=until)

    train.__doc__ = inspect.getdoc(inspect.getmodule(task)).splitlines()[0]
    return command(train)


def _train(
    task: str, size: str, given: dict[str, dict], baseline: str | None, out: Path, *, resume: bool, until: int | None
) -> None:
    """Trains `task` with a preset's settings and those that are given."""
    from sleep_ops.experiments.presets import preset, run_config
    from sleep_ops.tasks import build_task
    from sleep_ops.training import Trainer

    keep_freed_memory()
    std = given["model"].get("initializer_range")
    if std is not None and not 0 < std < 10:
        raise ValueError(f"init_std: expected a number in (0, 10), got {std}")
    if until is not None and until < 1:
        raise ValueError(f"until: expected an integer >= 1, got {until}")
    settings = {part: values | given[part] for part, values in preset(task, size).items()}
    config, console = run_config(task, settings, baseline), run_console()
    passes, steps = HybridConfig.from_dict(config.model).passes, config.train.steps
    label = f"{task} {baseline or f'N={passes}'}"
    trainer = Trainer(config, out, resume=resume, extend=True, label=label, console=console)
    if trainer.step and trainer.step >= min(until or steps, steps):
        console.print(f"{out}: already at step {trainer.step}, nothing to do")
        return
    if trainer.step:
        console.print(f"{out}: going on from step {trainer.step}")
    result = trainer.fit(until)
    if result.signal is not None and not result.finished:
        console.print(f"stopped by signal {result.signal} at step {result.step}, saved; the same command goes on")
        raise typer.Exit(128 + result.signal)
    if result.evaluation:
        print_evaluations(console, build_task(config.task), [(passes, result.evaluation)])
    state = "finished" if result.finished else f"at step {result.step} of {steps}"
    console.print(f"{out}: {state}, {result.seconds:.0f} s of training, {result.skipped} steps skipped")


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
