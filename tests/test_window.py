"""The one-launch kernels for short windows: the 2x rule, operator contracts, and which calls take them."""

from dataclasses import replace

import pytest
import torch
from cases import (
    CASES,
    GATED,
    NAMES,
    Case,
    check_two_times,
    evaluate,
    float16_is_slow,
    make_inputs,
    relative_error,
    single_pass,
    slow_unless,
)
from torch.utils._python_dispatch import TorchDispatchMode

from sleep_ops.kernels import single_chunk
from sleep_ops.kernels.configs import single_chunk_config
from sleep_ops.ops.chunk_triton import TritonPass, as_tokens
from sleep_ops.ops.gated_delta_rule import delta_rule_state, gated_delta_rule, sleep_gated_delta_rule
from sleep_ops.ops.window_triton import _gates, window_gated_delta_rule
from sleep_ops.reference import gated_delta_rule_reference

WINDOWS = [
    *(Case(f"T{T}", T=T, B=2, heads=(2, 4)) for T in (1, 15, 16, 17, 24, 32)),
    Case("rule110", T=24, dims=(64, 64), B=2, options=GATED),
    Case("K100-V60", T=24, dims=(100, 60), heads=(1, 2)),
    Case("hebbian-no-states", rule="hebbian", initial_state=False, options=GATED),
    Case("no-initial-state", initial_state=False, heads=(1, 2), options=GATED),
    Case("no-final-cotangent", final_cotangent=False, heads=(1, 2), options=GATED),
]
OTHERS = [case for case in CASES if not case.lengths and not case.id.startswith("T")]
QUICK = ["T1", "T17", "rule110", "K100-V60", "hebbian-no-states", "no-initial-state", "no-final-cotangent"]
QUICK += ["grouped-gated", "K60-V16", "K128-V128", "gate-extreme", "gate-zero-beta-two-repeated-keys"]
QUICK += ["keys-zero-normalised", "strided"]
GROUPED = next(case for case in CASES if case.id == "grouped-gated")


def window(*tokens, cu_seqlens=None, **options):
    """With the signature of `gated_delta_rule_reference`."""
    assert cu_seqlens is None
    return window_gated_delta_rule(*tokens, **options)


def cut(case: Case, dtype: torch.dtype) -> Case:
    """The case at a length its kernels take: its own, else some tokens short of the longest."""
    longest = max(T for T in range(1, 65) if single_chunk_config(*case.dims, T, dtype))
    return case if case.T <= longest else replace(case, T=longest - 5)


@pytest.mark.parametrize("case", slow_unless(QUICK, WINDOWS + OTHERS))
def test_two_times_rule(case, dtype, device):
    check_two_times(window, cut(case, dtype), dtype, device)


@pytest.mark.parametrize("rule", ["delta", "hebbian"])
@pytest.mark.parametrize("initial_state", [True, False])
def test_state_only(rule, initial_state, device):
    case = replace(GROUPED, T=13, rule=rule, initial_state=initial_state)
    inputs = make_inputs(case, torch.float32, device)
    whole = evaluate(gated_delta_rule_reference, case, inputs | {"d_output": torch.zeros_like(inputs["v"])})

    def without_q(q, *tokens, **options):
        output, state = window(None, *tokens, **options)
        assert output is None
        return 0 * q.sum() + torch.zeros_like(inputs["v"]), state

    for name, value in evaluate(without_q, case, inputs).items():
        if name != "output":
            assert relative_error(value, whole[name].double()) < 1e-5, name


@pytest.mark.parametrize(
    "case", slow_unless(["grouped-gated"], [GROUPED, *(case for case in CASES if case.id == "hebbian-gated")])
)
def test_agrees_with_the_chunk_kernels(case, dtype, device):
    case = cut(case, dtype)
    inputs = make_inputs(case, dtype, device)
    chunked = evaluate(single_pass(TritonPass), case, inputs)
    for name, value in evaluate(window, case, inputs).items():
        assert value.dtype == chunked[name].dtype
        assert relative_error(value, chunked[name].double()) < 8 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("initial_state", [True, False])
def test_everything_is_written(initial_state, device, poisoned):
    """With every buffer full of NaN before its kernel starts, no NaN comes out."""
    case = replace(GROUPED, T=13, dims=(20, 40), initial_state=initial_state)
    inputs = make_inputs(case, torch.float32, device)
    expected = evaluate(window, case, inputs)
    poisoned(single_chunk)
    for name, value in evaluate(window, case, inputs).items():
        assert torch.equal(value, expected[name]), name


@float16_is_slow
def test_same_bits_every_run(dtype, device):
    case = replace(cut(GROUPED, dtype), B=2, dims=(64, 64))
    inputs = make_inputs(case, dtype, device)
    first, second = (evaluate(window, case, inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    ("rule", "form"),
    [
        ("delta", "output"),
        pytest.param("hebbian", "output", marks=pytest.mark.slow),
        pytest.param("delta", "state", marks=pytest.mark.slow),
        pytest.param("delta", "from nothing", marks=pytest.mark.slow),
    ],
)
def test_opcheck(rule, form, device):
    case = Case("opcheck", T=10, heads=(1, 2), options=GATED, rule=rule)
    inputs = make_inputs(case, torch.float32, device)
    q, k, v, g, beta, state, A_log, dt_bias = (inputs[name].detach().requires_grad_() for name in NAMES)
    query, start = None if form == "state" else q, None if form == "from nothing" else state
    gates = (None, None) if form == "from nothing" else (A_log, dt_bias)
    arguments = (query, k, v, g, beta, *gates, start, 0.25, rule, True, 1.0)
    torch.library.opcheck(torch.ops.sleep_ops.window_gated_delta_rule, arguments)


def test_compiles_without_graph_breaks(device):
    case = replace(GROUPED, T=13)
    inputs = make_inputs(case, torch.float32, device)
    expected = evaluate(window, case, inputs)
    compiled = torch.compile(window, fullgraph=True, backend="aot_eager")
    for name, value in evaluate(compiled, case, inputs).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_only_wanted_gradients(device):
    """Frozen inputs get no gradient, and either result alone can be differentiated."""
    inputs = make_inputs(Case("frozen", T=13), torch.float32, device)
    tokens = [inputs[name] for name in ("q", "k", "v", "g", "beta")]
    value = tokens[2].requires_grad_()
    for root in window(*tokens, scale=0.25):
        (gradient,) = torch.autograd.grad(root.sum(), value, retain_graph=True)
        assert gradient.isfinite().all() and gradient.any()


def test_views_are_read_in_place(device):
    """Slices of joint projections too, of the gates' among them."""
    joint, gates = torch.randn(2, 5, 24, device=device), torch.randn(2, 5, 6, device=device)
    q, k, v = (x.unflatten(-1, (2, 4)) for x in joint.split(8, -1))
    g, beta = -gates[..., :2].abs(), gates[..., 2:4]
    read, read_gates = as_tokens(q, k, v), _gates(gates[..., :2], beta, None, None)
    assert [x.data_ptr() for x in (*read[:3], *read_gates[:2])] == [x.data_ptr() for x in (q, k, v, gates, beta)]
    assert read[3:] == (24, 24, 24) and read_gates[2:] == (None, None, 6, 6)
    view = window(q, k, v, g, beta, scale=1.0, use_beta_sigmoid=True)
    copy = window(*(x.contiguous() for x in (q, k, v, g, beta)), scale=1.0, use_beta_sigmoid=True)
    assert all(torch.equal(a, b) for a, b in zip(view, copy, strict=True))
    read, read_gates = as_tokens(None, k.transpose(1, 2), v), _gates(g.mT.contiguous().mT, beta, None, None)
    assert read.q is None and read.k.is_contiguous() and read_gates.g.is_contiguous() and read_gates.stride_g == 2


def test_only_inputs_are_kept_for_the_backward(device):
    inputs = make_inputs(replace(GROUPED, T=13), torch.float32, device)
    leaves = {name: inputs[name].requires_grad_() for name in NAMES}
    tokens = [leaves.pop(name) for name in NAMES[:5]]
    kept = []

    def keep(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        window(*tokens, scale=0.25, **leaves, **GATED)
    assert {x.data_ptr() for x in kept} == {inputs[name].data_ptr() for name in NAMES}


class Calls(TorchDispatchMode):
    """Names of the gated delta rule's operators called inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sleep_ops":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("operator", ["pass", "state", "sleep"])
def test_short_passes_are_one_call_each_way(operator, device):
    case = Case("short", T=13, heads=(1, 2), options=GATED)
    inputs = {name: make_inputs(case, torch.float32, device)[name].requires_grad_() for name in NAMES}
    with Calls() as calls:
        if operator == "state":
            del inputs["q"]
            result = delta_rule_state(**inputs, impl="triton", **GATED)
        elif operator == "sleep":
            result = sleep_gated_delta_rule(**inputs, passes=1, window=20, impl="triton", **GATED).output
        else:
            result = gated_delta_rule(**inputs, impl="triton", **GATED).output
        torch.autograd.grad(result.sum(), list(inputs.values()))
    assert calls.names == ["window_gated_delta_rule", "window_gated_delta_rule_backward"]


def test_longer_packed_and_sleeping_passes_take_the_chunk_kernels(device):
    case = Case("short", T=13, heads=(1, 2), options=GATED)
    inputs = make_inputs(case, torch.float32, device)
    tokens = {name: inputs[name] for name in NAMES if name != "initial_state"}
    long = make_inputs(replace(case, T=17), torch.float32, device)
    with Calls() as calls:
        gated_delta_rule(**{name: long[name] for name in tokens}, impl="triton", **GATED)
        borders = torch.tensor([0, 5, 13], device=device)
        gated_delta_rule(**tokens, cu_seqlens=borders, impl="triton", **GATED)
        sleep_gated_delta_rule(**tokens, passes=3, impl="triton", **GATED)
    assert "chunk_scan" in calls.names and "window_gated_delta_rule" not in calls.names


def test_which_windows_and_how():
    half, single = torch.bfloat16, torch.float32
    assert [single_chunk_config(64, 64, T, half).chunk for T in (1, 16, 17, 32)] == [16, 16, 32, 32]
    assert single_chunk_config(64, 64, 33, half) is None and single_chunk_config(64, 64, 17, single) is None
    assert single_chunk_config(192, 64, 16, half).chunk == 16 and single_chunk_config(192, 64, 17, half) is None
    tiles = {(64, 64): 64, (64, 128): 32, (16, 20): 32}
    assert {dims: single_chunk_config(*dims, 24, half).launch.block_v for dims in tiles} == tiles
