"""Training: the recipe, checkpoints, logs and the loop."""

from importlib import import_module
from typing import TYPE_CHECKING

from sleep_ops.training.config import RunConfig, TrainConfig, resolve_device

if TYPE_CHECKING:
    from sleep_ops.training.checkpoint import CheckpointError
    from sleep_ops.training.optim import build_optimizers
    from sleep_ops.training.run import load_run
    from sleep_ops.training.trainer import Trainer, TrainingDiverged, TrainResult

# What needs PyTorch is imported when it is first asked for: a command's help, made of `TrainConfig`, is not.
_HOMES = {
    "CheckpointError": "checkpoint",
    "TrainResult": "trainer",
    "Trainer": "trainer",
    "TrainingDiverged": "trainer",
    "build_optimizers": "optim",
    "load_run": "run",
}
__all__ = [
    "CheckpointError",
    "RunConfig",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "TrainingDiverged",
    "build_optimizers",
    "load_run",
    "resolve_device",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
