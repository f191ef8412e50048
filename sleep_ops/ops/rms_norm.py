"""y = x * rsqrt(mean(x^2) + eps) * weight over the last axis."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops.ops.eager import eager_on_cpu
from sleep_ops.ops.precision import backward_in_full_precision
from sleep_ops.validation import check_first_order


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What `F.rms_norm` computes over x [..., V] with weight [V]."""
    return _RMSNorm.apply(x, weight, eps) if eager_on_cpu(x, weight) else F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Its backward is written out: PyTorch's on a CPU is autograd of the pieces, and takes up to twice the time."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, inverse = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)  # F.rms_norm, and the factor of a row
        ctx.save_for_backward(x, inverse, weight)
        return y

    @staticmethod
    @backward_in_full_precision
    def backward(ctx, dy):
        check_first_order("rms_norm")
        x, inverse, weight = ctx.saved_tensors
        normed = x * inverse
        products = (dy * normed).reshape(-1, normed.shape[-1])
        along = (products @ weight).div_(weight.shape[0]).view(inverse.shape)  # of the gradient, per row, along normed
        dx = (dy * weight).addcmul_(normed, along, value=-1).mul_(inverse)
        return dx, products.sum(0), None
