"""Checks of the public operators' arguments: a ValueError names the argument, what was expected and what was got.

Checks read shapes, dtypes and devices, never values of tensors, with one exception: `cu_seqlens` and `lengths` on the
CPU, outside torch.compile. On a GPU reading them would make the host wait for the device, so there their values are the
caller's duty.
"""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sleep_ops.checks import check_choice, check_count, is_finite

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KERNEL_IMPLS = ("auto", "triton", "torch")  # of operators whose PyTorch form is their specification
OUTPUT_PASSES = ("first", "last")


def check_tensor(
    name: str,
    x: object,
    shape: tuple[int, ...],
    dims: str,
    device: torch.device | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES,
) -> None:
    """Raise unless x is a tensor of this shape (described by `dims`), on `device`, of one of `dtypes`."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor {dims}, got {type(x).__name__}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {dims} = {list(shape)}, got {list(x.shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")


def check_eps(name: str, eps: object) -> None:
    """Raise unless eps is a finite number >= 0."""
    if not is_finite(eps) or eps < 0:
        raise ValueError(f"{name}: expected a finite number >= 0, got {eps!r}")


def check_full(name: str, x: object, ndim: int, dims: str, may_be_empty: int = 0) -> None:
    """Raise unless x is a float tensor of `ndim` dimensions (`dims`), none empty but of the first `may_be_empty`."""
    if not isinstance(x, Tensor) or x.ndim != ndim or 0 in x.shape[may_be_empty:]:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected a tensor {dims} with no empty dimension, got {got}")
    check_tensor(name, x, x.shape, dims)


def check_scale(scale: object) -> None:
    """Raise unless scale is None or a finite number."""
    if scale is not None and not is_finite(scale):
        raise ValueError(f"scale: expected None or a finite number, got {scale!r}")


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, tokens: int, device: torch.device) -> None:
    """Check the borders of packed sequences; their values only on the CPU and outside torch.compile."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        got = list(cu_seqlens.shape) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise ValueError(f"cu_seqlens: expected a tensor [num_seqs + 1] with at least one sequence, got {got}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: expected dtype torch.int32 or torch.int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected device {device}, got {cu_seqlens.device}")
    if batch != 1:
        raise ValueError(f"cu_seqlens: expected a batch of B = 1 with packed sequences, got B = {batch}")
    borders = _values(cu_seqlens)
    if borders is None:
        return
    if borders[0] != 0 or borders[-1] != tokens or any(a > b for a, b in zip(borders[:-1], borders[1:], strict=True)):
        raise ValueError(f"cu_seqlens: expected borders rising from 0 to T = {tokens}, got {borders}")


def check_lengths(lengths: Tensor, batch: int, tokens: int, device: torch.device) -> None:
    """Check the real tokens of right-padded rows; their values only on the CPU and outside torch.compile."""
    check_tensor("lengths", lengths, (batch,), "[B]", device, (torch.int64,))
    values = _values(lengths)
    if values is not None and any(not 0 <= n <= tokens for n in values):
        raise ValueError(f"lengths: expected values from 0 to T = {tokens}, got {values}")


def _values(numbers: Tensor) -> list[int] | None:
    """The numbers, or None where the host would have to wait for them, or can't read them."""
    if torch.compiler.is_compiling() or numbers.device.type != "cpu":
        return None
    try:
        return numbers.tolist()
    except RuntimeError:
        if forward_ad._current_level < 0:
            raise
        return None  # torch 2.9 in forward mode


def check_heads(key_heads: int, value_heads: int) -> None:
    """Raise unless every key head serves the same number of value heads."""
    if value_heads % key_heads:
        raise ValueError(f"v: expected HV to be a multiple of H = {key_heads}, got HV = {value_heads}")


def check_state(name: str, state: Tensor, shape: tuple[int, ...], k: Tensor) -> None:
    """Raise unless state is [N, HV, K, V] in float32, or float64 beside float64 inputs."""
    dtypes = (torch.float32, torch.float64) if k.dtype == torch.float64 else (torch.float32,)
    check_tensor(name, state, shape, "[N, HV, K, V]", k.device, dtypes)


def check_passes(passes: object, window: object, output_pass: object) -> None:
    """Raise unless passes is an int >= 1 or math.inf, window None or an int >= 1, output_pass "first" or "last"."""
    endless = isinstance(passes, float) and passes == math.inf
    if not endless and (isinstance(passes, bool) or not isinstance(passes, int) or passes < 1):
        raise ValueError(f"passes: expected an integer >= 1 or math.inf, got {passes!r}")
    if window is not None:
        check_count("window", window)
    check_choice("output_pass", output_pass, OUTPUT_PASSES)


def check_no_tangents(operator: str, *tensors: Tensor | None) -> None:
    """Refuse forward-mode derivatives (torch.func.jvp, jacfwd, linearize, dual tensors): kernels would drop them."""
    if forward_ad._current_level < 0:
        return
    for x in tensors:
        if x is not None and (
            torch._C._functorch.is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None
        ):
            raise RuntimeError(f"{operator}: expected reverse mode, got a forward-mode derivative (torch.func.jvp)")


def check_first_order(operator: str) -> None:
    """Called in a written-out backward: refuse a graph of it (create_graph=True), whose derivatives would be wrong."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{operator}: expected one derivative (create_graph=False), got create_graph=True")
