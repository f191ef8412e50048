"""A model split over the processes of a run by FSDP2, and Muon for matrices that are.

Between steps a process holds its part of every parameter and of the optimisers' states. For a step
parameters are gathered, in one of two ways:

    "step"   all at once, before the first forward; freed after the last backward
    "call"   those of a block around each of its calls, which are one for every window and pass, and
             again around its backward, by FSDP2's hooks

Gradients are summed once a step: windows and passes share the weights, so a gradient is complete
only when the first window's backward is. Until then a process holds them whole.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.optim import Muon

from sleep_ops.layers.block import Block
from sleep_ops.layers.sharded import gathered
from sleep_ops.training.muon import SteppedMuon
from sleep_ops.training.parallel import Replicated, World

_REPLICATE, _SHARD = "replicate", "shard"


class ShardedMuon(SteppedMuon):
    """Muon for sharded matrices: momentum stays in parts, updates are orthogonalised whole.

    W processes that share matrices take W at a time: parts are exchanged until each process has an
    update of its own as a whole, all orthogonalise theirs at once, and parts go back. Beside what it
    keeps a process then holds its own update, what becomes of it, and its parts of W updates, which
    come to the size of one: what it holds does not grow with W.
    """

    def _take_step(self) -> None:
        for group in self.param_groups:
            for parameters in _rounds([p for p in group["params"] if p.grad is not None]):
                self._update(parameters, group)

    def _update(self, parameters: list[nn.Parameter], group: dict) -> None:
        """Of a matrix for each process, in the order of their ranks; the last ones may have none."""
        mesh = parameters[0].device_mesh[_SHARD]
        rank, processes = mesh.get_local_rank(), mesh.get_group()
        sizes = [_part_sizes(p, mesh.size()) for p in parameters]
        sizes += [[0] * mesh.size()] * (mesh.size() - len(parameters))
        here, own = [size[rank] for size in sizes], sizes[rank]  # parts of all matrices, all parts of one
        parts = torch.cat([self._direction(p, group).flatten() for p in parameters])
        whole = parts.new_empty(sum(own))
        dist.all_to_all_single(whole, parts, own, here, group=processes)
        if rank < len(parameters):
            whole.copy_(_orthogonal_step(whole.view(parameters[rank].shape), group).flatten())
        dist.all_to_all_single(parts, whole, here, own, group=processes)
        for p, step in zip(parameters, parts.split(here), strict=False):
            part = p.to_local()
            part.mul_(1 - group["lr"] * group["weight_decay"])
            part.add_(step.view_as(part))
        for exchanged in (parts, whole):  # gloo's threads may hold on to them into the next round
            exchanged.untyped_storage().resize_(0)

    def _direction(self, p: nn.Parameter, group: dict) -> Tensor:
        """This process's part of what is to be orthogonalised: the gradient, with momentum."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        gradient, buffer = p.grad.to_local(), state["momentum_buffer"].to_local()
        buffer.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer


class Sharded(Replicated):
    """A model whose parameters the processes share out ("fsdp").

    model: those but the first may give one on the meta device; parameters and buffers are then the
        first one's.
    dtype: what parameters are gathered in; gradients of it are summed in the parameters' own.
    reshard: "step" or "call", see above.
    replicas: groups of processes that each have the whole model, shared out within (HSDP).
    """

    matrix_optimizer = ShardedMuon

    def __init__(
        self,
        model: nn.Module,
        world: World,
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        reshard: str = "step",
        replicas: int = 1,
    ):
        marks = {name: dict(vars(p)) for name, p in model.named_parameters()}
        (empty,) = world.max([any(p.is_meta for p in model.parameters())])
        given = {name: p.detach() for name, p in model.named_parameters()} if empty else {}
        shape, names = (world.size,), (_SHARD,)
        if replicas > 1:
            shape, names = (replicas, world.size // replicas), (_REPLICATE, _SHARD)
        options = dict(
            mesh=init_device_mesh(device.type, shape, mesh_dim_names=names),
            mp_policy=MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False),
        )
        for unit in _units(model):
            fully_shard(unit, **options)
        fully_shard(model, **options)
        if empty and not world.main:
            model.to_empty(device=device)
        super().__init__(model, world, device, dtype)
        self._hand_out(given)
        self.reshard = reshard
        for name, p in model.named_parameters():
            vars(p).update(marks[name])
        # FSDP2 warns of hooks that are lost to views: those of the root, which has nothing left to do there.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        model.set_requires_gradient_sync(False)
        self._hooked(False)
        self.units = [m for m in model.modules() if isinstance(m, FSDPModule)]
        whole: dict[str, nn.Parameter] = {}
        for unit in self.units:
            if isinstance(unit, Block):
                gathered(unit, "replay")
            unit.unshard()
            whole |= {name: p for name, p in model.named_parameters() if not isinstance(p, DTensor)}
            unit.reshard()
        self.whole = [whole[name] for name, _ in model.named_parameters()]

    @torch.no_grad()
    def _hand_out(self, given: dict[str, Tensor]) -> None:
        """Give every process its parts of the first one's parameters, one at a time, and the buffers."""
        if not given:
            return
        for name, p in self.model.named_parameters():
            whole = given.pop(name)
            device = p.to_local().device
            whole = whole.to(device) if self.world.main else torch.empty(p.shape, dtype=p.dtype, device=device)
            p.to_local().copy_(distribute_tensor(whole, p.device_mesh, p.placements).to_local())
        for buffer in self.model.buffers():
            dist.broadcast(buffer, 0)

    @contextmanager
    def gathered(self) -> Iterator[list[nn.Parameter]]:
        for unit in self.units:
            unit.unshard()
        try:
            yield self.whole
        finally:
            for unit in self.units:
                unit.reshard()

    @contextmanager
    def gradients(self, alike: bool = False) -> Iterator[None]:
        if self.reshard == "call" and alike:
            self._hooked(True)
            self.computing = self.whole
            yield
            self._hooked(False)
            self.add_up()
        else:
            with super().gradients():
                yield

    def _hooked(self, wanted: bool) -> None:
        """Whether FSDP2's hooks free a block's parameters after a call; the root's stay for the step."""
        self.model.set_reshard_after_forward(wanted)  # type: ignore[operator]
        self.model.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]
        self.model.set_reshard_after_backward(wanted)  # type: ignore[operator]

    def add_up(self) -> None:
        """Over the processes too: what is whole has to make room for the next part's."""
        gradients = self._gradients(self.computing)
        for computing in self.computing:
            computing.grad = None
        for i, p in enumerate(self.parameters):
            gradient, gradients[i] = gradients[i], None
            if gradient is not None:
                mesh, whole = p.device_mesh, gradient.to(p.dtype)
                summed = DTensor.from_local(whole, mesh, [Partial("sum")] * mesh.ndim, run_check=False)
                parts = [*summed.placements[:-1], p.placements[-1]]
                part = summed.redistribute(placements=parts).redistribute(placements=p.placements)
                p.grad = part if p.grad is None else p.grad.add_(part)

    def _sum(self) -> None:
        """They are summed."""

    def assembled(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, x in tensors.items():
            x = x.full_tensor() if isinstance(x, DTensor) else x
            if self.world.main:
                yield name, x.cpu()

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        return super().clip(parameters, limit).full_tensor()


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """What is gathered at a time: blocks, the members of a model's outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from child.children()
        else:
            yield from _units(child)


def _rounds(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """As many at a time as processes share them, of one dtype, and alike in size: all wait for the largest."""
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        alike = sorted((p for p in parameters if p.dtype == dtype), key=torch.numel, reverse=True)
        many = alike[0].device_mesh[_SHARD].size()
        yield from (alike[i : i + many] for i in range(0, len(alike), many))


def _part_sizes(p: nn.Parameter, processes: int) -> list[int]:
    """Numbers of each process's part of a matrix: rows are dealt as `torch.chunk` does it."""
    rows, columns = p.shape
    most = -(-rows // processes)
    return [min(max(rows - i * most, 0), most) * columns for i in range(processes)]


def _orthogonal_step(update: Tensor, group: dict) -> Tensor:
    """Minus the learning rate times the update, orthogonalised: a step of torch's Muon, without momentum, from zero."""
    step = nn.Parameter(torch.zeros_like(update))
    step.grad = update
    kept = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    Muon([step], weight_decay=0.0, momentum=0.0, nesterov=False, **kept).step()
    return step.detach()
