"""The one-launch kernels for short windows: the 2x rule, what they read and keep, and which calls take them."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import CASES, GATED, NAMES, Case, arguments, check_two_times, evaluate, make_inputs, single_pass, slow_unless
from judge import identical, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from sleep_ops.kernels.configs import single_chunk_config
from sleep_ops.ops.chunk_triton import TritonPass, as_tokens
from sleep_ops.ops.gated_delta_rule import delta_rule_state, gated_delta_rule, sleep_gated_delta_rule
from sleep_ops.ops.rule import RuleOptions
from sleep_ops.ops.single_chunk import _gates, single_chunk_pass
from sleep_ops.reference import gated_delta_rule_reference
from sleep_ops.verify.yardstick import RoundedPass

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


def window(q, k, v, g, beta, *, scale, initial_state=None, cu_seqlens=None, **options):
    """With the signature of `gated_delta_rule_reference`."""
    assert cu_seqlens is None
    return single_chunk_pass(q, k, v, g, beta, RuleOptions(**options), scale=scale, initial_state=initial_state)


def cut(case: Case, dtype: torch.dtype) -> Case:
    """The case at a length its kernels take: its own, else some tokens short of the longest."""
    longest = max(T for T in range(1, 65) if single_chunk_config(*case.dims, T, dtype))
    return case if case.T <= longest else replace(case, T=longest - 5)


@pytest.mark.parametrize("case", slow_unless(QUICK, WINDOWS + OTHERS))
def test_two_times_rule(case, dtype, device):
    check_two_times(window, cut(case, dtype), dtype, device)


def replayed(one_pass, passes: int, output_pass: str):
    """So many passes by a function with the signature of `gated_delta_rule_reference`."""

    def function(*, initial_state=None, **arguments):
        outputs = []
        for _ in range(passes):
            output, initial_state = one_pass(initial_state=initial_state, **arguments)
            outputs.append(output)
        return outputs[0 if output_pass == "first" else -1], initial_state

    return function


REPLAYED = ["rule110", "K100-V60", "hebbian-no-states", "no-initial-state", "no-final-cotangent", "grouped-gated"]
REPLAYED += ["gate-extreme", "gate-zero", "keys-zero-normalised", "strided", "T1"]


@pytest.mark.parametrize("passes", slow_unless(["2", "7"], [2, 3, 7, 8, 64]))
@pytest.mark.parametrize("output_pass", slow_unless(["last"], ["first", "last"]))
@pytest.mark.parametrize("case", slow_unless(REPLAYED[:6], [x for x in WINDOWS + OTHERS if x.id in REPLAYED]))
def test_two_times_rule_of_replay(case, output_pass, passes, dtype, device):
    specification, plain = (
        replayed(one_pass, passes, output_pass) for one_pass in (gated_delta_rule_reference, single_pass(RoundedPass))
    )
    function = partial(sleep_gated_delta_rule, passes=passes, output_pass=output_pass, impl="triton")
    if case.gate == "zero":
        case = replace(case, amplification=passes)
    check_two_times(function, cut(case, dtype), dtype, device, specification=specification, plain=plain)


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
    identical(view, copy)
    read, read_gates = as_tokens(None, k.transpose(1, 2), v), _gates(g.mT.contiguous().mT, beta, None, None)
    assert read.q is None and read.k.is_contiguous() and read_gates.g.is_contiguous() and read_gates.stride_g == 2


def test_only_inputs_are_kept_for_the_backward(device):
    inputs = make_inputs(replace(GROUPED, T=13), torch.float32, device)
    leaves = {name: inputs[name].requires_grad_() for name in NAMES}
    kept = []

    def keep(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        window(**leaves, scale=0.25, **GATED)
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


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("operator", ["pass", "state", "sleep"])
def test_short_passes_are_one_call_each_way(operator, passes, device):
    """Replays one more, for the pass that puts out."""
    tensors, options = arguments(Case("short", T=13, heads=(1, 2), options=GATED), torch.float32, device)
    options |= {"impl": "triton"} | ({} if operator == "pass" else {"passes": passes})
    with Calls() as calls:
        if operator == "state":
            del tensors["q"]
            result = delta_rule_state(**tensors, **options)
        elif operator == "sleep":
            result = sleep_gated_delta_rule(**tensors, window=20, **options).output
        else:
            result = gated_delta_rule(**tensors, **options).output
        torch.autograd.grad(result.sum(), list(tensors.values()))
    replays = ["single_chunk_replay"] * ("passes" in options and passes > 1)
    forwards = [*replays, *["single_chunk"] * (operator != "state" or not replays)]
    assert calls.names == [*forwards, *(f"{name}_backward" for name in reversed(forwards))]


def test_what_is_longer_packed_or_in_several_windows_takes_the_chunk_kernels(device):
    case = Case("short", T=13, heads=(1, 2), initial_state=False, options=GATED)
    tensors, options = arguments(case, torch.float32, device)
    long, _ = arguments(replace(case, T=17), torch.float32, device)
    options |= {"impl": "triton"}
    with Calls() as calls:
        gated_delta_rule(**long, **options)
        gated_delta_rule(**tensors, **options | {"cu_seqlens": torch.tensor([0, 5, 13], device=device)})
        sleep_gated_delta_rule(**long, passes=3, **options)
        sleep_gated_delta_rule(**tensors, passes=3, window=7, **options)
        sleep_gated_delta_rule(**tensors, passes=math.inf, **options)
    assert "chunk_scan" in calls.names and not any(name.startswith("single_chunk") for name in calls.names)


def test_which_windows_and_how():
    half, single = torch.bfloat16, torch.float32
    assert [single_chunk_config(64, 64, T, half).chunk for T in (1, 16, 17, 32)] == [16, 16, 32, 32]
    assert single_chunk_config(64, 64, 33, half) is None and single_chunk_config(64, 64, 17, single) is None
    assert single_chunk_config(192, 64, 16, half).chunk == 16 and single_chunk_config(192, 64, 17, half) is None
    tiles = {(64, 64): (32, 64), (64, 128): (32, 32), (100, 20): (32, 32), (16, 20): (16, 16)}
    for dims, blocks in tiles.items():
        assert tuple(launch.block_v for launch in single_chunk_config(*dims, 24, half)[1:]) == blocks
