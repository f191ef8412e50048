"""Multi-query associative recall: the values of keys whose pairs were read, and evicted, before any is asked for.

    input   key_1 value_1  key_2 value_2  ...  key_p value_p    key_a    key_b    ...
    target    -      -       -      -            -      -      value_a  value_b   ...

Recall only: one pass can store the pairs, so sleep should not be needed. Source: Arora et al., Zoology, arXiv
2312.04927, for the task and for keys and values from the two halves of the vocabulary. There queries are spread over
the sequence at power-law distances; here they stand together behind the pairs, so that every pair is out of attention's
reach when its key returns.

A batch of 512 at the default size takes about 2.5 ms on one CPU core: 200,000 sequences, 30 million tokens, a second.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sleep_ops.checks import check_counts
from sleep_ops.streams import Stream
from sleep_ops.tasks.base import IGNORE_INDEX, Batch
from sleep_ops.tasks.common import as_batch, by_level, score


@dataclass(frozen=True)
class MQAR:
    """The associative recall task.

    num_pairs    keys, each with a value, in a sequence; all keys differ, and all values.
    num_queries  keys asked for again, all different.
    vocab_size   tokens; the lower half are keys, the others values.
    window       the natural one; it must divide the 2 num_pairs tokens of the pairs.
    """

    num_pairs: int = 64
    num_queries: int = 16
    vocab_size: int = 8192
    window: int = 32

    name: ClassVar[str] = "mqar"
    metric: ClassVar[str] = "per_label"

    def __post_init__(self):
        check_counts(self, num_pairs=1, num_queries=1, window=1)
        check_counts(self, vocab_size=2 * self.num_pairs)
        if self.num_queries > self.num_pairs:
            raise ValueError(f"num_queries: expected at most num_pairs = {self.num_pairs}, got {self.num_queries}")
        if self.context % self.window:
            raise ValueError(f"window: expected a divisor of the pairs' {self.context} tokens, got {self.window}")

    @property
    def context(self) -> int:
        """Tokens before the queries."""
        return 2 * self.num_pairs

    @property
    def seq_len(self) -> int:
        return self.context + self.num_queries

    def to_dict(self) -> dict:
        return {"name": self.name, **asdict(self)}

    def batch(
        self, seed: int, step: int, size: int, device: torch.device | str = "cpu", *, split: str = "train"
    ) -> Batch:
        """Batch number `step` of the stream (seed, split): `size` sequences of `seq_len` tokens.

        input_ids and labels come on `device`, loss_mask on the CPU.
        """
        stream, half = Stream(seed, step, size, split), self.vocab_size // 2
        keys = stream.distinct(half, size, self.num_pairs)
        values = half + stream.distinct(self.vocab_size - half, size, self.num_pairs)
        asked = stream.distinct(self.num_pairs, size, self.num_queries)
        input_ids = np.empty((size, self.seq_len), dtype=np.int64)
        input_ids[:, : self.context : 2] = keys
        input_ids[:, 1 : self.context : 2] = values
        input_ids[:, self.context :] = np.take_along_axis(keys, asked, 1)
        labels = np.full((size, self.seq_len), IGNORE_INDEX)
        labels[:, self.context :] = np.take_along_axis(values, asked, 1)
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

        Returns per_label (recall: queries answered right), exact (all of a sequence right), exact_stderr (its binomial
        standard error), loss (nats per query), samples, and window_i, the recall of the pairs in window i.
        """
        s = score(self, model, samples=samples, batch_size=batch_size, seed=seed, passes=passes, device=device)
        pairs, queries = s.input_ids[:, : self.context : 2], s.input_ids[:, self.context :]
        window = (queries[:, :, None] == pairs[:, None]).int().argmax(-1) * 2 // self.window
        right = s.right[:, self.context :]
        return s.summary() | by_level("window", right, window, range(self.context // self.window))

    def chance(self, samples: int = 16384) -> dict[str, float]:
        """What is reached without remembering which value belongs to which key.

        uniform    exact, by any value of the vocabulary.
        majority   exact, by any of the values that were read.
        per_label  the latter, per query.
        """
        values = self.vocab_size - self.vocab_size // 2
        n = self.num_queries
        return {"uniform": values**-n, "majority": self.num_pairs**-n, "per_label": 1 / self.num_pairs}

    def render(self, input_ids: Tensor, labels: Tensor) -> str:
        """One sequence, input_ids and labels int64 [T], as pairs and answered queries."""
        ids, answers = input_ids.tolist(), labels[self.context :].tolist()
        pairs = zip(ids[: self.context : 2], ids[1 : self.context : 2], strict=True)
        queries = zip(ids[self.context :], answers, strict=True)
        return "\n".join(
            [", ".join(f"{key}: {value}" for key, value in pairs), *(f"{key}? {value}" for key, value in queries)]
        )
