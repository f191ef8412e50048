"""Rule 110 from evicted context: the first bit of each string after t steps of the automaton.

One sequence is `strings` independent uniform strings of `bits` cells, then the answers:

    input   s_0 ... s_0  s_1 ... s_1  ...  [SEP]   label_0  ...  label_{n-2}
    target   -       -    -       -        label_0 label_1  ...  label_{n-1}

With a window of `bits` tokens every string fills exactly one window and is evicted before the next one, so storing it
costs a constant number of bits while reading the label off it takes `t` sequential steps (Rule 110 is P-complete).
Source: Lee et al., arXiv 2605.26099, section on Rule 110; the answer window's layout is ours.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from sleep_ops.checks import check_counts, is_number
from sleep_ops.streams import Stream, source
from sleep_ops.tasks.base import IGNORE_INDEX, Batch
from sleep_ops.tasks.common import as_batch, at_stage, check_first, score, stages_from

SEP = 2  # tokens 0 and 1 are the cells
BOUNDARIES = ("periodic", "zero")


def rule110_steps(cells: np.ndarray, t: int, boundary: str = "periodic") -> np.ndarray:
    """Run `t` steps of Rule 110: new = (c or r) and not (l and c and r) over the left, centre and right cells.

    cells     uint8 or bool [..., bits], zeros and ones.
    boundary  "periodic": the ends are neighbours; "zero": the cells outside are 0.
    Returns uint8 [..., bits].
    """
    # Cells lead in memory, so that a shift moves whole rows.
    c = np.ascontiguousarray(np.moveaxis(np.asarray(cells, dtype=np.uint8), -1, 0))
    left, right = np.zeros_like(c), np.zeros_like(c)
    for _ in range(t):
        left[1:], right[:-1] = c[:-1], c[1:]
        if boundary == "periodic":
            left[0], right[-1] = c[-1], c[0]
        c = (c | right) & ~(left & c & right)
    return np.moveaxis(c, 0, -1)


@dataclass(frozen=True)
class Rule110:
    """The Rule 110 task.

    t         steps of the automaton, >= 0.
    strings   strings (and answers) per sequence.
    bits      cells per string; also the natural window.
    boundary  "periodic" or "zero".
    held_out  fraction of all strings, chosen by a fixed hash, that never occur in training; evaluation then draws from
              these only. 0: both splits are uniform over all strings (the paper's setting), from disjoint streams.
    repeats   how often the strings are read, one after another each time: a baseline for sleep.
    first_t   a curriculum: steps of the automaton in training's first stage, one more in each that follows; None for t
              from the start.
    """

    t: int = 8
    strings: int = 4
    bits: int = 24
    boundary: str = "periodic"
    held_out: float = 0.0
    repeats: int = 1
    first_t: int | None = None

    name: ClassVar[str] = "rule110"
    metric: ClassVar[str] = "exact"
    vocab_size: ClassVar[int] = 3

    def __post_init__(self):
        check_counts(self, t=0, strings=1, bits=3, repeats=1)
        check_first(self, "first_t", 0, self.t)
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"boundary: expected one of {BOUNDARIES}, got {self.boundary!r}")
        held_out, expected = self.held_out, "0, or a fraction in [0.01, 0.5] of strings of at least 10 bits"
        if not (is_number(held_out) and (held_out == 0 or (0.01 <= held_out <= 0.5 and self.bits >= 10))):
            raise ValueError(f"held_out: expected {expected}, got {held_out!r} at {self.bits} bits")

    @property
    def seq_len(self) -> int:
        return self.context + self.strings

    @property
    def context(self) -> int:
        """Columns before the answers."""
        return self.repeats * self.strings * self.bits

    @property
    def window(self) -> int:
        return self.bits

    @property
    def stages(self) -> int:
        return stages_from(self.first_t, self.t)

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
        """Batch number `step` of the stream (seed, split): `size` sequences of `seq_len` tokens.

        input_ids and labels come on `device`, loss_mask on the CPU.
        """
        cells = self._strings(seed, step, size, split)
        answers = self._answers(cells, at_stage(stage, self.first_t, self.t))
        n, context = self.strings, self.context
        input_ids = np.empty((size, self.seq_len), dtype=np.int64)
        input_ids[:, :context] = np.tile(cells.reshape(size, -1), self.repeats)
        input_ids[:, context] = SEP
        input_ids[:, context + 1 :] = answers[:, : n - 1]
        labels = np.full((size, self.seq_len), IGNORE_INDEX, dtype=np.int64)
        labels[:, context:] = answers
        return as_batch(input_ids, labels, device)

    def evaluate(
        self,
        model: nn.Module,
        *,
        samples: int = 2048,
        batch_size: int = 512,
        seed: int = 0,
        passes: int | float | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]:
        """Accuracy of `model` on `samples` sequences of the evaluation stream.

        Returns exact (all answers of a sequence right), exact_stderr (its binomial standard error), per_label, loss
        (nats per answer), samples, and label_i for each answer. The answers are fed as input, which changes nothing
        in `exact`: greedy decoding is right everywhere exactly when it is right everywhere given the right prefix.
        """
        s = score(self, model, samples=samples, batch_size=batch_size, seed=seed, passes=passes, device=device)
        answers = s.right[:, self.context :].double().mean(0)
        return s.summary() | {f"label_{i}": answers[i].item() for i in range(self.strings)}

    def chance(self, samples: int = 16384) -> dict[str, float]:
        """What is reached without reading the strings.

        uniform   1 / 2^strings, guessing each answer.
        majority  always the commoner bit (as seen in the training split), measured on the evaluation split.
        ones      how often an answer is 1.
        """
        seen, asked = (self._answers(self._strings(0, 0, samples, split), self.t) for split in ("train", "eval"))
        common = int(seen.mean() >= 0.5)
        return {
            "uniform": 0.5**self.strings,
            "majority": float((asked == common).all(1).mean()),
            "ones": float(seen.mean()),
        }

    def render(self, input_ids: torch.Tensor, labels: torch.Tensor) -> str:
        """One sequence, input_ids and labels int64 [seq_len], as strings and their answers."""
        cells = "".join(map(str, input_ids[: self.strings * self.bits].tolist()))
        strings = (cells[i : i + self.bits] for i in range(0, len(cells), self.bits))
        answers = labels[self.context :].tolist()
        return "\n".join(f"{string} -> {answer}" for string, answer in zip(strings, answers, strict=True))

    def _strings(self, seed: int, step: int, size: int, split: str) -> np.ndarray:
        """uint8 [size, strings, bits]."""
        stream = Stream(seed, step, size, split)
        cells = self._uniform(stream, size * self.strings)
        if self.held_out:
            wanted = split == "eval"
            while len(bad := np.flatnonzero(self._is_held_out(cells) != wanted)):
                cells[bad] = self._uniform(stream, len(bad))
        return cells.reshape(size, self.strings, self.bits)

    def _answers(self, cells: np.ndarray, t: int) -> np.ndarray:
        """uint8 [size, strings] for strings [size, strings, bits]."""
        return rule110_steps(cells, t, self.boundary)[..., 0]

    def _uniform(self, stream: Stream, count: int) -> np.ndarray:
        total = count * self.bits
        words = stream.words(-(-total // 64)).astype("<u8")
        return np.unpackbits(words.view(np.uint8), count=total, bitorder="little").reshape(count, self.bits)

    def _is_held_out(self, cells: np.ndarray) -> np.ndarray:
        """bool [count]: a multiplicative hash of the string's bits falls below the held-out fraction."""
        weights = source(110, self.bits).random_raw(self.bits) | np.uint64(1)
        h = (cells * weights).sum(-1, dtype=np.uint64)
        h = (h ^ (h >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
        return (h >> np.uint64(11)).astype(np.float64) * 2.0**-53 < self.held_out
