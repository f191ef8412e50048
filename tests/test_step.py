"""One-token step: kernel and PyTorch form against the float64 recurrence, a text step by step, and in place."""

import pytest
import torch
from cases import NEGATIVE, Case, arguments
from judge import close, identical, leaves, outcome, relative_error, within_two_times
from small import DEVICE

from sleep_ops.ops.gated_delta_rule import gated_delta_rule
from sleep_ops.ops.step import gated_delta_rule_step
from sleep_ops.reference import gated_delta_rule_reference

SHAPES = {
    "square": dict(B=2, heads=(2, 2)),
    "grouped": dict(B=2, heads=(2, 6), dims=(20, 36)),
    "wide": dict(heads=(1, 2), dims=(96, 70)),
}


def first_token(dtype=torch.float32, **settings):
    """Tensors and options of a step."""
    beta = "random" if settings.get("options") else "wide"
    tensors, options = arguments(Case("step", T=1, beta=beta, **settings), dtype, DEVICE)
    tensors["state"] = tensors.pop("initial_state")
    del options["cu_seqlens"]
    tensors = {name: x[:, 0] if x.ndim > 1 and name != "state" else x for name, x in tensors.items()}
    return leaves(tensors), options


def reference_step(q, k, v, g, beta, state, **options):
    tokens = [x[:, None] for x in (q, k, v, g, beta)]
    o, state = gated_delta_rule_reference(*tokens, initial_state=state, **options)
    return o[:, 0], state


@pytest.mark.parametrize("rule", ["delta", "hebbian"])
@pytest.mark.parametrize("gates", [{}, NEGATIVE], ids=["plain", "activated"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_reference(shape, gates, rule, dtype):
    """The PyTorch form is close to float64 on the same inputs, the kernel at most twice as far from it."""
    tensors, options = first_token(dtype, **shape, rule=rule, options=gates)
    options["scale"] = 0.7
    truth = outcome(reference_step, leaves(tensors, torch.float64), **options)
    plain, results = (outcome(gated_delta_rule_step, tensors, impl=impl, **options) for impl in ("torch", "triton"))
    assert results["output"].dtype == dtype and results["final_state"].dtype == torch.float32
    for name, x in plain.items():
        assert relative_error(x, truth[name]) < 8 * torch.finfo(dtype).eps, name
    within_two_times(results, plain, truth, 1e-6)


def test_gradcheck():
    tensors, options = first_token(torch.float64, heads=(1, 2), dims=(3, 2), options=NEGATIVE)

    def function(*args):
        return gated_delta_rule_step(**dict(zip(tensors, args, strict=True)), **options)

    assert torch.autograd.gradcheck(function, list(tensors.values()))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_zero_key_and_exact_betas(impl):
    tensors, options = first_token(B=3)
    with torch.no_grad():
        tensors["k"][0] = 0
        tensors["beta"].copy_(torch.tensor([[0.0], [1.0], [2.0]]))
        tensors["g"].copy_(torch.tensor([[0.0], [-70.0], [0.0]]))
    got = outcome(gated_delta_rule_step, tensors, use_qk_l2norm=True, impl=impl, **options)
    assert all(x.isfinite().all() for x in got.values())
    identical(got["final_state"][0], tensors["state"][0].detach())


def test_steps_read_a_text_as_one_call_does():
    tensors, _ = arguments(Case("text", T=5, beta="wide", **SHAPES["grouped"]), torch.float32, DEVICE)
    whole = gated_delta_rule(**tensors)
    state, outputs = tensors.pop("initial_state"), []
    for t in range(5):
        o, state = gated_delta_rule_step(**{name: x[:, t] for name, x in tensors.items()}, state=state)
        outputs.append(o)
    close((torch.stack(outputs, 1), state), tuple(whole))


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("rule", ["delta", "hebbian"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_in_place_it_writes_what_it_returns_otherwise(shape, rule, impl):
    tensors, options = first_token(**shape, rule=rule, options=NEGATIVE)
    state, version = tensors["state"], tensors["state"]._version
    with torch.no_grad():
        want = gated_delta_rule_step(**tensors, **options, impl=impl)
        got = gated_delta_rule_step(**tensors, **options, impl=impl, inplace=True)
    assert got.final_state is state and state._version > version
    identical((got.output, state.detach()), tuple(want))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_in_place_without_gradients_or_not_at_all(impl):
    tensors, options = first_token(**SHAPES["square"])
    options["impl"] = impl
    before = tensors["state"].detach().clone()
    with pytest.raises(ValueError, match="inplace: expected False .*, got True"):
        gated_delta_rule_step(**tensors, **options, inplace=True)
    with torch.no_grad():
        strided = tensors["state"].mT.contiguous().mT
        with pytest.raises(ValueError, match="state: expected a contiguous tensor"):
            gated_delta_rule_step(**tensors | {"state": strided}, **options, inplace=True)
        identical((tensors["state"], strided), (before, before), check_stride=False)
        gated_delta_rule_step(**tensors, **options, inplace=True)
    assert not torch.equal(tensors["state"], before)
    double = {name: x.detach().double() for name, x in tensors.items()}
    with pytest.raises(ValueError, match="state: expected dtype torch.float64"):
        gated_delta_rule_step(**double | {"state": before}, inplace=True)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_compiles_whole_in_place(impl):
    tensors, options = first_token(**SHAPES["square"], options=NEGATIVE)
    tensors = {name: x.detach() for name, x in tensors.items()}
    want = gated_delta_rule_step(**tensors, **options, impl=impl)
    compiled = torch.compile(gated_delta_rule_step, fullgraph=True, backend="aot_eager")
    got = compiled(**tensors, **options, impl=impl, inplace=True)
    assert got.final_state is tensors["state"]
    close(tuple(got), tuple(want), rtol=1e-5, atol=1e-6)
