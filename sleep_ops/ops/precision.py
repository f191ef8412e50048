"""Autocast is for models: operators compute as their documentation says, whatever it is set to."""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor


def full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """Switches autocast off on x's device, where it is on."""
    kind = x.device.type
    # Compilers know no other devices, and those of older versions can't trace the question.
    on = torch.compiler.is_compiling() or (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()


def backward_in_full_precision(backward: Callable) -> Callable:
    """Of a `torch.autograd.Function`: who calls `loss.backward()` inside autocast gets the same gradients.

    So does who compiles a forward inside autocast: the backward is recorded there too.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *grads):
        with full_precision(grads[0]):
            return backward(ctx, *grads)

    return wrapped


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    @backward_in_full_precision
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return grad @ b.mT, a.mT @ grad


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of [..., I, J] and [..., J, K], as many dims before; compiled inside autocast its gradient is exact too."""
    if not torch.compiler.is_compiling():
        return a @ b
    return _Product.apply(a, b.view_as(b))  # a view: torch.compile takes no tensor twice, as in squares
