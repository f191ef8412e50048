"""One sequence split over the ranks of a process group: they exchange what their tokens do to the state, not tokens."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sleep_ops.affine import Transition, chain


class _AllGather(torch.autograd.Function):
    """x of every rank, in rank order; backwards the sum over ranks of what reached this rank's x."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        gathered = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, x, group=group)
        return tuple(gathered)

    @staticmethod
    def backward(ctx, *grads):
        dx = torch.empty_like(grads[0])
        dist.reduce_scatter(dx, [grad.contiguous() for grad in grads], group=ctx.group)
        return dx, None


def check_group(group: object, cu_seqlens: Tensor | None) -> None:
    """Raise unless `group` is a process group that this process belongs to, and sequences are not packed."""
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group: expected a torch.distributed process group or None, got {type(group).__name__}")
    if cu_seqlens is not None:
        raise ValueError("group: expected None together with cu_seqlens, got both")


def state_before_this_rank(
    transitions: Sequence[Transition], start: Tensor | None, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The states [N, HV, K, V] before this rank's tokens and after the last rank's, from `start` (None for zero).

    transitions: this rank's, in order. One all-gather of P and R; differentiable, the backward a reduce-scatter.
    """
    whole = transitions[0]
    for transition in transitions[1:]:
        whole = whole.then(transition)
    K = whole.P.shape[-1]
    gathered = _AllGather.apply(torch.cat(whole, -1), group)
    states = chain([Transition(x[..., :K], x[..., K:]) for x in gathered], start)
    return states[dist.get_rank(group)], states[-1]
