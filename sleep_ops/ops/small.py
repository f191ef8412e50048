"""Numbers too small to matter become zero: over denormal ones many CPUs take up to a hundred times longer.

Chains of maps and states shrink with every decay, forwards and backwards, and would pass through the denormal numbers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# As powers of the smallest normal number: in float32 8e-31, a factor of 1e8 from denormal, and 1e-19, whose square is
# not. The first for what has the scale of values or of a loss; the second for maps of norm at most 1.
ANY, MAP = 0.8, 0.5


class _Flushed(torch.autograd.Function):
    """x without numbers below tiny ** power, its gradient without those below tiny ** ANY; to autograd the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, power):
        return F.hardshrink(x, torch.finfo(x.dtype).tiny ** power)

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


def flushed(x: Tensor, power: float = ANY) -> Tensor:
    """x, on the CPU with zero for what is too small, in its gradient too. GPUs do not mind such numbers."""
    if x.device.type != "cpu":
        return x
    return (_Flushed if torch.compiler.is_compiling() else _FlushedForward).apply(x, power)


def flush_(x: Tensor) -> Tensor:
    """`flushed` in place, where no gradient is recorded."""
    return torch.hardshrink(x, torch.finfo(x.dtype).tiny ** ANY, out=x) if x.device.type == "cpu" else x


def flushed_exp2_(x: Tensor) -> Tensor:
    """2^x in place, on the CPU exactly 0 where that is too small."""
    if x.device.type == "cpu":
        torch.threshold_(x, ANY * math.log2(torch.finfo(x.dtype).tiny), -math.inf)
    return x.exp2_()
