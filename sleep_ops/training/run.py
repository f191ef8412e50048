"""A run's folder and its model: building it, finding it again, keeping others out."""

import os
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sleep_ops.adapters.loading import load_model
from sleep_ops.adapters.lora import add_lora, inserted_blocks
from sleep_ops.files import keep_others_out, kind, remove
from sleep_ops.layers.mixer import GDNMixer
from sleep_ops.model.hybrid import HybridConfig, SleepHybridModel
from sleep_ops.tasks import Task, build_task
from sleep_ops.training.checkpoint import Checkpoint, load_newest, model_tensors
from sleep_ops.training.config import CONFIG_FILE, RunConfig, resolve_device
from sleep_ops.training.parallel import World

METRICS_FILE, EVAL_FILE = "metrics.csv", "eval.csv"
CHECKPOINTS, BOARD, PROFILE = "checkpoints", "tensorboard", "profile"
OWN = (CHECKPOINTS, BOARD, PROFILE, METRICS_FILE, EVAL_FILE)  # what a run writes beside its configuration


def build_model(
    config: RunConfig, *, weights: bool = True, dtype: torch.dtype | None = None, device: str = "cpu"
) -> nn.Module:
    """The model a run begins with; new weights are drawn from the run's seed.

    weights: False leaves those unread that a checkpoint of the run has, for a model whose own are
        about to be loaded.
    dtype: of a LoRA run's base; None for the one it is trained in. All else is float32.
    device: "cpu", or "meta" for a model without values, which needs no memory.
    """
    torch.manual_seed(config.train.seed)
    with torch.device(device):
        if "folder" not in config.model:
            return SleepHybridModel(HybridConfig.from_dict(config.model))
        settings, real = dict(config.model), device != "meta"
        lora = settings.pop("lora", None)
        if lora is None:
            return load_model(**settings, weights=weights and real)
        if dtype is None:
            dtype = torch.bfloat16 if config.train.param_dtype == "bf16" else torch.float32
        base = load_model(**settings, dtype=dtype, weights=real)
        return add_lora(base, **(lora if weights and real else lora | {"start": None}))


def chosen_parameters(model: nn.Module, trainable: str) -> list[nn.Parameter]:
    """The parameters to train, of those that require gradients. See `TrainConfig.trainable`.

    Raises ValueError for a model without fast weights where only those are wanted.
    """
    if trainable == "all":
        return [p for p in model.parameters() if p.requires_grad]
    owners: list[nn.Module] = [*(m for m in model.modules() if isinstance(m, GDNMixer)), *inserted_blocks(model)]
    chosen = {p for owner in owners for p in owner.parameters() if p.requires_grad}
    if not chosen:
        without = "adapters on its fast weights" if owners else "fast weights"
        raise ValueError(f"trainable: expected 'all' for a model without {without}, got {trainable!r}")
    return [p for p in model.parameters() if p in chosen]


def select_parameters(model: nn.Module, trainable: str) -> None:
    """The others stop requiring gradients."""
    chosen = set(chosen_parameters(model, trainable))
    for p in model.parameters():
        p.requires_grad_(p in chosen)


def check_vocabulary(model: nn.Module, task: Task) -> None:
    """Raises ValueError where the task has tokens that the model does not know."""
    known = getattr(model, "vocab_size", task.vocab_size)
    if known < task.vocab_size:
        needed = f"a vocabulary of at least {task.vocab_size} tokens for {task.name}"
        raise ValueError(f"model: expected {needed}, got {known}")


def load_run(folder: Path, *, device: str = "auto", warn=print) -> tuple[RunConfig, Task, nn.Module, int]:
    """The configuration, task, trained model and step of a run folder.

    ValueError where it holds no checkpoint.
    """
    config = RunConfig.load(folder)
    checkpoint = load_newest(folder / CHECKPOINTS, warn)
    if checkpoint is None:
        raise ValueError(f"{folder}: expected a trained run, but it has no checkpoint yet")
    model = build_model(config, weights=False, dtype=torch.float32)
    checkpoint.fill(model_tensors(model))
    return config, build_task(config.task), model.to(resolve_device(device)).eval(), checkpoint.step


def newest_checkpoint(
    config: RunConfig, folder: Path, warn, *, extend: bool = False, world: World | None = None
) -> Checkpoint | None:
    """The newest whole checkpoint of `folder`, or None for a new run.

    extend: a run that has taken all its steps may be given more.
    world: every process calls this, and all find the same.

    ValueError where the folder holds a run with other settings, a run's files without one, or files
    for folders.
    """
    world = world or World()
    steps = world.on_main(lambda: _steps(config, folder, extend))
    if steps is None:
        return None
    checkpoint = load_newest(folder / CHECKPOINTS, warn, world)
    if steps < config.train.steps and (checkpoint is None or checkpoint.step < steps):
        world.on_main(lambda: config.check_resumable(folder))
    return checkpoint


def _steps(config: RunConfig, folder: Path, extend: bool) -> int | None:
    """How many the run in `folder` is to take, if it can be resumed; None where there is none."""
    if not (folder / CONFIG_FILE).exists():
        found = [name for name in OWN if kind(folder / name)]
        if found:
            raise ValueError(
                f"{folder}: expected a run or a folder without {' or '.join(found)}, got no {CONFIG_FILE}; it cannot "
                "be resumed. Choose another folder, or let them be deleted (resume=False, --fresh)."
            )
        return None
    steps = RunConfig.load(folder).train.steps
    extended = extend and steps < config.train.steps
    (replace(config, train=replace(config.train, steps=steps)) if extended else config).check_resumable(folder)
    for names, expected in (((CHECKPOINTS, BOARD, PROFILE), "a folder"), ((METRICS_FILE, EVAL_FILE), "a file")):
        for path in (folder / name for name in names):
            if kind(path) not in ("", expected):
                raise ValueError(f"{path}: expected {expected} in a run folder, got {kind(path)}")
    return steps


@contextmanager
def locked(folder: Path):
    """Hold a run folder against a second trainer, which would overwrite this one's records."""
    lock = folder / ".lock"
    if kind(lock) == "a folder":
        raise ValueError(f"{lock}: expected a file in a run folder, got a folder")
    with lock.open("w") as file:
        try:
            keep_others_out(file, wait=False)
        except OSError as error:
            raise ValueError(f"{folder}: expected a folder of its own, got one another process trains in") from error
        yield


def clear_run(folder: Path) -> None:
    """Delete a run's own files in `folder`, and nothing else."""
    with locked(folder):
        for name in (*OWN, CONFIG_FILE):  # the last one says that the others are a run's
            remove(folder / name)


def autocast(precision: str, device: torch.device):
    """The autocast context of a precision on a device; see TrainConfig.precision."""
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def deterministic(device: torch.device):
    """The same seed gives the same bits: deterministic algorithms while a CUDA run trains.

    Where an operation has none, PyTorch warns. The CPU needs nothing.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for; read when it is first used
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
