"""`sleep-ops bench launches`: every kernel launch of a forward and backward timed alone, beside the call as a whole.

The launches of one call are recorded with their arguments, and each is then repeated inside a CUDA graph between two
events. A launch that is repeated finds in the cache what fits there, and the call also has PyTorch's operations (the
products of replay passes), so that the parts don't add up to the whole. What can be tested without a GPU is the
recording; the timing has not run on one yet.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from sleep_ops.bench.cases import KERNEL_CASES, Case, make_inputs
from sleep_ops.bench.harness import (
    GRAPH_MODES,
    MACHINE,
    TIMES,
    Problem,
    Run,
    Stopwatch,
    environment,
    first_line,
    gradients,
    measure,
    run_of,
)
from sleep_ops.bench.providers import operator_problem, replay_of
from sleep_ops.bench.settings import LaunchesSettings, check_choices, check_counts, check_dtype
from sleep_ops.checks import check_seed
from sleep_ops.training.config import resolve_device

LAUNCHES = 20  # of a kernel in one graph: the launch of the graph is then no part of its time
COLUMNS = [
    *(*MACHINE, "case", "dtype", "batch", "tokens", "heads", "value_heads", "key_dim", "value_dim", "window", "passes"),
    *("direction", "position", "kernel", "grid", "repeats", *TIMES, "call_ms", "share"),
]


class Launch(NamedTuple):
    """One launch of a call; again() repeats it on the same memory."""

    direction: str
    kernel: str
    grid: tuple[int, ...]
    again: Callable[[], object]


@dataclass(frozen=True)
class LaunchesBenchmark(LaunchesSettings):
    """The benchmark of these settings.

    Raises ValueError for one that is unknown or out of range, and on anything but an NVIDIA GPU.
    """

    def __post_init__(self):
        check_choices(self, cases=KERNEL_CASES["cuda"])
        check_counts(self, "passes", "repeats")
        check_seed(self.seed)
        check_dtype(self)
        device = resolve_device(self.device)
        if device.type != "cuda" or torch.version.hip:
            raise ValueError(f"device: expected an NVIDIA GPU, on which launches can be timed, got {device}")

    @property
    def steps(self) -> int:
        """How often `run` yields."""
        return len(self.cases)

    def run(
        self, tell: Callable[[str], None], show: Callable[[str], None] = lambda label: None
    ) -> Iterator[list[dict]]:
        """Yield the rows of each case. tell: of what is not timed, and why; show: of what comes next."""
        device = resolve_device(self.device)
        common = environment(device) | {"repeats": self.repeats}
        given = {name: getattr(self, name) for name in ("passes", "dtype") if getattr(self, name) is not None}
        for name in self.cases:
            show(name)
            case = replace(KERNEL_CASES["cuda"][name], **given)
            sizes = asdict(case) | {"case": name, "window": case.window or case.tokens}
            problem = operator_problem(replay_of("ours", case, device), case, make_inputs(case, self.seed, device))
            try:
                rows = self._rows(problem, case, device)
            except RuntimeError as error:
                tell(f"{name}: no row: {first_line(error)}")
                rows = []
            yield [{column: (common | sizes | row)[column] for column in COLUMNS} for row in rows]

    def _rows(self, problem: Problem, case: Case, device: torch.device) -> list[dict]:
        launches = record(problem, case.passes)
        runs = {str(i): _alone(launch.again, device) for i, launch in enumerate(launches)}
        runs["call"] = run_of(problem, case.passes, GRAPH_MODES[1], device)
        reasons: list[str] = []
        found = measure(runs, self.repeats, device, lambda run, why: reasons.append(f"launch {run}: {why}"))
        if reasons:
            raise RuntimeError(reasons[0])
        call = found["call"]["ms_median"]
        rows = []
        for i, launch in enumerate(launches):
            times = {name: found[str(i)][name] for name in TIMES}
            row = {"direction": launch.direction, "position": i, "kernel": launch.kernel}
            row |= {"grid": "x".join(map(str, launch.grid)), "call_ms": call, "share": times["ms_median"] / call}
            rows.append(row | times)
        return rows


def record(problem: Problem, passes: int) -> list[Launch]:
    """The launches of a forward and backward, kernels compiled before."""
    gradients(problem, problem.run(passes))
    with recording() as forward:
        roots = problem.run(passes)
    with recording() as backward:
        gradients(problem, roots)
    return [
        Launch(direction, *launch)
        for direction, launches in (("forward", forward), ("backward", backward))
        for launch in launches
    ]


@contextmanager
def recording():
    """Gives a list that grows by (kernel, grid, what repeats the launch) at every launch of a Triton kernel.

    It keeps the tensors of every launch, so that none of their memory is given to another.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launches: list[tuple] = []
    originals = {kind: kind.run for kind in (JITFunction, InterpretedFunction)}

    def wrapped(run: Callable) -> Callable:
        def run_and_note(self, *args, grid, warmup, **options):
            result = run(self, *args, grid=grid, warmup=warmup, **options)
            if not warmup:
                again = partial(run, self, *args, grid=grid, warmup=False, **options)
                launches.append((self.__name__, tuple(grid), again))
            return result

        return run_and_note

    for kind, run in originals.items():
        kind.run = wrapped(run)
    try:
        yield launches
    finally:
        for kind, run in originals.items():
            kind.run = run


def _alone(again: Callable[[], object], device: torch.device) -> Run:
    """Milliseconds of one launch, of many in a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            again()

    def sample() -> tuple[float, float]:
        watch = Stopwatch(device)
        with watch:
            graph.replay()
        return watch.ms / LAUNCHES, 0.0

    return Run(sample)
