"""Fine-tuning a published checkpoint so that it sleeps: two phases, each an ordinary run.

    OUT/warm      only the fast weights learn, with hard eviction; ends by writing OUT/warm/model
    OUT/full      all weights learn, with the eviction that is wanted, from there; ends by writing OUT/model

With LoRA the weights stay as they are, beside adapters that learn (of the mixers alone, in the first
phase); OUT/warm/adapter and OUT/adapter have those by themselves, and OUT/model has them added.

Source: Lee et al., arXiv 2605.26099, experiments with Jet-Nemotron and Ouro (one epoch of the first phase for the
sliding window of Ouro).
"""

import shutil
from pathlib import Path

from rich.console import Console

from sleep_ops.adapters.loading import dtypes_like, left_out, model_type, save_model
from sleep_ops.adapters.lora import merge_lora, save_adapter
from sleep_ops.files import check_folder, whole_folder
from sleep_ops.tasks import Task, build_task
from sleep_ops.training.config import CONFIG_FILE, FinetuneConfig, Phase, resolve_device
from sleep_ops.training.division import Division
from sleep_ops.training.parallel import World, local_device
from sleep_ops.training.run import build_model, clear_run
from sleep_ops.training.steps import check_run
from sleep_ops.training.trainer import Trainer, TrainResult


def finetune(
    config: FinetuneConfig,
    out: Path,
    *,
    resume: bool = True,
    until: int | None = None,
    task: Task | None = None,
    console: Console | None = None,
) -> TrainResult | None:
    """Runs the phases that are not done yet in the folder `out`; returns the last one's result, None if all were done.

    Stopped anywhere, by a signal or a crash, the same call goes on to the same bits. resume: False deletes what earlier
    calls left in `out`. until: stop, and save, after so many steps of both phases together. task: that of `config`, if
    it is built already. Raises ValueError for settings that can't be and for an `out` with something else in it, before
    anything is written; and as `Trainer` does.
    """
    model_type(config.folder)
    device = resolve_device(local_device(config.train.device))
    world = World.join(device)
    console = (console or Console(markup=False)) if world.main else Console(quiet=True)
    phases, task, model = config.phases(out), task or build_task(config.task), None

    def begin() -> list[bool]:
        nonlocal model
        check_folder("out", Path(out))
        for phase in phases:
            begun, source = (phase.out / CONFIG_FILE).exists(), Path(config.folder).resolve()
            for path in phase.exports:
                if path.resolve() == source or (path.exists() and not begun):
                    expected = "expected a folder to write the model to, got one that has another model"
                    raise ValueError(f"{path}: {expected}")
            if resume and begun:
                phase.run.check_resumable(phase.out)
        if not resume:
            model = build_model(phases[0].run)
            for recipe in (phase.run.train for phase in phases):  # nothing is deleted for settings that can't be
                check_run(model, task, recipe, Division(recipe, world), device)
            for phase in reversed(phases):  # a model goes before the run that made it, a run before what it began with
                for path in filter(Path.exists, reversed(phase.exports)):
                    shutil.rmtree(path)
                if phase.out.exists():
                    clear_run(phase.out)
        return [phase.done or phases[-1].done for phase in phases]

    done = world.on_main(begin)
    if parts := left_out(config.folder):
        console.print(f"{config.folder}: the language model alone, without its {' and '.join(parts)}", soft_wrap=True)
    result, before = None, 0
    for phase, over in zip(phases, done, strict=True):
        if not over:
            trainer = Trainer(phase.run, phase.out, label=phase.name, task=task, model=model, console=console)
            result = _run(trainer, phase, config.folder, None if until is None else until - before)
            trainer = model = None  # two phases' models need not fit at once
            if not result.finished or result.signal is not None:
                break
        before += phase.run.train.steps
        if until is not None and until <= before:
            break
    return result


def _run(trainer: Trainer, phase: Phase, source: str, until: int | None) -> TrainResult:
    """Trains one phase from where it stands, and writes its model once it is finished."""
    if trainer.step:
        trainer.console.print(f"{phase.out}: going on from step {trainer.step}", soft_wrap=True)
    result = trainer.fit(until)
    if result.finished:
        model = trainer.whole_model(None if phase.adapter is not None else dtypes_like(source, trainer.model))

        def export() -> None:
            if phase.adapter is not None:
                with whole_folder(phase.adapter) as folder:
                    save_adapter(model, folder, source)
            if phase.model is not None:
                with whole_folder(phase.model) as folder:
                    save_model(model if phase.adapter is None else merge_lora(model), folder, source)

        trainer.world.on_main(export)
        for path in phase.exports:
            trainer.console.print(f"wrote {path}", soft_wrap=True)
    return result
