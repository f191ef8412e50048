"""y = x W^T: on a CPU by oneDNN where MKL would leave half of the processor idle.

PyTorch's products of float32 are MKL's, which uses AVX-512 on Intel's processors alone and AVX2 on others. oneDNN,
which PyTorch has as well, asks the processor what it can do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops.ops.eager import eager_on_cpu

_WIDE = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
_ENOUGH = 1 << 22  # multiplications from which on oneDNN's longer way into a product pays


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `F.linear` computes, differentiable as often: x [..., K], weight [N, K], bias [N] -> [..., N]."""
    large = bias is None and x.ndim > 1 and x.numel() * weight.shape[0] >= _ENOUGH
    if _WIDE and large and x.dtype == torch.float32 and eager_on_cpu(x, weight):
        return _Linear.apply(x, weight)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = linear(dy, weight.mT) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        left, right = dy.flatten(0, -2).mT, x.flatten(0, -2).mT
        # oneDNN copies a transposed left operand: better the smaller one.
        return dx, linear(left, right) if len(left) <= len(right) else linear(right, left).mT
