"""Public operators: the chunked PyTorch form against the specification, replay, dispatch, compile, bad inputs."""

import math

import pytest
import torch
from cases import slow_unless
from torch.utils.checkpoint import checkpoint

from sleep_ops.ops.affine import segment_transition
from sleep_ops.ops.gated_delta_rule import delta_rule_state, gated_delta_rule, sleep_gated_delta_rule
from sleep_ops.ops.gated_norm import gated_rms_norm
from sleep_ops.ops.packed import SHORT, alike
from sleep_ops.ops.short_conv import short_convolution
from sleep_ops.ops.step import gated_delta_rule_step
from sleep_ops.reference import gated_delta_rule_reference, log_decay, sleep_gated_delta_rule_reference

ACTIVATED = {"use_qk_l2norm": True, "use_beta_sigmoid": True, "allow_neg_eigval": True}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def make_inputs(B, T, H, HV, K, V, *, states=None, gates=True, dtype=torch.float64, seed=0):
    """Leaves: raw gates with their parameters, or (gates=False) normalised keys, decays and strengths in range."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    inputs = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, HV, V)}
    if gates:
        inputs |= {"g": normal(B, T, HV), "beta": normal(B, T, HV), "A_log": normal(HV) - 2, "dt_bias": normal(HV)}
    else:
        inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
        inputs |= {"g": -0.2 * normal(B, T, HV).abs(), "beta": 2 * torch.rand(B, T, HV, generator=generator).double()}
    inputs["initial_state"] = normal(states or B, HV, K, V)
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def run(function, inputs, **options):
    """Output, final state and the gradients of a random projection of both."""
    results = function(**inputs, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in results]
    total = sum((x * w).sum() for x, w in zip(results, weights, strict=True))
    grads = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    grads = (torch.zeros_like(x) if d is None else d for x, d in zip(inputs.values(), grads, strict=True))
    return {"output": results[0], "final_state": results[1], **dict(zip(inputs, grads, strict=True))}


def assert_same(got, want, **tolerance):
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


CASES = {
    "one_token": dict(shape=(2, 1, 1, 1, 8, 8)),
    "T15": dict(shape=(2, 15, 2, 2, 8, 6)),
    "T63_grouped": dict(shape=(1, 63, 2, 6, 4, 10)),
    "T64": dict(shape=(1, 64, 1, 2, 8, 8)),
    "T65": dict(shape=(2, 65, 2, 2, 6, 8)),
    "T75_wide": dict(shape=(1, 75, 1, 1, 60, 100)),
    "T200": dict(shape=(1, 200, 1, 3, 8, 4)),
    "packed": dict(shape=(1, 150, 2, 4, 8, 6), borders=[0, 1, 1, 80, 150]),
    "packed_one": dict(shape=(1, 20, 1, 1, 8, 8), borders=[0, 20]),
}


@pytest.mark.parametrize("gates", [False, True], ids=["plain", "activated"])
@pytest.mark.parametrize("rule", ["delta", "hebbian"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_chunked_form_is_the_recurrence(case, rule, gates):
    borders = case.get("borders")
    inputs = make_inputs(*case["shape"], states=len(borders) - 1 if borders else None, gates=gates)
    options = {"rule": rule, "cu_seqlens": torch.tensor(borders) if borders else None, **(ACTIVATED if gates else {})}
    assert_same(run(gated_delta_rule, inputs, **options), run(gated_delta_rule_reference, inputs, **options), **EXACT)


def test_without_initial_state():
    inputs = make_inputs(2, 130, 1, 2, 8, 6, gates=False)
    del inputs["initial_state"]
    assert_same(run(gated_delta_rule, inputs), run(gated_delta_rule_reference, inputs), **EXACT)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("g", [0.0, -1e-3, -70.0])
@pytest.mark.parametrize("keys", ["random", "repeated", "zero"])
def test_extreme_gates_and_keys(keys, g, beta):
    inputs = make_inputs(1, 70, 1, 2, 8, 6, gates=False)
    with torch.no_grad():
        inputs["g"].fill_(g)
        inputs["beta"].fill_(beta)
        if keys != "random":
            inputs["k"].copy_(inputs["k"][:, :1].clone() if keys == "repeated" else torch.zeros(()))
    options = {"use_qk_l2norm": True}
    got = run(gated_delta_rule, inputs, **options)
    assert all(x.isfinite().all() for x in got.values())
    # A zero key's gradient is about 1e3 times that of a unit key, and grows with it.
    assert_same(got, run(gated_delta_rule_reference, inputs, **options), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gates", [False, True], ids=["plain", "activated"])
def test_lower_precision_is_close(dtype, gates):
    inputs = make_inputs(2, 100, 2, 4, 32, 24, gates=gates)
    options = ACTIVATED if gates else {}
    low = {n: x.detach().to(dtype if n in "qkv" else torch.float32).requires_grad_() for n, x in inputs.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in low.items()}
    got, want = run(gated_delta_rule, low, **options), run(gated_delta_rule_reference, exact, **options)
    assert got["output"].dtype == dtype and got["final_state"].dtype == torch.float32
    for name, x in got.items():
        error = (x.double() - want[name]).norm() / want[name].norm()
        assert error < 30 * torch.finfo(dtype).eps, f"{name}: {error:.2e}"


@pytest.mark.parametrize("rule", ["delta", "hebbian"])
def test_gradcheck(rule):
    inputs = make_inputs(1, 5, 1, 2, 3, 2)

    def function(*args):
        return gated_delta_rule(**dict(zip(inputs, args, strict=True)), rule=rule, **ACTIVATED)

    assert torch.autograd.gradcheck(function, list(inputs.values()))


def test_gradcheck_over_chunks(monkeypatch):
    from sleep_ops.ops import chunk_torch

    monkeypatch.setattr(chunk_torch, "MAX_CHUNK", 3)
    inputs = make_inputs(1, 7, 1, 1, 3, 2, gates=False)

    def function(*args):
        return sleep_gated_delta_rule(**dict(zip(inputs, args, strict=True)), passes=2, window=4)

    assert torch.autograd.gradcheck(function, list(inputs.values()))


def test_split_run_is_the_whole_run():
    inputs = make_inputs(2, 90, 1, 2, 8, 6, gates=False)
    state, outputs = inputs.pop("initial_state"), []
    whole = gated_delta_rule(**inputs, initial_state=state)
    for part in (slice(0, 1), slice(1, 70), slice(70, 90)):
        o, state = gated_delta_rule(**{name: x[:, part] for name, x in inputs.items()}, initial_state=state)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole.output, **EXACT)
    torch.testing.assert_close(state, whole.final_state, **EXACT)


@pytest.mark.parametrize("passes", [1, 3])
def test_first_pass_outputs_are_causal(passes):
    inputs = make_inputs(1, 50, 1, 2, 8, 6, gates=False)
    changed = {name: x.detach().clone() for name, x in inputs.items()}
    for name in ("q", "k", "v", "g", "beta"):
        changed[name][:, 33:] *= 0.5
    options = {"passes": passes, "window": 20, "output_pass": "first"}
    got, other = sleep_gated_delta_rule(**inputs, **options), sleep_gated_delta_rule(**changed, **options)
    torch.testing.assert_close(got.output[:, :33], other.output[:, :33], rtol=0, atol=1e-14)
    assert (got.output[:, 33:] - other.output[:, 33:]).abs().amax() > 1e-3


@pytest.mark.parametrize("borders", [None, [0, 0, 25, 75]], ids=["batch", "packed"])
@pytest.mark.parametrize("output_pass", ["first", "last"])
@pytest.mark.parametrize("window", [None, 20, 30, 200], ids=str)
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_replay_is_chained_passes(passes, window, output_pass, borders):
    inputs = make_inputs(1 if borders else 2, 75, 2, 4, 8, 6, states=3 if borders else None)
    options = {"passes": passes, "window": window, "output_pass": output_pass, **ACTIVATED}
    options["cu_seqlens"] = torch.tensor(borders) if borders else None
    got, want = run(sleep_gated_delta_rule, inputs, **options), run(sleep_gated_delta_rule_reference, inputs, **options)
    assert_same(got, want, **EXACT)
    if passes == 1:
        plain = {name: x for name, x in options.items() if name not in ("passes", "window", "output_pass")}
        assert_same(got, run(gated_delta_rule, inputs, **plain), **EXACT)


@pytest.mark.parametrize("borders", [None, [0, 0, 40, 75]], ids=["batch", "packed"])
@pytest.mark.parametrize("output_pass", ["first", "last"])
@pytest.mark.parametrize("window", [None, 40], ids=str)
def test_infinite_passes_are_very_many(window, output_pass, borders):
    inputs = make_inputs(1, 75, 1, 2, 4, 3, states=3 if borders else None)
    options = {"window": window, "output_pass": output_pass, **ACTIVATED}
    options["cu_seqlens"] = torch.tensor(borders) if borders else None
    got = run(sleep_gated_delta_rule, inputs, passes=math.inf, **options)
    want = run(sleep_gated_delta_rule, inputs, passes=60, **options)
    assert_same(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("borders", [None, [0, 10, 45]], ids=["batch", "packed"])
def test_state_alone(borders, impl):
    inputs = make_inputs(1, 45, 2, 4, 8, 6, states=2 if borders else None)
    q = inputs.pop("q")
    options = {"passes": 2, "window": 16, "cu_seqlens": torch.tensor(borders) if borders else None, **ACTIVATED}
    got = delta_rule_state(**inputs, impl=impl, **options)
    want = sleep_gated_delta_rule(q, **inputs, **options).final_state
    torch.testing.assert_close(got, want, **EXACT)
    grads = [torch.autograd.grad(x.square().sum(), list(inputs.values())) for x in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("borders", [None, [0, 8, 8, 30]], ids=["batch", "packed"])
def test_triton_sleeps_alike(borders):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make_inputs(1, 30, 1, 2, 16, 16, states=3 if borders else None, dtype=torch.float32)
    inputs = {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}
    options = {"passes": 2, "window": 12, "output_pass": "first", **ACTIVATED}
    options["cu_seqlens"] = torch.tensor(borders, device=device) if borders else None
    got = run(sleep_gated_delta_rule, inputs, impl="triton", **options)
    assert_same(got, run(sleep_gated_delta_rule, inputs, impl="torch", **options), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("function", slow_unless(["pass"], ["pass", "sleep", "packed_sleep"]))
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_whole(impl, function):
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    packed = function == "packed_sleep"
    inputs = make_inputs(1, 21, 1, 2, 16, 16, states=2 if packed else None, dtype=torch.float32)
    inputs = {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}
    options = {"impl": impl, **ACTIVATED}
    if function != "pass":
        options |= {"passes": 2, "window": 8, "output_pass": "first"}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 5, 21], device=device)
    operator = gated_delta_rule if function == "pass" else sleep_gated_delta_rule
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, inputs, **options), run(operator, inputs, **options), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_checkpointing_changes_no_gradient(impl):
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    inputs = make_inputs(1, 20, 1, 2, 16, 16, dtype=torch.float32)
    inputs = {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}

    def checkpointed(**arguments):
        return checkpoint(gated_delta_rule, use_reentrant=False, **arguments)

    got, want = (run(f, inputs, impl=impl, **ACTIVATED) for f in (checkpointed, gated_delta_rule))
    assert_same(got, want, rtol=0, atol=0)


def test_autocast_has_no_effect():
    inputs = make_inputs(1, 20, 1, 1, 8, 8, dtype=torch.float32)
    want = gated_delta_rule(**inputs, **ACTIVATED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gated_delta_rule(**inputs, **ACTIVATED)
    assert torch.equal(got.output, want.output) and torch.equal(got.final_state, want.final_state)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_second_derivatives_are_refused(impl):
    """The written-out backwards are no functions of the inputs to autograd: an error, not a wrong number."""
    inputs = make_inputs(1, 20, 1, 1, 16, 16, gates=False, dtype=torch.float32)
    output = gated_delta_rule(**inputs, impl=impl).output
    with pytest.raises(RuntimeError, match="create_graph|no autograd formula"):
        torch.autograd.grad(output.sum(), inputs["k"], create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_without_gradients(impl, mode):
    inputs = make_inputs(1, 20, 1, 1, 16, 16, dtype=torch.float32)
    want = sleep_gated_delta_rule(**inputs, impl=impl, passes=2, window=8, **ACTIVATED)
    with mode():
        got = sleep_gated_delta_rule(**inputs, impl=impl, passes=2, window=8, **ACTIVATED)
    assert not got.output.requires_grad
    assert torch.equal(got.output, want.output) and torch.equal(got.final_state, want.final_state)


def test_a_result_used_twice():
    inputs = make_inputs(1, 20, 1, 2, 8, 6)
    output, state = gated_delta_rule(**inputs, **ACTIVATED)
    leaves = list(inputs.values())
    (output.square().sum() + output.sum() + (state * state).sum()).backward()
    output, state = gated_delta_rule_reference(**inputs, **ACTIVATED)
    want = torch.autograd.grad(output.square().sum() + output.sum() + (state * state).sum(), leaves)
    for leaf, gradient in zip(leaves, want, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, **EXACT)


def test_large_half_precision_inputs_stay_finite():
    inputs = make_inputs(1, 40, 1, 1, 16, 16, dtype=torch.float32)
    large = {name: (x.detach() * 2000).half() if name in "qkv" else x.detach() for name, x in inputs.items()}
    exact = gated_delta_rule_reference(**{name: x.double() for name, x in large.items()}, **ACTIVATED)
    for impl in ("torch", "triton"):
        got = gated_delta_rule(**large, impl=impl, **ACTIVATED)
        for a, b in zip(got, exact, strict=True):
            assert (a.double() - b).norm() < 1e-2 * b.norm()


def test_inputs_are_not_written_to():
    inputs = {name: x.detach() for name, x in make_inputs(1, 20, 1, 1, 8, 8).items()}
    before = {name: x.clone() for name, x in inputs.items()}
    sleep_gated_delta_rule(**inputs, passes=2, window=7, **ACTIVATED)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_gates_may_have_their_own_dtype():
    inputs = make_inputs(1, 20, 1, 2, 8, 8, dtype=torch.float32)
    mixed = {name: x.detach().bfloat16() if name in ("g", "beta", "A_log") else x for name, x in inputs.items()}
    same = {name: x.detach().float() for name, x in mixed.items()}
    got, want = gated_delta_rule(**mixed, **ACTIVATED), gated_delta_rule(**same, **ACTIVATED)
    assert torch.equal(got.output, want.output) and got.output.dtype == torch.float32


BAD = {
    "q_heads": ("q", {"q": torch.zeros(1, 6, 1, 8)}),
    "q_dtype": ("q", {"q": torch.zeros(1, 6, 2, 8).half()}),
    "q_missing": ("q", {"q": None}),
    "k_rank": ("k", {"k": torch.zeros(1, 6, 8)}),
    "k_dtype": ("k", {"k": torch.zeros(1, 6, 2, 8, dtype=torch.int64)}),
    "no_keys": ("k", {"k": torch.zeros(1, 6, 2, 0)}),
    "v_tokens": ("v", {"v": torch.zeros(1, 5, 4, 6)}),
    "v_heads": ("v", {"v": torch.zeros(1, 6, 3, 6)}),
    "g_shape": ("g", {"g": torch.zeros(1, 6, 2)}),
    "g_type": ("g", {"g": 0.5}),
    "beta_dtype": ("beta", {"beta": torch.zeros(1, 6, 4, dtype=torch.int32)}),
    "beta_device": ("beta", {"beta": torch.zeros(1, 6, 4, device="meta")}),
    "state_shape": ("initial_state", {"initial_state": torch.zeros(1, 4, 6, 8)}),
    "state_dtype": ("initial_state", {"initial_state": torch.zeros(1, 4, 8, 6, dtype=torch.float64)}),
    "scale": ("scale", {"scale": math.nan}),
    "rule": ("rule", {"rule": "oja"}),
    "impl": ("impl", {"impl": "cuda"}),
    "A_log_alone": ("dt_bias", {"A_log": torch.zeros(4)}),
    "dt_bias_alone": ("A_log", {"dt_bias": torch.zeros(4)}),
    "A_log_shape": ("A_log", {"A_log": torch.zeros(2), "dt_bias": torch.zeros(4)}),
    "allow_neg_eigval": ("allow_neg_eigval", {"allow_neg_eigval": True}),
    "cu_seqlens_dtype": ("cu_seqlens", {"cu_seqlens": torch.tensor([0.0, 6.0])}),
    "cu_seqlens_unsorted": ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 4, 2, 6])}),
    "cu_seqlens_short": ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 5])}),
    "cu_seqlens_empty": ("cu_seqlens", {"cu_seqlens": torch.tensor([0])}),
    "cu_seqlens_list": ("cu_seqlens", {"cu_seqlens": [0, 6]}),
    "passes_zero": ("passes", {"passes": 0}),
    "passes_float": ("passes", {"passes": 2.5}),
    "passes_nan": ("passes", {"passes": math.nan}),
    "passes_tensor": ("passes", {"passes": torch.tensor([2, 3])}),
    "flag": ("use_qk_l2norm", {"use_qk_l2norm": "no"}),
    "sigmoid_flag": ("use_beta_sigmoid", {"use_beta_sigmoid": 1}),
    "window_zero": ("window", {"window": 0}),
    "window_nan": ("window", {"window": math.nan}),
    "window_float": ("window", {"window": 4.0}),
    "output_pass": ("output_pass", {"output_pass": "middle"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_argument_is_named(case):
    name, bad = BAD[case]
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": (1, 6, 2, 8), "k": (1, 6, 2, 8), "v": (1, 6, 4, 6), "g": (1, 6, 4), "beta": (1, 6, 4)}
    good = {key: torch.rand(size, generator=generator) for key, size in sizes.items()}
    sleep_only = name in ("passes", "window", "output_pass")
    for function in (sleep_gated_delta_rule,) if sleep_only else (gated_delta_rule, sleep_gated_delta_rule):
        options = {"passes": 2} if function is sleep_gated_delta_rule else {}
        with pytest.raises(ValueError, match=rf"^{name}: expected .*got "):
            function(**{**good, **options, **bad})


def test_packed_batch_is_an_error():
    inputs = make_inputs(2, 6, 1, 1, 4, 4, states=1)
    with pytest.raises(ValueError, match="^cu_seqlens: "):
        gated_delta_rule(**inputs, cu_seqlens=torch.tensor([0, 6]), **ACTIVATED)


def test_triton_refuses_what_it_can_not_run(monkeypatch):
    inputs = make_inputs(1, 6, 1, 1, 4, 4)
    with pytest.raises(ValueError, match="^impl: .*float64"):
        gated_delta_rule(**inputs, impl="triton", **ACTIVATED)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    single = {name: x.detach().float() for name, x in inputs.items()}
    with pytest.raises(ValueError, match="^impl: .*CUDA"):
        gated_delta_rule(**single, impl="triton", **ACTIVATED)


def test_missing_triton_is_named(monkeypatch):
    from sleep_ops.ops import dispatch

    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    single = {name: x.detach().float() for name, x in make_inputs(1, 6, 1, 1, 4, 4).items()}
    with pytest.raises(ImportError, match="Triton is not installed"):
        gated_delta_rule(**single, impl="triton", **ACTIVATED)


def test_unknown_keyword_is_a_type_error():
    inputs = make_inputs(1, 6, 1, 1, 4, 4)
    with pytest.raises(TypeError, match="chunk_size"):
        gated_delta_rule(**inputs, chunk_size=64)


def kept_bytes(function):
    """Of the distinct tensors that autograd keeps for the backward of what `function` does, its inputs included."""
    sizes = {}

    def keep(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        results = function()
    del results
    return sum(sizes.values())


@pytest.mark.parametrize("lengths", [[8] * 64 + [1024], [1] * 30 + [300], [65, 0, 128, 257, 3, 40, 513]], ids=str)
@pytest.mark.parametrize("passes", [1, 3])
def test_packed_sequences_cost_what_their_tokens_cost(lengths, passes):
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    inputs = make_inputs(1, ends[-1], 1, 1, 16, 16, states=len(lengths), gates=False, dtype=torch.float32)
    state = inputs.pop("initial_state")

    def packed():
        return sleep_gated_delta_rule(
            **inputs, initial_state=state, passes=passes, cu_seqlens=torch.tensor(ends), impl="torch"
        )

    def alone():
        results = []
        for n, (a, b) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
            part = {name: x[:, a:b] for name, x in inputs.items()}
            if a < b:
                results.append(sleep_gated_delta_rule(**part, initial_state=state[n : n + 1], passes=passes))
        return results

    assert kept_bytes(packed) <= 1.5 * kept_bytes(alone)
    output, states = packed()
    torch.testing.assert_close(output, torch.cat([o for o, _ in alone()], 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        states[[n > 0 for n in lengths]], torch.cat([s for _, s in alone()]), rtol=1e-4, atol=1e-5
    )


def test_sequences_of_alike_lengths_go_together():
    for lengths in ([1, 16, 17, 24, 25, 32, 33, 49, 64], range(700), [5], [0, 0]):
        groups = alike(lengths)
        assert sorted(n for group in groups for n in group) == list(range(len(lengths)))
        for group in groups:
            longest = max(lengths[n] for n in group)
            assert longest <= SHORT or all(longest < 1.5 * lengths[n] for n in group)
    assert len(alike(range(1, 4097))) <= 17


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_forward_mode_is_refused(impl):
    """Kernels and written-out backwards would drop the tangents."""
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    inputs = make_inputs(1, 5, 1, 1, 16, 16, gates=False, dtype=torch.float32)
    inputs = {name: x.detach().to(device) for name, x in inputs.items()}
    tokens = {name: inputs[name] for name in ("k", "v", "g", "beta")}
    step = {name: x if name == "initial_state" else x[:, 0] for name, x in inputs.items()}
    step["state"] = step.pop("initial_state")
    row = inputs["v"].flatten(2)
    functions = {
        "gated_delta_rule": (lambda x: gated_delta_rule(**inputs | {"q": x}, impl=impl)[0], inputs["q"]),
        "sleep_gated_delta_rule": (
            lambda x: sleep_gated_delta_rule(**inputs | {"q": x}, impl=impl, passes=3)[0],
            inputs["q"],
        ),
        "sleep.*": (lambda x: delta_rule_state(**tokens | {"g": x}, impl=impl, passes=2), inputs["g"]),
        "segment_transition": (lambda x: segment_transition(**tokens | {"k": x}, impl=impl).P, inputs["k"]),
        "gated_delta_rule_step": (lambda x: gated_delta_rule_step(**step | {"v": x}, impl=impl)[0], step["v"]),
        "short_convolution": (lambda x: short_convolution(row, x, impl=impl)[0], torch.ones(16, 4, device=device)),
        "gated_rms_norm": (lambda x: gated_rms_norm(row, row, x, eps=1e-5, impl=impl), torch.ones(16, device=device)),
    }
    for name, (function, x) in functions.items():
        if impl == "torch" and name in (
            "gated_delta_rule_step",
            "gated_rms_norm",
        ):  # plain PyTorch, differentiated well
            torch.func.jvp(function, (x,), (x,))
            continue
        for derivative in (
            lambda f, x: torch.func.jvp(f, (x,), (x,)),
            lambda f, x: torch.func.jacfwd(f)(x),
            lambda f, x: torch.func.linearize(f, x),
        ):
            with pytest.raises(RuntimeError, match=f"^{name}: .*forward-mode"):
                derivative(function, x)


def test_forward_mode_of_the_reference_is_right():
    inputs = {name: x.detach() for name, x in make_inputs(1, 5, 1, 1, 4, 4, gates=False).items()}
    (v, function) = inputs.pop("v"), lambda v: gated_delta_rule(v=v, impl="reference", **inputs).output.sum()
    torch.testing.assert_close(torch.func.jacfwd(function)(v), torch.func.grad(function)(v))


@pytest.mark.parametrize("passes", [1, 3])
def test_meta_tensors_give_shapes(passes):
    inputs = {name: x.detach().to("meta") for name, x in make_inputs(2, 20, 1, 2, 8, 6, dtype=torch.float32).items()}
    output, state = sleep_gated_delta_rule(**inputs, **ACTIVATED, passes=passes, window=8)
    assert output.is_meta and output.shape == (2, 20, 2, 6) and state.shape == (2, 2, 8, 6)
    step = {name: x[:, 0] if x.ndim > 1 and name != "initial_state" else x for name, x in inputs.items()}
    step["state"] = step.pop("initial_state")
    assert gated_delta_rule_step(**step, **ACTIVATED).output.shape == (2, 2, 6)


def test_softplus_of_large_gates_is_exact_in_float64():
    a = torch.linspace(-5, 60, 200, dtype=torch.float64)[:, None]
    got = log_decay(a, torch.zeros(1), torch.zeros(1))
    torch.testing.assert_close(got, -torch.logaddexp(a, torch.zeros_like(a)), rtol=4e-16, atol=0)


@pytest.mark.parametrize(("batch", "tokens", "borders"), [(0, 5, None), (2, 0, None), (0, 0, None), (1, 0, [0, 0, 0])])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_tokens_leave_the_state_and_zero_gradients(impl, passes, batch, tokens, borders):
    """An idle rank of several still runs its model, forwards and backwards."""
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    states = batch if borders is None else len(borders) - 1
    inputs = make_inputs(batch, tokens, 1, 2, 16, 16, states=states, dtype=torch.float32)
    inputs = {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}
    options = {"cu_seqlens": None if borders is None else torch.tensor(borders, device=device), "impl": impl}
    output, state = sleep_gated_delta_rule(**inputs, **options, passes=passes, **ACTIVATED)
    assert output.shape == (batch, tokens, 2, 16) and torch.equal(state, inputs["initial_state"])
    (output.sum() + state.sum()).backward()
    for name, x in inputs.items():
        assert torch.equal(x.grad, torch.ones_like(x) if name == "initial_state" else torch.zeros_like(x)), name
    parts = {name: inputs[name] for name in ("k", "v", "g", "beta", "A_log", "dt_bias")}
    P, R = segment_transition(**parts, **options, **ACTIVATED)
    assert torch.equal(P, torch.eye(16, device=device).expand(states, 2, 16, 16)) and not R.any()


@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0), (0, 1)])
def test_layer_runs_without_tokens(batch, tokens):
    from sleep_ops import SleepGDNLayer

    layer = SleepGDNLayer(32, num_heads=2, head_dim=16)
    y, state = layer(torch.zeros(batch, tokens, 32), return_state=True)
    y, _ = layer(torch.zeros(batch, 1, 32) if batch == 0 else y, state=state, return_state=True)
    y.sum().backward()
    assert y.shape[0] == batch and not any(p.grad is None or p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize(
    ("dtype", "beta", "g", "least", "most"),
    [
        (torch.bfloat16, 1.0, 0.0, 0.005, 0.1),
        (torch.bfloat16, 2.0, 0.0, 0.3, math.inf),
        (torch.bfloat16, 2.0, -0.1, 0.0, 0.1),
        (torch.float32, 2.0, 0.0, 0.0, 1e-4),
    ],
)
def test_repeated_keys_err_as_the_docstring_says(dtype, beta, g, least, most):
    """The median over seeds of the output's error, on inputs as rounded."""
    errors = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        q, v = (torch.randn(1, 256, 1, 64, generator=generator).to(dtype) for _ in range(2))
        k = torch.randn(1, 1, 1, 64, generator=generator)
        k = (k / k.norm()).to(dtype).expand(1, 256, 1, 64)
        gates = torch.full((1, 256, 1), g), torch.full((1, 256, 1), beta)
        truth = gated_delta_rule(*(x.double() for x in (q, k, v, *gates)), impl="reference").output
        found = gated_delta_rule(q, k, v, *gates, impl="torch").output.double()
        errors.append(((found - truth).norm() / truth.norm()).item())
    assert least <= sorted(errors)[4] <= most
