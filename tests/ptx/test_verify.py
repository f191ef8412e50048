"""What `sleep-ops verify` checks first on a GPU, on kernels as compiled for it: it finds them right, and no report."""

import pytest
import torch
from cases import slow_unless
from ptx.emulation import check_silent, on_gpu

from sleep_ops.verify import checks
from sleep_ops.verify.problems import problems

SMALL = {f"{p.operator}: {p.case}": p for p in problems(large=False)}
QUICK = ("gated_delta_rule: five chunks", "gated_delta_rule: Hebbian", "sleep_gated_delta_rule: N = 4")


@pytest.mark.parametrize("arch", slow_unless(["90"], [90, 80]))
@pytest.mark.parametrize("name", slow_unless(QUICK, SMALL))
def test_kernels_are_found_right_in_bfloat16(name, arch):
    with on_gpu(arch) as emulator:
        rows = checks.check(SMALL[name], "triton", "bfloat16", torch.device("cpu"))
    check_silent(emulator)
    assert emulator.counts and {row["verdict"] for row in rows} == {"right"}, rows
