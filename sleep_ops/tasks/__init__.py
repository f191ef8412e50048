"""Tasks that ask for reasoning over evicted context, behind one interface (`Task`)."""

import inspect

from sleep_ops.tasks.base import IGNORE_INDEX, Batch, Task
from sleep_ops.tasks.depo import Depo
from sleep_ops.tasks.gsm_infinite import GSMInfinite
from sleep_ops.tasks.mqar import MQAR
from sleep_ops.tasks.rule110 import Rule110
from sleep_ops.tasks.text import Text
from sleep_ops.tasks.variable_tracking import VariableTracking
from sleep_ops.tasks.word_problem import WordProblem

TASKS: dict[str, type] = {
    task.name: task for task in (Rule110, Depo, MQAR, WordProblem, VariableTracking, GSMInfinite, Text)
}


def build_task(settings: dict) -> Task:
    """Rebuild a task from its `to_dict()`. ValueError for a task or a setting that there is not."""
    settings = dict(settings)
    name = settings.pop("name", None)
    if name not in TASKS:
        raise ValueError(f"task: expected one of {tuple(TASKS)}, got {name!r}")
    unknown = sorted(settings.keys() - inspect.signature(TASKS[name]).parameters.keys())
    if unknown:
        raise ValueError(f"task: expected settings of {name}, got {', '.join(unknown)}")
    return TASKS[name](**settings)


__all__ = [
    "IGNORE_INDEX",
    "MQAR",
    "TASKS",
    "Batch",
    "Depo",
    "GSMInfinite",
    "Rule110",
    "Task",
    "Text",
    "VariableTracking",
    "WordProblem",
    "build_task",
]
