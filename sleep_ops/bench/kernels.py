"""`sleep-ops bench kernels`: the operators on the sizes of models, against what the sizes need at the least.

Forward, backward, both, and for small sizes both as replays of a CUDA graph, so that the host is not what is timed;
peak memory; and the first call in a fresh process, where everything is yet to be compiled. Every provider is compared
with the float64 recurrence before it is timed. The parts for CUDA have not run on a GPU yet.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from sleep_ops.bench.cases import KERNEL_CASES, Case, make_inputs
from sleep_ops.bench.checks import ERRORS, operator_check, right_ones
from sleep_ops.bench.harness import (
    GRAPH_MODES,
    MACHINE,
    MODES,
    TIMES,
    Run,
    default_repeats,
    environment,
    first_line,
    measure,
    run_of,
)
from sleep_ops.bench.providers import operator_problem, replay_of
from sleep_ops.bench.settings import KernelsSettings, check_choices, check_counts, check_dtype
from sleep_ops.checks import check_seed
from sleep_ops.training.config import resolve_device

PROVIDERS = (*KernelsSettings.providers, "transformers")
FIRST_CALL = "first-call"
COLUMNS = [
    *(*MACHINE, "case", "provider", "mode", "dtype", "batch", "tokens", "heads", "value_heads", "key_dim", "value_dim"),
    *("window", "passes", "repeats", *TIMES, "peak_extra_mib", "saved_mib"),
    *("gflop", "mib_moved", "h100_floor_ms", "floor_fraction", *ERRORS),
]
GRAPH_TOKENS = 16384  # beyond these in a batch the host is no part of the time
SWEEPS: dict[str, dict] = {
    "cuda": {
        "tokens": (64, 256, 1024, 4096, 16384, 65536),
        "window": (24, 75, 256, 512, 1024, 2048, 4096),
    },
    "cpu": {"tokens": (64, 256, 1024), "window": (24, 75, 256)},
}
SWEEP_TOKENS = 131072  # the most in a batch
WINDOW_SWEEP_PASSES = 4


@dataclass(frozen=True)
class KernelsBenchmark(KernelsSettings):
    """The benchmark of these settings. Raises ValueError for one that is unknown or out of range."""

    def __post_init__(self):
        check_choices(self, cases=KERNEL_CASES["cpu"], providers=PROVIDERS)
        if self.sweep is not None and self.sweep not in SWEEPS["cpu"]:
            raise ValueError(f"sweep: expected one of {', '.join(SWEEPS['cpu'])}, got {self.sweep!r}")
        check_counts(self, "passes", "repeats")
        check_seed(self.seed)
        check_dtype(self)
        resolve_device(self.device)

    @property
    def points(self) -> list[tuple[str, Case]]:
        """The cases, or every size that the sweep makes of them."""
        device = resolve_device(self.device).type
        given = {n: getattr(self, n) for n in ("passes", "dtype") if getattr(self, n) is not None}
        found = []
        for name in self.cases:
            case = replace(KERNEL_CASES[device][name], **given)
            if self.sweep == "tokens":
                lengths = [tokens for tokens in SWEEPS[device]["tokens"] if case.batch * tokens <= SWEEP_TOKENS]
                found += [(name, replace(case, tokens=tokens)) for tokens in lengths]
            elif self.sweep == "window":
                case = replace(case, passes=self.passes or max(case.passes, WINDOW_SWEEP_PASSES))
                windows = [window for window in SWEEPS[device]["window"] if window < case.tokens]
                found += [(name, replace(case, window=window)) for window in windows] + [(name, case)]
            else:
                found.append((name, case))
        return found

    @property
    def steps(self) -> int:
        """How often `run` yields."""
        return sum(len(self._modes(case)) for _, case in self.points)

    def run(
        self, tell: Callable[[str], None], show: Callable[[str], None] = lambda label: None
    ) -> Iterator[list[dict]]:
        """Yield the rows of each (case, mode). tell: of what is not measured, and why; show: of what comes next."""
        device = resolve_device(self.device)
        repeats = self.repeats or default_repeats(device)
        common = environment(device)
        for name, case in self.points:
            label = f"{name}: {case.tokens} tokens, windows of {case.window}" if self.sweep else name

            def note(provider: str, why: str, label: str = label) -> None:
                tell(f"{label}: {provider} {why}")

            show(f"{label}: checking")
            checked = self._check(case, device, note)
            inputs = make_inputs(case, self.seed, device)
            problems = {
                provider: operator_problem(replay_of(provider, case, device), case, inputs) for provider in checked
            }
            for mode in self._modes(case):
                show(f"{label}: {mode}")
                if mode == FIRST_CALL:
                    found = _first_call(case, device, note) if "ours" in checked else {}
                else:
                    runs = _runs(problems, case.passes, mode, device, note)
                    found = measure(runs, repeats, device, lambda p, why, mode=mode: note(p, f"{mode}: {why}"))  # type: ignore[misc]
                rows = []
                for provider, figures in found.items():
                    row = common | asdict(case) | figures | checked[provider] | _least(case, mode, figures, device)
                    row |= {"case": name, "provider": provider, "mode": mode, "window": case.window or case.tokens}
                    row["repeats"] = 1 if mode == FIRST_CALL else repeats
                    rows.append({column: row[column] for column in COLUMNS})
                yield rows

    def _modes(self, case: Case) -> tuple[str, ...]:
        small = resolve_device(self.device).type == "cuda" and case.batch * case.tokens <= GRAPH_TOKENS
        return (*MODES, *(GRAPH_MODES if small else ()), *((FIRST_CALL,) if self.first_call else ()))

    def _check(self, case: Case, device: torch.device, note: Callable) -> dict[str, dict[str, float]]:
        """The errors of the providers that are right, after one pass and after the case's own."""
        passes = sorted({1, case.passes})
        checks: dict = {
            provider: lambda provider=provider: operator_check(
                replay_of(provider, case, device), case, self.seed, device, passes
            )
            for provider in self.providers
        }
        return right_ones(checks, case.dtype, note)


def _runs(problems: dict, passes: int, mode: str, device: torch.device, note: Callable) -> dict[str, Run]:
    """Those that could be made ready: recording a CUDA graph fails where an operator waits for the device."""
    runs = {}
    for provider, problem in problems.items():
        try:
            runs[provider] = run_of(problem, passes, mode, device)
        except RuntimeError as error:
            note(provider, f"{mode}: no row: {first_line(error)}")
    return runs


def _least(case: Case, mode: str, figures: dict, device: torch.device) -> dict:
    """The case's arithmetic and traffic, an H100's floor in 16 bits, and how much of the time on CUDA that floor is."""
    mode = "forward+backward" if mode == FIRST_CALL else mode.removesuffix("-graph")
    floor = case.floor_ms(mode)
    timed = floor is not None and device.type == "cuda"
    return {
        "gflop": case.flops(mode) / 1e9,
        "mib_moved": case.bytes(mode) / 2**20,
        "h100_floor_ms": "" if floor is None else floor,
        "floor_fraction": floor / figures["ms_median"] if timed else "",
    }


def _first_call(case: Case, device: torch.device, note: Callable) -> dict[str, dict]:
    """The first forward and backward of `ours` in a new process without compiled kernels.

    Imports, inputs and the device's own start are not counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "sleep_ops.bench.first_call", json.dumps(asdict(case)), str(device)],
            env=os.environ | {"TRITON_CACHE_DIR": folder},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        note("ours", f"{FIRST_CALL}: no row: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
        return {}
    return {"ours": dict.fromkeys(TIMES, float(done.stdout)) | {"peak_extra_mib": "", "saved_mib": ""}}
