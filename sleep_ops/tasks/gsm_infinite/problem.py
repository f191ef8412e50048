"""Problems in words: one question, the sentences its answer follows from, and distractors up to a wanted length.

    Question: What is the number of otters in Pine Lake? Problem: <note> <sentences, in random order> Answer:

The question comes first, so that it is read before what it asks about, and the answer is given without working.
`op` is exact: the operations on the path from constants to the answer, every constant counting one. Distractors are
sentences of the same form, about quantities that follow from those already there: no quantity that the question needs
follows from one of theirs. They are never constants, for a constant follows from nothing.
On one CPU core a problem of 512 tokens takes about 0.5 ms, one of 3,000 2 ms and a slower tokenizer's time.
Sources: Zhou et al., GSM-Infinite, arXiv 2502.05252; Ye et al., iGSM, arXiv 2407.20311. Worlds and sentences are ours.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from sleep_ops.streams import split_key
from sleep_ops.tasks.gsm_infinite.structure import WHOLE, Draws, Quantity, Rule, core, distractor
from sleep_ops.tasks.gsm_infinite.worlds import WORLDS, World

MAX_OP = 32  # with many more, values within 0..LIMIT are hardly ever found
_WORD = re.compile(r"[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]")
_SIGNS = {"more": "{1} + {0}", "fewer": "{0} - {1}", "times": "{1} * {0}"}
_JOINS = {"sum": " + ", "total": " + ", "difference": " - ", "product": " * "}


def words(text: str) -> list[str]:
    """Words, numbers and punctuation marks."""
    return _WORD.findall(text)


def count_tokens(text: str) -> int:
    """About what a subword tokenizer makes of it: one for each punctuation mark and digit, one for every started eight
    letters of a word."""
    return sum(-(-len(word) // 8) if word.isalpha() else len(word) for word in words(text))


def prompt_of(question: str, problem: str) -> str:
    return f"Question: {question} Problem: {problem} Answer:"


@dataclass(frozen=True)
class Problem:
    """One problem.

    id         of (split, seed, index); no two problems share one.
    template   its world's name.
    op         operations that the answer takes.
    question   and, after the world's `note`, the `sentences` in the order they are read; `core` says of each of them
               whether the answer needs it.
    answer     in 0..LIMIT.
    solution   the working, one step a sentence, which no prompt shows.
    length     tokens of the prompt, as the generator's `count` has it.
    """

    id: str
    template: str
    op: int
    question: str
    note: str
    sentences: tuple[str, ...]
    core: tuple[bool, ...]
    answer: int
    solution: str
    length: int

    @property
    def problem(self) -> str:
        return " ".join((self.note, *self.sentences))

    @property
    def prompt(self) -> str:
        return prompt_of(self.question, self.problem)

    def record(self) -> dict[str, str | int]:
        """What a line of an exported file holds: prompt and answer (a space first) for training, and the rest."""
        return {
            "prompt": self.prompt,
            "answer": f" {self.answer}",
            "problem": self.problem,
            "question": self.question,
            "solution": self.solution,
            "op": self.op,
            "id": self.id,
            "template": self.template,
            "length": self.length,
        }


@dataclass(frozen=True)
class Generator:
    """Makes problem number `index` of the stream (seed, split), each without those before it.

    ops      smallest and largest number of operations, each number in between as likely.
    lengths  smallest and largest wanted length of the prompt in tokens, each in between as likely: sentences are added
             as long as they fit, so that less than one more would have been room for. None: no distractors.
    count    how many tokens a text has, such as by a checkpoint's tokenizer. Problems depend on it.

    Raises ValueError for settings that are not such, and in `problem` where the answer's own sentences are longer than
    the wanted length (`needed` says what is always enough), or the world has too few places for it.
    """

    ops: tuple[int, int] = (1, 8)
    lengths: tuple[int, int] | None = (2000, 3300)
    count: Callable[[str], int] = count_tokens

    def __post_init__(self):
        for name, largest in (("ops", MAX_OP), ("lengths", None)):
            value = getattr(self, name)
            if name == "lengths" and value is None:
                continue
            pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(type(v) is int for v in value)
            if not (pair and 1 <= value[0] <= value[1] and (largest is None or value[1] <= largest)):
                bound = "" if largest is None else f" <= {largest}"
                raise ValueError(f"{name}: expected a smallest and a largest integer >= 1{bound}, got {value!r}")
            object.__setattr__(self, name, tuple(value))

    def problem(self, seed: int, index: int, split: str = "train") -> Problem:
        """Problem number `index` of the stream (seed, split), of "train" or "eval", whose problems never meet."""
        draw, op, length, world = self._start(seed, index, split)
        structure, rules, values = core(draw, op, world.places, len(world.kinds))
        asked = next(iter(rules))
        question, answer = world.ask(asked), values[asked]
        stated = [(world.state(q, rule), True) for q, rule in rules.items() if q.form not in WHOLE]
        stated = draw.sample(stated, len(stated))
        solution = _solution(world, rules, values)

        def measure() -> int:
            return self.count(prompt_of(question, " ".join((world.note, *(text for text, _ in stated)))))

        total = measure()
        if length is not None:
            if total > length:
                raise ValueError(f"lengths: expected at least the {total} tokens of this problem, got {length}")
            known, added = list(rules), []
            following = self._distractor(draw, world, structure, known, values)
            # A tokenizer's counts of sentences need not add up to that of the text: it has the last word.
            while total + following[1] <= length:
                while total + following[1] <= length:
                    stated.insert(draw.below(len(stated) + 1), following[0])
                    added.append(following[0])
                    total += following[1]
                    following = self._distractor(draw, world, structure, known, values)
                total = measure()
            while total > length:
                stated.remove(added.pop())
                total = measure()
        sentences, needed = zip(*stated, strict=True)
        name = f"{split}-{seed}-{index}"
        return Problem(name, world.name, op, question, world.note, sentences, needed, answer, solution, total)

    def answer(self, seed: int, index: int, split: str = "train") -> tuple[int, int]:
        """op and answer of a problem, without the work of its words and distractors."""
        draw, op, _, world = self._start(seed, index, split)
        _, rules, values = core(draw, op, world.places, len(world.kinds))
        return op, values[next(iter(rules))]

    def needed(self) -> int:
        """A length that every problem's own sentences fit in, where the words of a world are equally long."""
        largest = 0
        for world in WORLDS:
            phrases = [Quantity("count", 0, 0), Quantity("rate", 0, 0), Quantity("total", 0), Quantity("parts", 0)]
            joins = [Rule((a, b), join) for join in ("sum", "difference", "product") for a in phrases for b in phrases]
            heads = [Rule((a,), head=head) for head in _SIGNS for a in phrases]
            step = max(self.count(" " + world.state(q, rule)) for q in phrases[:2] for rule in joins + heads)
            start = max(self.count(prompt_of(world.ask(q), world.note)) for q in phrases)
            largest = max(largest, start + self.ops[1] * step)
        return largest

    def _start(self, seed: int, index: int, split: str) -> tuple[Draws, int, int | None, World]:
        if not 0 <= seed < 1 << 64 or not 0 <= index < 1 << 63:
            raise ValueError(f"seed and index: expected integers >= 0, got {seed} and {index}")
        draw = Draws(seed, split_key(split, index))
        op = _between(draw, self.ops)
        return draw, op, self.lengths and _between(draw, self.lengths), draw.choice(WORLDS)

    def _distractor(self, draw, world, structure, known, values) -> tuple[tuple[str, bool], int]:
        text = world.state(*distractor(draw, structure, known, values))
        return (text, False), self.count(" " + text)


def write_jsonl(path: str | Path, problems: Iterable[Problem]) -> int:
    """Write the records of these problems, one a line; the number of them."""
    count = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for problem in problems:
            file.write(json.dumps(problem.record()) + "\n")
            count += 1
    return count


def _between(draw: Draws, ends: tuple[int, int]) -> int:
    return ends[0] + draw.below(ends[1] - ends[0] + 1)


def _solution(world: World, rules: dict[Quantity, Rule], values: dict[Quantity, int]) -> str:
    steps = [f"{world.phrase(q)} = {_working(rules[q], values)}." for q in reversed(rules)]
    return " ".join(step[0].upper() + step[1:] for step in steps)


def _working(rule: Rule, values: dict[Quantity, int]) -> str:
    value = str(rule.value(values))
    if not rule.operands:
        return value
    v = [str(values[q]) for q in rule.operands]
    if rule.join == "parts":
        text = " + ".join(f"{a} * {b}" for a, b in zip(v[::2], v[1::2], strict=True))
    else:
        text = _JOINS.get(rule.join, "").join(v)
    if rule.head:
        text = _SIGNS[rule.head].format(f"({text})" if len(v) > 1 else text, rule.number)
    return f"{text} = {value}"
