"""A training step rehearsed: what the trainer does, with tensors that have no values.

Parameters are fake, and so is all that is computed from them: shapes and dtypes are those of a
step, nothing is stored and nothing computed. What the host decides by, the ids, labels and masks of
a batch, is real. The processes of a run are stood for by the first one, in a process group in which
nothing is sent.

Its memory is counted as that of a real step is, `watched`, which the predictions are checked by.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sleep_ops.checks import expect
from sleep_ops.tasks.base import Batch
from sleep_ops.training.config import TrainConfig
from sleep_ops.training.division import Division
from sleep_ops.training.memory import LiveBytes
from sleep_ops.training.parallel import World
from sleep_ops.training.stages import Stages
from sleep_ops.training.steps import Steps

if not torch._C._dispatch_has_kernel_for_dispatch_key("c10d::allreduce_", "Meta"):
    # Which gives torch 2.9 the collectives of tensors without values.
    import torch.distributed._tools.fake_collectives  # noqa: F401

_aten = torch.ops.aten
_COLLECTIVES = ("c10d", "_c10d_functional")


def _attention(q: Tensor, k: Tensor, v: Tensor, *_, **__) -> int:
    """Two products over q [B, H, T, K], k [B, HKV, S, K], v [B, HKV, S, V]; PyTorch's count wants as many heads."""
    return 2 * q[..., 0].numel() * k.shape[2] * (q.shape[3] + v.shape[3])


def _attention_backward(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *__, **___) -> int:
    """Five: the scores again, and two gradients of each of those products."""
    return 2 * q[..., 0].numel() * k.shape[2] * (3 * q.shape[3] + 2 * v.shape[3])


_FLOPS = flop_registry | {
    _aten._grouped_mm: lambda a, b, *_, **__: 2 * a.numel() * b.shape[-1],  # every token's choices, whatever they are
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Step(NamedTuple):
    """What a step of one process comes to.

    phases: bytes by kind when each phase ("backward", forward included, "sums" of gradients where
        they are a phase of their own, "updates") has the most of them; see `watched`.
    host: bytes in the host's memory at most.
    flops: floating-point operations of products of matrices and attention.
    sent: bytes that processes exchange, of each collective the whole, of a sum for all twice that.
    moved: bytes that go to the host's memory and back, both ways added.
    """

    phases: dict[str, dict[str, float]]
    host: float
    flops: float
    sent: float
    moved: float = 0

    @property
    def kinds(self) -> dict[str, float]:
        """Bytes by kind at the peak."""
        return max(self.phases.values(), key=lambda kinds: sum(kinds.values()))

    @property
    def peak(self) -> float:
        """Bytes at most."""
        return sum(self.kinds.values())


class _FakeBytes(LiveBytes):
    """Counts what is not there: tensors made within it have no values, unless they are made of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.fakes, self.flops, self.sent = FakeTensorMode(allow_non_fake_inputs=True), 0, 0

    def compute(self, func, args, kwargs):
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(isinstance(x, FakeTensor) and x.fake_mode is self.fakes for x in given):
            if given or active_fake_mode() is not None:  # DTensor's own, which finds out shapes
                return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default and args[0].is_floating_point():
            return 0.0  # a loss or a norm, which is finite
        expected = "operations whose results' sizes don't depend on what tensors hold (experts: by grouped_mm)"
        expect(func._overloadpacket is not _aten.nonzero, "model", expected, str(func))
        with self.fakes:
            out = (_grouped_mm if func._overloadpacket is _aten._grouped_mm else func)(*args, **kwargs)
        if not given and isinstance(out, Tensor) and not out.is_floating_point():
            return func(*args, **kwargs)
        if func.namespace in _COLLECTIVES and func._overloadpacket is not torch.ops._c10d_functional.wait_tensor:
            whole = max(x.nbytes for x in tree_leaves((given, out)) if isinstance(x, Tensor))
            self.sent += whole * (2 if "allreduce" in func.__name__ else 1)  # parts are added up, then gathered
        if func._overloadpacket in _FLOPS:
            self.flops += _FLOPS[func._overloadpacket](*args, **kwargs, out_val=out)
        return out


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor, bias: None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """An empty result, in every dtype: PyTorch's own form without values is for bfloat16 alone."""
    groups = (len(offs),) if a.dim() == b.dim() == 2 else ()
    return a.new_empty(*groups, a.shape[-2], b.shape[-1], dtype=out_dtype or a.dtype)


class _First(World):
    """The first of some processes, of which the others do as it does."""

    def max(self, values: Sequence[int]) -> list[int]:
        return list(values)


class Rehearsal(Steps):
    """Steps of the model that `build` makes, in the first of some processes, all of it fake."""

    def __init__(self, build: Callable[[], nn.Module], recipe: TrainConfig, processes: int, count: _FakeBytes):
        self.count, self.offload = count, recipe.offload
        with torch.device("meta"):
            model = _faked(build(), count.fakes)
        model.to = lambda device: model  # where it is already
        with count, count.making("parameters"):
            super().__init__(
                model,
                replace(recipe, offload=False, cuda_graph=False),
                division=Division(recipe, _First(0, processes)),
                stages=Stages(None, recipe.stage_loss, recipe.stage_warmup),
                device=torch.device("cpu"),
                console=Console(quiet=True),
            )
        self.model.train()
        with count:  # their states are there when a step begins
            for p in self.parameters:
                p.grad = torch.zeros_like(p)
            for optimizer in self.optimizers.values():
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        self.host = self.most_host = self.moved = 0

    def _own_loss(self, batch: Batch, total: int, alike: bool) -> Tensor:
        if not self.offload:
            return super()._own_loss(batch, total, alike)
        with saved_tensors_hooks(partial(_Away.send, self), partial(_Away.fetch, self)):
            return super()._own_loss(batch, total, alike)


def _faked(model: nn.Module, fakes: FakeTensorMode) -> nn.Module:
    """A model on the meta device, as if it were on the CPU: with fake parameters and buffers, tied as they were."""
    made: dict[Tensor, Tensor] = {}

    def fake(x: Tensor) -> Tensor:
        with fakes if x.is_floating_point() else nullcontext():
            y = torch.zeros(x.shape, dtype=x.dtype, device="cpu")
            if isinstance(x, nn.Parameter):
                y = nn.Parameter(y, x.requires_grad)
                vars(y).update(vars(x))
        return y

    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, x in place.items():
                if x is not None:
                    made.setdefault(x, None)
                    place[name] = made[x] = fake(x) if made[x] is None else made[x]
    return model


class _Away:
    """A tensor in the host's memory."""

    def __init__(self, run: Rehearsal, x: Tensor):
        self.run, self.bytes = run, x.nbytes
        self.size, self.stride, self.dtype = x.size(), x.stride(), x.dtype
        run.host += self.bytes
        run.moved += self.bytes
        run.most_host = max(run.most_host, run.host)

    def __del__(self):
        self.run.host -= self.bytes

    @classmethod
    def send(cls, run: Rehearsal, x: Tensor) -> "Tensor | _Away":
        recomputed = torch._C._current_graph_task_id() != -1  # in the backward nothing is sent away any more
        return x if recomputed or run.count.is_weight(x) else cls(run, x)

    @staticmethod
    def fetch(run: Rehearsal, kept: "Tensor | _Away") -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        run.moved += kept.bytes
        return torch.empty_strided(kept.size, kept.stride, dtype=kept.dtype)


@contextmanager
def watched(run: Steps, count: LiveBytes) -> Iterator[None]:
    """A step of `run` within it is counted, phase by phase (see `Step`) and kind by kind.

    Kinds are "parameters", "gathered" (whole, rounded or cast for a step), "optimizer", "gradients",
    "activations" and "updates", what optimisers work with.
    """
    layout: Any = run.layout
    optimizers: list[Any] = [*run.optimizers.values()]
    hooks = []

    def gradients_of(parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            if p.requires_grad:
                hooks.append(p.register_post_accumulate_grad_hook(lambda p: count.mark("gradients", [p.grad])))

    @contextmanager
    def gathered() -> Iterator[list[nn.Parameter]]:
        with whole() as parameters:
            pairs = zip(parameters, layout.parameters, strict=True)
            count.mark("gathered", (x for x, p in pairs if isinstance(p, DTensor) or x.dtype != p.dtype))
            if not hooks:
                gradients_of(parameters)
            yield parameters

    def within(phase: str, kind: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            if phase not in ("", count.phase):
                count.begin(phase)
            with count.making(kind):
                return function(*args, **kwargs)

        return run

    whole = layout.gathered
    layout.gathered, layout._sum = gathered, within("sums", "gradients", layout._sum)
    layout.clip = within("updates", "updates", layout.clip)
    layout.add_up = within("", "gradients", layout.add_up)
    if hasattr(layout, "whole"):  # gathered around calls
        gradients_of(layout.whole)
        count.mark("gathered", layout.whole)
    count.mark("parameters", run.model.state_dict(keep_vars=True).values())
    for optimizer in optimizers:
        optimizer.step = within("updates", "updates", optimizer.step)
        count.mark("optimizer", (x for state in optimizer.state.values() for x in state.values()))
    count.most.clear()
    count.begin("backward")
    try:
        with count:
            yield
    finally:
        for hook in hooks:
            hook.remove()
        del layout.gathered, layout._sum, layout.clip, layout.add_up
        for optimizer in optimizers:
            del optimizer.step


def rehearse(
    build: Callable[[], nn.Module], recipe: TrainConfig, *, tokens: int, processes: int = 1, kernels: bool = True
) -> Step:
    """A step of the first process, which has the most rows, on texts of `tokens` tokens, all with loss.

    build: makes the model, with its sleep settings, on the meta device.
    kernels: what is counted is what the Triton kernels keep, not the PyTorch forms for CPUs.

    Raises ValueError for experts that are not computed by grouped products: the sizes of their tensors
    depend on what tokens choose.
    """
    count = _FakeBytes()
    with _processes(processes), _kernels(kernels), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is slow on a CPU
        run = Rehearsal(build, recipe, processes, count)
        run.division.check(run.model, SimpleNamespace(seq_len=tokens))
        ids = torch.zeros(recipe.batch_size, tokens, dtype=torch.int64)
        count.flops = count.sent = 0
        with watched(run, count):
            run.take(Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool)))
    return Step(count.most, run.most_host, count.flops, count.sent, run.moved)


@contextmanager
def _processes(number: int) -> Iterator[None]:
    """So many, in a group in which nothing is sent."""
    if number == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=number, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _kernels(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    from sleep_ops.kernels import gated_norm, short_conv  # noqa: F401
    from sleep_ops.ops import chunk_triton, single_chunk  # noqa: F401

    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
