"""One sequence split over the ranks of a process group: they exchange what their tokens do to the state, not tokens."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sleep_ops.ops.affine import Transition, by_step, chain
from sleep_ops.ops.precision import backward_in_full_precision
from sleep_ops.ops.windows import Windows
from sleep_ops.validation import check_first_order


def check_group(group: object, cu_seqlens: Tensor | None = None) -> None:
    """Raise unless `group` is a process group (a process outside it holds none), and sequences are not packed."""
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group: expected a torch.distributed process group or None, got {type(group).__name__}")
    if cu_seqlens is not None:
        raise ValueError("group: expected None together with cu_seqlens, got both")


def state_before_this_rank(
    transitions: Sequence[Transition], start: Tensor | None, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The states [N, HV, K, V] before this rank's tokens and after the last rank's, from `start` (None for zero).

    transitions: this rank's, in order. One all-gather of P and R; differentiable, the backward a reduce-scatter, in
    which every rank takes part whichever of the two states its loss depends on.
    """
    whole = transitions[0]
    for transition in transitions[1:]:
        whole = whole.then(transition)
    start = torch.zeros_like(whole.R) if start is None else start.to(whole.R.dtype)
    return _StateBeforeThisRank.apply(torch.cat(whole, -1), start, group)


def replay_on_ranks(
    transition: Transition,
    start: Tensor | None,
    passes: int,
    windows: Windows,
    output_pass: str,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """What `affine.replay` does, over windows of which this rank has some; passes >= 2."""
    others = transition.power(passes - 1)
    steps = by_step(transition.then(others), windows)
    state, final = state_before_this_rank(steps, start, group)
    *firsts, _ = chain(steps, state)
    begin = windows.by_window(firsts)
    return begin if output_pass == "first" else others.apply(begin), final


def tokens_before_this_rank(x: Tensor, n: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """x [B, T, ...] and the last n tokens [B, n, ...] of the rank before, zero in the first rank.

    Differentiable; every rank's backward must reach the x returned. ValueError for fewer than n tokens.
    """
    if x.shape[1] < n:
        raise ValueError(f"x: expected at least {n} tokens on every rank, got {x.shape[1]}")
    return _TokensBeforeThisRank.apply(x, n, group)


class _TokensBeforeThisRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n, group):
        ctx.n, ctx.group, rank = n, group, dist.get_rank(group)
        tails = _gathered(x[:, x.shape[1] - n :], group)
        return x.view_as(x), tails[rank - 1] if rank else torch.zeros_like(tails[0])

    @staticmethod
    def backward(ctx, d_x, d_before):
        check_first_order("gated_delta_rule")
        rank = dist.get_rank(ctx.group)
        found = _gathered(d_before, ctx.group)
        if rank + 1 < len(found):
            d_x = torch.cat([d_x[:, : d_x.shape[1] - ctx.n], d_x[:, d_x.shape[1] - ctx.n :] + found[rank + 1]], dim=1)
        return d_x, None, None


def _gathered(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x.contiguous(), group=group)
    return found


class _StateBeforeThisRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole, start, group):
        gathered = _gathered(whole, group)
        ctx.group = group
        ctx.save_for_backward(start, *gathered)
        return _states(gathered, start, group)

    @staticmethod
    @backward_in_full_precision
    def backward(ctx, *d_states):
        check_first_order("gated_delta_rule")
        start, *gathered = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            states = _states(gathered, start, ctx.group)
            d_start, *d_gathered = torch.autograd.grad(states, [start, *gathered], d_states, allow_unused=True)
        d_gathered = [torch.zeros_like(x) if d is None else d for x, d in zip(gathered, d_gathered, strict=True)]
        d_whole = torch.empty_like(gathered[0])
        dist.reduce_scatter(d_whole, d_gathered, group=ctx.group)
        return d_whole, d_start, None


def _states(gathered: Sequence[Tensor], start: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    K = start.shape[-2]
    states = chain([Transition(x[..., :K], x[..., K:]) for x in gathered], start)
    return states[dist.get_rank(group)].clone(), states[-1]  # an output must not be an input itself, as the start is
