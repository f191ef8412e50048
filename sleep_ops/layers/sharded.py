"""Blocks and layers sharded by FSDP2, which gathers parameters around a call and its backward.

A block is called once for each window and pass, and its states lead from call to call. FSDP2 frees
the parameters when a call's backward is through. That must not happen while another call's backward
has begun and waits for the first one's states, so a call's results are joined: its backward begins
when all of their gradients are there.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from sleep_ops.layers.mixer import ReplayInputs

State = TypeVar("State", bound=tuple)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 (`fully_shard`) takes care of this very module."""
    return hasattr(module, "unshard")


def joined(
    layer: nn.Module, h: Tensor | None, state: State, writes: ReplayInputs | None
) -> tuple[Tensor | None, State, ReplayInputs | None]:
    """The same results of a sharded layer, with one backward.

    A gradient of any of them arrives at h, the only one that FSDP2 sees of a transformers layer.
    """
    if not is_sharded(layer) or not torch.is_grad_enabled():
        return h, state, writes
    parts = (() if h is None else (h,)), state, writes or ()
    found = iter(_Joined.apply(*(x for part in parts for x in part)))
    h = None if h is None else next(found)
    state = type(state)(*(next(found) for _ in state))
    return h, state, writes if writes is None else ReplayInputs(*found)


def gathered(layer: nn.Module, name: str, method: Callable | None = None) -> Callable:
    """layer's method `name` (or `method`, which becomes that), run sharded like its forward."""
    if not is_sharded(layer):
        return getattr(layer, name) if method is None else method
    if name not in vars(layer):
        from torch.distributed.fsdp import register_fsdp_forward_method  # half a second to import

        if method is not None:
            setattr(layer, name, method)
        register_fsdp_forward_method(layer, name)
    return vars(layer)[name]


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first, *others):
        ctx.set_materialize_grads(False)
        ctx.zero = first.new_zeros(()).expand(first.shape)
        return first, *others

    @staticmethod
    def backward(ctx, grad, *grads):
        return ctx.zero if grad is None else grad, *grads
