"""One-token step: kernel and PyTorch form against the float64 recurrence, gradients, opcheck, bad inputs."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sleep_ops.kernels import step as step_kernel_module
from sleep_ops.ops import step as step_module
from sleep_ops.ops.step import gated_delta_rule_step
from sleep_ops.reference import gated_delta_rule_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
ACTIVATED = {"use_qk_l2norm": True, "use_beta_sigmoid": True, "allow_neg_eigval": True}
# (B, H, HV, K, V)
SHAPES = {"square": (2, 2, 2, 16, 16), "grouped": (2, 2, 6, 20, 36), "wide": (1, 1, 2, 96, 70)}


def make_inputs(shape, dtype, gates, seed=0):
    """q, k, v in `dtype`, gates and state in float32, and the gate parameters where asked."""
    B, H, HV, K, V = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    inputs = {"q": normal(B, H, K), "k": normal(B, H, K), "v": normal(B, HV, V)}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    if gates:
        inputs |= {"g": normal(B, HV), "beta": normal(B, HV), "A_log": normal(HV), "dt_bias": normal(HV)}
    else:
        inputs["k"] = torch.nn.functional.normalize(inputs["k"].float(), dim=-1).to(dtype)
        inputs |= {"g": -normal(B, HV).abs(), "beta": 2 * torch.rand(B, HV, generator=generator)}
    inputs["state"] = normal(B, HV, K, V)
    return {name: x.to(DEVICE).requires_grad_() for name, x in inputs.items()}


def reference_step(q, k, v, g, beta, state, **options):
    tokens = [x[:, None] for x in (q, k, v, g, beta)]
    o, state = gated_delta_rule_reference(*tokens, initial_state=state, **options)
    return o[:, 0], state


def run(function, inputs, options, seed=1):
    """Outputs and gradients of a random projection of them, as one dictionary."""
    results = function(**inputs, **options)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in results]
    total = sum((x * w).double().sum() for x, w in zip(results, weights, strict=True))
    grads = torch.autograd.grad(total, list(inputs.values()))
    return {"output": results[0], "final_state": results[1], **dict(zip(inputs, grads, strict=True))}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["delta", "hebbian"])
@pytest.mark.parametrize("gates", [False, True], ids=["plain", "activated"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_reference(shape, gates, rule, dtype):
    """The PyTorch form is close to float64 on the same inputs, the kernel at most twice as far from it."""
    inputs = make_inputs(shape, dtype, gates)
    options = {"rule": rule, "scale": 0.7, **(ACTIVATED if gates else {})}
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    want = run(reference_step, exact, options)
    by_torch = run(gated_delta_rule_step, inputs, {**options, "impl": "torch"})
    by_triton = run(gated_delta_rule_step, inputs, {**options, "impl": "triton"})
    assert by_triton["output"].dtype == dtype and by_triton["final_state"].dtype == torch.float32
    for name, exact in want.items():
        torch_error, triton_error = ((x[name].double() - exact).norm() / exact.norm() for x in (by_torch, by_triton))
        assert torch_error < 8 * torch.finfo(dtype).eps, f"{name}: {torch_error:.2e}"
        assert triton_error < 2 * torch_error + 1e-6, f"{name}: {triton_error:.2e}, PyTorch {torch_error:.2e}"


def test_gradcheck():
    inputs = {name: x.detach().double() for name, x in make_inputs((1, 1, 2, 3, 2), torch.float32, True).items()}
    leaves = [x.requires_grad_() for x in inputs.values()]

    def function(*args):
        return gated_delta_rule_step(**dict(zip(inputs, args, strict=True)), **ACTIVATED)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("which", ["output", "final_state"])
def test_one_result_alone_has_gradients(which):
    inputs = make_inputs(SHAPES["grouped"], torch.float32, True)
    got, want = (
        torch.autograd.grad(
            getattr(gated_delta_rule_step(**inputs, **ACTIVATED, impl=impl), which).sum(),
            list(inputs.values()),
            allow_unused=True,
        )
        for impl in ("triton", "torch")
    )
    for name, a, b in zip(inputs, got, want, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_zero_key_and_exact_betas(impl):
    inputs = make_inputs((3, 1, 1, 16, 16), torch.float32, False)
    with torch.no_grad():
        inputs["k"][0] = 0
        inputs["beta"].copy_(torch.tensor([[0.0], [1.0], [2.0]]))
        inputs["g"].copy_(torch.tensor([[0.0], [-70.0], [0.0]]))
    got = run(gated_delta_rule_step, inputs, {"use_qk_l2norm": True, "impl": impl})
    assert all(x.isfinite().all() for x in got.values())
    torch.testing.assert_close(got["final_state"][0], inputs["state"][0], rtol=0, atol=0)


def test_steps_read_a_text_as_one_call_does():
    from sleep_ops.ops.gated_delta_rule import gated_delta_rule

    tokens = [make_inputs(SHAPES["grouped"], torch.float32, False, seed=t) for t in range(5)]
    state, outputs = torch.zeros_like(tokens[0]["state"]), []
    for token in tokens:
        o, state = gated_delta_rule_step(**{**token, "state": state})
        outputs.append(o)
    stacked = {name: torch.stack([token[name] for token in tokens], 1) for name in ("q", "k", "v", "g", "beta")}
    whole = gated_delta_rule(**stacked)
    torch.testing.assert_close(torch.stack(outputs, 1), whole.output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, whole.final_state, rtol=1e-4, atol=1e-5)


def test_state_is_not_written_to():
    inputs = make_inputs(SHAPES["square"], torch.float32, False)
    before = inputs["state"].detach().clone()
    gated_delta_rule_step(**inputs, impl="triton")
    assert torch.equal(inputs["state"], before)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("rule", ["delta", "hebbian"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_in_place_it_writes_what_it_returns_otherwise(shape, rule, impl):
    inputs = {name: x.detach() for name, x in make_inputs(shape, torch.float32, True).items()}
    options = {"rule": rule, "impl": impl, **ACTIVATED}
    want = gated_delta_rule_step(**inputs, **options)
    state, version = inputs["state"], inputs["state"]._version
    got = gated_delta_rule_step(**inputs, **options, inplace=True)
    assert got.final_state is state and state._version > version
    assert torch.equal(state, want.final_state) and torch.equal(got.output, want.output)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_in_place_without_gradients_or_not_at_all(impl):
    inputs = make_inputs(SHAPES["square"], torch.float32, True)
    before = inputs["state"].detach().clone()
    with pytest.raises(ValueError, match="inplace: expected False .*, got True"):
        gated_delta_rule_step(**inputs, impl=impl, inplace=True)
    with torch.no_grad():
        strided = inputs["state"].mT.contiguous().mT
        with pytest.raises(ValueError, match="state: expected a contiguous tensor"):
            gated_delta_rule_step(**{**inputs, "state": strided}, impl=impl, inplace=True)
        assert torch.equal(inputs["state"], before) and torch.equal(strided, before)
        gated_delta_rule_step(**inputs, impl=impl, inplace=True)
    assert not torch.equal(inputs["state"], before)
    double = {name: x.detach().double() for name, x in inputs.items()}
    with pytest.raises(ValueError, match="state: expected dtype torch.float64"):
        gated_delta_rule_step(**{**double, "state": before}, inplace=True)


def test_checkpointed():
    inputs = make_inputs(SHAPES["grouped"], torch.float32, True)

    def recomputed(**inputs):
        return checkpoint(lambda: gated_delta_rule_step(**inputs), use_reentrant=False)

    options = {**ACTIVATED, "impl": "triton"}
    got, want = run(recomputed, inputs, options), run(gated_delta_rule_step, inputs, options)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_everything_is_written(poisoned):
    inputs = {name: x.detach() for name, x in make_inputs(SHAPES["grouped"], torch.float32, False).items()}
    want = gated_delta_rule_step(**inputs, impl="triton")
    poisoned(step_kernel_module)
    got = gated_delta_rule_step(**inputs, impl="triton")
    assert torch.equal(got.output, want.output) and torch.equal(got.final_state, want.final_state)


def test_strided_inputs():
    inputs = {name: x.detach() for name, x in make_inputs(SHAPES["grouped"], torch.float32, False).items()}
    strided = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in inputs.items()}
    got, want = gated_delta_rule_step(**strided, impl="triton"), gated_delta_rule_step(**inputs, impl="triton")
    assert torch.equal(got.output, want.output) and torch.equal(got.final_state, want.final_state)


@pytest.mark.parametrize("gates", [False, True], ids=["plain", "activated"])
def test_opcheck(gates):
    inputs = make_inputs((2, 1, 2, 16, 16), torch.float32, gates)
    args = [inputs.get(name) for name in ("q", "k", "v", "g", "beta", "state", "A_log", "dt_bias")]
    options = (0.3, "delta", gates, gates, gates)
    torch.library.opcheck(step_module._step, (*args, *options))
    leaves = [x if x is None else x.detach() for x in args]
    cotangents = [x.detach() for x in step_module._step(*args, *options)]
    torch.library.opcheck(step_module._step_backward, (*cotangents, *leaves, *options))
    torch.library.opcheck(step_module._step_inplace, (*leaves, *options))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_compiles_whole(impl):
    inputs = make_inputs(SHAPES["square"], torch.float32, True)
    options = {**ACTIVATED, "impl": impl}
    compiled = torch.compile(gated_delta_rule_step, fullgraph=True, backend="aot_eager")
    got, want = run(compiled, inputs, options), run(gated_delta_rule_step, inputs, options)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_compiles_whole_in_place(impl):
    inputs = {name: x.detach() for name, x in make_inputs(SHAPES["square"], torch.float32, True).items()}
    options = {**ACTIVATED, "impl": impl}
    want = gated_delta_rule_step(**inputs, **options)
    compiled = torch.compile(gated_delta_rule_step, fullgraph=True, backend="aot_eager")
    got = compiled(**inputs, **options, inplace=True)
    assert got.final_state is inputs["state"]
    torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-5, atol=1e-6)


BAD = {
    "q": {"q": torch.zeros(2, 2, 15)},
    "k": {"k": torch.zeros(2, 2)},
    "v": {"v": torch.zeros(2, 3, 16)},
    "g": {"g": torch.zeros(2, 1)},
    "beta": {"beta": torch.zeros(2, 2, dtype=torch.int64)},
    "state": {"state": torch.zeros(2, 2, 16, 16, dtype=torch.float16)},
    "scale": {"scale": float("nan")},
    "rule": {"rule": "oja"},
    "impl": {"impl": "cuda"},
    "use_qk_l2norm": {"use_qk_l2norm": 1},
    "inplace": {"inplace": "no"},
    "dt_bias": {"A_log": torch.zeros(2)},
    "allow_neg_eigval": {"allow_neg_eigval": True},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_named(name):
    inputs = {key: x.detach() for key, x in make_inputs(SHAPES["square"], torch.float32, False).items()}
    bad = {key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for key, x in BAD[name].items()}
    with pytest.raises(ValueError, match=rf"^{name}: expected .*got "):
        gated_delta_rule_step(**{**inputs, **bad})
