"""A curriculum of stages: when the next one begins, on which batches training is, and that it is resumed exactly."""

import math

import pytest
import torch
from test_training import QUIET, Toy, columns, config, losses

from sleep_ops.tasks import Rule110
from sleep_ops.training import Trainer
from sleep_ops.training.stages import Stages

TASK = Rule110(t=2, strings=2, bits=6, first_t=0)


def test_a_stage_is_learnt_when_twenty_losses_say_so():
    stages = Stages(TASK, 0.5, 80)
    assert stages.arguments == {"stage": 0}
    # Of the last 20 there is always one that isn't a number.
    assert not any(stages.risen(0, x) for x in [1.0, *[0.4] * 18, math.nan, *[0.4] * 19])
    assert stages.risen(0, 0.4) and stages.arguments == {"stage": 1}
    assert not any(stages.risen(0, 0.0) for _ in range(19)) and stages.risen(0, 10.0)  # their mean is 0.5
    assert not any(stages.risen(0, 0.0) for _ in range(99)) and stages.arguments == {"stage": 2}


def test_a_task_without_stages_is_asked_for_none():
    stages = Stages(Rule110(t=2), 0.5, 80)
    assert not any(stages.risen(0, 0.0) for _ in range(99)) and stages.arguments == {}


def test_the_learning_rate_rises_again_with_every_further_stage():
    stages = Stages(TASK, 0.5, 3)
    for step in range(1, 21):
        assert stages.learning_rate_factor(step) == 1
        stages.risen(step, 0.0)
    assert [stages.learning_rate_factor(step) for step in range(20, 25)] == [0.25, 0.5, 0.75, 1.0, 1.0]


class Noting:
    """The task, and the stage of the last batch made for each step."""

    def __init__(self):
        self.made = {}

    def __getattr__(self, name):
        return getattr(TASK, name)

    def batch(self, seed, step, size, device="cpu", *, split="train", stage=None):
        if split == "train":
            self.made[step] = stage
        return TASK.batch(seed, step, size, device, split=split, stage=stage)


def trained(out, until=None):
    """Training whose stages last 20 steps each, whatever the loss, from new or from where it was."""
    torch.manual_seed(0)
    task = Noting()
    run = Trainer(config(steps=50, stage_loss=1e9), out, model=Toy(), task=task, console=QUIET)
    run.fit(until=until)
    return run, task.made


def test_the_step_after_a_stage_is_of_the_next(tmp_path):
    _, made = trained(tmp_path)
    expected = [0] * 20 + [1] * 20 + [2] * 10
    assert [made[step] for step in range(50)] == expected
    assert columns(tmp_path / "metrics.csv", "stage") == [(float(stage),) for stage in expected]
    assert columns(tmp_path / "eval.csv", "step", "stage")[4:6] == [(20.0, 0.0), (24.0, 1.0)]


@pytest.mark.parametrize("stop", [13, 20, 33])
def test_a_curriculum_is_resumed_exactly(tmp_path, stop):
    straight, _ = trained(tmp_path / "straight")
    trained(tmp_path / "parts", until=stop)
    resumed, _ = trained(tmp_path / "parts")
    assert losses(tmp_path / "straight") == losses(tmp_path / "parts")
    assert all(map(torch.equal, straight.model.parameters(), resumed.model.parameters()))
