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
from torch.optim import Muon

from sleep_ops.parameters import replaced
from sleep_ops.training.muon import StackedMuon

_PATIENCE = timedelta(hours=2)  # how long processes wait for the first one, which saves
_BUCKET = 1 << 24  # elements in one sum of gradients


@dataclass(frozen=True)
class World:
    """The processes of a run.

    rank: this one's among `size`.
    hosts: their group for messages between hosts; None for one process.
    writers: another, for what goes on beside training: the writing of checkpoints.
    """

    rank: int = 0
    size: int = 1
    hosts: Any = None
    writers: Any = None

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
        groups = (dist.new_group(backend="gloo", timeout=_PATIENCE) for _ in range(2))
        return cls(dist.get_rank(), dist.get_world_size(), *groups)

    @property
    def main(self) -> bool:
        """Whether this is the first process: it alone writes and prints."""
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

    def together(self, function: Callable[[], Any], group: Any = None) -> Any:
        """function() in every process; each returns its own result, or all raise what the first of them raises.

        group: to tell one another by; `hosts` where it is None.
        """
        result = error = None
        try:
            result = function()
        except Exception as raised:
            error = raised
        for told in self.all_gather(error, group):
            if told is not None:
                raise told
        return result

    def all_gather(self, value: object, group: Any = None) -> list:
        """Every process's value, in the order of their ranks; group as above."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value, group=self.hosts if group is None else group)
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        """Add the other processes' tensors to this one, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


class Replicated:
    """A model that every process holds as a whole ("ddp"), and what a step does with it.

    model: moved to `device`; the same one in every process.
    dtype: what its parameters are rounded to for forward and backward; the optimisers' own stay as
        they are. None for neither.
    """

    matrix_optimizer: type[Muon] = StackedMuon

    def __init__(self, model: nn.Module, world: World, device: torch.device, dtype: torch.dtype | None = None):
        self.model, self.world, self.dtype = model.to(device), world, dtype
        self.parameters = list(model.parameters())
        self.computing: list[nn.Parameter] = []  # what forward and backward compute with, in a step

    @contextmanager
    def gathered(self) -> Iterator[list[nn.Parameter]]:
        """Within it every process has all parameters, those given, to compute with."""
        if self.dtype is None:
            yield self.parameters
            return
        with replaced(self.model, lambda _, p: nn.Parameter(p.detach().to(self.dtype), p.requires_grad)) as rounded:
            yield list(rounded.values())

    @contextmanager
    def gradients(self, alike: bool = False) -> Iterator[None]:
        """Backward passes run within it; after it, their gradients are summed over the processes.

        alike: the processes will call the same blocks in the same order, backward too.
        """
        with self.gathered() as self.computing:
            yield
        self.add_up()
        self.computing = []
        self._sum()

    def add_up(self) -> None:
        """Between parts of a batch: adds gradients of rounded parameters to sums in the parameters' own dtype.

        Every process has to call it equally often.
        """
        if self.dtype is None:  # those of the parts are summed where they are
            return
        for p, computing in zip(self.parameters, self.computing, strict=True):
            if computing.grad is not None:
                gradient, computing.grad = computing.grad.to(p.dtype), None
                p.grad = gradient if p.grad is None else p.grad.add_(gradient)

    def _gradients(self, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """Of these, zeros where another process alone has one; what none has stays without, as in one process."""
        known = self.world.max([p.grad is not None for p in parameters])
        return [
            torch.zeros_like(p) if has and p.grad is None else p.grad for p, has in zip(parameters, known, strict=True)
        ]

    def _sum(self) -> None:
        if self.world.size == 1:
            return
        gradients = self._gradients(self.parameters)
        pairs = [(p, i) for i, p in enumerate(self.parameters) if gradients[i] is not None]
        for bucket in _buckets(pairs):
            total = self.world.sum(torch.cat([gradients[i].flatten() for _, i in bucket]))
            for (p, i), part in zip(bucket, total.split([p.numel() for p, _ in bucket]), strict=True):
                p.grad, gradients[i] = part.view_as(p).clone(), None

    def assembled(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, parts put together one at a time, in the first process; maybe none in the others."""
        yield from tensors.items()

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        """Clip the gradients to a global norm, and return what it was."""
        return nn.utils.clip_grad_norm_(parameters, limit)


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


def _buckets(pairs: list[tuple[nn.Parameter, int]]) -> Iterator[list[tuple[nn.Parameter, int]]]:
    """Parameters of one dtype each, in order, with about _BUCKET elements."""
    for dtype in dict.fromkeys(p.dtype for p, _ in pairs):
        bucket, size = [], 0
        for p, i in pairs:
            if p.dtype != dtype:
                continue
            bucket.append((p, i))
            size += p.numel()
            if size >= _BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
