"""An evaluator that reads a problem's words: what the answer is, what it takes, and which sentences it needs.

It shares the worlds' wording with the generator and nothing else: neither its graph nor its arithmetic.
"""

import re
from typing import NamedTuple

from sleep_ops.tasks.gsm_infinite.worlds import WORLDS, World

_FORMS = ("count", "rate", "total", "parts")
_HEADS = {"more": lambda n, v: v + n, "fewer": lambda n, v: v - n, "times": lambda n, v: v * n}
_JOINS = {"sum": lambda v: sum(v), "difference": lambda v: v[0] - v[1], "product": lambda v: v[0] * v[1]}
Name = tuple[str, str, str | None]  # form, place, kind


class Evaluation(NamedTuple):
    """answer; op, the operations that it takes; needed, the numbers of the sentences that it needs."""

    answer: int
    op: int
    needed: frozenset[int]


class Expression(NamedTuple):
    """What a sentence says a quantity is: a number, or a head and its number over a join of quantities."""

    head: str | None
    number: int | None
    join: str | None
    names: tuple[Name, ...]


class Reading:
    """A problem's text, parsed. ValueError, quoting it, for a sentence that is not of its world's form, or that
    states what another one does."""

    def __init__(self, problem: str):
        worlds = [world for world in WORLDS if problem.startswith(world.note)]
        if len(worlds) != 1:
            raise ValueError(f"problem: expected the note of a world first, got {problem[:80]!r}")
        (self.world,) = worlds
        self._phrases = {form: _pattern(getattr(self.world, form), self.world) for form in _FORMS}
        self._heads = {head: _pattern(getattr(self.world, head), self.world) for head in _HEADS}
        self._joins = {join: _pattern(getattr(self.world, join), self.world) for join in _JOINS}
        statement = _pattern(self.world.statement, self.world)
        self.sentences = re.findall(r"[^.]+\.", problem[len(self.world.note) :])
        self.stated: dict[Name, tuple[int, Expression]] = {}
        for i, sentence in enumerate(self.sentences):
            sentence = sentence.strip()
            found = statement.fullmatch(sentence[0].lower() + sentence[1:])
            if found is None:
                raise ValueError(f"problem: expected statements of {self.world.name}, got {sentence!r}")
            name = self._name(found["quantity"])
            if name in self.stated or name[0] not in ("count", "rate"):
                raise ValueError(f"problem: expected each count or rate to be stated once, got {sentence!r}")
            self.stated[name] = i, self._expression(found["expression"])

    def evaluate(self, question: str) -> Evaluation:
        """ValueError for a question of another form, or one that needs what is not stated or what needs itself."""
        found = _pattern(self.world.question, self.world).fullmatch(question)
        if found is None:
            raise ValueError(f"question: expected one of {self.world.name}, got {question!r}")
        done: dict[Name, tuple[int, int]] = {}
        asked = self._name(found["quantity"])
        self._solve(asked, done, ())
        needed = frozenset(self.stated[name][0] for name in done if name in self.stated)
        return Evaluation(done[asked][0], sum(op for _, op in done.values()), needed)

    def _solve(self, name: Name, done: dict[Name, tuple[int, int]], above: tuple[Name, ...]) -> int:
        """The quantity's value; it and the operations it takes itself go to `done`, like those of all it needs."""
        if name in above:
            raise ValueError(f"problem: expected no quantity to need itself, got {name}")
        if name in done:
            return done[name][0]

        def solve(other: Name) -> int:
            return self._solve(other, done, (*above, name))

        form, place, _ = name
        if form in ("total", "parts"):
            kinds = [kind for form, at, kind in self.stated if form == "count" and at == place]
            if not kinds:
                raise ValueError(f"problem: expected a count for {place}, got none")
            value, op = sum(solve(("count", place, kind)) for kind in kinds), len(kinds) - 1
            if form == "parts":
                value = sum(solve(("count", place, kind)) * solve(("rate", place, kind)) for kind in kinds)
                op += len(kinds)
        elif name not in self.stated:
            raise ValueError(f"problem: expected a statement of {name}, got none")
        else:
            head, number, join, names = self.stated[name][1]
            values = [solve(other) for other in names]
            if not values:
                value, op = number, 1
            else:
                value, op = (_JOINS[join](values) if join else values[0]), len(values) - 1
                if head:
                    value, op = _HEADS[head](number, value), op + 1
        done[name] = value, op
        return value

    def _name(self, phrase: str) -> Name:
        for form, pattern in self._phrases.items():
            if found := pattern.fullmatch(phrase):
                return form, found["place"], found.groupdict().get("kind")
        raise ValueError(f"problem: expected a quantity of {self.world.name}, got {phrase!r}")

    def _expression(self, text: str) -> Expression:
        if text.isdecimal():
            return Expression(None, int(text), None, ())
        head = number = join = None
        for name, pattern in self._heads.items():
            if found := pattern.fullmatch(text):
                head, number, text = name, int(found["number"]), found["rest"]
                break
        for name, pattern in self._joins.items():
            if found := pattern.fullmatch(text):
                join, text = name, found["operands"]
                break
        names = tuple(self._name(phrase) for phrase in (re.split(", | and ", text) if join else [text]))
        if join and (len(names) not in (2, 3) if join == "sum" else len(names) != 2):
            raise ValueError(f"problem: expected another number of quantities, got {text!r}")
        return Expression(head, number, join, names)


def evaluate(problem: str, question: str) -> Evaluation:
    """Read `problem` and answer `question`, both in the words of one world. ValueError where they are not."""
    return Reading(problem).evaluate(question)


def _pattern(template: str, world: World) -> re.Pattern:
    groups = {
        "place": r"(?P<place>[A-Z][a-z]+ [A-Z][a-z]+)",
        "kind": f"(?P<kind>{'|'.join(world.kinds)})",
        "number": r"(?P<number>[0-9]+)",
    }
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(groups.get(p, f"(?P<{p}>.+)") if i % 2 else re.escape(p) for i, p in enumerate(parts)))
