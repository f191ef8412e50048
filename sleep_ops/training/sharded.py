"""A model split over the processes of a run by FSDP2, and Muon for matrices that are.

Between steps a process holds its part of every parameter and of the optimiser's state. For a step
the parameters are gathered once, block by block, and let go after the last backward, instead of
around every call of a block: there is one for each window and pass, and how many depends on the
rows a process has.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.optim import Muon, Optimizer

from sleep_ops.training.parallel import Replicated, World


class ShardedMuon(Muon):
    """Muon for sharded matrices: momentum stays in parts, updates are orthogonalised whole."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: nn.Parameter, group: dict) -> None:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        part, gradient, buffer = (x.to_local() for x in (p, p.grad, state["momentum_buffer"]))
        buffer.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        # One step of torch's Muon without momentum, from zero, is minus the learning rate times the whole update.
        step = nn.Parameter(torch.zeros(p.shape, device=part.device, dtype=part.dtype))
        step.grad = _like(update, p).full_tensor()
        kept = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
        Muon([step], weight_decay=0.0, momentum=0.0, nesterov=False, **kept).step()
        part.mul_(1 - group["lr"] * group["weight_decay"])
        part.add_(_split(step.detach(), p).to_local())


class Sharded(Replicated):
    """A model whose parameters the processes share out ("fsdp")."""

    matrix_optimizer = ShardedMuon

    def __init__(self, model: nn.Module, world: World, device: torch.device):
        marks = {name: dict(vars(p)) for name, p in model.named_parameters()}
        options = dict(mesh=init_device_mesh(device.type, (world.size,)), reshard_after_forward=False)
        for unit in _units(model):
            fully_shard(unit, **options)
        fully_shard(model, **options)
        super().__init__(model, world, device)
        for name, p in model.named_parameters():
            vars(p).update(marks[name])
        model.set_requires_gradient_sync(False)
        model.set_reshard_after_backward(False)
        # Hooks lost to views, of which FSDP2 warns, would gather and reduce: what is done here in their place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        self.units = [m for m in model.modules() if isinstance(m, FSDPModule)]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        for unit in self.units:
            unit.unshard()
        try:
            yield
        finally:
            for unit in self.units:
                unit.reshard()

    @contextmanager
    def gradients(self) -> Iterator[None]:
        with self.gathered():
            yield
            found = []
            for p in self.model.parameters():
                found.append(p.grad)
                p.grad = None
        known = self.used(found)
        for i, p in enumerate(self.model.parameters()):
            gradient, found[i] = found[i], None
            if known[i]:
                if gradient is None:
                    gradient = torch.zeros(p.shape, device=p.device, dtype=p.dtype)
                summed = DTensor.from_local(gradient, p.device_mesh, [Partial("sum")], run_check=False)
                p.grad = summed.redistribute(placements=p.placements)

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        return super().clip(parameters, limit).full_tensor()

    def whole(self, state: Any) -> Any:
        if isinstance(state, dict):
            return {key: self.whole(value) for key, value in state.items()}
        if isinstance(state, list):
            return [self.whole(value) for value in state]
        if isinstance(state, DTensor):
            full = state.full_tensor()
            return full.cpu() if self.world.main else None
        return state

    def split(self, state: dict, optimizer: Optimizer) -> dict:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        parts = {
            i: {key: _split(x, parameters[i]) if x.shape == parameters[i].shape else x for key, x in values.items()}
            for i, values in state["state"].items()
        }
        return state | {"state": parts}


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """What is gathered at a time: blocks, the members of a model's outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from child.children()
        else:
            yield from _units(child)


def _split(whole: Tensor, p: DTensor) -> DTensor:
    """This process's part of a tensor that all have, kept as p is."""
    return distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def _like(part: Tensor, p: DTensor) -> DTensor:
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
