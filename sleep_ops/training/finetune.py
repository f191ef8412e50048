"""Fine-tuning a published checkpoint so that it sleeps: two phases, each an ordinary run.

    OUT/warm      only the fast weights learn, with hard eviction; ends by writing OUT/warm/model
    OUT/full      all weights learn, with the eviction that is wanted, from there; ends by writing OUT/model

Source: Lee et al., arXiv 2605.26099, experiments with Jet-Nemotron and Ouro (one epoch of the first phase for the
sliding window of Ouro).
"""

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from sleep_ops.adapters.loading import model_type, remembered, save_model
from sleep_ops.files import check_folder, whole_folder
from sleep_ops.model.config import SleepSettings
from sleep_ops.tasks import Task, build_task
from sleep_ops.training.config import CONFIG_FILE, RunConfig, TrainConfig, resolve_device
from sleep_ops.training.parallel import World, local_device
from sleep_ops.training.run import build_model, check_vocabulary, clear_run
from sleep_ops.training.trainer import Trainer, TrainResult

RECIPE = TrainConfig(batch_size=256, lr_muon=1e-3)  # the paper's
MODEL_FOLDER = "model"
_WARM_SEED = 1 << 32  # added to the seed: the two phases go through the data in orders of their own


@dataclass(frozen=True)
class FinetuneConfig:
    """What to fine-tune, on what, and how.

    folder      the checkpoint.
    task        as a task's `to_dict()` gives it.
    settings    of sleep, as `load_model` takes them, and `insert`; eviction is that of the second phase.
    train       the recipe of the second phase, and of the first but for its steps.
    warm_steps  optimiser steps of the first phase; 0 leaves it out.
    """

    folder: str
    task: dict
    settings: dict
    train: TrainConfig = RECIPE
    warm_steps: int = 0

    def __post_init__(self):
        if not isinstance(self.warm_steps, int) or isinstance(self.warm_steps, bool) or self.warm_steps < 0:
            raise ValueError(f"warm_steps: expected an integer >= 0, got {self.warm_steps!r}")
        if self.train.trainable != "all":
            raise ValueError(f"trainable: expected 'all' (see warm_steps), got {self.train.trainable!r}")
        # Checked now: those of the second phase would otherwise be found wanting after the first.
        SleepSettings.from_dict({"window": 1} | {k: v for k, v in self._given().items() if k != "insert"})

    def _given(self) -> dict:
        given = {name: value for name, value in self.settings.items() if value is not None}
        return given | {"passes": "inf"} if given.get("passes") == math.inf else given

    def phases(self, out: Path) -> list["Phase"]:
        """The runs in their order. Folders in them are absolute, so that a run means the same from everywhere."""
        source, out = str(Path(self.folder).resolve()), Path(out)
        settings, found = self._given(), []
        if self.warm_steps:
            seed = self.train.seed + _WARM_SEED
            train = replace(self.train, steps=self.warm_steps, trainable="fast_weights", seed=seed)
            model = {"folder": source, **settings, "eviction": "hard"}
            found.append(Phase("warm", out / "warm", out / "warm" / MODEL_FOLDER, RunConfig(self.task, model, train)))
            source = str(found[0].export.resolve())
            settings.pop("insert", None)  # they are there now
            # That folder remembers the first phase's eviction.
            settings.setdefault("eviction", remembered(self.folder, "eviction") or "hard")
        run = RunConfig(self.task, {"folder": source, **settings}, self.train)
        return [*found, Phase("full", out / "full", out / MODEL_FOLDER, run)]


@dataclass(frozen=True)
class Phase:
    """One run: its folder, where the model goes in the end, and its configuration."""

    name: str
    out: Path
    export: Path
    run: RunConfig

    @property
    def done(self) -> bool:
        return self.export.exists()


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
    world = World.join(resolve_device(local_device(config.train.device)))
    console = (console or Console()) if world.main else Console(quiet=True)
    phases, task, model = config.phases(out), task or build_task(config.task), None

    def begin() -> list[bool]:
        nonlocal model
        check_folder("out", Path(out))
        for phase in phases:
            begun, source = (phase.out / CONFIG_FILE).exists(), Path(config.folder).resolve()
            if phase.export.resolve() == source or (phase.done and not begun):
                expected = "expected a folder to write the model to, got one that has another model"
                raise ValueError(f"{phase.export}: {expected}")
            if resume and begun:
                phase.run.check_resumable(phase.out)
        if not resume:
            model = build_model(phases[0].run)
            check_vocabulary(model, task)  # nothing is deleted for settings that can't be
            for phase in reversed(phases):  # a model goes before the run that made it, a run before what it began with
                if phase.done:
                    shutil.rmtree(phase.export)
                if phase.out.exists():
                    clear_run(phase.out)
        return [phase.done for phase in phases]

    done = world.first(begin)
    result, before = None, 0
    for phase, over in zip(phases, done, strict=True):
        if not over:
            trainer = Trainer(phase.run, phase.out, label=phase.name, task=task, model=model, console=console)
            result = _run(trainer, phase, config.folder, None if until is None else until - before)
            trainer = model = None  # two phases' models need not fit at once
            if not result.finished:
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
        model = trainer.whole_model()

        def export() -> None:
            with whole_folder(phase.export) as folder:
                save_model(model, folder, source)

        trainer.world.first(export)
        trainer.console.print(f"wrote {phase.export}", soft_wrap=True)
    return result
