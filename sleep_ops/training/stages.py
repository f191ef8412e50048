"""A curriculum of difficulty: a task's next stage begins once the one before it has been learnt."""

from sleep_ops.tasks import Task

_STEPS = 20  # whose mean loss says so


class Stages:
    """Which stage of `task` training is at, for tasks that have `stages` (see `Task`).

    The next one begins after 20 steps at the one before with a mean loss of at most `loss`, nats per label. How long a
    stage takes differs between seeds by a factor of several, so that none of fixed length is right for all.
    """

    def __init__(self, task: Task, loss: float):
        self._count, self._loss = getattr(task, "stages", 1), loss
        self._stage, self._losses = 0, []  # type: int, list[float]

    @property
    def arguments(self) -> dict:
        """What a task's `batch` takes of it; nothing where there is one stage."""
        return {"stage": self._stage} if self._count > 1 else {}

    def risen(self, loss: float) -> bool:
        """Whether with this step's `loss` the next stage begins."""
        if self._stage == self._count - 1:
            return False
        self._losses = [*self._losses, loss][-_STEPS:]
        if len(self._losses) < _STEPS or not sum(self._losses) / _STEPS <= self._loss:
            return False
        self._stage, self._losses = self._stage + 1, []
        return True

    def state(self) -> dict:
        """Of a checkpoint."""
        return {"stage": self._stage, "stage_losses": self._losses}

    def restore(self, state: dict) -> None:
        self._stage, self._losses = state.get("stage", 0), list(state.get("stage_losses", []))
