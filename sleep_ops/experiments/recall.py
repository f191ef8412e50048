"""What replay does for a memory, without training: recall of n key/value pairs after N passes over them.

Each memory is one head's fast weights S [K, V], empty at first. n pairs are written into it in order: keys are random
unit vectors of K dims, values codewords from a codebook of M random unit vectors of V dims. Replaying them N times is

    S_N = P S_(N-1) + R,    S_0 = 0        (P, R) = segment_transition of the n pairs: a power, whose cost is log N

and recalls S_N^T k_i for key i. The error is |S_N^T k_i - v_i|^2 / |v_i|^2, and the fraction of the keys whose nearest
codeword is wrong. One pass of the delta rule spoils old keys by writing new ones; passes in turn are Kaczmarz's method
for S^T k_i = v_i. With load n/K <= 1 it converges to the least-squares solution of least norm, which recalls every
key, the slower the closer the load is to 1. With more keys than dims no state recalls all of them, and passes settle
on a compromise that favours the keys written last; a smaller beta brings it closer to least squares.

Infinitely many passes are the fixed point (I - P)^-1 R. Without decay and with fewer keys than dims there are many, and
the operators refuse `passes=math.inf`: what S_0 holds in directions that no key touches stays for ever. From S_0 = 0
those directions stay empty, so the limit is taken in the others: S = Q S', with Q [K, min(n, K)] an orthonormal basis
of the keys' span and S' the fixed point for the keys Q^T k_i. Nothing is approximated.

References beside the curve: the least squared error that any state reaches (by the keys' pseudoinverse), and one pass
of the Hebbian rule, which adds up all pairs.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from sleep_ops.checks import check_count, expect, is_count, is_number
from sleep_ops.experiments.settings import RecallSettings
from sleep_ops.files import pyplot
from sleep_ops.ops.affine import segment_transition
from sleep_ops.ops.gated_delta_rule import delta_rule_state
from sleep_ops.training.config import resolve_device

LARGEST = 2**30  # numbers in one tensor of float64: 8 GiB
MARKS = {"delta": "o", "hebbian": "x", "least squares": "D"}


@dataclass(frozen=True)
class RecallExperiment(RecallSettings):
    """Error of recall against N, for each load; N = infinity is always added.

    Raises ValueError, naming the field, for a setting that can't be, and for sizes beyond `LARGEST`.
    """

    def __post_init__(self):
        for name in ("key_dim", "value_dim"):
            check_count(name, getattr(self, name))
        for name, low in (("codewords", 2), ("memories", 2), ("seed", 0)):
            value = getattr(self, name)
            if not (is_count(value, low) and value < 2**63):
                raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
        for n in self.passes:
            check_count("passes", n)
        if not _rising(self.passes):
            raise ValueError(f"passes: expected rising integers >= 1, got {self.passes!r}")
        if not all(is_number(load) and 0 < load < math.inf for load in self.loads):
            raise ValueError(f"loads: expected numbers > 0, got {self.loads!r}")
        if not _rising((0, *map(self.pairs, self.loads))) or not self.loads:
            raise ValueError(
                f"loads: expected rising numbers, each of more pairs than the one before at K = {self.key_dim}, "
                f"got {self.loads!r}"
            )
        if not is_number(self.beta) or not 0 < self.beta < 2:
            raise ValueError(f"beta: expected a number in (0, 2), got {self.beta!r}")
        if not is_number(self.decay) or not 0 <= self.decay <= 1:
            raise ValueError(f"decay: expected a number in [0, 1], got {self.decay!r}")
        rows = self.memories * max(self.pairs(self.loads[-1]), self.key_dim)
        for names, numbers in (
            ("loads, memories, key_dim, value_dim", rows * max(self.key_dim, self.value_dim)),
            ("codewords, value_dim", self.codewords * self.value_dim),
            ("codewords, loads, memories", self.codewords * rows),
        ):
            expect(numbers <= LARGEST, names, f"sizes of at most {LARGEST} numbers (8 GiB) together", numbers)
        resolve_device(self.device)

    def pairs(self, load: float) -> int:
        """n, the pairs written at this load."""
        return round(load * self.key_dim)

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """keys [memories, n, K] of the heaviest load, codebook [M, V], both float64, and each key's codeword, int64.

        Drawn on the CPU: every device gets the same.
        """
        device, generator = resolve_device(self.device), torch.Generator().manual_seed(self.seed)
        n = self.pairs(self.loads[-1])
        codebook = torch.randn(self.codewords, self.value_dim, generator=generator, dtype=torch.float64)
        keys = torch.randn(self.memories, n, self.key_dim, generator=generator, dtype=torch.float64)
        answers = torch.randint(self.codewords, (self.memories, n), generator=generator)
        unit_keys, unit_codebook = (torch.nn.functional.normalize(x, dim=-1) for x in (keys, codebook))
        return unit_keys.to(device), unit_codebook.to(device), answers.to(device)

    def run(self) -> list[dict]:
        """Rows in long format, one per (load, rule, passes).

        rule is "delta", "hebbian" (one pass) or "least squares" (under passes = math.inf). `wrong` is the fraction of
        keys whose nearest codeword is not theirs, `error` the mean relative squared error; each with its standard
        error over the memories. Raises ValueError for keys that float64 can't tell from linearly dependent ones.
        """
        keys, codebook, answers = self.draw()
        settings = ("seed", "key_dim", "value_dim", "codewords", "memories", "beta", "decay")
        common = {name: getattr(self, name) for name in settings}
        rows = []
        with _one_thread():
            for load in self.loads:
                n = self.pairs(load)
                for rule, passes, state in self._states(keys[:, :n], codebook[answers[:, :n]]):
                    figures = _recall(state, keys[:, :n], answers[:, :n], codebook)
                    rows.append({**common, "load": load, "pairs": n, "rule": rule, "passes": passes, **figures})
        return rows

    def _states(self, keys: Tensor, values: Tensor):
        """(rule, passes, state [memories, K, V]) for keys [memories, n, K] and values [memories, n, V]."""
        k, v = keys[:, :, None], values[:, :, None]  # [B, T, H = 1, .]: a memory is a batch row
        beta = torch.full_like(k[..., 0], self.beta)
        g = torch.full_like(beta, -self.decay)
        yield "hebbian", 1, delta_rule_state(k, v, g, beta, rule="hebbian")[:, 0]
        once = segment_transition(k, v, g, beta)
        for passes in self.passes:
            yield "delta", passes, once.power(passes).R[:, 0]
        basis = torch.linalg.qr(keys.mT).Q
        inside = delta_rule_state((keys @ basis)[:, :, None], v, g, beta, passes=math.inf)[:, 0]
        yield "delta", math.inf, basis @ inside
        yield "least squares", math.inf, torch.linalg.pinv(keys) @ values


@contextmanager
def _one_thread():
    """One CPU thread inside: the bits don't depend on the number of cores, and matrices this small gain by no more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rising(values: tuple) -> bool:
    return bool(values) and all(a < b for a, b in zip(values[:-1], values[1:], strict=True))


def _recall(state: Tensor, keys: Tensor, answers: Tensor, codebook: Tensor) -> dict[str, float]:
    recalled = keys @ state
    # Among unit vectors the nearest is the one of largest inner product.
    wrong = ((recalled @ codebook.T).argmax(-1) != answers).double().mean(1)
    error = (recalled - codebook[answers]).square().sum(-1).mean(1)
    figures = {}
    for name, per_memory in (("wrong", wrong), ("error", error)):
        figures[name] = per_memory.mean().item()
        figures[f"{name}_stderr"] = (per_memory.std() / len(per_memory) ** 0.5).item()
    return figures


def table(rows: list[dict], measure: str = "wrong") -> Table:
    """One measure ("wrong" or "error"): a line for each N, a column for each load."""
    title, form = {"wrong": ("wrong codewords", "{:.1%}"), "error": ("relative squared error", "{:.2g}")}[measure]
    loads = dict.fromkeys(row["load"] for row in rows)
    result = Table("load n/K", *(f"{load:g}" for load in loads), title=f"{title} after N passes")
    for rule, passes in dict.fromkeys((row["rule"], row["passes"]) for row in rows):
        n = "∞" if passes == math.inf else passes
        name = {"delta": f"N = {n}", "hebbian": f"Hebbian rule, N = {n}", "least squares": "least squares"}[rule]
        line = [row for row in rows if (row["rule"], row["passes"]) == (rule, passes)]
        result.add_row(name, *(form.format(row[measure]) for row in line))
    return result


def plot(rows: list[dict], path: Path) -> None:
    """Both errors against N, one line per load, with the standard error as a band and the references as marks."""
    plt = pyplot()
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    finite = sorted({row["passes"] for row in rows if row["passes"] != math.inf})
    infinity = 4 * finite[-1]  # its place on the axis

    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    loads = list(dict.fromkeys(row["load"] for row in rows))
    colours = [plt.get_cmap("viridis")(0.9 * i / max(len(loads) - 1, 1)) for i in range(len(loads))]
    for axes, measure in zip(panels, ("wrong", "error"), strict=True):
        for load, colour in zip(loads, colours, strict=True):
            by_rule = {rule: [r for r in rows if (r["load"], r["rule"]) == (load, rule)] for rule in MARKS}
            *curve, limit = by_rule["delta"]
            x, y = [r["passes"] for r in curve], [r[measure] for r in curve]
            spread = [r[f"{measure}_stderr"] for r in curve]
            axes.plot(x, y, marker="o", markersize=3, color=colour)
            low, high = ([a + sign * s for a, s in zip(y, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot([x[-1], infinity], [y[-1], limit[measure]], ":", color=colour)
            axes.plot(infinity, limit[measure], MARKS["delta"], markersize=4, color=colour)
            for rule, place in (("hebbian", 1 / 1.5), ("least squares", 1.5 * infinity)):
                axes.plot(place, by_rule[rule][0][measure], MARKS[rule], fillstyle="none", color=colour)
        axes.set_xscale("log", base=2)
        ticks = finite[::2] if len(finite) > 6 else finite
        axes.set_xticks([*ticks, infinity], [*map(str, ticks), "∞"])
        axes.set_xlabel("passes N over the pairs")
        axes.grid(alpha=0.3)
    panels[0].set(title="keys recalled as a wrong codeword", ylim=(-0.01, None))
    panels[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[1].set(title="relative squared error of the recalled value")
    panels[1].set_yscale("symlog", linthresh=1e-3)
    panels[1].set_ylim(-1e-4, 1.6 * max(row["error"] for row in rows))

    key: list[tuple[dict, str]] = [
        ({"marker": "o", "markersize": 3, "color": c}, f"{load:g}") for load, c in zip(loads, colours, strict=True)
    ]
    for rule, label in (("hebbian", "Hebbian rule, N = 1"), ("least squares", "least squares")):
        key.append(({"marker": MARKS[rule], "fillstyle": "none", "linestyle": "", "color": "grey"}, label))
    handles = [Line2D([], [], **style, label=label) for style, label in key]
    panels[0].legend(handles=handles, title="load n/K")
    first = rows[0]
    figure.suptitle(
        f"Delta rule, fast weights {first['key_dim']} x {first['value_dim']}, {first['codewords']} codewords, "
        f"mean of {first['memories']} memories"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
