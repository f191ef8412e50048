"""Time, memory and the machine: how a call is measured, whatever it is."""

import importlib.metadata
import platform
import statistics
import subprocess
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

MODES = ("forward", "backward", "forward+backward")
GRAPH_MODES = ("forward-graph", "forward+backward-graph")
MACHINE = ["revision", "device", "python", "torch", "triton", "fla", "flash_qla", "threads"]
TIMES = ["ms_median", "ms_p20", "ms_p80"]
MIB = 2**20
REPLAYS = 10  # of a CUDA graph in one sample: their launch is then no part of what is timed


class Problem(NamedTuple):
    """run(N) -> (output, final state), differentiated in `leaves` from the cotangents of both."""

    run: Callable[[int], tuple[Tensor, Tensor]]
    leaves: list[Tensor]
    cotangents: list[Tensor]


class Run(NamedTuple):
    """sample() -> (milliseconds, peak MiB above what was held, 0 if unknown); saved() -> MiB kept for the backward."""

    sample: Callable[[], tuple[float, float]]
    saved: Callable[[], float] | None = None


def gradients(problem: Problem, roots: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    cotangents = [c.to(root.dtype) for c, root in zip(problem.cotangents, roots, strict=True)]
    return torch.autograd.grad(roots, problem.leaves, cotangents)


class Stopwatch:
    """A block's `ms`, by CUDA events or the host's clock, and its `peak` of allocated bytes (0 on the CPU)."""

    def __init__(self, device: torch.device):
        self.device = device if device.type == "cuda" else None

    def __enter__(self):
        if self.device:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record(torch.cuda.current_stream(self.device))
        else:
            self._start = time.perf_counter()
        return self

    def __exit__(self, *_):
        if self.device:
            self._events[1].record(torch.cuda.current_stream(self.device))
            torch.cuda.synchronize(self.device)
            self.ms = self._events[0].elapsed_time(self._events[1])
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self.ms, self.peak = (time.perf_counter() - self._start) * 1e3, 0


def run_of(problem: Problem, passes: int, mode: str, device: torch.device) -> Run:
    """`passes` passes in one of MODES or, recorded here and replayed, GRAPH_MODES."""
    if mode in GRAPH_MODES:
        graph = _record(problem, passes, mode, device)
        return Run(lambda: _replay_once(graph, device))
    saved = None if mode == "forward" else lambda: saved_mib(problem, passes)
    return Run(lambda: _run_once(problem, passes, mode, device), saved)


def _run_once(problem: Problem, passes: int, mode: str, device: torch.device) -> tuple[float, float]:
    """The forward alone records no autograd graph."""
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    watch = Stopwatch(device)
    if mode == "forward":
        with torch.no_grad(), watch:
            problem.run(passes)
    elif mode == "backward":
        roots = problem.run(passes)
        with watch:
            gradients(problem, roots)
    else:
        with watch:
            gradients(problem, problem.run(passes))
    return watch.ms, max(watch.peak - held, 0) / MIB


def _record(problem: Problem, passes: int, mode: str, device: torch.device) -> "torch.cuda.CUDAGraph":
    """The forward, or forward and backward, as one CUDA graph."""

    def once() -> None:
        if mode == "forward-graph":
            with torch.no_grad():
                problem.run(passes)
        else:
            gradients(problem, problem.run(passes))

    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles and allocates what a recording must not
            for _ in range(3):
                once()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
    return graph


def _replay_once(graph: "torch.cuda.CUDAGraph", device: torch.device) -> tuple[float, float]:
    watch = Stopwatch(device)
    with watch:
        for _ in range(REPLAYS):
            graph.replay()
    return watch.ms / REPLAYS, 0.0


class _Saved:
    """A tensor that lives as long as the graph node that saved it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def saved_mib(problem: Problem, passes: int) -> float:
    """MiB that autograd keeps for the backward: each storage counted once, those of the leaves not."""
    alive = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        box = _Saved(tensor)
        alive.add(box)
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        roots = problem.run(passes)
    storages = [box.tensor.untyped_storage() for box in alive]
    kept = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for leaf in problem.leaves:
        kept.pop(leaf.untyped_storage().data_ptr(), None)
    del roots
    return sum(kept.values()) / MIB


def measure(
    runs: dict[str, Run], repeats: int, device: torch.device, tell: Callable[[str, str], None]
) -> dict[str, dict]:
    """Time, quantiles and memory by name of the run; the runs take turns.

    One that runs out of memory is left out and told of: tell(name, why).
    """
    samples, kept = {name: [] for name in runs}, {}
    for repeat in range(-2 if device.type == "cuda" else -1, repeats):
        for name in list(samples):
            try:
                sample = runs[name].sample()
                if repeat == -1 and runs[name].saved:
                    kept[name] = runs[name].saved()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                tell(name, "out of memory, no row")
                del samples[name]
                continue
            if repeat >= 0:
                samples[name].append(sample)
    figures = {}
    for name, pairs in samples.items():
        times, peaks = zip(*pairs, strict=True)
        low, *_, high = statistics.quantiles(times, n=5, method="inclusive") if repeats > 1 else times * 2
        figures[name] = dict(zip(TIMES, (statistics.median(times), low, high), strict=True))
        figures[name]["peak_extra_mib"] = max(peaks) or ""
        figures[name]["saved_mib"] = kept.get(name, "")
    return figures


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def default_repeats(device: torch.device) -> int:
    return 20 if device.type == "cuda" else 5


def environment(device: torch.device) -> dict:
    """What a timing depends on besides the code under test."""
    distributions = {"triton": "triton", "fla": "fla-core", "flash_qla": "flash-qla"}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    return {
        "revision": _revision(),
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{column: _version(distribution) for column, distribution in distributions.items()},
        "threads": torch.get_num_threads(),
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _revision() -> str:
    """The checkout's commit, with -dirty where files differ from it; empty outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()
