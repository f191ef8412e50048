"""The project's operators on emulated kernels: they choose and launch on CPU tensors as on a GPU of sm_80 or sm_90."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from cases import relative_error
from ptx.emulator import Emulator, emulated
from torch import Tensor

from sleep_ops.kernels import configs, launches
from sleep_ops.ops import chunk_triton, dispatch, gated_norm, short_conv, step, window_triton

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@contextlib.contextmanager
def on_gpu(arch: int, **options) -> Iterator[Emulator]:
    """impl="triton" on CPU tensors runs as compiled for sm_`arch`; torch.empty gives NaN. `options` are Emulator's."""
    with contextlib.ExitStack() as stack:
        for module in (configs, chunk_triton, window_triton):
            stack.enter_context(mock.patch.object(module, "architecture", lambda device: f"sm{arch}"))
        for module in (dispatch, gated_norm, short_conv, step):
            if hasattr(module, "choose_impl"):
                stack.enter_context(mock.patch.object(module, "choose_impl", lambda impl, x: impl))
        stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        torch.use_deterministic_algorithms(True)  # then torch.empty is filled
        yield stack.enter_context(emulated(arch, **options))


def launch_table(name: str, rows: dict[tuple, tuple]) -> contextlib.AbstractContextManager:
    """A table of kernels/launches.py with these rows in it."""
    return mock.patch.dict(getattr(launches, name), rows)


def check_silent(emulator: Emulator, *kernels: str) -> None:
    """Nothing was reported, and of the kernels named each ran."""
    assert not emulator.reports, emulator.summary()
    missing = {f"{name}_kernel" for name in kernels} - set(emulator.counts)
    assert not missing, f"{missing} did not run, {set(emulator.counts)} did"


def check_two_times_torch(function, tensors: dict[str, Tensor], wanted: tuple[str, ...]) -> None:
    """The 2x rule for function(impl=, **tensors) -> results, and the gradients of `wanted`, against impl="torch"."""

    def run(impl: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        given = {name: x.to(dtype or x.dtype).requires_grad_(name in wanted) for name, x in tensors.items()}
        results = function(impl=impl, **given)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
        leaves = [given[name] for name in wanted]
        gradients = torch.autograd.grad(results, leaves, cotangents) if wanted else []
        return {f"result {i}": x.detach() for i, x in enumerate(results)} | dict(zip(wanted, gradients, strict=True))

    truth, plain, got = run("torch", torch.float64), run("torch"), run("triton")
    rounding = torch.finfo(next(iter(tensors.values())).dtype).eps / 2
    for name, value in got.items():
        assert value.dtype == plain[name].dtype, name
        error, allowed = (relative_error(x, truth[name]) for x in (value, plain[name]))
        assert error <= 2 * allowed + rounding, f"{name}: error {error:.2e}, allowed {2 * allowed + rounding:.2e}"
