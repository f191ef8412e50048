"""What the fast weights hold after each pass: linear probes for the automaton's rows between a string and its answer.

A string of Rule 110 fills the first window, which sleeps n passes; the fast weights of all blocks are then the features
of a ridge regression for each cell of row j, the string after j steps of the automaton. Row t's first cell is the
answer, and depends on 2 (t - j) + 1 cells of row j, its cone.

A state of thousands of numbers holds any function of a short string for a probe that sees enough strings, before
training too. So probes are fitted on few, which tells how plainly the state says it, and stand beside two others: one
of the cells themselves, and one of the fast weights of the same model before its training. They are judged on strings
of the evaluation split, which neither model nor probe has seen where the run holds strings out. Linear probes: Alain
and Bengio, arXiv 1610.01644; their controls: Hewitt and Liang, arXiv 1909.03368.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from sleep_ops.checks import check_count, expect
from sleep_ops.experiments.plot import draw_means
from sleep_ops.files import pyplot
from sleep_ops.layers.mixer import GDNState
from sleep_ops.model.session import SleepSession
from sleep_ops.model.sleeping import SleepingModel
from sleep_ops.tasks import Task
from sleep_ops.tasks.rule110 import Rule110, rule110_steps

STRING, UNTRAINED, TRAINED = "string", "untrained", "trained"
STRENGTHS = tuple(10.0**e for e in range(-5, 2))  # of the ridge, beside the features' mean square
_BATCH = 512


def probe(
    models: Mapping[str, SleepingModel],
    task: Task,
    *,
    passes: Sequence[int],
    fitted: int = 256,
    judged: int = 4096,
    seed: int = 1,
) -> list[dict]:
    """A row for the string itself (passes 0), each of `models` after n of `passes`, and each row j of the automaton.

    models: such as {"untrained": ..., "trained": ...}. fitted, judged: strings that a probe is fitted and judged on.

    Columns: features, "string" or the model's name; passes, n; step, j; first, how often the first cell of row j is
    read right; cone, the mean over the cells of the answer's cone; guess, `cone` for each cell's commoner value; the
    settings. ValueError for another task, a window that is not one string, and what is no pass or number of strings.
    """
    if not isinstance(task, Rule110):
        raise ValueError(f"task: expected rule110, got {getattr(task, 'name', task)}")
    for model in models.values():
        window = model.settings.window
        expect(window == task.bits, "model.window", f"one string, {task.bits} tokens", window)
    for n in passes:
        check_count("passes", n)
    check_count("fitted", fitted, 16)
    check_count("judged", judged, 1)
    seen, asked = _strings(task, fitted, seed, "train"), _strings(task, judged, seed, "eval")
    wanted, truth = (torch.from_numpy(_rows(task, cells)) for cells in (seen, asked))
    common = (truth == (wanted.double().mean(0) >= 0.5)).double().mean(0)  # [t + 1, bits]
    rows = []
    for name, n, features in _features(models, passes):
        right = _judge(features(seen), wanted, features(asked), truth)
        for j in range(task.t + 1):
            cone = _cone(task, j)
            found = {"first": right[j, 0], "cone": right[j, cone].mean(), "guess": common[j, cone].mean()}
            row = {"features": name, "passes": n, "step": j} | {key: value.item() for key, value in found.items()}
            rows.append(row | {"fitted": fitted, "judged": judged, "seed": seed})
    return rows


Features = Callable[[np.ndarray], Tensor]  # strings uint8 [M, bits] -> float64 [M, F]


def _features(models: Mapping[str, SleepingModel], passes: Sequence[int]) -> Iterator[tuple[str, int, Features]]:
    """(name, passes, features) of all there is to probe."""
    yield STRING, 0, lambda cells: torch.from_numpy(cells).double() * 2 - 1
    for name, model in models.items():
        for n in passes:
            yield name, n, partial(_fast_weights, model, n)


def _strings(task: Rule110, samples: int, seed: int, split: str) -> np.ndarray:
    """Strings uint8 [samples, bits] of a split."""
    ids = task.batch(seed, 0, samples, split=split).input_ids
    return ids[:, : task.bits].numpy().astype(np.uint8)


def _rows(task: Rule110, cells: np.ndarray) -> np.ndarray:
    """Rows 0 .. t of the automaton: uint8 [samples, bits] -> uint8 [samples, t + 1, bits]."""
    return np.stack([rule110_steps(cells, j, task.boundary) for j in range(task.t + 1)], 1)


def _cone(task: Rule110, step: int) -> list[int]:
    """The cells of row `step` that the first cell of row t depends on."""
    reach = range(step - task.t, task.t - step + 1)
    if task.boundary == "periodic":
        return sorted({i % task.bits for i in reach})
    return [i for i in reach if 0 <= i < task.bits]


@torch.no_grad()
def _fast_weights(model: SleepingModel, passes: int, cells: np.ndarray) -> Tensor:
    """All blocks' fast weights after strings uint8 [M, bits] slept: float64 [M, F], F = sum of H K V."""
    device, found = model.embedding_weight.device, []
    for start in range(0, len(cells), _BATCH):
        session = SleepSession(model, passes=passes)
        session.read(torch.from_numpy(cells[start : start + _BATCH].astype(np.int64)).to(device))
        session.sleep()
        states = (s.fast_weights for s in session.state.blocks if isinstance(s, GDNState))
        found.append(torch.cat([s.flatten(1) for s in states], 1).double().cpu())
    return torch.cat(found)


def _judge(seen: Tensor, wanted: Tensor, asked: Tensor, truth: Tensor) -> Tensor:
    """How often each cell is read right, float64 [t + 1, bits].

    seen [M, F] and wanted [M, t + 1, bits]: features and cells to fit; asked [A, F] and truth [A, t + 1, bits]: to
    judge by. The ridge's strength is chosen for each row of the automaton, on the last eighth of what is fitted.
    """
    shape, cells = wanted.shape[1:], wanted.flatten(1).double() * 2 - 1
    kept = len(seen) - len(seen) // 8
    tried = _ridge(seen[:kept], cells[:kept], seen[kept:])
    right = [((y > 0) == (cells[kept:] > 0)).double().mean(0).unflatten(0, shape).mean(1) for y in tried]
    best = torch.stack(right).argmax(0)  # [t + 1]
    found = torch.stack([y.unflatten(1, shape) for y in _ridge(seen, cells, asked)])  # [strengths, A, t + 1, bits]
    read = torch.stack([found[choice, :, j] for j, choice in enumerate(best.tolist())], 1)
    return ((read > 0) == (truth > 0)).double().mean(0)


def _ridge(x: Tensor, y: Tensor, asked: Tensor) -> Iterator[Tensor]:
    """Y of the features `asked`, for each of `STRENGTHS`: x [M, F], y [M, G], asked [A, F] -> [A, G] each.

    Y = A (X^T X + r I)^-1 X^T Y = A X^T (X X^T + r I)^-1 Y, of the two the smaller, with centred X and Y.
    """
    centre, mean = x.mean(0), y.mean(0)
    x, y, asked = x - centre, y - mean, asked - centre
    wide = x.shape[1] > len(x)
    gram = x @ x.mT if wide else x.mT @ x
    scale = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    for strength in STRENGTHS:
        factor = torch.linalg.cholesky(gram + strength * scale * torch.eye(len(gram), dtype=gram.dtype))
        solution = x.mT @ torch.cholesky_solve(y, factor) if wide else torch.cholesky_solve(x.mT @ y, factor)
        yield asked @ solution + mean


Curves = dict[tuple[str, int], dict[float, list[float]]]  # {(features, passes): {row: cones, one of each run}}


def _curves(rows: Sequence[dict]) -> Curves:
    found: Curves = {}
    for row in rows:
        found.setdefault((row["features"], row["passes"]), {}).setdefault(row["step"], []).append(row["cone"])
    return found


def table(rows: Sequence[dict]) -> Table:
    """The cone's accuracy: a line for the string, and for each model after each n; a column for each row."""
    steps = sorted({row["step"] for row in rows})
    result = Table("", *(f"row {j}" for j in steps), title="cells that a linear probe reads right")
    for (name, n), points in _curves(rows).items():
        result.add_row(_label(name, n), *(f"{fmean(points[j]):.1%}" if j in points else "" for j in steps))
    return result


def _label(name: str, passes: int) -> str:
    return "the string itself" if name == STRING else f"{name}, n = {passes}"


def plot(rows: Sequence[dict], path: Path) -> None:
    """The cone's accuracy against the automaton's row, a line for each n; of several runs the mean in its band."""
    plt = pyplot()
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    passes = sorted({row["passes"] for row in rows if row["features"] != STRING})
    shades = {n: plt.get_cmap("viridis")(0.9 * place / max(len(passes) - 1, 1)) for place, n in enumerate(passes)}
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for (name, n), points in _curves(rows).items():
        style = {"color": shades.get(n, "black"), "label": _label(name, n)}
        style |= {"marker": "o"} if name == TRAINED else {"linestyle": "--", "alpha": 0.6}
        draw_means(axes, points, dots=False, **style)
    axes.set(xlabel="row of the automaton: steps after the string", ylabel="cells that a linear probe reads right")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
