"""Figures as grids over runs: which settings vary, what is drawn against what, the paper's numbers where there are any.

figures/NAME.toml, with tables [set] (settings of every run), [grid] (settings that vary), and the same under
[small] and [tiny] where these differ.
"""

import itertools
from dataclasses import dataclass, field, replace
from importlib.resources import files

from sleep_ops.checks import check_choice, check_distinct, expect, is_number
from sleep_ops.experiments.presets import SIZES, read_toml

PASSES = "model.passes"  # the setting that every grid has


@dataclass(frozen=True)
class Figure:
    """name, title: of the figure. kind: "train" (runs from scratch), "finetune" (from a checkpoint folder) or
    "throughput" (training steps, timed).

    task: of the runs; of throughput, the preset of `bench train`. x: the grid's setting on the x axis, or "level": the
    evaluation's own levels of difficulty, `levels`, which are `x_label`. metric: what is drawn. reference: the paper's
    (x, y), if it gives numbers; where they hold for one series alone, (x, y, label).
    set: settings of all runs; grid: the values of those that vary, "model.passes" among them. All as "part.field".
    """

    name: str
    title: str
    kind: str
    task: str
    x: str
    metric: str
    grid: dict[str, list]
    set: dict[str, object] = field(default_factory=dict)
    reference: list[list] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)
    x_label: str = ""

    @property
    def series(self) -> tuple[str, ...]:
        """The grid's settings that tell one line from another."""
        return tuple(name for name in self.grid if name != self.x)

    def narrowed(self, values: dict[str, list]) -> "Figure":
        """The same with other values of what varies. ValueError for what does not vary, has no values, or one twice."""
        for name, given in values.items():
            expect(name in self.grid, "grid", f"one of {', '.join(self.grid)}", name)
            expect(isinstance(given, list) and len(given) > 0, f"grid {name}", "a list of values, such as [1,4]", given)
            check_distinct(f"grid {name}", given)
            for value in given if name == PASSES else ():
                right = value == "inf" or (is_number(value) and value >= 1)
                expect(right, f"grid {name}", 'integers >= 1, or "inf"', value)
        return replace(self, grid=self.grid | values)

    def points(self) -> list[dict[str, object]]:
        """The settings that vary, for every run of the grid."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


def figure_names() -> tuple[str, ...]:
    """The figures there are."""
    place = files("sleep_ops.experiments").joinpath("figures")
    return tuple(sorted(f.name.removesuffix(".toml") for f in place.iterdir() if f.name.endswith(".toml")))


def load_figure(name: str, size: str = "paper") -> Figure:
    """A figure in one of the presets' sizes. ValueError for a name or a size that is none."""
    check_choice("preset", size, SIZES)
    table = read_toml("figures", name)
    smaller = [table.pop(other, {}) for other in SIZES[1:]][: SIZES.index(size)]
    for other in smaller:
        parts = {part: table.get(part, {}) | other.get(part, {}) for part in ("set", "grid")}
        table |= other | parts
    if size != "paper" and table.get("set"):
        table["reference"] = []  # the paper's numbers are for the paper's setting
    return Figure(name=name, **table)
