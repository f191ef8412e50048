"""A sequence split over processes: the one-process result, outputs and every gradient, over gloo."""

import os
import socket
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import NAMES, NEGATIVE, Case, arguments, make_inputs
from judge import exact, leaves, outcome

from sleep_ops.ops.gated_delta_rule import gated_delta_rule, sleep_gated_delta_rule

T = 150
CASE = Case("parallel", T=T, B=2, heads=(2, 4), dims=(8, 6), options=NEGATIVE)
TOKENS = NAMES[:5]
SLEEP = dict(function=sleep_gated_delta_rule)


def evaluate(part=slice(None), share=1.0, function=gated_delta_rule, **options):
    """The outcome over the tokens of `part`; `share` of the loss on the final state is this process's."""
    inputs = make_inputs(CASE, torch.float64, "cpu")
    tensors, of_case = arguments(CASE)
    tensors = {name: x[:, part] if name in TOKENS else x for name, x in tensors.items()}
    weights = inputs["d_output"][:, part], share * inputs["d_final_state"].double() if share else None
    return outcome(function, leaves(tensors), weights, **of_case, **options)


def worker(rank, borders, options, with_state, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = len(borders) - 1
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        part = slice(borders[rank], borders[rank + 1])
        share = 1 / ranks if with_state else 0
        found = evaluate(part, share, group=dist.group.WORLD, **options)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    "borders, options, with_state",
    [
        ((0, 80, T), dict(segments=1), True),
        ((0, 1, 100, T), dict(segments=1), True),
        ((0, 5, T), dict(segments=2), True),
        ((0, 70, 100, T), dict(segments=1), False),
        ((0, 40, 100, T), dict(SLEEP, passes=5, window=20, output_pass="first"), True),
        ((0, 100, T), dict(SLEEP, passes=2, window=50, output_pass="last"), True),
        ((0, 60, T), dict(SLEEP, passes=1, window=30), False),
    ],
    ids=["two", "three", "two-cut", "three-output-alone", "replay", "replay-last", "one-pass"],
)
def test_equals_one_process(borders, options, with_state, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(borders, options, with_state, port, str(tmp_path)), nprocs=len(borders) - 1)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(borders) - 1)]
    want = evaluate(share=1.0 if with_state else 0, **{k: v for k, v in options.items() if k != "segments"})
    per_token = ("output", *(f"d{name}" for name in TOKENS))
    whole = {
        name: torch.cat(x, 1) if name in per_token else sum(x) for name in want for x in [[p[name] for p in parts]]
    }
    for p in parts:
        exact(whole | {"final_state": p["final_state"]}, want)


@pytest.fixture
def alone(tmp_path):
    """The group of this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store")), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def tokens():
    tensors, _ = arguments(replace(CASE, B=1, initial_state=False, options={}))
    return tensors


def test_wrong_groups_are_named(alone):
    with pytest.raises(ValueError, match="^group: expected a torch.distributed process group or None, got str"):
        gated_delta_rule(**tokens(), group="world")
    with pytest.raises(ValueError, match="^group: expected None together with cu_seqlens"):
        gated_delta_rule(**tokens(), group=alone, cu_seqlens=torch.tensor([0, 70, T]))


def test_a_group_of_one_changes_nothing(alone):
    exact(outcome(gated_delta_rule, tokens(), group=alone), outcome(gated_delta_rule, tokens()))


def test_second_derivatives_are_refused(alone):
    tensors = tokens()
    state = gated_delta_rule(**tensors, group=alone, impl="reference").final_state
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(state.sum(), tensors["v"], create_graph=True)
