"""What the checks must notice: removed barriers, waits and fences of each kind, faulty accesses, a race of Triton's."""

import re
from typing import NamedTuple

import pytest
import torch
from cases import NEGATIVE, Case, arguments, slow_unless
from ptx import toys
from ptx.emulation import launch_table, on_gpu
from ptx.emulator import Emulator, emulated
from ptx.test_operators import CHUNKS_OF_32, CHUNKS_OF_64

from sleep_ops import gated_delta_rule

SYNCHRONISATION = {
    "barrier": r"bar\.sync\s+0;",
    "copy wait": r"cp\.async\.wait_group\s+\d+;",
    "wgmma wait": r"wgmma\.wait_group\.sync\.aligned \d+;",
    "proxy fence": r"fence\.proxy\.async\.shared::cta;",
    "wgmma fence": r"wgmma\.fence\.sync\.aligned;",
}
EXPECTED = {
    "barrier": "race",
    "copy wait": "race",
    "wgmma wait": "wgmma",
    "proxy fence": "proxy",
    "wgmma fence": "wgmma",
}


class Scan(NamedTuple):
    """chunk_scan over at least four chunks; kinds: of synchronisation that it has."""

    arch: int
    rows: dict
    T: int
    kinds: tuple[str, ...]

    def run(self, change=None) -> tuple[torch.Tensor, Emulator]:
        case = Case("scan", T=self.T, dims=(64, 64), options=NEGATIVE)
        tensors, options = arguments(case, torch.bfloat16)
        with launch_table("LAUNCHES", self.rows), on_gpu(self.arch, change=change) as emulator, torch.no_grad():
            return gated_delta_rule(**tensors, impl="triton", **options).output, emulator


SCANS = {
    "sm90": Scan(90, CHUNKS_OF_32, 133, tuple(SYNCHRONISATION)),
    "sm80": Scan(80, CHUNKS_OF_32, 133, ("barrier", "copy wait")),
    "sm90-long-chunks": Scan(90, CHUNKS_OF_64, 261, tuple(SYNCHRONISATION)),
}


def source_of(scan: Scan) -> str:
    """The PTX of chunk_scan."""
    found = {}

    def keep(name: str, ptx: str) -> str:
        found[name] = ptx
        return ptx

    _, emulator = scan.run(keep)
    assert not emulator.reports, emulator.summary()
    return found["chunk_scan_kernel"]


def without(match: re.Match, kernel: str = "chunk_scan_kernel"):
    """A change that takes one instruction out of a kernel."""
    return lambda name, ptx: ptx[: match.start()] + ptx[match.end() :] if name == kernel else ptx


@pytest.mark.parametrize("scan", slow_unless(["sm90"], SCANS.values(), ids=SCANS))
def test_removed_from_a_copy_of_chunk_scan(scan):
    """Each is removed in turn. What goes unnoticed guards nothing: the results stay as they were."""
    source = source_of(scan)
    expected, _ = scan.run()
    for kind in scan.kinds:
        places = list(re.finditer(SYNCHRONISATION[kind], source))
        noticed = 0
        for place in places:
            output, emulator = scan.run(without(place))
            noticed += EXPECTED[kind] in {report.kind for report in emulator.reports}
            assert emulator.reports or torch.equal(output, expected), f"{kind} at {place.start()}: silently wrong"
        assert noticed >= (0.75 * len(places) if kind == "barrier" else 1), f"{kind}: {noticed} of {len(places)}"


PIPELINED = [
    *((90, stages, kind) for stages in (1, 2) for kind in ("barrier", "wgmma wait")),
    (90, 1, "proxy fence"),
    (90, 2, "copy wait"),
    *((80, 2, kind) for kind in ("barrier", "copy wait")),
]


@pytest.mark.parametrize(("arch", "stages", "kind"), PIPELINED)
def test_all_of_a_kind_removed_from_a_loop_of_products(arch, stages, kind):
    x, y = torch.randn(2, 6, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    counts = []

    def change(name, ptx):
        ptx, count = re.subn(SYNCHRONISATION[kind], "", ptx)
        counts.append(count)
        return ptx

    with emulated(arch, change=change) as emulator:
        o, s = torch.empty(64, 64), torch.empty(64)
        toys.pipelined_kernel[(1,)](x, y, o, s, 6, C=64, B=64, BOTH=False, num_stages=stages)
    assert counts[0] > 0
    assert EXPECTED[kind] in {report.kind for report in emulator.reports}, emulator.summary()


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_pipelining_race_of_triton(stages):
    """A tile that a wgmma in flight reads, and registers too, gets a buffer too few on sm_90 (seen in 3.6.0 and 3.7.1).

    As the products' reads may come late, so may they see what is written over them.
    """
    x, y = torch.randn(2, 6, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = (x.double() @ y.double().mT).sum(0)
    for late in (False, True):
        o, s = torch.empty(64, 64), torch.empty(64)
        with emulated(90, late=late) as emulator:
            toys.pipelined_kernel[(1,)](x, y, o, s, 6, C=64, B=64, BOTH=True, num_stages=stages)
        races = stages > 1
        assert {report.kind for report in emulator.reports} == ({"race"} if races else set()), emulator.summary()
        right = bool((o.double() - want).norm() / want.norm() < 1e-5)
        assert right == (not (races and late))


def test_access_out_of_bounds():
    with emulated(90) as emulator:
        toys.unmasked_kernel[(1,)](torch.zeros(100), torch.zeros(128), BLOCK=128)
    assert [report.kind for report in emulator.reports] == ["bounds"]
    assert "x + " in emulator.reports[0].note and "ld.global" in emulator.reports[0].instruction


def dot_reports(*replacement) -> set[str]:
    """Kinds of report of a product through shared memory, in whose PTX a pattern is replaced wherever it is."""
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()

    def change(name, ptx):
        changed, count = re.subn(*replacement, ptx)
        assert count
        return changed

    with emulated(80, change=change) as emulator:
        toys.dot_kernel[(1,)](a, b, torch.empty(64, 64), 64, 64, 64, False, False, "ieee")
    return {report.kind for report in emulator.reports}


def test_shared_memory_that_nothing_wrote():
    assert "uninit" in dot_reports(r"st\.shared(?:::cta)?\.v4\.b32[^;]*;", "")


@pytest.mark.parametrize("offset", [1, 1 << 20], ids=["misaligned", "beyond the end"])
def test_shared_access_out_of_bounds(offset):
    assert "bounds" in dot_reports(r"(st\.shared(?:::cta)?\.v4\.b32\s+\[ ?%r\d+)[^\]]*", rf"\1 + {offset}")


@pytest.mark.parametrize("removed", [False, True])
def test_threads_of_a_warp_out_of_order(removed):
    """A program of one warp needs its barrier too: threads read what others of the warp wrote."""
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()

    def change(name, ptx):
        return re.sub(SYNCHRONISATION["barrier"], "", ptx) if removed else ptx

    with emulated(80, change=change) as emulator:
        toys.dot_kernel[(1,)](a, b, torch.empty(16, 16), 16, 16, 16, False, False, "ieee", num_warps=1)
    assert {report.kind for report in emulator.reports} == ({"warp-order"} if removed else set())


def test_programs_that_write_the_same_place():
    with emulated(90) as emulator:
        toys.shared_place_kernel[(2,)](torch.empty(128), BLOCK=128)
    assert {report.kind for report in emulator.reports} == {"race"}


@pytest.mark.parametrize("removed", [False, True])
def test_warps_that_read_what_others_write_in_a_tensor(removed):
    x, z = torch.arange(128.0), torch.empty(128)

    def change(name, ptx):
        return re.sub(SYNCHRONISATION["barrier"], "", ptx) if removed else ptx

    with emulated(90, change=change) as emulator:
        toys.turned_kernel[(1,)](x, z, BLOCK=128)
    assert {report.kind for report in emulator.reports} == ({"race"} if removed else set())
    if not removed:
        assert torch.equal(z, x.flip(0))
