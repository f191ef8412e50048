"""A curriculum of difficulty: a task's next stage begins once the one before it has been learnt."""

from sleep_ops.tasks import Task

_STEPS = 20  # whose mean loss says so


class Stages:
    """Which stage of `task` training is at, for tasks that have `stages` (see `Task`); others, and None, have one.

    The next one begins after 20 steps at the one before with a mean loss of at most `loss`, nats per label. How long a
    stage takes differs between seeds by a factor of several, so that none of fixed length is right for all.

    The learning rate then rises from 0 again, over `warmup` steps. In a new stage a model is worse than one that knows
    nothing, and at full rate it may forget all it has learnt before it finds what is to be added.
    """

    def __init__(self, task: Task | None, loss: float, warmup: int):
        self._count, self._loss, self._warmup = getattr(task, "stages", 1), loss, warmup
        self.stage, self._began, self._losses = 0, None, []  # type: int, int | None, list[float]

    @property
    def arguments(self) -> dict:
        """What a task's `batch` takes of it; nothing where there is one stage."""
        return {"stage": self.stage} if self._count > 1 else {}

    def learning_rate_factor(self, step: int) -> float:
        """The factor on both learning rates at `step` (0-based)."""
        return 1.0 if self._began is None else min(1.0, (step - self._began + 1) / (self._warmup + 1))

    def risen(self, step: int, loss: float) -> bool:
        """Whether the next stage begins with `step`, after one that had this loss."""
        if self.stage == self._count - 1:
            return False
        self._losses = [*self._losses, loss][-_STEPS:]
        if len(self._losses) < _STEPS or not sum(self._losses) / _STEPS <= self._loss:
            return False
        self.stage, self._began, self._losses = self.stage + 1, step, []
        return True

    def state(self) -> dict:
        """Of a checkpoint."""
        return {"stage": self.stage, "stage_began": self._began, "stage_losses": self._losses}

    def restore(self, state: dict) -> None:
        """What `state` gave; a run from before there were stages has no such thing."""
        if "stage" in state:
            self.stage, self._began, self._losses = state["stage"], state["stage_began"], state["stage_losses"]
