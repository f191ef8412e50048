"""RMS normalisation with an output gate: y = x * rsqrt(mean(x^2) + eps) * weight * silu(gate), over the last axis."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops.checks import check_choice
from sleep_ops.ops.dispatch import choose_impl
from sleep_ops.ops.launching import differentiable
from sleep_ops.ops.rms_norm import rms_norm
from sleep_ops.validation import KERNEL_IMPLS, check_eps, check_no_tangents, check_tensor


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, impl: str = "auto") -> Tensor:
    """Normalise every row of x to unit mean square, scale it by `weight` and by SiLU of `gate`.

    Args:
        x: [..., V].
        gate: the shape of x, in any floating dtype.
        weight: [V].
        eps: added to the mean square; >= 0.
        impl: "auto" (Triton for CUDA tensors, PyTorch otherwise), "triton" or "torch".

    Returns [..., V] in the dtype of x; computed in float32 (float64 for float64 inputs). Differentiable in x, gate and
    weight. Raises ValueError for a wrong shape, dtype or device, or an unknown option.
    """
    if not isinstance(x, Tensor) or x.ndim < 1:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: expected a tensor [..., V], got {got}")
    check_tensor("x", x, x.shape, "[..., V]")
    check_tensor("gate", gate, x.shape, "[..., V] of x", x.device)
    check_tensor("weight", weight, x.shape[-1:], "[V]", x.device)
    check_eps("eps", eps)
    check_choice("impl", impl, KERNEL_IMPLS)
    if x.numel() and choose_impl(impl, x) == "triton":
        check_no_tangents("gated_rms_norm", x, gate, weight)
        return gated_norm(x, gate, weight, eps)
    return _gated_norm_torch(x, gate, weight, eps)


def _gated_norm_torch(x, gate, weight, eps):
    dtype = torch.promote_types(x.dtype, torch.float32)
    normed = rms_norm(x.to(dtype), weight.to(dtype), eps)
    return (normed * F.silu(gate.to(dtype))).to(x.dtype)


def _backward(d_y, x, gate, weight, eps):
    from sleep_ops.kernels.gated_norm import backward

    dx, dgate, dweight = backward(_rows(d_y), _rows(x), _rows(gate), weight.contiguous(), eps)
    return dx.view(x.shape), dgate.view(x.shape), dweight


def _shapes(x, gate, weight, eps):
    return x.new_empty(x.shape)


@differentiable("gated_rms_norm", outputs="y", gradients="x gate weight", shapes=_shapes, backward=_backward)
def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gated norm by `kernels/gated_norm.py`; arguments as in `gated_rms_norm`, already checked."""
    from sleep_ops.kernels.gated_norm import forward

    return forward(_rows(x), _rows(gate), weight.contiguous(), eps).view(x.shape)


def _rows(x):
    return x.reshape(-1, x.shape[-1]).contiguous()
