"""The gated norm: both forms against its definition, rows and gates at the edge."""

import pytest
import torch
import torch.nn.functional as F
from judge import exact, largest_error, outcome, triton_within_two_times
from small import DEVICE, normal

from sleep_ops.ops.gated_norm import gated_rms_norm

SHAPES = {"heads": (2, 5, 3, 64), "odd": (7, 100), "one_row": (1, 16), "narrow": (300, 8), "wide": (3, 2304)}
EPS = 1e-5


def build(shape, dtype):
    x, gate = normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
    weight = (1 + 0.1 * normal(shape[-1], seed=2)).to(dtype)
    return {"x": x.requires_grad_(), "gate": gate.requires_grad_(), "weight": weight.requires_grad_()}


def test_torch_form_is_the_definition():
    x, gate, weight = build((4, 6), torch.float64).values()
    expected = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight * F.silu(gate)
    exact(gated_rms_norm(x, gate, weight, eps=EPS, impl="torch"), expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_triton_form_within_twice_the_error_of_torch(shape, dtype):
    rounding = 4 * torch.finfo(torch.float32).eps
    triton_within_two_times(gated_rms_norm, build(shape, dtype), rounding, largest_error, eps=EPS)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_zero_rows_and_far_gates_stay_finite(impl):
    x, gate = torch.zeros(4, 8, device=DEVICE), torch.full((4, 8), -200.0, device=DEVICE)
    x[1], gate[2] = 1e4, 200.0
    tensors = {"x": x, "gate": gate, "weight": torch.ones(8, device=DEVICE)}
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    assert all(value.isfinite().all() for value in outcome(gated_rms_norm, tensors, eps=EPS, impl=impl).values())


def test_gradcheck():
    leaves = list(build((3, 5), torch.float64).values())
    assert torch.autograd.gradcheck(lambda *x: gated_rms_norm(*x, eps=EPS, impl="torch"), leaves)
