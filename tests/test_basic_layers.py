"""Linear layers and norms by this package's operations: results, gradients and names are PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from judge import close, exact, outcome
from small import normal
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from sleep_ops.layers import basic
from sleep_ops.layers.basic import Linear, RMSNorm, project
from sleep_ops.ops import linear as linear_module
from sleep_ops.ops.linear import linear
from sleep_ops.ops.rms_norm import rms_norm


@pytest.fixture
def always_onednn(monkeypatch):
    """oneDNN's products whatever the size, where PyTorch has them."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("a PyTorch without oneDNN")
    monkeypatch.setattr(linear_module, "_WIDE", True)
    monkeypatch.setattr(linear_module, "_ENOUGH", 1)


@pytest.mark.parametrize("shape", [(7, 13), (3, 5, 13), (1, 13), (2, 3, 4, 13)], ids=str)
@pytest.mark.parametrize("columns", [5, 29])
def test_linear_is_pytorchs(always_onednn, shape, columns):
    tensors = {"x": normal(*shape).requires_grad_(), "weight": normal(columns, 13, seed=1).requires_grad_()}
    close(outcome(linear, tensors), outcome(F.linear, tensors))


def test_linear_of_strided_inputs_and_second_derivatives(always_onednn):
    x, weight = normal(4, 6, 13).transpose(0, 1).requires_grad_(), normal(9, 13, seed=1).requires_grad_()
    found = []
    for function in (linear, F.linear):
        slopes = torch.autograd.grad(function(x, weight).square().sum(), (x, weight), create_graph=True)
        found.append(torch.autograd.grad(sum(s.square().sum() for s in slopes), (x, weight)))
    close(*found, rtol=1e-3, atol=1e-3)


def test_linear_elsewhere_is_pytorchs_own(always_onednn):
    x, weight = normal(4, 13), normal(9, 13, seed=1)
    assert torch.equal(linear(x[0], weight), F.linear(x[0], weight))  # one row
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    close(torch.func.vmap(linear, (0, None))(x, weight), F.linear(x, weight))
    close(torch.func.jvp(lambda w: linear(x, w), (weight,), (weight,))[1], F.linear(x, weight))


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 16), (5,)], ids=str)
def test_rms_norm_is_pytorchs(shape):
    tensors = {
        "x": normal(*shape, dtype=torch.float64).requires_grad_(),
        "weight": normal(shape[-1], seed=1, dtype=torch.float64).requires_grad_(),
    }
    tensors["x"].data[..., :1] *= 1e3
    exact(
        outcome(lambda x, weight: rms_norm(x, weight, 1e-5), tensors),
        outcome(lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5), tensors),
    )


def test_rms_norm_of_zeros_and_its_second_derivative():
    x = torch.zeros(2, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(rms_norm(x, torch.ones(4), 1e-5).sum(), x)
    assert slope.isfinite().all()
    with pytest.raises(RuntimeError, match="rms_norm: expected one derivative"):
        torch.autograd.grad(rms_norm(x, torch.ones(4), 1e-5).sum(), x, create_graph=True)


def test_modules_hold_what_pytorchs_do():
    mine = nn.ModuleDict({"a": Linear(3, 4), "b": Linear(3, 4, bias=False), "c": RMSNorm(3, 1e-5)})
    theirs = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4, bias=False), "c": nn.RMSNorm(3, eps=1e-5)})
    theirs.load_state_dict(mine.state_dict())
    x = normal(2, 3)
    for name in mine:
        close(mine[name](x), theirs[name](x))


class TestProject:
    def build(self, **changed):
        torch.manual_seed(0)
        modules = {"q": Linear(6, 4, bias=False), "a": Linear(6, 1, bias=False), "v": Linear(6, 8, bias=False)}
        return list((modules | changed).values())

    def gradients(self, function, x, modules):
        outputs = function(x, *modules)
        weights = [module.weight for module in modules]
        return [*outputs, *torch.autograd.grad([y.square().sum() for y in outputs], [x, *weights])]

    def test_is_a_call_of_each(self, monkeypatch):
        x, modules = normal(2, 80, 6).requires_grad_(), self.build()
        monkeypatch.setattr(Linear, "forward", None)  # none is called
        found = self.gradients(project, x, modules)
        monkeypatch.undo()
        close(found, self.gradients(lambda x, *ms: [m(x) for m in ms], x, modules))

    @pytest.mark.parametrize(
        "other", ["hook", "global hook", "own forward", "bias", "another class", "few rows", "no gradients"]
    )
    def test_calls_what_is_more_than_a_product(self, other, request):
        x, modules, called = normal(2, 80, 6), self.build(), []
        if other == "hook":
            modules[1].register_forward_hook(lambda *_: called.append(1))
        elif other == "global hook":
            registered = register_module_forward_hook(
                lambda module, *_: called.append(1) if module is modules[1] else None
            )
            request.addfinalizer(registered.remove)
        elif other == "own forward":
            plain = modules[1].forward
            modules[1].forward = lambda x: called.append(1) or plain(x)
        elif other == "bias":
            modules = self.build(a=Linear(6, 1))
        elif other == "another class":
            modules = self.build(a=nn.Linear(6, 1, bias=False))
        elif other == "few rows":
            x = x[:1, : basic._ROWS - 1]
        with torch.set_grad_enabled(other != "no gradients"):
            found = project(x, *modules)
        assert len({y.untyped_storage().data_ptr() for y in found}) == len(modules)
        close(found, [module(x) for module in modules])
        assert len(called) == (2 if "hook" in other or other == "own forward" else 0)
