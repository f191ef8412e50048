"""Your own text: lines of JSON, tokenised by a checkpoint folder's tokenizer.

    {"prompt": "...", "answer": "..."}     the loss is on the answer's tokens
    {"text": "..."}                        the loss is on every token but the first

Other keys are left alone. One example is one row, padded at its right: the model is causal, so no label's position sees
the padding, and which token it is changes nothing. Prompt and answer are tokenised apart, so that the answer's tokens
are those a model has to generate after the prompt; a space between the two belongs to one of them.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from rich import progress
from torch import nn

from sleep_ops.checks import check_choice, check_count, check_flags, expect, is_number
from sleep_ops.files import check_folder, write_atomically
from sleep_ops.streams import shuffled
from sleep_ops.tasks.base import IGNORE_INDEX, Batch
from sleep_ops.tasks.common import as_batch, evaluating, score_batch
from sleep_ops.tasks.examples import Example, Examples, file_key, gathered, stored
from sleep_ops.tokenizer import TOKENIZER_FILES, load_tokenizer

OVERFLOWS = ("error", "cut")
_SETTINGS = (
    *("data", "tokenizer", "eval_data", "held_out", "seq_len", "overflow", "end_token", "level"),
    *("cache", "digest"),
)
_LINES_AT_ONCE = 1000
_HELD_OUT_KEY, _ORDER_KEY, _EVAL_KEY = 1 << 63, 0, 1 << 62  # streams of random numbers that never meet
_order = lru_cache(maxsize=2)(shuffled)  # of an epoch, and of the next one, which a batch may reach into


@dataclass(frozen=True)
class Text:
    """Prompts and their answers, or running text, from files.

    data, eval_data  files of JSON lines; without eval_data, the fraction `held_out` of the lines of `data` (the same
                     ones whatever the seed) is kept out of training, to evaluate on.
    tokenizer        a folder with a transformers tokenizer, such as the model's.
    seq_len          tokens of a row, or None for those of the longest example; shorter examples are padded.
    overflow         what becomes of a prompt that with its answer is longer than seq_len: "error" is a ValueError,
                     "cut" drops its oldest tokens. Answers are never cut; texts longer than seq_len become several
                     examples.
    end_token        whether the tokenizer's end token follows every answer and text, as one more token to predict.
    level            a field of the lines, an integer >= 0, by which evaluation is reported too: their difficulty.
    cache            a folder to keep the tokens in, and to read them from as they are needed, for data larger than
                     memory: made once for a file, a tokenizer and a seq_len, which has to be given. The batches are
                     the same. None: tokens are kept in memory.
    digest           of all tokens; given, as in the settings of a run that is taken up again, it is compared.

    Raises ValueError naming the file and the line for one that isn't such an object, or too long; ImportError naming
    the extra without transformers.
    """

    data: str
    tokenizer: str
    eval_data: str | None = None
    held_out: float = 0.1
    seq_len: int | None = None
    overflow: str = "error"
    end_token: bool = True
    level: str | None = None
    cache: str | None = None
    digest: str | None = None
    splits: dict[str, Examples] = field(init=False, repr=False, compare=False)
    metric: str = field(init=False, repr=False, compare=False)

    name: ClassVar[str] = "text"
    window: ClassVar[None] = None

    def __post_init__(self):
        if self.seq_len is not None:
            check_count("seq_len", self.seq_len)
        check_choice("overflow", self.overflow, OVERFLOWS)
        check_flags(end_token=self.end_token)
        if self.cache is not None:
            check_folder("cache", Path(self.cache))
            expect(self.seq_len is not None, "seq_len", "an integer >= 1 with cache", None)
        fraction = is_number(self.held_out) and 0 < self.held_out < 1
        expect(fraction, "held_out", "a fraction between 0 and 1", self.held_out)
        tokenizer = load_tokenizer(self.tokenizer)
        if self.end_token:
            expected = "False for a tokenizer without an end token (eos_token)"
            expect(tokenizer.eos_token_id is not None, "end_token", expected, self.end_token)
        train = self._read(self.data, tokenizer)
        if self.eval_data is not None:
            asked = self._read(self.eval_data, tokenizer)
        else:
            count = int(train.lines[-1]) + 1
            kept = max(round(self.held_out * count), 1)
            expect(kept < count, "data", "lines for training and some to hold out, or eval_data", f"{count} lines")
            apart = np.isin(train.lines, shuffled(0, _HELD_OUT_KEY, count)[:kept])
            train, asked = (train.take(np.flatnonzero(which)) for which in (~apart, apart))
        object.__setattr__(self, "splits", {"train": train, "eval": asked})
        digest = self._digest()
        expect(self.digest in (None, digest), "data", f"the tokens of digest {self.digest}, as before", digest)
        object.__setattr__(self, "digest", digest)
        if self.seq_len is None:
            longest = max(int((examples.ends - examples.starts).max()) for examples in (train, asked))
            object.__setattr__(self, "seq_len", longest - 1)
        object.__setattr__(self, "metric", self._metric(train, asked))

    def _metric(self, train: Examples, asked: Examples) -> str:
        """Exact answers; the loss where there are only texts."""
        of_file = (train, asked) if self.eval_data is None else (asked,)
        if all((examples.answers == 1).all() for examples in of_file):
            # Answers to prompts of one token begin where texts do: the first line says which they are.
            _, first = next(_records(self.data if self.eval_data is None else self.eval_data, shown=False))
            return "exact" if "answer" in first else "loss"
        return "exact" if (asked.answers > 1).any() else "loss"

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id in use."""
        return 1 + max(examples.top for examples in self.splits.values())

    def to_dict(self) -> dict:
        return {"name": self.name} | {name: getattr(self, name) for name in _SETTINGS}

    def batch(
        self, seed: int, step: int, size: int, device: torch.device | str = "cpu", *, split: str = "train"
    ) -> Batch:
        """Batch number `step` of the stream (seed, split): `size` rows of `seq_len` tokens.

        Every epoch goes through all examples of the split in an order of its own. input_ids and labels come on
        `device`, loss_mask on the CPU.
        """
        if split not in self.splits:
            raise ValueError(f"split: expected one of {tuple(self.splits)}, got {split!r}")
        if not (0 <= seed < 1 << 64 and step >= 0 and size >= 1):
            expected = "integers 0 <= seed < 2^64, step >= 0, size >= 1"
            raise ValueError(f"seed, step, size: expected {expected}, got {seed}, {step}, {size}")
        examples = self.splits[split]
        input_ids = np.zeros((size, self.seq_len), dtype=np.int64)
        labels = np.full((size, self.seq_len), IGNORE_INDEX, dtype=np.int64)
        for row, i in enumerate(self._chosen(seed, step, size, split)):
            tokens, answer = examples.sequence(i), examples.answers[i]
            input_ids[row, : len(tokens) - 1] = tokens[:-1]
            labels[row, answer - 1 : len(tokens) - 1] = tokens[answer:]
        return as_batch(input_ids, labels, device)

    def _chosen(self, seed: int, step: int, size: int, split: str) -> np.ndarray:
        """The examples of a batch, by number."""
        count, key = len(self.splits[split].answers), _ORDER_KEY if split == "train" else _EVAL_KEY
        epochs, places = np.divmod(np.arange(step * size, (step + 1) * size), count)
        orders = {epoch: _order(seed, key | int(epoch), count) for epoch in np.unique(epochs)}
        return np.array([orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)])

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
        """Accuracy of `model` on `samples` evaluation examples, or on all of them where there are fewer.

        Returns exact (every answer token right), exact_stderr (its binomial standard error), per_label (of answer
        tokens), loss (nats per answer token), samples, and with `level` exact_L for every level L of the evaluation
        examples and majority_L, what the commonest of its answers would reach. The answers are fed as input, which
        changes nothing in `exact`: greedy decoding is right everywhere exactly when it is right everywhere given the
        right prefix.
        """
        if samples < 1 or batch_size < 1:
            raise ValueError(f"samples and batch_size: expected integers >= 1, got {samples} and {batch_size}")
        samples = min(samples, len(self.splits["eval"].answers))
        size = min(batch_size, samples)
        exact, right, loss, answers, levels = [], 0, 0.0, 0, []
        with evaluating(model):
            for step, start in enumerate(range(0, samples, size)):
                batch = self.batch(seed, step, size, split="eval").rows(slice(0, samples - start))
                found, nats = score_batch(model, batch, passes=passes, device=device)
                exact += (found | ~batch.loss_mask).all(1).tolist()
                levels += self.splits["eval"].levels[self._chosen(seed, step, size, "eval")][: len(found)].tolist()
                right, answers = right + int(found.sum()), answers + int(batch.loss_mask.sum())
                loss += nats.sum().item()
        rate = sum(exact) / samples
        by_level = {f"exact_{level}": _mean(exact, levels, level) for level in self._levels}
        return {
            "exact": rate,
            "exact_stderr": (rate * (1 - rate) / samples) ** 0.5,
            "per_label": right / answers,
            "loss": loss / answers,
            "samples": float(samples),
            **by_level,
            **{f"majority_{level}": self._majority(level) for level in self._levels},
        }

    def chance(self, samples: int = 16384) -> dict[str, float]:
        """What is reached without reading the prompts: majority, by always giving training's commonest answer."""
        found = {split: examples.given(samples) for split, examples in self.splits.items()}
        ((commonest, _),) = Counter(found["train"]).most_common(1)
        return {"majority": found["eval"].count(commonest) / len(found["eval"])}

    @property
    def _levels(self) -> list[int]:
        return sorted(set(self.splits["eval"].levels.tolist()) - {-1})

    def _majority(self, level: int) -> float:
        """How often the commonest answer of a level's evaluation examples is right."""
        examples = self.splits["eval"]
        given = [answer for answer, found in zip(examples.given(), examples.levels, strict=True) if found == level]
        return Counter(given).most_common(1)[0][1] / len(given)

    def _read(self, path: str, tokenizer) -> Examples:
        """All examples of a file."""
        if self.cache is None:
            return gathered(self._tokenised(path, tokenizer))
        return stored(Path(self.cache), self._key(path), lambda: self._tokenised(path, tokenizer))

    def _key(self, path: str) -> str:
        """The name in `cache` of what is made of a file."""
        expect(Path(path).is_file(), "data", "a file of JSON lines", str(path))
        vocabulary = sorted({x for pattern in TOKENIZER_FILES for x in Path(self.tokenizer).glob(pattern)})
        settings = self.seq_len, self.overflow, self.end_token, self.level, Examples._fields
        return file_key(Path(path), *(x.read_bytes() for x in vocabulary), settings)

    def _digest(self) -> str:
        """Of all tokens, as 16 hexadecimal digits."""
        place = None
        if self.cache is not None:
            paths = [self.data, *([] if self.eval_data is None else [self.eval_data])]
            place = Path(self.cache) / f"{file_key(*map(self._key, paths), self.held_out)}.digest"
            if place.is_file():
                return place.read_text()
        digest = hashlib.sha256()
        for examples in self.splits.values():
            examples.hash_into(digest)
        found = digest.hexdigest()[:16]
        if place is not None:
            write_atomically(place, found.encode())
        return found

    def _tokenised(self, path: str, tokenizer) -> Iterator[Example]:
        """The examples of a file, one after another."""
        number, lines = 0, _records(path, shown=self.cache is not None)
        while part := list(islice(lines, _LINES_AT_ONCE)):
            firsts = [r.get("prompt", r.get("text")) for _, r in part]
            seconds = [r.get("answer", "") for _, r in part]
            firsts, seconds = (
                tokenizer(texts, add_special_tokens=special)["input_ids"]
                for texts, special in ((firsts, True), (seconds, False))
            )
            for (where, record), first, second in zip(part, firsts, seconds, strict=True):
                end = [tokenizer.eos_token_id] if self.end_token else []
                level = -1 if self.level is None else record.get(self.level)
                if self.level is not None:
                    fits = type(level) is int and level >= 0
                    expect(fits, f"{where}: {self.level}", "an integer >= 0, as for `level`", level)
                for tokens, answer in self._examples(where, "text" in record, first, second + end):
                    yield tokens, answer, level, number
                number += 1
        expect(number > 0, "data", "at least one line", f"none in {path}")

    def _examples(self, where: str, running: bool, first: list[int], second: list[int]) -> Iterator[tuple]:
        """(tokens, place of the first one to predict) of a line; `second` is an answer, or the end of a text."""
        longest = None if self.seq_len is None else self.seq_len + 1  # the last one is only predicted
        if running:
            tokens = first + second
            expect(len(tokens) > 1, where, "a text of at least two tokens", len(tokens))
            # Pieces share a token: the last to predict in one is the first to read in the next.
            for start in range(0, len(tokens) - 1, self.seq_len or len(tokens)):
                yield np.array(tokens[start : None if longest is None else start + longest], dtype=np.int32), 1
            return
        expect(len(first) > 0, where, "a prompt of at least one token", "none")
        expect(len(second) > self.end_token, where, "an answer of at least one token", "none")
        surplus = 0 if longest is None else len(first) + len(second) - longest
        if surplus > 0:
            total = f"{len(first)} and {len(second)} tokens"
            possible = self.overflow == "cut" and surplus < len(first)
            expect(possible, where, f"a prompt and an answer that fit in seq_len {self.seq_len}", total)
            first = first[surplus:]
        yield np.array(first + second, dtype=np.int32), len(first)


def _records(path: str, *, shown: bool) -> Iterator[tuple[str, dict]]:
    """("file, line n", object) of every line that is not blank; shown: with a progress bar, in a terminal."""
    expect(Path(path).is_file(), "data", "a file of JSON lines", str(path))
    hidden = not (shown and sys.stdout.isatty() and os.environ.get("RANK", "0") == "0")
    with progress.open(path, "rb", description=f"tokens of {Path(path).name}", disable=hidden) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode())
                json.dumps(record, ensure_ascii=False).encode()  # half an emoji is no text
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: expected JSON, got {error}") from error
            keys = {"prompt", "answer", "text"} & record.keys() if isinstance(record, dict) else set()
            fits = keys in ({"prompt", "answer"}, {"text"}) and all(isinstance(record[key], str) for key in keys)
            expected = '{"prompt": string, "answer": string} or {"text": string}'
            expect(fits, where, expected, line.decode().strip()[:80])
            yield where, record


def _mean(values: list[bool], levels: list[int], level: int) -> float:
    """The mean over those of a level; NaN where there is none."""
    chosen = [value for value, found in zip(values, levels, strict=True) if found == level]
    return sum(chosen) / len(chosen) if chosen else float("nan")
