"""The project's operators on emulated kernels: they choose and launch on CPU tensors as on a GPU of sm_80 or sm_90."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from ptx.emulator import Emulator, emulated

from sleep_ops.kernels import configs, launches
from sleep_ops.ops import chunk_triton, dispatch, gated_norm, short_conv, single_chunk, step

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@contextlib.contextmanager
def on_gpu(arch: int, multiprocessors: int = 0, **options) -> Iterator[Emulator]:
    """impl="triton" on CPU tensors runs as compiled for sm_`arch`; torch.empty gives NaN. `options` are Emulator's."""
    with contextlib.ExitStack() as stack:
        for module in (configs, chunk_triton, single_chunk):
            stack.enter_context(mock.patch.object(module, "architecture", lambda device: f"sm{arch}"))
        stack.enter_context(mock.patch.object(configs, "multiprocessors", lambda device: multiprocessors))
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
