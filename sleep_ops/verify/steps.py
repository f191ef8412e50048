"""What `sleep-ops verify` does, in order: the purpose of each step, its needs, share of the time, command and files."""

import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sleep_ops.bench.tune import emulator


@dataclass(frozen=True)
class Place:
    """Where a verification runs: the folder it writes, its device, and the checkout, if it is run from one."""

    out: Path
    device: torch.device
    checkout: Path | None = None


@dataclass(frozen=True)
class Step:
    """One step; `command(place, seconds)` is what runs it, and should itself come to an end after so long.

    needs         of NEEDS, or "module NAME", "tool NAME"; without one of them the step is left out.
    weight        its share of the time is in proportion to this.
    least         seconds below which it is not worth beginning.
    files         what it leaves in the folder, for the report: tables and plots.
    folders       what else it leaves there, to go on with.
    environment   variables set for it.
    in_checkout   whether it runs in the checkout's root.
    """

    name: str
    purpose: str
    command: Callable[[Place, int], list[str]]
    needs: tuple[str, ...] = ()
    weight: float = 1.0
    least: int = 10
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    in_checkout: bool = False


NEEDS = {
    "cuda": (lambda place: place.device.type == "cuda" and not torch.version.hip, "it needs an NVIDIA GPU"),
    "checkout": (lambda place: place.checkout is not None, "it needs a checkout, with its tests/ptx"),
}


def missing(step: Step, place: Place) -> str:
    """Why the step can't run here; empty where it can."""
    for need in step.needs:
        kind, _, name = need.partition(" ")
        if kind == "module" and importlib.util.find_spec(name) is None:
            return f"it needs {name}, which is not installed"
        if kind == "tool" and shutil.which(name) is None:
            return f"it needs {name}, which is not on the PATH"
        if need in NEEDS and not NEEDS[need][0](place):
            return NEEDS[need][1]
    return ""


def checkout() -> Path | None:
    """The root of the checkout this package is in, if it has the tests that emulate kernels."""
    script = emulator()
    return None if script is None else script.parents[2]


def _module(name: str, *options: str) -> Callable[[Place, int], list[str]]:
    def command(place: Place, seconds: int) -> list[str]:
        timed = ["--seconds", str(seconds)] if name in ("checks", "rule110") else []
        run = [sys.executable, "-m", f"sleep_ops.verify.{name}", str(place.out), "--device", str(place.device)]
        return [*run, *timed, *options]

    return command


def _bench(name: str, *options: str, cpu: tuple[str, ...] = (), folder: str = "") -> Callable[[Place, int], list[str]]:
    """`options` on any device, those of `cpu` on a CPU besides."""

    def command(place: Place, seconds: int) -> list[str]:
        run = [sys.executable, "-m", "sleep_ops", "bench", name, "--device", str(place.device)]
        run += ["--out", str(place.out / folder), "--seconds", str(seconds), *options]
        return run + list(cpu if place.device.type == "cpu" else ())

    return command


def _sanitizer(tool: str) -> Callable[[Place, int], list[str]]:
    def command(place: Place, seconds: int) -> list[str]:
        run = _module("checks", "--short")(Place(place.out / tool, place.device), seconds)
        return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86", *run]

    return command


def _emulated(place: Place, seconds: int) -> list[str]:
    return [sys.executable, "-m", "pytest", "tests/ptx", "-q", "-m", "not slow", "-p", "no:cacheprovider"]


def _tune(case: str, weight: float) -> Step:
    return Step(
        f"tune-{case}",
        f"launch settings for the head dims of the case {case}, measured",
        _bench("tune", "--case", case, "--repeats", "10", folder=f"tune-{case}"),
        needs=("cuda",),
        weight=weight,
        least=60,
        files=(f"tune-{case}/tune.csv",),
    )


_PASSES_CPU = ("--case", "mid", "--passes", "1,2,4,16", "--max-chained", "4", "--repeats", "3")
_PASSES_CPU += ("--providers", "ours,ours-chained,layer")  # the others need CUDA
# Without the allocator's cache every tensor has borders of its own, beyond which an access is seen.
_UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

STEPS = (
    Step("machine", "versions, and what is missing", _module("machine"), weight=2, least=5, files=("machine.csv",)),
    Step(
        "checks",
        "operators and layer, forward and every gradient, against float64; twice the same bits",
        _module("checks"),
        weight=14,
        least=15,
        files=("checks.csv",),
        environment={"TRITON_INTERPRET": "1"},
    ),
    _tune("rule110", 4),
    _tune("long", 8),
    _tune("jet", 8),
    Step(
        "launches",
        "every kernel launch timed alone, beside the call",
        _bench("launches"),
        needs=("cuda",),
        weight=4,
        least=30,
        files=("launches.csv", "launches.png"),
    ),
    Step(
        "kernels",
        "the operators on the sizes of models, against what is installed",
        _bench("kernels", cpu=("--case", "rule110,mid-replay,depo,jet", "--providers", "ours", "--repeats", "3")),
        weight=4,
        least=15,
        files=("kernels.csv", "kernels.png"),
    ),
    Step(
        "passes",
        "time and memory against the number of replay passes",
        _bench("passes", cpu=_PASSES_CPU),
        weight=4,
        least=15,
        files=("passes.csv", "passes.png"),
    ),
    Step(
        "train",
        "a training step: tokens per second and memory",
        lambda place, seconds: _bench(
            "train",
            *(("--cuda-graph",) if place.device.type == "cuda" else ()),
            cpu=("--passes", "1,2,4", "--providers", "ours", "--repeats", "3"),
        )(place, seconds),
        weight=3,
        least=12,
        files=("train.csv", "train.png"),
    ),
    Step(
        "graph",
        "a CUDA-graph training step against eager ones: the same losses",
        _module("graph"),
        needs=("cuda",),
        weight=3,
        least=40,
        files=("graph.csv",),
        folders=("graph-runs",),
    ),
    Step(
        "memcheck",
        "compute-sanitizer over the short set of checks: memory",
        _sanitizer("memcheck"),
        needs=("cuda", "tool compute-sanitizer"),
        weight=5,
        least=60,
        files=("memcheck/checks.csv",),
        environment=_UNCACHED,
    ),
    Step(
        "racecheck",
        "compute-sanitizer over the short set of checks: races in shared memory",
        _sanitizer("racecheck"),
        needs=("cuda", "tool compute-sanitizer"),
        weight=5,
        least=60,
        files=("racecheck/checks.csv",),
    ),
    Step(
        "rule110",
        "Rule 110 for as long as there is time: does it learn?",
        _module("rule110"),
        weight=4,
        least=20,
        files=("rule110.csv", "rule110.png"),
        folders=("rule110-run",),
    ),
    Step(
        "emulated",
        "kernels as compiled for sm_80 and sm_90, run and raced in an emulator on the CPU",
        _emulated,
        needs=("checkout", "module pytest", "module triton"),
        weight=3,
        least=120,
        in_checkout=True,
    ),
)
