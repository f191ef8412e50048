"""Quantities, how they follow from each other, and random problems over them: integers only, no words.

The structure graph has places that hold kinds. Each of its edges carries two quantities, `count` (how many of the kind
are at the place) and `rate` (how many parts each of them has); each place carries two more, `total` (the sum of its
counts) and `parts` (the sum of count times rate). A count or a rate is stated by one sentence, its `Rule`. A total or
parts is stated by none: it follows from which counts and rates are stated for the place.

The dependency graph is a rule for every quantity. `core` draws one that the question needs entirely and whose rules
cost exactly `op` operations; `distractor` adds a quantity that depends on those already there.
Sources: iGSM (Ye et al., arXiv 2407.20311), structure and dependency graph; GSM-Infinite (Zhou et al., arXiv
2502.05252), distractors as outgoing edges alone. The forms of the rules and all distributions are ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sleep_ops.streams import source

LIMIT = 50  # every quantity, core or distractor, is in 0..LIMIT
LARGEST_NUMBER = 9  # of those that stand in a sentence
LARGEST_FACTOR = 4
STATED, WHOLE = ("count", "rate"), ("total", "parts")
_SHAPES = ((True, 1), (False, 2), (True, 2), (False, 3), (True, 3))  # (has a head, operands)
_WHOLE_COST = 3  # a total of two constants, or the parts of one: the cheapest


class Draws:
    """Random integers of the stream (seed, key): counter-based, so that any stream can be had without the others."""

    def __init__(self, seed: int, key: int):
        self._source = source(seed, key)
        self._words = iter(())

    def below(self, n: int) -> int:
        """Uniform in 0..n-1."""
        word = next(self._words, None)
        if word is None:
            self._words = iter(self._source.random_raw(256).tolist())
            word = next(self._words)
        return word * n >> 64

    def once_in(self, n: int) -> bool:
        return self.below(n) == 0

    def choice(self, items: Sequence):
        return items[self.below(len(items))]

    def sample(self, items: Sequence, count: int) -> list:
        """`count` distinct items in random order."""
        places = []
        while len(places) < count:
            place = self.below(len(items))
            if place not in places:
                places.append(place)
        return [items[place] for place in places]


class Quantity(NamedTuple):
    """form is of STATED, or of WHOLE, where kind is -1."""

    form: str
    place: int
    kind: int = -1


class Rule(NamedTuple):
    """A quantity's value: the operands joined, then the head applied with its number.

    join  "" (one operand, or none), "sum" (two or three), "difference" (first less second, never negative) or
          "product" of stated quantities; "total" (the operands' sum) or "parts" (the sum of the operands' products,
          two by two) of whole ones.
    head  "", "more", "fewer" or "times"; without operands the value is the number.
    """

    operands: tuple[Quantity, ...] = ()
    join: str = ""
    head: str = ""
    number: int = 0

    @property
    def operations(self) -> int:
        """Additions, subtractions and multiplications of two numbers; a constant counts one."""
        return len(self.operands) - 1 + bool(self.head) if self.operands else 1

    def value(self, values: dict[Quantity, int]) -> int:
        if not self.operands:
            return self.number
        v = _joined(self.join, [values[q] for q in self.operands])
        return {"": v, "more": v + self.number, "fewer": v - self.number, "times": v * self.number}[self.head]


def _joined(join: str, v: list[int]) -> int:
    if join == "difference":
        return v[0] - v[1]
    if join == "product":
        return v[0] * v[1]
    if join == "parts":
        return sum(a * b for a, b in zip(v[::2], v[1::2], strict=True))
    return sum(v)


class Structure:
    """Which places and kinds are in use. A place with a whole quantity is closed: nothing new is stated for it."""

    def __init__(self, places: int, kinds: int):
        self.places, self.kinds = places, kinds
        self.seen: set[int] = set()
        self.open: list[int] = []
        self.counts: dict[int, list[int]] = {}  # of an open place, the kinds whose count is stated
        self.used: set[Quantity] = set()

    def stated(self, draw: Draws) -> Quantity:
        """A new count (two times in three) or rate at an open place."""
        while len(self.open) < 4 or len(self.used) >= len(self.open) * self.kinds:  # at most half full
            self.open.append(self._new_place(draw))
            self.counts[self.open[-1]] = []
        while True:
            quantity = Quantity(STATED[draw.once_in(3)], draw.choice(self.open), draw.below(self.kinds))
            if quantity not in self.used:
                self.used.add(quantity)
                if quantity.form == "count":
                    self.counts[quantity.place].append(quantity.kind)
                return quantity

    def whole(self, draw: Draws) -> Quantity:
        """A whole quantity of a new place, closed from the start."""
        return Quantity(draw.choice(WHOLE), self._new_place(draw))

    def members(self, draw: Draws, quantity: Quantity, budget: int) -> tuple[Quantity, ...]:
        """The counts, or counts and rates, that a new whole quantity follows from; with their sum and one operation
        for each they cost at most `budget`, which is at least _WHOLE_COST."""
        if quantity.form == "total":
            count = 2 + draw.below(min(2, (budget - 1) // 2))
        else:
            count = 1 + draw.below(min(2, (budget + 1) // 4))
        return _members(quantity, draw.sample(range(self.kinds), count))

    def close(self, draw: Draws, values: dict[Quantity, int]) -> Quantity | None:
        """The whole of an open place with at least two counts, whose value joins `values`; the place is closed by it.
        Parts where every rate is stated, else a total; None where the drawn place has neither within LIMIT."""
        if not self.open:
            return None
        place = draw.choice(self.open)
        kinds = self.counts[place]
        if len(kinds) < 2:
            return None
        quantity = Quantity(WHOLE[all(Quantity("rate", place, kind) in self.used for kind in kinds)], place)
        rule = _rule(draw, quantity.form, _members(quantity, kinds), False, values)
        if rule is None:
            return None
        self.open.remove(place)
        values[quantity] = rule.value(values)
        return quantity

    def _new_place(self, draw: Draws) -> int:
        if len(self.seen) == self.places:
            raise ValueError(f"lengths: expected no more than the quantities of {self.places} places take, got more")
        while (place := draw.below(self.places)) in self.seen:
            pass
        self.seen.add(place)
        return place


def _members(quantity: Quantity, kinds: Sequence[int]) -> tuple[Quantity, ...]:
    forms = STATED[:1] if quantity.form == "total" else STATED
    return tuple(Quantity(form, quantity.place, kind) for kind in kinds for form in forms)


def core(draw: Draws, op: int, places: int, kinds: int) -> tuple[Structure, dict[Quantity, Rule], dict[Quantity, int]]:
    """A structure, the rules of all quantities that the first of them needs (itself included; operands come after
    what they are for), `op` operations in all, and their values."""
    while True:
        structure = Structure(places, kinds)
        outline = _outline(draw, structure, op)
        rules, values = {}, {}
        for quantity in reversed(outline):
            rule = _rule(draw, quantity.form, *outline[quantity], values)
            if rule is None:
                break
            rules[quantity], values[quantity] = rule, rule.value(values)
        else:
            return structure, dict(reversed(rules.items())), values


def distractor(
    draw: Draws, structure: Structure, known: list[Quantity], values: dict[Quantity, int]
) -> tuple[Quantity, Rule]:
    """A stated quantity that follows from some of `known`; it is added to known and values, and so, now and then, is
    the whole of a place, for those to come."""
    if draw.once_in(8) and (whole := structure.close(draw, values)):
        known.append(whole)
    rule = None
    while rule is None:
        headed, count = draw.choice(_SHAPES)
        if count <= len(known):
            rule = _rule(draw, "", tuple(draw.sample(known, count)), headed, values)
    quantity = structure.stated(draw)
    known.append(quantity)
    values[quantity] = rule.value(values)
    return quantity, rule


def _outline(draw: Draws, structure: Structure, op: int) -> dict[Quantity, tuple[tuple[Quantity, ...], bool]]:
    """Operands and "has a head" of every quantity, the asked one first: the dependency graph without its values.

    Quantities wait in `pending` until it is settled what they follow from: new ones, or others that wait. What waits
    has no operands yet, so no cycle closes; what is made is made for something, so the first needs all.
    """
    pending = [structure.whole(draw) if op >= _WHOLE_COST and draw.once_in(3) else structure.stated(draw)]
    outline, left = {}, op
    while pending:
        quantity = pending.pop(draw.below(len(pending)))
        budget = left - sum(_least(q) for q in pending)
        headed = False
        if quantity.form in WHOLE:
            operands = structure.members(draw, quantity, budget)
            new = list(operands)
        else:
            possible = [(h, m) for h, m in _SHAPES if h + m - 1 + max(m - len(pending), 0) <= budget]
            if not possible or (pending and draw.once_in(4)):
                operands, new = (), []
            else:
                headed, count = draw.choice(possible)
                spare = budget - (headed + count - 1)
                shared = max(count - spare, 0)
                while shared < min(count, len(pending)) and draw.once_in(4):
                    shared += 1
                spare -= count - shared
                new = []
                for _ in range(count - shared):
                    bigger = spare >= _WHOLE_COST - 1 and draw.once_in(4)
                    spare -= bigger * (_WHOLE_COST - 1)
                    new.append(structure.whole(draw) if bigger else structure.stated(draw))
                operands = (*new, *draw.sample(pending, shared))
        outline[quantity] = operands, headed
        left -= Rule(operands, head="more" if headed else "").operations
        pending += new
    return outline


def _least(quantity: Quantity) -> int:
    """Operations that a quantity takes at least, its operands' included."""
    return _WHOLE_COST if quantity.form in WHOLE else 1


def _rule(
    draw: Draws, form: str, operands: tuple[Quantity, ...], headed: bool, values: dict[Quantity, int]
) -> Rule | None:
    """A rule with these operands whose value is in 0..LIMIT, drawn among the possible ones; None where there's none.

    No product has a factor of 0: every operand matters.
    """
    if not operands:
        return Rule(number=1 + draw.below(LARGEST_NUMBER))
    found = [values[q] for q in operands]
    if form in WHOLE:
        fits = _joined(form, found) <= LIMIT and (form == "total" or min(found) > 0)
        return Rule(operands, form) if fits else None
    joins = ["sum"] if sum(found) <= LIMIT else []
    if len(operands) == 1:
        joins = [""]
    elif len(operands) == 2:
        joins += ["difference"]
        joins += ["product"] if min(found) > 1 and found[0] * found[1] <= LIMIT else []
    if not joins:
        return None
    join = draw.choice(joins)
    if join == "difference" and found[0] < found[1]:
        operands, found = operands[::-1], found[::-1]
    if not headed:
        return Rule(operands, join)
    v = _joined(join, found)
    numbers = {"more": (1, LIMIT - v), "fewer": (1, v), "times": (2, min(LARGEST_FACTOR, LIMIT // v) if v else 0)}
    head = draw.choice([head for head, (low, high) in numbers.items() if low <= high])
    low, high = numbers[head]
    return Rule(operands, join, head, low + draw.below(min(high, LARGEST_NUMBER) - low + 1))
