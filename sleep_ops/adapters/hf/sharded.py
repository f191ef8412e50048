"""Layers sharded by FSDP2, which gathers parameters around a layer's calls and their backward.

It sees a call's arguments and its one result. The state a layer is given and leaves travels beside
them, so the gradients that reach the layer through the state alone have to be led past that result.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from sleep_ops.layers.block import BlockState
from sleep_ops.layers.mixer import ReplayInputs


def joined(
    layer: nn.Module, h: Tensor, state: BlockState, writes: ReplayInputs | None
) -> tuple[Tensor, BlockState, ReplayInputs | None]:
    """The same, but a gradient of any arrives at h, where FSDP2 begins the layer's backward."""
    if not isinstance(layer, FSDPModule) or not torch.is_grad_enabled():
        return h, state, writes
    h, *rest = _Joined.apply(h, *state, *(writes or ()))
    count = len(state)
    return h, type(state)(*rest[:count]), writes if writes is None else ReplayInputs(*rest[count:])


def gathered(layer: nn.Module, name: str, method: Callable | None = None) -> Callable:
    """layer's method `name` (or `method`, which becomes that), run sharded like its forward."""
    if not isinstance(layer, FSDPModule):
        return getattr(layer, name) if method is None else method
    if name not in vars(layer):
        if method is not None:
            setattr(layer, name, method)
        register_fsdp_forward_method(layer, name)
    return vars(layer)[name]


def check_gathered(weight: Tensor) -> None:
    """Raises ValueError for a model read outside its forward pass, its parameters sharded."""
    if isinstance(weight, DTensor):
        raise ValueError(
            "model: expected gathered parameters, got sharded ones; call the model itself, or first "
            "register_fsdp_forward_method(model, 'generate')"
        )


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, *others):
        ctx.set_materialize_grads(False)
        ctx.zero = h.new_zeros(()).expand(h.shape)
        return h, *others

    @staticmethod
    def backward(ctx, grad, *grads):
        return ctx.zero if grad is None else grad, *grads
