"""Every kernel as compiled for sm_80 and sm_90, through the public operators: the 2x rule, and no report of any kind.

Long enough that loops are pipelined: at least four chunks. The quick cases touch every kernel on each architecture.
"""

import re
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from cases import GATED, NEGATIVE, Case, check_two_times, slow_unless
from judge import triton_within_two_times
from ptx.emulation import DTYPES, check_silent, launch_table, on_gpu

from sleep_ops import gated_delta_rule, sleep_gated_delta_rule
from sleep_ops.kernels import chunk_prepare
from sleep_ops.kernels.launches import LAUNCHES
from sleep_ops.ops.affine import segment_transition
from sleep_ops.ops.gated_norm import gated_rms_norm
from sleep_ops.ops.short_conv import short_convolution
from sleep_ops.ops.step import gated_delta_rule_step
from sleep_ops.reference import sleep_gated_delta_rule_reference

SM90 = ("16-bit", None, None, "sm90")
CHUNKS_OF_32 = {SM90: LAUNCHES["16-bit", None, None, None]}
CHUNKS_OF_64 = {("16-bit", None, None, None): (64, (16, 1, 1), (32, 4, 2), (32, 4, 2), (32, 4, 1))}  # sm_90 has its own
FEW_PROGRAMS = {SM90: (64, (16, 1, 1), (32, 4, 3), (32, 4, 3), (32, 4, 3))}  # by sweep_launch of kernels/configs.py
ONE_PASS = ("chunk_prepare", "chunk_scan", "chunk_reverse", "gate_backward")
WHOLE = (*ONE_PASS, "chunk_grad")
LONG = (*ONE_PASS, "chunk_grad_long")
SINGLE_CHUNK = ("single_chunk_forward", "single_chunk_backward")
REPLAY = (*SINGLE_CHUNK, "replay_forward", "replay_backward")
CONVOLUTION = tuple(f"short_conv_{name}" for name in ("forward", "z_backward", "x_backward", "state_backward"))
NORM = ("gated_norm_forward", "gated_norm_backward")


class Problem(NamedTuple):
    """A case of an operator, the kernels that it must run, rows of the launch table, and whether it is a quick one."""

    id: str
    case: Case
    kernels: tuple[str, ...]
    rows: dict = CHUNKS_OF_32
    quick: bool = False


def gated(T, K, V, **others):
    return Case("gated", T=T, dims=(K, V), heads=others.pop("heads", (1, 2)), options=NEGATIVE, **others)


PASSES = [
    Problem("K64-V64", gated(133, 64, 64), WHOLE, quick=True),
    Problem("K128-V128", gated(133, 128, 128), WHOLE),
    Problem("K60-V100", gated(133, 60, 100), WHOLE),
    Problem("K96-V256", gated(133, 96, 256), WHOLE),
    Problem("K256-V256", gated(69, 256, 256, heads=(1, 1)), WHOLE),
    Problem("packed", Case("packed", lengths=(40, 0, 133, 1, 27), dims=(64, 64), options=NEGATIVE), WHOLE),
    Problem("plain", Case("plain", T=133, dims=(64, 64), heads=(2, 2), B=2, initial_state=False, strided=True), WHOLE),
    Problem("hebbian", Case("h", T=133, dims=(64, 64), heads=(1, 2), rule="hebbian", options=GATED), WHOLE),
    Problem("long-chunks-K64-V64", gated(260, 64, 64), LONG, CHUNKS_OF_64, quick=True),
    Problem("long-chunks-K128-V128", gated(260, 128, 128, heads=(1, 1)), LONG, CHUNKS_OF_64),
    Problem("long-chunks-K60-V100", gated(260, 60, 100), LONG, CHUNKS_OF_64),
    Problem("long-chunks-K96-V256", gated(260, 96, 256), LONG, CHUNKS_OF_64),
    Problem("long-chunks-few-programs", gated(325, 128, 128, heads=(1, 1)), LONG, CHUNKS_OF_64 | FEW_PROGRAMS),
    Problem("long-chunks-packed", Case("p", lengths=(70, 0, 1, 260), dims=(64, 64), strided=True), LONG, CHUNKS_OF_64),
    Problem(
        "long-chunks-hebbian",
        Case("h", T=260, dims=(64, 64), heads=(1, 2), rule="hebbian", options=GATED),
        LONG,
        CHUNKS_OF_64,
    ),
    Problem(
        "long-chunks-hebbian-one-tile",
        Case("h", T=130, dims=(32, 24), heads=(1, 2), rule="hebbian"),
        LONG,
        CHUNKS_OF_64,
        quick=True,
    ),
    Problem("single-chunk-K64-V64", gated(24, 64, 64, B=2), SINGLE_CHUNK, quick=True),
    Problem("single-chunk-K128-V128", gated(32, 128, 128, B=2), SINGLE_CHUNK),
    Problem("single-chunk-K60-V100", gated(29, 60, 100, B=2), SINGLE_CHUNK),
    Problem("single-chunk-K96-V256", gated(31, 96, 256), SINGLE_CHUNK),
    Problem("single-chunk-K256-V256", gated(16, 256, 256, heads=(1, 1)), SINGLE_CHUNK),
    Problem("single-chunk-short", gated(5, 64, 64, B=2), SINGLE_CHUNK),
    Problem("single-chunk-fresh", gated(24, 64, 64, B=2, initial_state=False, strided=True), SINGLE_CHUNK),
    Problem("single-chunk-hebbian", Case("h", T=24, dims=(64, 64), heads=(1, 2), B=2, rule="hebbian"), SINGLE_CHUNK),
]
SLEEPS = [
    Problem("windows", gated(133, 64, 64), WHOLE, quick=True),
    Problem("K60-V100", gated(133, 60, 100), WHOLE),
    Problem("K128-V128", gated(133, 128, 128, heads=(1, 1)), WHOLE),
    Problem("packed", Case("packed", lengths=(50, 0, 30), dims=(64, 64), options=GATED), WHOLE),
    Problem("hebbian", Case("h", T=100, dims=(64, 64), heads=(1, 2), rule="hebbian", options=GATED), WHOLE),
    Problem("long-chunks", gated(260, 64, 64), LONG, CHUNKS_OF_64),
    Problem("single-chunk-K64-V64", gated(24, 64, 64, B=2), REPLAY, quick=True),
    Problem("single-chunk-K128-V128", gated(32, 128, 128), REPLAY),
    Problem("single-chunk-K60-V100", gated(29, 60, 100, B=2), REPLAY),
    Problem("single-chunk-K96-V256", gated(31, 96, 256), REPLAY),
    Problem("single-chunk-K256-V256", gated(16, 256, 256, heads=(1, 1)), REPLAY),
    Problem("single-chunk-short", gated(5, 64, 64, B=2), REPLAY),
    Problem("single-chunk-fresh", gated(24, 64, 64, B=2, initial_state=False), REPLAY),
    Problem("single-chunk-hebbian", Case("h", T=24, dims=(64, 64), heads=(1, 2), B=2, rule="hebbian"), REPLAY),
]


def params(problems):
    """Of each problem: quick ones in bfloat16 always; everything else, and float16, is slow."""
    return [
        pytest.param(
            problem,
            arch,
            dtype,
            id=f"{problem.id}-sm{arch}-{dtype}",
            marks=() if problem.quick and dtype == "bf16" else pytest.mark.slow,
        )
        for problem in problems
        for arch in (90, 80)
        for dtype in ("bf16", "f16")
    ]


def run_triton(operator, **fixed):
    return lambda *tensors, **options: operator(*tensors, impl="triton", **fixed, **options)


@pytest.mark.parametrize(("problem", "arch", "dtype"), params(PASSES))
def test_one_pass(problem, arch, dtype):
    with launch_table("LAUNCHES", problem.rows), on_gpu(arch) as emulator:
        check_two_times(run_triton(gated_delta_rule), problem.case, DTYPES[dtype], "cpu")
    check_silent(emulator, *problem.kernels)
    normalised = problem.case.options.get("use_qk_l2norm", False) and problem.kernels is not SINGLE_CHUNK
    assert ("normalise_kernel" in emulator.counts) == normalised


@pytest.mark.parametrize(
    ("case", "apart"),
    [
        pytest.param(gated(325, 64, 64), False, id="heads together"),
        pytest.param(gated(325, 64, 64), True, id="heads apart", marks=pytest.mark.slow),
        pytest.param(gated(325, 128, 128, heads=(1, 1)), True, id="K128-V128", marks=pytest.mark.slow),
        pytest.param(
            Case("p", lengths=(70, 0, 1, 325), dims=(64, 64), strided=True), True, id="packed", marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.parametrize("dtype", slow_unless(["bf16"], ["bf16", "f16"]))
def test_few_programs(case, apart, dtype, monkeypatch):
    """Which leave multiprocessors idle: narrower tiles, and products of queries and keys kept for the sweeps."""
    if not apart:
        monkeypatch.setattr(chunk_prepare, "heads_together", lambda programs, heads, device: heads)
    with on_gpu(90, multiprocessors=132) as emulator:
        check_two_times(run_triton(gated_delta_rule), case, DTYPES[dtype], "cpu")
    check_silent(emulator, *LONG)


@pytest.mark.parametrize(("problem", "arch", "dtype"), params(SLEEPS))
def test_sleep(problem, arch, dtype):
    """Four passes over windows of 40 (of 150 with long chunks): the widened kernels. Six over one of a single chunk."""
    sleep = {"passes": 6 if problem.kernels is REPLAY else 4, "window": 40 if problem.rows is CHUNKS_OF_32 else 150}

    def plain(*tensors, **options):
        """Powers of T x T only where the kernels take them too: elsewhere maps, which err by more."""
        with mock.patch("sleep_ops.ops.gated_delta_rule.is_short", lambda _: problem.kernels is REPLAY):
            return sleep_gated_delta_rule(*tensors, impl="torch", **sleep, **options)

    with launch_table("LAUNCHES", problem.rows), on_gpu(arch) as emulator:
        check_two_times(
            run_triton(sleep_gated_delta_rule, **sleep),
            problem.case,
            DTYPES[dtype],
            "cpu",
            specification=lambda *tensors, **options: sleep_gated_delta_rule_reference(*tensors, **sleep, **options),
            plain=plain,
        )
    check_silent(emulator, *problem.kernels)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 80])
def test_transition(arch):
    """The final state by a pass as a map, P S + R."""

    def mapped(impl):
        def function(q, k, v, g, beta, *, scale, initial_state, **options):
            transition = segment_transition(k, v, g, beta, impl=impl, **options)
            output, _ = gated_delta_rule(
                q, k, v, g, beta, scale=scale, initial_state=initial_state, impl=impl, **options
            )
            return output, transition.apply(initial_state)

        return function

    with on_gpu(arch) as emulator:
        check_two_times(mapped("triton"), gated(133, 64, 64), torch.bfloat16, "cpu", plain=mapped("torch"))
    check_silent(emulator, *(LONG if arch == 90 else WHOLE))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 80])
def test_float32(arch):
    """Products of float32 numbers in full, and of three tf32 parts."""
    with on_gpu(arch) as emulator:
        check_two_times(run_triton(gated_delta_rule), gated(70, 32, 32), torch.float32, "cpu")
    check_silent(emulator, *WHOLE)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 80])
def test_replay_in_float32(arch):
    sleep = {"passes": 6}
    with on_gpu(arch) as emulator:
        check_two_times(
            run_triton(sleep_gated_delta_rule, **sleep),
            gated(13, 32, 32),
            torch.float32,
            "cpu",
            specification=lambda *tensors, **options: sleep_gated_delta_rule_reference(*tensors, **sleep, **options),
            plain=lambda *tensors, **options: sleep_gated_delta_rule(*tensors, impl="torch", **sleep, **options),
        )
    check_silent(emulator, *REPLAY)


def drawn(shapes: dict[str, tuple], dtype: str) -> dict[str, torch.Tensor]:
    """Normal numbers in dtype, those of gates, states and norms in float32."""
    tensors = {}
    for n, (name, shape) in enumerate(shapes.items()):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(n))
        wide = name in ("g", "beta", "state", "A_log", "dt_bias")
        tensors[name] = (x if wide else x.to(DTYPES[dtype])).requires_grad_()
    return tensors


def check_against_torch(function, tensors, arch: int, dtype: str, kernels: tuple[str, ...], **options) -> None:
    with on_gpu(arch) as emulator:
        triton_within_two_times(function, tensors, torch.finfo(DTYPES[dtype]).eps / 2, **options)
    check_silent(emulator, *kernels)


def small(cases: dict[str, tuple], quick: str):
    """Of every case on each architecture; slow but for the quick one in bfloat16."""
    return [
        pytest.param(
            *case,
            arch,
            dtype,
            id=f"{name}-sm{arch}-{dtype}",
            marks=() if name == quick and dtype == "bf16" else pytest.mark.slow,
        )
        for name, case in cases.items()
        for arch in (90, 80)
        for dtype in ("bf16", "f16")
    ]


STEPS = {
    "K64-V64": (64, 64, "delta", False),
    "K128-V128": (128, 128, "delta", False),
    "K60-V100": (60, 100, "delta", False),
    "K96-V256": (96, 256, "delta", False),
    "K256-V256": (256, 256, "delta", False),
    "inplace": (64, 64, "delta", True),
    "hebbian-inplace": (60, 100, "hebbian", True),
}


@pytest.mark.parametrize(("K", "V", "rule", "inplace", "arch", "dtype"), small(STEPS, "K60-V100"))
def test_step(K, V, rule, inplace, arch, dtype):
    shapes = {"q": (3, 1, K), "k": (3, 1, K), "v": (3, 2, V), "g": (3, 2), "beta": (3, 2), "state": (3, 2, K, V)}
    tensors = drawn(shapes | {"A_log": (2,), "dt_bias": (2,)}, dtype)

    def step(state, impl, **others):
        writes = inplace and impl == "triton"
        return gated_delta_rule_step(
            state=state.clone() if writes else state, impl=impl, inplace=writes, rule=rule, **GATED, **others
        )

    if inplace:
        tensors = {name: x.detach() for name, x in tensors.items()}
    check_against_torch(step, tensors, arch, dtype, ["step"])


CONVOLUTIONS = {
    "rows-64": (2, 37, 64, {}),
    "rows-100": (2, 37, 100, {}),
    "lengths": (2, 37, 72, {"lengths": torch.tensor([37, 11])}),
    "packed": (1, 75, 130, {"cu_seqlens": torch.tensor([0, 20, 20, 53, 75], dtype=torch.int32)}),
}


@pytest.mark.parametrize(("B", "T", "D", "options", "arch", "dtype"), small(CONVOLUTIONS, "packed"))
def test_short_convolution(B, T, D, options, arch, dtype):
    N = len(options["cu_seqlens"]) - 1 if "cu_seqlens" in options else B
    shapes = {"x": (B, T, D), "weight": (D, 4), "bias": (D,), "conv_state": (N, 3, D)}
    check_against_torch(short_convolution, drawn(shapes, dtype), arch, dtype, CONVOLUTION, **options)


NORMS = {"64": (50, 64), "128": (37, 128), "100": (33, 100), "2304": (5, 2304)}


@pytest.mark.parametrize(("rows", "width", "arch", "dtype"), small(NORMS, "100"))
def test_gated_norm(rows, width, arch, dtype):
    tensors = drawn({"x": (rows, width), "gate": (rows, width), "weight": (width,)}, dtype)
    tensors["weight"] = (1 + tensors["weight"].detach().float() / 10).requires_grad_()
    check_against_torch(gated_rms_norm, tensors, arch, dtype, NORM, eps=1e-6)


def test_every_kernel_is_among_the_kernels_that_must_run():
    sources = [path.read_text() for path in (Path(__file__).parents[2] / "kernels").glob("*.py")]
    names = {name for source in sources for name in re.findall(r"^def (\w+)_kernel\(", source, re.MULTILINE)}
    required = {name for problem in PASSES + SLEEPS for name in problem.kernels}
    assert names == required | {"normalise", "step", *CONVOLUTION, *NORM}
