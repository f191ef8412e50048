"""Depo: who comes k places after a node of a directed cycle whose edges were read, and evicted, in random order?

    context   [pad] ...  name(u) name(next u)  name(u') name(next u') ...       every edge once
    queries   [k] name(q) [=] name(q + k)   [k'] name(q') [=] name(q' + k') ... [pad]

A name is a string over the tokens 1 .. V whose last token is shifted to V + 1 .. 2V, so it says where it ends. Source:
Allen-Zhu, Physics of Language Models, part 4.1; the numbers of nodes, names and queries are those of Lee et al., arXiv
2605.26099. Where the tokens of the original stand here:

    1 .. 2V                names, as they are; 0 stays unused
    9000 + k               2V + k, for k = 1 .. max_hops
    9500                   2V + max_hops + 1
    padding                2V + max_hops + 2

The queries begin in the same column in every sequence: contexts are padded at their left, queries at their right. A
cycle of fewer nodes than there are queries is asked about each of its nodes once.

A batch of 128 at the default size takes about 2 ms on one CPU core: 60,000 sequences, 24 million tokens, a second.
"""

from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sleep_ops.checks import check_choice, check_counts
from sleep_ops.streams import Stream
from sleep_ops.tasks.base import IGNORE_INDEX, Batch
from sleep_ops.tasks.common import as_batch, at_stage, by_level, check_first, score, stages_from

PADS = ("masked", "tokens")


@dataclass(frozen=True)
class Depo:
    """The Depo task.

    min_nodes, max_nodes         nodes of a cycle; in training n has weight 1 / (n + sqrt(max_nodes)).
    vocabulary                   V, the tokens names are made of.
    shortest_name, longest_name  tokens per name, each length equally likely.
    queries                      per sequence, each about another node.
    max_hops                     in training, k is uniform in 1 .. max_hops.
    first_hops                   a curriculum: that limit in training's first stage, one more in each that follows; None
                                 for max_hops from the start.
    repeats                      how often the context is read, without a gap: a baseline for sleep.
    pads                         "masked": `attention_mask` marks the padding, which the model then does not see;
                                 "tokens": padding is read like any token.
    window                       the natural one: a quarter of the context in the paper's setting.

    Evaluation asks about cycles of max_nodes nodes, k = 1, 2, 4, ... up to max_hops, each equally often.
    """

    min_nodes: int = 3
    max_nodes: int = 75
    vocabulary: int = 50
    shortest_name: int = 2
    longest_name: int = 2
    queries: int = 10
    max_hops: int = 16
    first_hops: int | None = None
    repeats: int = 1
    pads: str = "masked"
    window: int = 75

    name: ClassVar[str] = "depo"
    metric: ClassVar[str] = "exact"

    def __post_init__(self):
        lowest = {"min_nodes": 2, "vocabulary": 2, "shortest_name": 1, "queries": 1, "max_hops": 1, "repeats": 1}
        check_counts(self, **lowest, window=1)
        check_counts(self, max_nodes=self.min_nodes, longest_name=self.shortest_name)
        check_choice("pads", self.pads, PADS)
        check_first(self, "first_hops", 1, self.max_hops)
        if self.vocabulary**self.shortest_name < self.max_nodes:
            raise ValueError(
                f"vocabulary: expected {self.max_nodes} different names of {self.shortest_name} tokens, got "
                f"{self.vocabulary} tokens, enough for {self.vocabulary**self.shortest_name}"
            )
        if self.vocabulary**self.longest_name > 2**40:
            raise ValueError(
                f"longest_name: expected at most 2^40 names, got {self.longest_name} of {self.vocabulary} tokens"
            )

    @property
    def answer_token(self) -> int:
        """The original's 9500."""
        return 2 * self.vocabulary + self.max_hops + 1

    @property
    def pad_token(self) -> int:
        return self.answer_token + 1

    @property
    def vocab_size(self) -> int:
        return self.pad_token + 1

    @property
    def context(self) -> int:
        """Columns before the queries."""
        return self.repeats * self.max_nodes * 2 * self.longest_name

    @property
    def seq_len(self) -> int:
        return self.context + min(self.queries, self.max_nodes) * (2 + 2 * self.longest_name)

    @property
    def test_hops(self) -> tuple[int, ...]:
        """The powers of two up to max_hops."""
        return tuple(2**i for i in range(self.max_hops.bit_length()))

    @property
    def stages(self) -> int:
        return stages_from(self.first_hops, self.max_hops)

    def to_dict(self) -> dict:
        return {"name": self.name, **asdict(self)}

    def hop_token(self, k: int) -> int:
        """The original's 9000 + k."""
        return 2 * self.vocabulary + k

    def attention_mask(self, input_ids: Tensor) -> Tensor | None:
        """Which tokens of input_ids [B, T] are real, bool [B, T]; None where padding is to be read."""
        return input_ids != self.pad_token if self.pads == "masked" else None

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

        The loss is taken where [=] or a token of an answer comes next. Where there is padding that is to be masked, the
        batch has an attention_mask, and windows end at columns. All but loss_mask come on `device`.
        """
        stream = Stream(seed, step, size, split)
        nodes, hops = self._sizes(stream, size, split, at_stage(stage, self.first_hops, self.max_hops))
        names, lengths = self._names(stream, size)
        rows, most = np.arange(size)[:, None], self.max_nodes
        absent = np.arange(most) >= nodes[:, None]

        def in_random_order():  # first those of the n nodes that are there
            return (stream.uniform(size, most) + absent).argsort(1)

        # The cycle runs 0, 1, ..., n - 1: names are random already.
        source = in_random_order()
        edges = np.stack([source, (source + 1) % nodes[:, None]], 2).reshape(size, -1)
        there = ~absent.repeat(2, 1)[..., None] & (np.arange(self.longest_name) < lengths[rows, edges][..., None])
        there, context = (np.tile(x.reshape(size, -1), self.repeats) for x in (there, names[rows, edges]))
        (context,) = self._pack(there, context, left=True)

        asked = in_random_order()[:, : hops.shape[1]]
        answer = (asked + hops) % nodes[:, None]
        width = self.longest_name
        queries = np.full((*asked.shape, 2 + 2 * width), self.answer_token)
        queries[..., 0] = self.hop_token(hops)  # type: ignore[arg-type]
        queries[..., 1 : 1 + width] = names[rows, asked]
        queries[..., 2 + width :] = names[rows, answer]
        there = np.ones(queries.shape, dtype=bool)
        there[..., 1 : 1 + width] = np.arange(width) < lengths[rows, asked][..., None]
        there[..., 2 + width :] = np.arange(width) < lengths[rows, answer][..., None]
        there &= ~absent[:, : hops.shape[1], None]
        to_predict = np.broadcast_to(np.arange(2 + 2 * width) > width, there.shape)
        queries, to_predict = self._pack(there, queries, to_predict)

        input_ids = np.concatenate([context, queries], 1)
        labels = np.full(input_ids.shape, IGNORE_INDEX)
        at = self.context - 1  # the column whose label is the first query token
        labels[:, at:-1] = np.where(to_predict == 1, queries, IGNORE_INDEX)
        batch = as_batch(input_ids, labels, device)
        mask = self.attention_mask(batch.input_ids)
        if mask is None or bool(mask.all()):
            return batch
        # Padding stands at the ends alone, and windows end where they do without any.
        return batch._replace(attention_mask=mask, windows_by="positions")

    def evaluate(
        self,
        model: nn.Module,
        *,
        samples: int = 2048,
        batch_size: int = 128,
        seed: int = 0,
        passes: int | float | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]:
        """Accuracy of `model` on `samples` sequences of the evaluation stream.

        Returns, for each k of test_hops, exact_k (queries whose whole answer name is right) and loss_k (nats per token
        of an answer name); exact, the mean over k; exact_stderr, its standard error, as sequences vary; per_label and
        loss over all labels, [=] among them; samples.
        """
        options: dict = dict(samples=samples, batch_size=batch_size, seed=seed, passes=passes, device=device)
        s = score(self, model, **options)
        # An answer belongs to the query that began last before it.
        hop = s.input_ids - 2 * self.vocabulary
        begins = (hop >= 1) & (hop <= self.max_hops)
        query = begins.cumsum(1) - 1
        in_name = s.asked & (s.labels != self.answer_token)
        tally = torch.zeros(3, samples, int(query.max()) + 1, dtype=torch.float64)
        for total, values in zip(tally, (in_name & ~s.right, s.nats * in_name, in_name), strict=True):
            total.scatter_add_(1, query.clamp(min=0), values.double())
        wrong, nats, tokens = tally
        k = torch.zeros_like(wrong).scatter_add_(1, query.clamp(min=0), torch.where(begins, hop, 0).double())
        correct = (wrong == 0).double()
        exact = by_level("exact", correct, k, self.test_hops)
        losses = by_level("loss", nats / tokens.clamp(min=1), k, self.test_hops)
        per_sequence = (correct * (k > 0)).sum(1) / (k > 0).sum(1)
        return s.summary() | {
            "exact": float(np.nanmean(list(exact.values()))),
            "exact_stderr": per_sequence.std(correction=0).item() / samples**0.5,
            **exact,
            **losses,
        }

    def chance(self, samples: int = 16384) -> dict[str, float]:
        """What is reached without following the edges, per query.

        uniform   any string of a name's tokens, at the shortest length.
        majority  any node of the cycle.
        """
        return {"uniform": self.vocabulary**-self.shortest_name, "majority": 1 / self.max_nodes}

    def render(self, input_ids: Tensor, labels: Tensor) -> str:
        """One sequence, input_ids and labels int64 [T], as edges and answered queries in the original's tokens."""
        ids = input_ids.tolist()
        names = self._split_names([i for i in ids[: self.context] if i != self.pad_token])
        names = names[: len(names) // self.repeats]
        edges = ", ".join(f"{u} > {v}" for u, v in zip(names[::2], names[1::2], strict=True))
        lines = [f"{len(names) // 2} edges" + (f", read {self.repeats} times" if self.repeats > 1 else ""), edges]
        expected = labels.tolist()
        for at in range(self.context, len(ids)):
            if 1 <= ids[at] - 2 * self.vocabulary <= self.max_hops:
                equals = ids.index(self.answer_token, at)
                end = equals
                while end < len(ids) and expected[end] != IGNORE_INDEX:
                    end += 1
                (asked,), (answer,) = (self._split_names(x) for x in (ids[at + 1 : equals], expected[equals:end]))
                lines.append(f"[{9000 + ids[at] - 2 * self.vocabulary}] {asked} [9500] {answer}")
        return "\n".join(lines)

    def _split_names(self, tokens: list[int]) -> list[str]:
        names, current = [], []
        for token in tokens:
            current.append(str(token))
            if token > self.vocabulary:
                names.append(".".join(current))
                current = []
        return names

    def _sizes(self, stream: Stream, size: int, split: str, hops: int) -> tuple[np.ndarray, np.ndarray]:
        """Nodes n int64 [size], and hops k int64 [size, queries], in training at most `hops`."""
        count = min(self.queries, self.max_nodes)
        if split == "eval":
            every = np.resize(self.test_hops, size * count)
            return np.full(size, self.max_nodes), every[stream.uniform(size * count).argsort()].reshape(size, count)
        sizes = np.arange(self.min_nodes, self.max_nodes + 1)
        weights = np.cumsum(1 / (sizes + self.max_nodes**0.5))
        nodes = sizes[np.searchsorted(weights, stream.uniform(size) * weights[-1], side="right")]
        return nodes, 1 + stream.below(hops, size, count)

    def _names(self, stream: Stream, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Different names for every row: tokens int64 [size, max_nodes, longest_name], lengths int64 [size, max_nodes].

        Beyond a name's length its tokens mean nothing.
        """
        choices = range(self.shortest_name, self.longest_name + 1)
        lengths = self.shortest_name + stream.below(len(choices), size, self.max_nodes)
        names = np.zeros((size, self.max_nodes, self.longest_name), dtype=np.int64)
        for length in choices:
            numbers = stream.distinct(self.vocabulary**length, size, self.max_nodes)
            digits = numbers[..., None] // self.vocabulary ** np.arange(length) % self.vocabulary + 1
            digits[..., -1] += self.vocabulary
            names[..., :length] = np.where((lengths == length)[..., None], digits, names[..., :length])
        return names, lengths

    def _pack(self, there: np.ndarray, *parts: np.ndarray, left: bool = False) -> list[np.ndarray]:
        """Move what is `there` [size, ...] together, in order, and pad at the left or right: each [size, columns].

        The first part is tokens; any other is padded with 0.
        """
        there = there.reshape(len(there), -1)
        order = (there if left else ~there).argsort(1, kind="stable")
        there = np.take_along_axis(there, order, 1)
        packed = [np.take_along_axis(part.reshape(there.shape), order, 1) for part in parts]
        return [np.where(there, part, 0 if i else self.pad_token) for i, part in enumerate(packed)]
