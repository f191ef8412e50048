"""Forward, loss and backward of a training step as a CUDA graph: recorded once, then launched.

A step of a small model is thousands of short kernels, one or more for every window, pass and block,
and the host can't queue them as fast as a GPU runs them. What they are depends on shapes and on
where loss is taken, not on tokens.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from math import inf

import torch
from torch import Tensor

from sleep_ops.model.hybrid import SleepHybridModel
from sleep_ops.model.sleeping import Call
from sleep_ops.tasks import Batch

MAX_GRAPHS = 3  # each keeps the memory of a whole step's activations
WARM_UP = 3  # steps before recording: kernels are compiled, libraries allocate their workspaces


class StepGraphs:
    """Losses and gradients of a model in training, by one graph for every kind of batch.

    Batches are of a kind that agree in shapes, dtypes, loss mask and number of passes: all that the
    host decides by.

    context: makes the context (autocast) of the forward.

    Gradients stand in buffers of their own, the same for all graphs; clearing a parameter's `.grad`
    doesn't free them.
    """

    def __init__(self, model: SleepHybridModel, context: Callable[[], AbstractContextManager]):
        self.model, self.context = model, context
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.gradients = [torch.empty_like(p) for p in self.parameters]
        self._graphs: dict[tuple, _StepGraph] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, batch: Batch, passes: int | None = None) -> Tensor | None:
        """The loss of `batch`, its gradients left in the parameters; the next call overwrites both.

        passes: N, instead of the model's.

        None, and nothing done, where no graph serves: for a loss mask that is not on the CPU,
        padding, endless passes, rows of which some sleep and others don't, and for further kinds of
        batches once there are MAX_GRAPHS.
        """
        kind = self._kind(batch, passes)
        if kind is None or (kind not in self._graphs and len(self) == MAX_GRAPHS):
            return None
        if kind not in self._graphs:
            self._graphs[kind] = _StepGraph(self, batch, passes)
        return self._graphs[kind].replay(batch)

    def _kind(self, batch: Batch, passes: int | None) -> tuple | None:
        ids, labels, mask = batch[:3]
        config, passes = self.model.config, self.model.config.resolve_passes(passes)
        if mask is None or mask.device.type != "cpu" or passes == inf:
            return None
        if batch.attention_mask is not None:
            return None
        if config.sleep_on == "unlabelled" and not torch.equal(mask, mask[:1].expand_as(mask)):
            return None
        return passes, ids.shape, ids.dtype, labels.shape, labels.dtype, mask.shape, mask.numpy().tobytes()


class _StepGraph:
    """The graph of one kind of batch, with buffers for its input."""

    def __init__(self, owner: StepGraphs, batch: Batch, passes: int | None):
        self.owner = owner
        given = dict(batch.arguments(), passes=passes, return_logits=False, return_state=False)
        plan = owner.model.plan(Call(batch.input_ids, **given))
        self.ids, self.labels = plan.ids.clone(), plan.labels.clone()
        self.plan = plan._replace(ids=self.ids, labels=self.labels)
        self.loss = torch.empty((), device=self.ids.device)
        self.used: list[bool] = []
        self.launch = _record(self._step, self.ids.device)

    def replay(self, batch: Batch) -> Tensor:
        self.ids.copy_(batch.input_ids)
        self.labels.copy_(batch.labels)
        self.launch()
        owner = self.owner
        for parameter, gradient, used in zip(owner.parameters, owner.gradients, self.used, strict=True):
            parameter.grad = gradient if used else None
        return self.loss

    def _step(self) -> None:
        owner = self.owner
        with owner.context():  # left again inside the graph: weights that autocast has cast must not outlive a step
            loss = owner.model.run(self.plan).loss
        # Not backward(), whose accumulators belong to the stream of whatever graph has kept them alive.
        found = torch.autograd.grad(loss, owner.parameters, allow_unused=True)
        self.used = [x is not None for x in found]
        pairs = [(buffer, x) for buffer, x in zip(owner.gradients, found, strict=True) if x is not None]
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))  # type: ignore[arg-type]
        self.loss.copy_(loss.detach())


def _record(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What repeats the kernels that `step` launches, and none of its Python, on the same memory."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        # thread_local: the thread that prepares the next batch pins memory meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    return graph.replay
