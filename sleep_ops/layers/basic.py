"""PyTorch's modules with this package's operations: the same parameters under the same names."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from sleep_ops.ops.linear import linear
from sleep_ops.ops.rms_norm import rms_norm

_ROWS = 128  # below, joining the weights costs more than it saves


class Linear(nn.Linear):
    """`nn.Linear` by `sleep_ops.ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def project(x: Tensor, *modules: nn.Module) -> Sequence[Tensor]:
    """What each of the modules makes of x [..., K]; in training on a CPU by one product, where nothing comes between.

    A product of few columns costs a CPU less than the calls around it, and x gets its gradient at once. Without
    gradients each has a result of its own, so that a cache of one does not hold the others' memory.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    together = x.device.type == "cpu" and torch.is_grad_enabled() and rows >= _ROWS and not _has_any_global_hook()
    if not (together and all(map(_is_plain, modules))):
        return [module(x) for module in modules]
    weights = [module.weight for module in modules]
    return linear(x, torch.cat(weights)).split([len(weight) for weight in weights], dim=-1)


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is a product with its weight and nothing else."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return type(module) is Linear and module.bias is None and not any(hooks) and "forward" not in module.__dict__


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` with a weight [size], by `sleep_ops.ops.rms_norm`."""

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
