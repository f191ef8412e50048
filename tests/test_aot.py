"""Every kernel compiles for GPUs that are not here, within their registers and shared memory (see aot.py)."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # minutes of compiling
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Bytes a thread that may spill, by the start of the kernel's name, up to K = V = 128 in 16 bits; others get none.
SPILL_BYTES = {"chunk_grad": 216, "chunk_grad_widened": 88, "chunk_scan": 64, "gated_norm_backward": 16}
SPILL_BYTES |= {"chunk_states_widened": 8}
SPILL_BYTES |= {"single_chunk_forward": 232, "single_chunk_backward": 592}
SPILL_BYTES |= {"replay_forward": 256, "replay_backward": 3072}
LARGE_SPILL_BYTES = {"chunk_grad": 88, "chunk_grad_widened": 88, "chunk_scan": 24, "chunk_scan_widened": 16}
LARGE_SPILL_BYTES |= {"single_chunk_forward": 96, "single_chunk_backward": 520}
LARGE_SPILL_BYTES |= {"replay_forward": 112, "replay_backward": 2736}
# By architecture: the same of any kernel for chunks of 64.
LONG_SPILL_BYTES = {80: 784, 90: 288, 100: 352}
FEW_SPILL_BYTES = {"chunk_prepare_few": 416}  # of those for few programs, others none


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = pathlib.Path(__file__).with_name("aot.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_every_kernel_is_compiled_for_every_architecture(records):
    sources = (pathlib.Path(__file__).parent.parent / "kernels").glob("*.py")
    names = {name for path in sources for name in re.findall(r"^def (\w+)_kernel\(", path.read_text(), re.MULTILINE)}
    assert len(names) >= 11
    widened = {"chunk_scan", "chunk_states", "chunk_reverse", "chunk_grad", "chunk_grad_long"}
    for name in names | {f"{name}_widened" for name in widened} | {"chunk_states"}:
        assert {r["arch"] for r in records if r["kernel"].startswith(f"{name}-")} == set(SHARED_BYTES), name


def test_no_kernel_is_replaced_by_a_trap(records):
    assert not [r for r in records if r["traps"]]


def test_products_in_16_bits_are_for_tensor_cores(records):
    chunked = [r for r in records if r["kernel"].startswith(("chunk_", "single_chunk_")) and "fp32" not in r["kernel"]]
    assert chunked and all(r["tensor_core"] for r in chunked)


def test_chunks_of_64_are_for_the_newest_tensor_cores(records):
    """But those of the inverse, which are of 16 tokens, and the trace of chunk_grad_long, of its tile's columns."""
    others = ("gate", "chunk_prepare")
    long = [r for r in records if "C64" in r["kernel"] and not r["kernel"].startswith(others)]
    for arch, instruction in {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}.items():
        found = {r["kernel"]: r["tensor_core"] for r in long if r["arch"] == arch}
        assert len(found) == (10 if arch == 90 else 8) and all(
            instructions[0] == instruction for instructions in found.values()
        )
        assert all(len(found[kernel]) == 1 or kernel.startswith("chunk_grad_long") for kernel in found)


def test_every_multiprocessor_holds_two_programs(records):
    """Of the chunk kernels, so that one computes while another waits for memory; but where there are too few."""
    few = [r for r in records if r["programs"] < 2 and r["kernel"].startswith(("chunk_", "single_chunk_"))]
    assert all(r["kernel"].startswith(("chunk_scan_few", "chunk_reverse_few")) for r in few)


def test_shared_memory_fits(records):
    assert not [r for r in records if r["shared_bytes"] > SHARED_BYTES[r["arch"]]]


def test_spills_stay_within_bounds(records):
    for record in records:
        kernel, _, shape = record["kernel"].partition("-")
        if "fp32" in shape:
            continue
        large = "K256" in shape or "V192" in shape
        bound = (LARGE_SPILL_BYTES if large else SPILL_BYTES).get(kernel, 0)
        if kernel.endswith("_few"):
            bound = FEW_SPILL_BYTES.get(kernel, 0)
        elif "C64" in shape:
            bound = LONG_SPILL_BYTES[record["arch"]]
        assert record["spill_bytes"] <= bound, record
