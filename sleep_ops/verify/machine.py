"""What this machine has, and what is missing: named, never required.

    python -m sleep_ops.verify.machine OUT [--device cpu]

Writes OUT/machine.csv.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy
import torch

from sleep_ops.bench.harness import environment
from sleep_ops.files import write_csv
from sleep_ops.training.config import resolve_device

FILE = "machine.csv"
# Module, distribution that has its version, and what goes on without it.
OPTIONAL = {
    "triton": ("triton", "the PyTorch forms alone"),
    "flash_attn": ("flash-attn", "attention is PyTorch's"),
    "fla": ("fla-core", "not compared with"),
    "flash_qla": ("flash-qla", "not compared with"),
    "transformers": ("transformers", "no adapters for its models"),
    "pytest": ("pytest", "kernels are not emulated"),
    "tensorboard": ("tensorboard", "runs write CSV files alone"),
}
TOOLS = {"compute-sanitizer": "no memcheck, no racecheck", "nvidia-smi": "the driver is not known", "git": ""}


def machine(device: torch.device) -> list[dict[str, str]]:
    """Rows of what there is: item, found, without."""
    facts = {
        "revision": environment(device)["revision"] or "outside a checkout",
        "system": platform.platform(),
        "CPU": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "Python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "numpy": numpy.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
        facts["GPU"] += f"sm_{properties.major}{properties.minor}, {properties.multi_processor_count} multiprocessors"
        facts["driver"] = driver()
    else:
        facts["GPU"] = "not used" if torch.cuda.is_available() else "none"
    rows = [{"item": item, "found": found, "without": ""} for item, found in facts.items()]
    for module, (distribution, without) in OPTIONAL.items():
        found = version(distribution) if importlib.util.find_spec(module) else "missing"
        rows.append({"item": distribution, "found": found, "without": without if found == "missing" else ""})
    for tool, without in TOOLS.items():
        found = "there" if shutil.which(tool) else "missing"
        rows.append({"item": tool, "found": found, "without": without if found == "missing" else ""})
    return rows


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "there"


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m sleep_ops.verify.machine")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    rows = machine(resolve_device(given.device))
    write_csv(given.out / FILE, rows)
    for row in rows:
        print("{item}: {found}".format(**row), f"({row['without']})" if row["without"] else "")
