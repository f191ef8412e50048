"""Rows of kernels/launches.py as compiled, and which rows `bench tune` refuses by it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from ptx.rows import architectures, faults

from sleep_ops.bench.tune import emulated_faults
from sleep_ops.kernels import launches

ROWS = [(name, key) for name in ("LAUNCHES", "SINGLE_CHUNK_LAUNCHES") for key in getattr(launches, name)]


@pytest.mark.parametrize(
    ("table", "key", "arch"),
    [
        pytest.param(
            table,
            key,
            arch,
            id=f"{table}-{'-'.join(map(str, key))}-sm{arch}",
            # The tests of operators run the rows for any GPU; those measured on one are checked in every run.
            marks=pytest.mark.slow if key[3] is None else (),
        )
        for table, key in ROWS
        for arch in architectures(key)
    ],
)
def test_rows_of_the_table(table, key, arch):
    assert faults(table, key, getattr(launches, table)[key], arch) == []


def test_a_race_is_a_fault():
    """With its barriers taken out of one kernel, a row that is fine is refused."""

    def change(name, ptx):
        return re.sub(r"bar\.sync\s+0;", "", ptx) if name == "single_chunk_forward_kernel" else ptx

    found = faults("SINGLE_CHUNK_LAUNCHES", ("16-bit", 64, 64, "sm90"), (32, (64, 4, 1), (64, 4, 1)), 90, change=change)
    assert any(fault.startswith("sm_90: race: single_chunk_forward_kernel") for fault in found)


def test_what_does_not_compile_is_a_fault():
    (found,) = faults("SINGLE_CHUNK_LAUNCHES", ("16-bit", 64, 64, "sm90"), (32, (24, 4, 1), (64, 4, 1)), 90)
    assert found.startswith("sm_90: CompilationError")


@pytest.mark.parametrize(
    ("block_v", "right"),
    [pytest.param(64, True, marks=pytest.mark.slow), (24, False)],
    ids=["right", "not a power of 2"],
)
def test_tune_asks_in_a_process_of_its_own(block_v, right):
    found = emulated_faults("SINGLE_CHUNK_LAUNCHES", ("16-bit", 64, 64, "sm90"), (32, (block_v, 4, 1), (64, 4, 1)))
    assert (found == []) == right


def test_the_command_line_refuses_the_interpreter():
    script = Path(__file__).with_name("rows.py")
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(script.parents[2])}
    row = '["SINGLE_CHUNK_LAUNCHES", ["16-bit", 64, 64, "sm90"], [32, [64, 4, 1], [64, 4, 1]]]'
    done = subprocess.run([sys.executable, script, row], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "TRITON_INTERPRET: expected it unset" in done.stderr
