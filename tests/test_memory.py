"""Freed memory stays with a command that trains, where the C library is glibc."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from sleep_ops.training.heap import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for n in range(20):
    if n == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(1 << 20) for _ in range(8)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> int:
    """Pages that the system had to find for ten times 32 MiB, after as much before."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, capture_output=True, check=True, env=clean | environment).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_the_next_step():
    assert faults("keep") < 1000
    # Whoever has settings of their own keeps them: here every block is the system's.
    assert faults("keep", MALLOC_MMAP_THRESHOLD_="1000000") > 1000
