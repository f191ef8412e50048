"""The gated delta rule and its sleep: the chunked PyTorch form against the specification, dtypes, dispatch, memory."""

import math
from dataclasses import replace

import pytest
import torch
from cases import NEGATIVE, Case, arguments
from judge import close, exact, identical, kept_bytes, leaves, outcome, relative_error

from sleep_ops.ops import chunk_torch, dispatch
from sleep_ops.ops.chunk_torch import TorchPass
from sleep_ops.ops.gated_delta_rule import gated_delta_rule, sleep_gated_delta_rule
from sleep_ops.ops.packed import SHORT, alike
from sleep_ops.ops.rule import RuleOptions
from sleep_ops.reference import gated_delta_rule_reference, log_decay
from sleep_ops.verify.yardstick import RoundedPass

CASES = [
    Case("one-token", T=1, B=2, dims=(8, 8)),
    Case("T15", T=15, B=2, heads=(2, 2), dims=(8, 6)),
    Case("T63-grouped", T=63, heads=(2, 6), dims=(4, 10)),
    Case("T64", T=64, heads=(1, 2), dims=(8, 8)),
    Case("T65", T=65, B=2, heads=(2, 2), dims=(6, 8)),
    Case("T75-wide", T=75, dims=(60, 100)),
    Case("T130-no-states", T=130, B=2, heads=(1, 2), dims=(8, 6), initial_state=False),
    Case("T200", T=200, heads=(1, 3), dims=(8, 4)),
    Case("packed", lengths=(1, 0, 79, 70), heads=(2, 4), dims=(8, 6)),
    Case("packed-one", lengths=(20,), dims=(8, 8)),
]
SMALL = Case("small", T=20, heads=(1, 2), dims=(16, 16), options=NEGATIVE)


@pytest.mark.parametrize("options", [{}, NEGATIVE], ids=["plain", "activated"])
@pytest.mark.parametrize("rule", ["delta", "hebbian"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunked_form_is_the_recurrence(case, rule, options):
    case = replace(case, rule=rule, options=options, beta="random" if options else "wide")
    tensors, options = arguments(case)
    exact(outcome(gated_delta_rule, tensors, **options), outcome(gated_delta_rule_reference, tensors, **options))


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("g", [0.0, -1e-3, -70.0])
@pytest.mark.parametrize("keys", ["random", "repeated", "zero"])
def test_extreme_gates_and_keys(keys, g, beta):
    tensors, options = arguments(Case("extreme", T=70, heads=(1, 2), dims=(8, 6), keys=keys))
    with torch.no_grad():
        tensors["g"].fill_(g)
        tensors["beta"].fill_(beta)
        if keys == "zero":
            tensors["k"].zero_()
    options["use_qk_l2norm"] = True
    got = outcome(gated_delta_rule, tensors, **options)
    assert all(x.isfinite().all() for x in got.values())
    # A zero key's gradient is about 1e3 times that of a unit key, and grows with it.
    exact(got, outcome(gated_delta_rule_reference, tensors, **options), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, NEGATIVE], ids=["plain", "activated"])
def test_lower_precision_is_close(dtype, options):
    case = Case("low", T=100, B=2, heads=(2, 4), dims=(32, 24), options=options)
    low, options = arguments(case, dtype)
    got = outcome(gated_delta_rule, low, **options)
    want = outcome(gated_delta_rule_reference, leaves(low, torch.float64), **options)
    assert got["output"].dtype == dtype and got["final_state"].dtype == torch.float32
    for name, x in got.items():
        assert relative_error(x, want[name]) < 30 * torch.finfo(dtype).eps, name


def gradcheck(function, case, **others):
    tensors, options = arguments(case)
    options |= others
    assert torch.autograd.gradcheck(
        lambda *x: function(**dict(zip(tensors, x, strict=True)), **options), list(tensors.values())
    )


@pytest.mark.parametrize("rule", ["delta", "hebbian"])
def test_gradcheck(rule):
    gradcheck(gated_delta_rule, Case("small", T=5, heads=(1, 2), dims=(3, 2), rule=rule, options=NEGATIVE))


def test_gradcheck_over_chunks(monkeypatch):
    monkeypatch.setattr(chunk_torch, "MAX_CHUNK", 3)
    gradcheck(sleep_gated_delta_rule, Case("small", T=7, dims=(3, 2)), passes=2, window=4)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_split_run_is_the_whole_run(impl, device):
    dtype, judge = (torch.float64, exact) if impl == "torch" else (torch.float32, close)
    tensors, options = arguments(Case("split", T=90, heads=(1, 2), beta="wide"), dtype, device)
    whole = gated_delta_rule(**tensors, impl=impl)
    state, outputs = tensors.pop("initial_state"), []
    for part in (slice(0, 1), slice(1, 17), slice(17, 64), slice(64, 90)):
        o, state = gated_delta_rule(**{n: x[:, part] for n, x in tensors.items()}, initial_state=state, impl=impl)
        outputs.append(o)
    judge((torch.cat(outputs, 1), state), tuple(whole))


@pytest.mark.parametrize("passes", [1, 3])
def test_first_pass_outputs_are_causal(passes):
    tensors, _ = arguments(Case("causal", T=50, heads=(1, 2), dims=(8, 6)))
    changed = {name: x.detach().clone() for name, x in tensors.items()}
    for name in ("q", "k", "v", "g", "beta"):
        changed[name][:, 33:] *= 0.5
    got, other = (
        sleep_gated_delta_rule(**x, passes=passes, window=20, output_pass="first").output for x in (tensors, changed)
    )
    exact(got[:, :33], other[:, :33], rtol=0, atol=1e-14)
    assert (got[:, 33:] - other[:, 33:]).abs().amax() > 1e-3


def test_a_result_used_twice():
    tensors, options = arguments(SMALL)

    def twice(function):
        output, state = function(**tensors, **options)
        return torch.autograd.grad(output.square().sum() + output.sum() + (state * state).sum(), list(tensors.values()))

    exact(twice(gated_delta_rule), twice(gated_delta_rule_reference))


def test_large_half_precision_inputs_stay_finite():
    tensors, options = arguments(replace(SMALL, T=40), torch.float32)
    large = {name: (x.detach() * 2000).half() if name in "qkv" else x.detach() for name, x in tensors.items()}
    truth = gated_delta_rule_reference(**{name: x.double() for name, x in large.items()}, **options)
    for impl in ("torch", "triton"):
        for x, expected in zip(gated_delta_rule(**large, **options, impl=impl), truth, strict=True):
            assert relative_error(x, expected) < 1e-2


def test_gates_may_have_their_own_dtype():
    tensors, options = arguments(SMALL, torch.float32)
    mixed = {name: x.detach().bfloat16() if name in ("g", "beta", "A_log") else x for name, x in tensors.items()}
    same = {name: x.detach().float() for name, x in mixed.items()}
    got, want = (gated_delta_rule(**x, **options).output.detach() for x in (mixed, same))
    identical(got, want)


def test_triton_refuses_what_it_can_not_run(monkeypatch):
    tensors, options = arguments(SMALL)
    with pytest.raises(ValueError, match="^impl: .*float64"):
        gated_delta_rule(**tensors, **options, impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="^impl: .*CUDA"):
        gated_delta_rule(**leaves(tensors, torch.float32), **options, impl="triton")


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tensors, options = arguments(SMALL, torch.float32)
    with pytest.raises(ImportError, match="Triton is not installed"):
        gated_delta_rule(**tensors, **options, impl="triton")


def test_unknown_keyword_is_a_type_error():
    tensors, options = arguments(SMALL)
    with pytest.raises(TypeError, match="chunk_size"):
        gated_delta_rule(**tensors, **options, chunk_size=64)


@pytest.mark.parametrize("lengths", [(*[8] * 64, 1024), (*[1] * 30, 300), (65, 0, 128, 257, 3, 40, 513)], ids=str)
@pytest.mark.parametrize("passes", [1, 3])
def test_packed_sequences_cost_what_their_tokens_cost(lengths, passes):
    tensors, options = arguments(Case("packed", lengths=lengths), torch.float32)
    state, ends = tensors.pop("initial_state"), options["cu_seqlens"].tolist()

    def packed():
        return sleep_gated_delta_rule(**tensors, initial_state=state, passes=passes, **options, impl="torch")

    def alone():
        return [
            sleep_gated_delta_rule(
                **{name: x[:, a:b] for name, x in tensors.items()}, initial_state=state[n : n + 1], passes=passes
            )
            for n, (a, b) in enumerate(zip(ends[:-1], ends[1:], strict=True))
            if a < b
        ]

    assert kept_bytes(packed) <= 1.5 * kept_bytes(alone)
    output, states = packed()
    outputs, finals = zip(*alone(), strict=True)
    close((output, states[[n > 0 for n in lengths]]), (torch.cat(outputs, 1), torch.cat(finals)))


def test_sequences_of_alike_lengths_go_together():
    for lengths in ([1, 16, 17, 24, 25, 32, 33, 49, 64], range(700), [5], [0, 0]):
        groups = alike(lengths)
        assert sorted(n for group in groups for n in group) == list(range(len(lengths)))
        for group in groups:
            longest = max(lengths[n] for n in group)
            assert longest <= SHORT or all(longest < 1.5 * lengths[n] for n in group)
    assert len(alike(range(1, 4097))) <= 17


def test_softplus_of_large_gates_is_exact_in_float64():
    a = torch.linspace(-5, 60, 200, dtype=torch.float64)[:, None]
    got = log_decay(a, torch.zeros(1), torch.zeros(1))
    exact(got, -torch.logaddexp(a, torch.zeros_like(a)), rtol=4e-16, atol=0)


@pytest.mark.parametrize(
    ("kind", "dtype", "beta", "g", "least", "most"),
    [
        (RoundedPass, torch.bfloat16, 1.0, 0.0, 0.005, 0.1),
        (RoundedPass, torch.bfloat16, 2.0, 0.0, 0.3, math.inf),
        (RoundedPass, torch.bfloat16, 2.0, -0.1, 0.0, 0.1),
        (TorchPass, torch.bfloat16, 2.0, 0.0, 0.0, 2.0**-9),
        (TorchPass, torch.float32, 2.0, 0.0, 0.0, 1e-4),
    ],
)
def test_repeated_keys_err_as_the_docstring_says(kind, dtype, beta, g, least, most):
    """The median over seeds of the output's error, on inputs as rounded; RoundedPass errs as the kernels do."""
    errors = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        q, v = (torch.randn(1, 256, 1, 64, generator=generator).to(dtype) for _ in range(2))
        k = torch.randn(1, 1, 1, 64, generator=generator)
        k = (k / k.norm()).to(dtype).expand(1, 256, 1, 64)
        gates = torch.full((1, 256, 1), g), torch.full((1, 256, 1), beta)
        truth = gated_delta_rule(*(x.double() for x in (q, k, v, *gates)), impl="reference").output
        found, _ = kind(k, v, *gates, RuleOptions()).run(q, None, 64**-0.5)
        errors.append(relative_error(found, truth))
    assert least <= sorted(errors)[4] <= most
