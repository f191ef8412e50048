"""A sequence split over processes: the one-process result, outputs and every gradient, over gloo."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sleep_ops.ops.gated_delta_rule import gated_delta_rule

T, H, HV, K, V = 150, 2, 4, 8, 6
GATES = {"use_qk_l2norm": True, "use_beta_sigmoid": True, "allow_neg_eigval": True}
TOKENS = ("q", "k", "v", "g", "beta")


def make_inputs():
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    inputs = {"q": normal(2, T, H, K), "k": normal(2, T, H, K), "v": normal(2, T, HV, V), "g": normal(2, T, HV)}
    inputs |= {"beta": normal(2, T, HV), "A_log": normal(HV) - 2, "dt_bias": normal(HV)}
    inputs |= {"initial_state": normal(2, HV, K, V), "d_output": normal(2, T, HV, V), "d_state": normal(2, HV, K, V)}
    return inputs


def evaluate(inputs, part=slice(None), share=1.0, **options):
    """Results over the tokens of `part`, and gradients; `share` of the loss on the final state is this process's."""
    leaves = {name: x for name, x in inputs.items() if not name.startswith("d_")}
    leaves = {n: (x[:, part] if n in TOKENS else x).clone().requires_grad_() for n, x in leaves.items()}
    output, state = gated_delta_rule(**leaves, **GATES, **options)
    loss = (output * inputs["d_output"][:, part]).sum()
    if share:
        loss = loss + share * (state * inputs["d_state"]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"output": output.detach(), "state": state.detach(), **dict(zip(leaves, gradients, strict=True))}


def worker(rank, borders, segments, with_state, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = len(borders) - 1
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        part = slice(borders[rank], borders[rank + 1])
        share = 1 / ranks if with_state else 0
        found = evaluate(make_inputs(), part, share=share, group=dist.group.WORLD, segments=segments)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    "borders, segments, with_state",
    [((0, 80, T), 1, True), ((0, 1, 100, T), 1, True), ((0, 5, T), 2, True), ((0, 70, 100, T), 1, False)],
    ids=["two", "three", "two-cut", "three-output-alone"],
)
def test_equals_one_process(borders, segments, with_state, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(borders, segments, with_state, port, str(tmp_path)), nprocs=len(borders) - 1)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(borders) - 1)]
    want = evaluate(make_inputs(), share=1.0 if with_state else 0)
    for name in ("output", *TOKENS):
        torch.testing.assert_close(torch.cat([p[name] for p in parts], 1), want[name], rtol=1e-10, atol=1e-10)
    for name in ("A_log", "dt_bias", "initial_state"):
        torch.testing.assert_close(sum(p[name] for p in parts), want[name], rtol=1e-10, atol=1e-10)
    for p in parts:
        torch.testing.assert_close(p["state"], want["state"], rtol=1e-10, atol=1e-10)


def test_wrong_groups_are_named(tmp_path):
    inputs = {name: x[:1] for name, x in make_inputs().items() if name in TOKENS}
    with pytest.raises(ValueError, match="^group: expected a torch.distributed process group or None, got str"):
        gated_delta_rule(**inputs, group="world")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store")), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="^group: expected None together with cu_seqlens"):
            gated_delta_rule(**inputs, group=dist.group.WORLD, cu_seqlens=torch.tensor([0, 70, T]))
        alone, plain = gated_delta_rule(**inputs, group=dist.group.WORLD), gated_delta_rule(**inputs)
        torch.testing.assert_close(alone.output, plain.output)
        torch.testing.assert_close(alone.final_state, plain.final_state)
    finally:
        dist.destroy_process_group()


def test_second_derivatives_are_refused(tmp_path):
    inputs = {name: x[:1].requires_grad_() for name, x in make_inputs().items() if name in TOKENS}
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store")), rank=0, world_size=1)
    try:
        state = gated_delta_rule(**inputs, group=dist.group.WORLD, impl="reference").final_state
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(state.sum(), inputs["v"], create_graph=True)
    finally:
        dist.destroy_process_group()
