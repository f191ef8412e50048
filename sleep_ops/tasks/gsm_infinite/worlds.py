"""The worlds: what places, kinds and quantities are called, and how sentences are put.

A place's name is two words, a kind one, and a number stands alone, so that the length in words of a sentence depends on
its rule and world alone. The number in front of an expression is applied to all that follows it.
"""

from dataclasses import dataclass

from sleep_ops.tasks.gsm_infinite.structure import STATED, WHOLE, Quantity, Rule

FIRST_NAMES = tuple(
    "Alder Amber Birch Bramble Cedar Clover Copper Crystal Eastern Elder Falcon Golden Granite Harbor Hazel Ivory "
    "Juniper Laurel Linden Maple Marble Misty Northern Oak Pearl Pine River Silver Stone Sunny Western Willow".split()
)


@dataclass(frozen=True)
class World:
    """The words of one world.

    name         what records call `template`.
    last_names   second words of places; the first ones are FIRST_NAMES.
    kinds        singular; the plural takes an s.
    count, rate, total, parts                          phrases for quantities, with {place} and {kind}.
    note         says what a whole takes in.
    question, statement                                with {quantity} and {expression}.
    more, fewer, times                                 with {number} and {rest}.
    sum, difference, product                           with {operands}, which are listed with commas and "and".
    """

    name: str
    last_names: tuple[str, ...]
    kinds: tuple[str, ...]
    count: str
    rate: str
    total: str
    parts: str
    note: str
    question: str
    statement: str
    more: str
    fewer: str
    times: str
    sum: str
    difference: str
    product: str

    @property
    def places(self) -> int:
        return len(FIRST_NAMES) * len(self.last_names)

    def place(self, i: int) -> str:
        return f"{FIRST_NAMES[i % len(FIRST_NAMES)]} {self.last_names[i // len(FIRST_NAMES)]}"

    def phrase(self, quantity: Quantity) -> str:
        place = self.place(quantity.place)
        return getattr(self, quantity.form).format(place=place, kind=self.kinds[quantity.kind])

    def ask(self, quantity: Quantity) -> str:
        return self.question.format(quantity=self.phrase(quantity))

    def state(self, quantity: Quantity, rule: Rule) -> str:
        """The sentence of a stated quantity's rule."""
        *others, last = map(self.phrase, rule.operands) if rule.operands else [str(rule.number)]
        text = f"{', '.join(others)} and {last}" if others else last
        if rule.join:
            text = getattr(self, rule.join).format(operands=text)
        if rule.head:
            text = getattr(self, rule.head).format(number=rule.number, rest=text)
        text = self.statement.format(quantity=self.phrase(quantity), expression=text)
        return text[0].upper() + text[1:]

    def texts(self) -> list[str]:
        """Sentences that between them have every word of this world but the numbers."""
        stated = [
            Quantity(form, place, kind) for form in STATED for place in range(2) for kind in range(len(self.kinds))
        ]
        wholes = [Quantity(form, place) for form in WHOLE for place in range(self.places)]
        known = stated + wholes
        rules = [Rule((q,), head="more") for q in known] + [Rule((known[0],), head=head) for head in ("fewer", "times")]
        rules += [Rule(tuple(known[:3]), "sum"), *(Rule(tuple(known[:2]), join) for join in ("difference", "product"))]
        texts = [self.state(q, rule) for rule in rules for q in (Quantity("count", 0, 0), Quantity("rate", 0, 0))]
        return [self.note, *map(self.ask, known), *texts]


WILDLIFE = World(
    name="wildlife",
    last_names=tuple("Canyon Creek Forest Grove Heath Hollow Island Lake Marsh Meadow Ridge Valley".split()),
    kinds=tuple(
        "badger bear beaver eagle hedgehog heron marten otter owl rabbit raccoon squirrel stoat swan turtle "
        "weasel".split()
    ),
    count="the number of {kind}s in {place}",
    rate="the number of young per {kind} in {place}",
    total="the number of all animals in {place}",
    parts="the number of all young in {place}",
    note="No animals live in a place but those whose number is given for it.",
    question="What is {quantity}?",
    statement="{quantity} equals {expression}.",
    more="{number} more than {rest}",
    fewer="{number} fewer than {rest}",
    times="{number} times {rest}",
    sum="the sum of {operands}",
    difference="the difference between {operands}",
    product="the product of {operands}",
)
SCHOOLS = World(
    name="schools",
    last_names=tuple("Academy Campus College Faculty Hall House Institute Lyceum School Seminary Tower Yard".split()),
    kinds=tuple(
        "archery astronomy ballet chess choir cooking debating drama fencing film gardening juggling painting "
        "poetry rowing sailing".split()
    ),
    count="the count of {kind} clubs at {place}",
    rate="the membership of each {kind} club at {place}",
    total="the count of clubs altogether at {place}",
    parts="the membership of clubs altogether at {place}",
    note="A school has just the clubs that are counted for it, and nobody is in two of them.",
    question="How large is {quantity}?",
    statement="{quantity} is {expression}.",
    more="{number} added to {rest}",
    fewer="{number} taken away from {rest}",
    times="{number} multiplied by {rest}",
    sum="the total of {operands}",
    difference="the gap between {operands}",
    product="the product of {operands}",
)
MARKETS = World(
    name="markets",
    last_names=tuple("Arcade Bakery Bazaar Corner Depot Farm Kitchen Market Pantry Shop Stall Store".split()),
    kinds=tuple("bag barrel basket bin bowl bucket carton casket chest crate hamper jar pot sack tray tub".split()),
    count="the {kind}s of {place}",
    rate="the apples inside one {kind} of {place}",
    total="the containers everywhere in {place}",
    parts="the apples everywhere in {place}",
    note="Only the containers listed for a store are there, and apples are nowhere else.",
    question="How many are {quantity}?",
    statement="{quantity} are as many as {expression}.",
    more="{number} on top of {rest}",
    fewer="{number} short of {rest}",
    times="{number} times {rest}",
    sum="the sum of {operands}",
    difference="the difference of {operands}",
    product="the product of {operands}",
)
WORLDS = (WILDLIFE, SCHOOLS, MARKETS)
