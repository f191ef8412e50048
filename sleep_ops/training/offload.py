"""What the backward needs, kept in the host's memory until then."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Offloaded(saved_tensors_hooks):
    """Within it tensors that autograd saves are copied to the host, and back when they are asked for.

    parameters: these, and views of them, stay where they are: they are there in the backward too.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self._own = {p.untyped_storage()._cdata for p in parameters}  # of sharded ones, which may be empty now, too
        super().__init__(self._pack, _unpack)

    def _pack(self, x: Tensor) -> Any:
        if x.untyped_storage()._cdata in self._own:
            return x
        return x.device, torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x)


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, x = packed
    return x.to(device, non_blocking=True)
