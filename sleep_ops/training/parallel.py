"""A run in several processes, as `torchrun` starts them, and what they tell one another.

Every process makes the whole batch of a step and trains on rows of its own. Gradients are summed
once a step, after the last backward: windows and passes share the weights, so a gradient is
complete only when the first window's backward is, and no earlier sum could hide behind the
computation. It also leaves every process free to read as many windows as its rows need.
"""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Muon, Optimizer

_PATIENCE = timedelta(hours=2)  # how long processes wait for the first one, which evaluates and saves
_BUCKET = 1 << 24  # elements in one sum of gradients


@dataclass(frozen=True)
class World:
    """The processes of a run.

    rank: this one's among `size`.
    hosts: their group for messages between hosts; None for one process.
    """

    rank: int = 0
    size: int = 1
    hosts: Any = None

    @classmethod
    def join(cls, device: torch.device) -> "World":
        """The processes of `torchrun`, or of a process group that is there already; else this one.

        device: where this process trains; gradients travel by NCCL from GPUs and by gloo from CPUs.
        """
        if not dist.is_available():
            return cls()
        if _launched() and not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
            atexit.register(_leave)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=_PATIENCE))

    @property
    def main(self) -> bool:
        """Whether this is the first process: it alone evaluates, writes and prints."""
        return self.rank == 0

    def on_main(self, function: Callable[[], Any]) -> Any:
        """function() in the first process; all return what it returns, or raise what it raises."""
        if self.size == 1:
            return function()
        told: list = [None, None]
        if self.main:
            try:
                told[0] = function()
            except Exception as error:
                told[1] = error
        dist.broadcast_object_list(told, group=self.hosts)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def max(self, values: Sequence[int]) -> list[int]:
        """Number by number, the largest that a process has."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.hosts)
        return tensor.tolist()

    def all_gather(self, value: object) -> list:
        """Every process's value, in the order of their ranks."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value, group=self.hosts)
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        """Add the other processes' tensors to this one, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


class Replicated:
    """A model that every process holds as a whole ("ddp"), and what a step does with it.

    model: moved to `device`; the same one in every process.
    """

    matrix_optimizer = Muon

    def __init__(self, model: nn.Module, world: World, device: torch.device):
        self.model, self.world = model.to(device), world

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it every process has all parameters."""
        yield

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Backward passes run within it, on whole parameters; after it, gradients are summed."""
        yield
        if self.world.size == 1:
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        used = [p for p, known in zip(parameters, self.used(p.grad for p in parameters), strict=True) if known]
        for p in used:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in _buckets([p.grad for p in used]):
            total = self.world.sum(torch.cat([x.flatten() for x in bucket]))
            parts = total.split([x.numel() for x in bucket])
            torch._foreach_copy_(bucket, [part.view_as(x) for part, x in zip(parts, bucket, strict=True)])

    def used(self, gradients: Iterator[Tensor | None]) -> list[int]:
        """Which of the gradients any process has; what none has stays None, as in one process."""
        return self.world.max([x is not None for x in gradients])

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        """Clip the gradients to a global norm, and return what it was."""
        return nn.utils.clip_grad_norm_(parameters, limit)

    def whole(self, state: Any) -> Any:
        """Nested dicts and lists with every tensor whole; for the first process alone."""
        return state

    def split(self, state: dict, optimizer: Optimizer) -> dict:
        """An optimiser's whole state, as this process keeps it."""
        return state


def local_device(device: str) -> str:
    """The `device` of this process: of several on a node, the GPU with its local rank.

    Raises ValueError where several processes are to use one GPU.
    """
    if not _launched():
        return device
    if device.startswith("cuda:"):
        raise ValueError(f"device: expected auto, cuda or cpu with several processes, got {device!r}")
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device


def _launched() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype each, in order, with about _BUCKET elements."""
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        bucket, size = [], 0
        for x in (x for x in tensors if x.dtype == dtype):
            bucket.append(x)
            size += x.numel()
            if size >= _BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
