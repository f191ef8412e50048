"""Numbers too small to matter become zero: over denormal ones many CPUs take up to a hundred times longer.

Chains of maps and states shrink with every decay, forwards and backwards, and would pass through the denormal numbers.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


# Functions: where shapes are dynamic, torch.compile takes a module's floats for symbols, and fails.
def least(dtype: torch.dtype) -> float:
    """Of what has the scale of values or of a loss: in float32 8e-31, a factor of 1e8 from denormal."""
    return torch.finfo(dtype).tiny ** 0.8


def least_of_map(dtype: torch.dtype) -> float:
    """Of maps of norm at most 1: in float32 1e-19, whose square is not denormal."""
    return torch.finfo(dtype).tiny ** 0.5


class _Flushed(torch.autograd.Function):
    """x without numbers below `smallest`, its gradient without those below `least`; to autograd the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, smallest):
        return F.hardshrink(x, smallest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return flushed(grad), None


class _FlushedForward(_Flushed):
    """With a forward-mode derivative, which torch.compile does not know of custom functions."""

    @staticmethod
    def jvp(ctx, tangent, _):
        return flushed(tangent)


def flushed(x: Tensor, smallest: Callable[[torch.dtype], float] = least) -> Tensor:
    """x, on the CPU with zero for what is too small, in its gradient too. GPUs do not mind such numbers."""
    if x.device.type != "cpu":
        return x
    return (_Flushed if torch.compiler.is_compiling() else _FlushedForward).apply(x, smallest(x.dtype))


def flush_(x: Tensor) -> Tensor:
    """`flushed` in place, where no gradient is recorded."""
    return torch.hardshrink(x, least(x.dtype), out=x) if x.device.type == "cpu" else x


def flushed_exp2_(x: Tensor) -> Tensor:
    """2^x in place, on the CPU exactly 0 where that is too small."""
    if x.device.type == "cpu":
        torch.threshold_(x, math.log2(least(x.dtype)), -math.inf)
    return x.exp2_()
