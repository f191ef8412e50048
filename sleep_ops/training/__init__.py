"""Training: the recipe, checkpoints, logs and the loop."""

from sleep_ops.training.checkpoint import CheckpointError
from sleep_ops.training.config import RunConfig, TrainConfig, resolve_device
from sleep_ops.training.optim import build_optimizers
from sleep_ops.training.run import load_run
from sleep_ops.training.trainer import Trainer, TrainingDiverged, TrainResult

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
