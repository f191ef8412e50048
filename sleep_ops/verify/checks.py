"""Every operator against float64, forward and every gradient, and twice to the same bits.

    python -m sleep_ops.verify.checks OUT [--device cpu] [--seconds 60] [--short]

In 16 bits a kernel's error may be twice that of PyTorch with the same roundings (yardstick.py), plus half a unit of
rounding; in float32, and for the PyTorch form itself, it has a bound of its own. On CUDA the kernels run, on a CPU the
PyTorch form, and with TRITON_INTERPRET=1, for a few of the cases, the kernels in Triton's interpreter; once, for that
runs one program after another and can't race. Writes OUT/checks.csv.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from sleep_ops.bench.cases import DTYPES
from sleep_ops.bench.checks import ERROR_BOUNDS
from sleep_ops.bench.harness import MACHINE, environment, first_line
from sleep_ops.files import write_csv
from sleep_ops.ops.dispatch import HAS_TRITON
from sleep_ops.training.config import resolve_device
from sleep_ops.verify.problems import Problem, problems
from sleep_ops.verify.yardstick import plain_error, rounded_as_kernels

FILE = "checks.csv"
COLUMNS = [*MACHINE, "operator", "case", "impl", "dtype", "result", "error", "allowed", "same_bits", "verdict"]
FLOAT32 = {"g", "beta", "initial_state", "A_log", "dt_bias"}  # whatever the dtype of the rest
LEFT_OUT = "left out for time"


def plan(device: torch.device, short: bool) -> list[tuple[str, str]]:
    """What is checked in which dtype, the most telling first. The interpreter's bfloat16 products are wrong."""
    if device.type == "cuda":
        return [("triton", "bfloat16"), *(() if short else (("triton", "float16"), ("triton", "float32")))]
    if os.environ.get("TRITON_INTERPRET") == "1" and HAS_TRITON:
        return [("torch", "float32"), ("torch", "bfloat16"), ("triton", "float32"), ("triton", "float16")]
    return [("torch", "float32"), ("torch", "bfloat16")]


def interpreted(impl: str, device: torch.device) -> bool:
    return impl == "triton" and device.type == "cpu"


def evaluate(problem: Problem, impl: str, leaves: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and gradients by name, from cotangents rounded to `dtype`."""
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    results = problem.call(impl, **leaves)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(x.shape, generator=generator).to(dtype).to(x) for x in results]
    gradients = torch.autograd.grad(results, list(leaves.values()), cotangents, allow_unused=True)
    named = {f"result {i}": x.detach() for i, x in enumerate(results)}
    return named | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True) if x is not None}


def relative_error(x: Tensor, truth: Tensor) -> float:
    norm = truth.norm().item() or 1.0
    error = (x.detach().cpu().double() - truth).norm().item() / norm
    return math.inf if math.isnan(error) else error


def check(problem: Problem, impl: str, name: str, device: torch.device) -> list[dict]:
    """A row for every result and gradient."""
    dtype = DTYPES[name]
    rounded = {n: x.to(torch.float32 if n in FLOAT32 else dtype) for n, x in problem.leaves.items()}
    truth = evaluate(problem, "reference", {n: x.double() for n, x in rounded.items()}, dtype)
    leaves = {n: x.to(device) for n, x in rounded.items()}
    found = evaluate(problem, impl, leaves, dtype)
    again = None if interpreted(impl, device) else evaluate(problem, impl, leaves, dtype)
    plain = None
    if impl == "triton" and name != "float32":
        with rounded_as_kernels():
            plain = evaluate(problem, "torch", leaves, dtype)
    rows = []
    for result, exact in truth.items():
        error, allowed = relative_error(found[result], exact), ERROR_BOUNDS[name]
        same = "" if again is None else torch.equal(found[result], again[result])
        if plain is not None:
            allowed = 2 * plain_error(result, plain, truth, relative_error) + 0.5 * torch.finfo(dtype).eps
        verdict = "right" if error <= allowed and same is not False else "WRONG"
        rows.append({"result": result, "error": error, "allowed": allowed, "same_bits": same, "verdict": verdict})
    return rows


def run(out: Path, device: str, seconds: float = math.inf, short: bool = False) -> bool:
    """Writes the rows of all checks for which there is time; whether all were right."""
    place, begin, rows = resolve_device(device), time.monotonic(), []
    common = environment(place)
    for impl, dtype in plan(place, short):
        for problem in problems(large=place.type == "cuda" and not short):
            if interpreted(impl, place) and not problem.interpreted:
                continue
            names = {"operator": problem.operator, "case": problem.case, "impl": impl, "dtype": dtype}
            blank = dict.fromkeys(("result", "error", "allowed", "same_bits"), "")
            if rows and time.monotonic() - begin > seconds:
                found = [blank | {"verdict": LEFT_OUT}]
            else:
                try:
                    found = check(problem, impl, dtype, place)
                except Exception as error:  # whatever a compiler or a device raises is a finding, and not the last
                    found = [blank | {"verdict": f"WRONG: {first_line(error)}"}]
            rows += [{column: (common | names | row)[column] for column in COLUMNS} for row in found]
            write_csv(out / FILE, rows)
            worst = max(found, key=lambda row: (row["verdict"] != "right", row["error"] or 0))
            label = f"{problem.operator}, {problem.case}, {impl}, {dtype}"
            print(f"{label}: {worst['verdict']} {worst['result']} {worst['error']}", flush=True)
    return not any(row["verdict"].startswith("WRONG") for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m sleep_ops.verify.checks")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--short", action="store_true", help="the small cases, on CUDA in bfloat16 alone")
    given = parser.parse_args()
    sys.exit(not run(given.out, given.device, given.seconds, given.short))
