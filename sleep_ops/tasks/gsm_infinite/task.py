"""GSM-Infinite as a task for models trained from scratch: the generator's problems over a vocabulary of whole words.

    input   Question : What is ... ? Problem : ... .  Answer  :     <pad> ...
    target     -     -   -   -       -    -           -     number    -

Every number is one token. The prompt fills the sequence but for less than one sentence; what is left at its end is
padding, which the answer's position does not see.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from sleep_ops.checks import check_counts, expect
from sleep_ops.tasks.base import IGNORE_INDEX, Batch
from sleep_ops.tasks.common import as_batch, at_stage, by_level, check_first, score, stages_from
from sleep_ops.tasks.gsm_infinite.problem import MAX_OP, Generator, prompt_of, words
from sleep_ops.tasks.gsm_infinite.structure import LIMIT
from sleep_ops.tasks.gsm_infinite.worlds import WORLDS

PAD = 0
FIRST_NUMBER = 1  # the token of number n is FIRST_NUMBER + n
_TEXTS = [prompt_of("", "")] + [text for world in WORLDS for text in world.texts()]
_WORDS = sorted({word for text in _TEXTS for word in words(text) if not word.isdecimal()})
VOCABULARY = ("<pad>", *map(str, range(LIMIT + 1)), *_WORDS)
_IDS = {word: i for i, word in enumerate(VOCABULARY)}
_COUNTED = 4096  # training problems whose answers the majority is taken from


def encode(text: str) -> list[int]:
    """Tokens of a text in the words of the worlds. ValueError for any other word, or a number above LIMIT."""
    try:
        return [_IDS[word] for word in words(text)]
    except KeyError as error:
        raise ValueError(f"text: expected words of the vocabulary, got {error.args[0]!r}") from None


def decode(ids: list[int]) -> str:
    """The text of these tokens, padding left out."""
    text = " ".join(VOCABULARY[i] for i in ids if i != PAD)
    for mark in ".,:?":
        text = text.replace(f" {mark}", mark)
    return text


@dataclass(frozen=True)
class GSMInfinite:
    """The GSM-Infinite task.

    seq_len         tokens (words, numbers and marks) of a sequence, which the longest prompts fill.
    shortest        the smallest wanted length of a prompt, each up to seq_len as likely; None for seq_len itself.
    min_op, max_op  operations that an answer takes, each number as likely.
    first_op        a curriculum: that largest number in training's first stage, one more in each that follows; None for
                    max_op from the start.
    """

    seq_len: int = 2048
    shortest: int | None = None
    min_op: int = 1
    max_op: int = 8
    first_op: int | None = None

    name: ClassVar[str] = "gsm_infinite"
    metric: ClassVar[str] = "exact"
    vocab_size: ClassVar[int] = len(VOCABULARY)

    def __post_init__(self):
        check_counts(self, min_op=1)
        check_counts(self, max_op=self.min_op)
        expect(self.max_op <= MAX_OP, "max_op", f"an integer <= {MAX_OP}", self.max_op)
        check_first(self, "first_op", self.min_op, self.max_op)
        needed = Generator((self.min_op, self.max_op), None, _length).needed()
        check_counts(self, seq_len=needed)
        if self.shortest is not None:
            check_counts(self, shortest=needed)
            expect(self.shortest <= self.seq_len, "shortest", f"None, or <= seq_len {self.seq_len}", self.shortest)

    @property
    def window(self) -> int:
        """A quarter of a sequence, about the share of 512 tokens in the paper's problems."""
        return self.seq_len // 4

    @property
    def stages(self) -> int:
        return stages_from(self.first_op, self.max_op)

    @property
    def generator(self) -> Generator:
        return self._generator(self.max_op)

    def to_dict(self) -> dict:
        return {"name": self.name, **asdict(self)}

    def batch(
        self,
        seed: int,
        step: int,
        size: int,
        device: torch.device | str = "cpu",
        *,
        split: str = "train",
        stage: int | None = None,
    ) -> Batch:
        """Batch number `step` of the stream (seed, split): its row i is problem step * 2^32 + i of the generator, at a
        `stage` of the curriculum of one for as many operations.

        input_ids and labels come on `device`, loss_mask on the CPU.
        """
        if seed < 0 or step < 0 or size < 1:
            raise ValueError(f"seed, step, size: expected >= 0, >= 0, >= 1, got {seed}, {step}, {size}")
        generator = self._generator(at_stage(stage, self.first_op, self.max_op))
        input_ids = np.full((size, self.seq_len), PAD, dtype=np.int64)
        labels = np.full((size, self.seq_len), IGNORE_INDEX, dtype=np.int64)
        for row, i in enumerate(_numbers(step, size)):
            problem = generator.problem(seed, i, split)
            ids = encode(problem.prompt)
            input_ids[row, : len(ids)] = ids
            labels[row, len(ids) - 1] = FIRST_NUMBER + problem.answer
        return as_batch(input_ids, labels, device)

    def evaluate(
        self,
        model: nn.Module,
        *,
        samples: int = 2048,
        batch_size: int = 256,
        seed: int = 0,
        passes: int | float | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]:
        """Accuracy of `model` on `samples` problems of the evaluation stream.

        Returns exact, exact_stderr (its binomial standard error), per_label (the same as exact: there is one), loss
        (nats per answer), samples, and op_i for the problems of i operations; majority and majority_op_i, beside them,
        are what always giving the answer that is commonest in training among problems of as many operations reaches
        on the same problems. NaN for an op that none of them has.
        """
        s = score(self, model, samples=samples, batch_size=batch_size, seed=seed, passes=passes, device=device)
        sizes = (min(batch_size, samples - start) for start in range(0, samples, batch_size))
        asked = [self.generator.answer(seed, i, "eval") for step, n in enumerate(sizes) for i in _numbers(step, n)]
        right, ops = s.right[s.asked], torch.tensor(asked)[:, 0]
        return s.summary() | by_level("op", right, ops, self._ops) | self._majority(asked)

    def chance(self, samples: int = 4096) -> dict[str, float]:
        """What is reached without reading the problems: uniform, guessing among all numbers in the vocabulary;
        majority and majority_op_i, as in `evaluate`."""
        asked = [self.generator.answer(0, i, "eval") for i in range(samples)]
        return {"uniform": 1 / (LIMIT + 1), **self._majority(asked)}

    def records(self, seed: int, count: int, *, split: str = "train") -> list[dict[str, str | int]]:
        """The first `count` problems of a stream as `Problem.record` gives them, prompt and answer first."""
        generator = self.generator
        return [generator.problem(seed, i, split).record() for i in range(count)]

    def render(self, input_ids: torch.Tensor, labels: torch.Tensor) -> str:
        """One sequence in words: input_ids and labels are rows [T] of a batch."""
        answer = decode(labels[labels != IGNORE_INDEX].tolist())
        return f"{decode(input_ids.tolist())} {answer}"

    def _generator(self, max_op: int) -> Generator:
        return Generator((self.min_op, max_op), (self.shortest or self.seq_len, self.seq_len), _length)

    @property
    def _ops(self) -> range:
        return range(self.min_op, self.max_op + 1)

    def _majority(self, asked: list[tuple[int, int]]) -> dict[str, float]:
        """Accuracy on problems with these (op, answer) of the commonest answer to training problems of each op."""
        seen = {op: Counter() for op in self._ops}
        for op, answer in (self.generator.answer(0, i) for i in range(_COUNTED)):
            seen[op][answer] += 1
        commonest = {op: max(counts, key=counts.get, default=None) for op, counts in seen.items()}
        right = torch.tensor([answer == commonest[op] for op, answer in asked])
        ops = torch.tensor(asked)[:, 0]
        return {"majority": right.double().mean().item()} | by_level("majority_op", right, ops, self._ops)


def _numbers(step: int, size: int) -> range:
    """Which problems of its stream a batch has: the first ones of its step, however large it is."""
    return range(step << 32, (step << 32) + size)


def _length(text: str) -> int:
    return len(words(text))
