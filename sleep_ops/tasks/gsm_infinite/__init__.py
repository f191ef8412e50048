"""GSM-Infinite: arithmetic stories of exact depth among distractors, as a task and as JSON lines to fine-tune on."""

from sleep_ops.tasks.gsm_infinite.evaluator import Evaluation, evaluate
from sleep_ops.tasks.gsm_infinite.problem import Generator, Problem, count_tokens, write_jsonl
from sleep_ops.tasks.gsm_infinite.task import GSMInfinite

__all__ = ["Evaluation", "GSMInfinite", "Generator", "Problem", "count_tokens", "evaluate", "write_jsonl"]
