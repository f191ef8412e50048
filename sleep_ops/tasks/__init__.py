"""Tasks that ask for reasoning over evicted context, behind one interface (`Task`)."""

from sleep_ops.tasks.base import IGNORE_INDEX, Batch, Task
from sleep_ops.tasks.rule110 import Rule110
from sleep_ops.tasks.text import Text

TASKS = {task.name: task for task in (Rule110, Text)}


def build_task(settings: dict) -> Task:
    """Rebuild a task from its `to_dict()`."""
    settings = dict(settings)
    name = settings.pop("name", None)
    if name not in TASKS:
        raise ValueError(f"task: expected one of {tuple(TASKS)}, got {name!r}")
    return TASKS[name](**settings)


__all__ = ["IGNORE_INDEX", "TASKS", "Batch", "Rule110", "Task", "Text", "build_task"]
