"""Word problems over permutation groups: the product of all elements read so far.

    loss="every"   input   x_1  x_2     x_3         ...            loss="last"   x_1 ... x_n  [=]
                   target  x_1  x_1 x_2 x_1 x_2 x_3 ...                           -  ...  -   x_1 ... x_n

Tokens are group elements: the permutations of 0 .. 4 (for A5 the even ones) numbered in lexicographic order, 0 the
identity. A product applies its first factor first. Neither group is solvable, so the word problem is complete for NC1,
out of reach, at every length, of attention and of diagonal recurrences of constant depth (unless TC0 = NC1). Source:
Merrill et al., The Illusion of State in State-Space Models, arXiv 2404.08819, and Liu et al., Transformers Learn
Shortcuts to Automata, arXiv 2210.10749, whose words are of generators. With loss="last" the question has a position of
its own (ours), so that the whole word can be evicted before it.

A batch of 512 words of 64 elements takes about 0.7 ms on one CPU core: 700,000 words, 45 million tokens, a second.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import combinations, permutations
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from sleep_ops.checks import check_choice, check_counts
from sleep_ops.streams import Stream
from sleep_ops.tasks.base import IGNORE_INDEX, Batch
from sleep_ops.tasks.common import as_batch, score

GROUPS = ("S5", "A5")
ALPHABETS = ("group", "generators")
LOSSES = ("every", "last")


@cache
def elements(group: str) -> np.ndarray:
    """The permutations of a group, int64 [order, 5]: element p takes i to p[i]."""
    found = [
        p
        for p in permutations(range(5))
        if group == "S5" or sum(p[i] > p[j] for i, j in combinations(range(5), 2)) % 2 == 0
    ]
    return np.array(found)


@cache
def letters(group: str, alphabet: str) -> np.ndarray:
    """Numbers of the elements that words are made of, int64: all of them, or two that all are products of.

    The two are the cycle of five with the swap of 0 and 1 (S5), or with the cycle of 0, 1 and 2 (A5).
    """
    if alphabet == "group":
        return np.arange(len(elements(group)))
    two = ((1, 2, 3, 4, 0), (1, 0, 2, 3, 4) if group == "S5" else (1, 2, 0, 3, 4))
    return np.array([elements(group).tolist().index(list(p)) for p in two])


@cache
def product_table(group: str) -> np.ndarray:
    """uint8 [order, order]: table[a, b] is the element that applies a, then b."""
    places = 5 ** np.arange(4, -1, -1)
    found = elements(group)
    # b[a[i]] for every pair, looked up by its digits, which are sorted as the elements are.
    return np.searchsorted(found @ places, found.T[found].swapaxes(1, 2) @ places).astype(np.uint8)


def products(words: np.ndarray, group: str) -> np.ndarray:
    """The product of the first i elements, for every i: uint8 [B, T] -> uint8 [B, T]."""
    table, found, reach = product_table(group), words.copy(), 1
    # After each round found[:, i] is the product of the last `reach` elements up to i.
    while reach < words.shape[1]:
        found[:, reach:] = table[found[:, :-reach], found[:, reach:]]
        reach *= 2
    return found


@dataclass(frozen=True)
class WordProblem:
    """The word problem task.

    group     "S5" (120 elements) or "A5" (60).
    length    elements of a word, drawn uniformly.
    loss      "every": each position predicts the product up to itself; "last": one more position, [=], that of the
              word.
    window    the natural one.
    alphabet  what words are made of: "group", any element; "generators", two elements that generate the group.
    """

    group: str = "S5"
    length: int = 64
    loss: str = "every"
    window: int = 16
    alphabet: str = "group"

    name: ClassVar[str] = "word_problem"
    metric: ClassVar[str] = "exact"

    def __post_init__(self):
        check_choice("group", self.group, GROUPS)
        check_choice("loss", self.loss, LOSSES)
        check_choice("alphabet", self.alphabet, ALPHABETS)
        check_counts(self, length=1, window=1)

    @property
    def order(self) -> int:
        """Elements of the group."""
        return len(elements(self.group))

    @property
    def vocab_size(self) -> int:
        return self.order + 1  # and [=]

    @property
    def seq_len(self) -> int:
        return self.length + (self.loss == "last")

    def to_dict(self) -> dict:
        return {"name": self.name, **asdict(self)}

    def batch(
        self, seed: int, step: int, size: int, device: torch.device | str = "cpu", *, split: str = "train"
    ) -> Batch:
        """Batch number `step` of the stream (seed, split): `size` sequences of `seq_len` tokens.

        input_ids and labels come on `device`, loss_mask on the CPU.
        """
        drawn = letters(self.group, self.alphabet)
        words = drawn[Stream(seed, step, size, split).below(len(drawn), size, self.length)]
        found = products(words.astype(np.uint8), self.group)
        if self.loss == "every":
            return as_batch(words, found.astype(np.int64), device)
        labels = np.full((size, self.seq_len), IGNORE_INDEX)
        labels[:, -1] = found[:, -1]
        return as_batch(np.pad(words, ((0, 0), (0, 1)), constant_values=self.order), labels, device)

    def evaluate(
        self,
        model: nn.Module,
        *,
        samples: int = 2048,
        batch_size: int = 512,
        seed: int = 0,
        passes: int | float | None = None,
        device: torch.device | str = "cpu",
        lengths: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Accuracy of `model` on `samples` words of the evaluation stream.

        Returns exact (all labels of a word right), exact_stderr (its binomial standard error), per_label, loss (nats
        per label), samples, and length_i, how often the product of i elements is right: for i = 1, 2, 4, ... and the
        whole word with loss="every", for the whole word with "last".

        lengths: of further words, `samples` of each, longer than in training or shorter; each adds its length_i.
        """
        how: dict = {"samples": samples, "batch_size": batch_size, "seed": seed, "passes": passes, "device": device}
        s = score(self, model, **how)
        found = s.summary()
        if self.loss == "every":
            shorter = (2**i for i in range(self.length.bit_length()))
            found |= {f"length_{i}": s.right[:, i - 1].double().mean().item() for i in (*shorter, self.length)}
        for length in (*(lengths or ()), *([self.length] if self.loss == "last" else [])):
            last = s if length == self.length else score(replace(self, length=length), model, **how)
            found[f"length_{length}"] = last.right[:, -1].double().mean().item()
        return found

    def chance(self, samples: int = 16384) -> dict[str, float]:
        """What is reached without reading the words.

        uniform    all labels right by any element at each.
        majority   all labels right by the likeliest answer: with loss="every" the products of one word, one of
                   letters^length; with "last" the commonest product.
        per_label  a label right by the commonest product at its place.
        """
        drawn, asked = letters(self.group, self.alphabet), slice(None if self.loss == "every" else -1, None)
        likely = np.eye(1, self.order)[0]  # of each product, before anything is read
        after = product_table(self.group)[:, drawn].ravel()  # p x for every product p and letter x
        commonest = []
        for _ in range(self.length):
            likely = np.bincount(after, np.repeat(likely, len(drawn)), self.order) / len(drawn)
            commonest.append(likely.max())
        return {
            "uniform": float(self.order) ** -len(commonest[asked]),
            "majority": float(len(drawn)) ** -self.length if self.loss == "every" else float(commonest[-1]),
            "per_label": float(np.mean(commonest[asked])),
        }

    def render(self, input_ids: Tensor, labels: Tensor) -> str:
        """One sequence, input_ids and labels int64 [T]: each element as the images of 0 .. 4, then any product."""
        shown = ["".join(map(str, p)) for p in elements(self.group).tolist()] + ["[=]"]
        return "\n".join(
            shown[token] + ("" if label == IGNORE_INDEX else f" -> {shown[label]}")
            for token, label in zip(input_ids.tolist(), labels.tolist(), strict=True)
        )
