"""What all benchmarks share: cases and their arithmetic, providers, checks, and how calls are measured."""

import functools
from dataclasses import replace

import pytest
import torch
from commands import bench, refuses

from sleep_ops import gated_delta_rule
from sleep_ops.bench import harness, providers
from sleep_ops.bench.cases import KERNEL_CASES, PASSES_CASES, Case, make_inputs
from sleep_ops.bench.checks import operator_check, right_ones
from sleep_ops.bench.harness import MODES, Problem, Run, gradients, measure, run_of, saved_mib
from sleep_ops.bench.providers import chained, operator_problem, replay_of

CPU = torch.device("cpu")
ONE_WINDOW = Case(batch=2, tokens=70, heads=3, value_heads=3, key_dim=8, value_dim=8, dtype="float32")
WINDOWS = Case(1, 200, 2, 2, 16, 16, window=80, dtype="float32")
GROUPED = Case(2, 50, 2, 4, 8, 12, dtype="float32")
CASES = pytest.mark.parametrize("case", [ONE_WINDOW, WINDOWS, GROUPED], ids=["one-window", "windows", "grouped"])


def test_every_case_has_its_sizes_on_both_devices():
    for cases in (KERNEL_CASES, PASSES_CASES):
        assert cases["cuda"].keys() == cases["cpu"].keys()
        assert {case.dtype for case in cases["cuda"].values()} == {"bfloat16"}
        assert {case.dtype for case in cases["cpu"].values()} == {"float32"}
        for name, case in cases["cuda"].items():
            small = cases["cpu"][name]
            assert small.flops("forward") < 0.05 * case.flops("forward"), name
            assert small.value_heads // small.heads == case.value_heads // case.heads, name
    assert KERNEL_CASES["cuda"]["long"] == Case(1, 32768, 16, 32, 128, 128)
    assert KERNEL_CASES["cuda"]["jet"] == Case(4, 2000, 12, 12, 96, 256)


def test_costs_at_the_usual_size():
    """Per token and value head at C = 64, K = V = 128 (the state's own bytes apart)."""
    case = Case(1, 64, 1, 1, 128, 128)
    assert [round(case.flops(mode) / 64e3) for mode in MODES] == [167, 475, 642]
    state = 128 * 128 * 4
    assert [(case.bytes(mode) - state) / 64 for mode in MODES[:2]] == [1032, 1808]
    grouped = replace(case, value_heads=2)
    assert [(grouped.bytes(mode) - 2 * state) / 128 for mode in MODES[:2]] == [776, 1296]
    assert case.bytes("forward+backward") == case.bytes("forward") + case.bytes("backward")
    assert replace(case, dtype="float32").floor_ms("forward") is None


def test_floors_are_the_longer_of_traffic_and_arithmetic():
    long = KERNEL_CASES["cuda"]["long"]
    assert long.floor_ms("forward") == pytest.approx(long.bytes("forward") / 3e9) == pytest.approx(0.27, abs=0.01)
    assert long.floor_ms("backward") == pytest.approx(long.flops("backward") / 750e9) == pytest.approx(0.61, abs=0.01)
    assert long.floor_ms("forward+backward") == long.floor_ms("forward") + long.floor_ms("backward")


def test_passes_cost_their_state_columns_and_from_then_on_those_of_the_map():
    costs = [replace(WINDOWS, passes=n).flops("forward") for n in (1, 2, 3, 4, 100)]
    further = [b - a for a, b in zip(costs, costs[1:], strict=False)]
    assert further[0] == further[1] == 200 * 2 * 16 * (4 * 16 + 2 * 64) and further[2:] == [0, 0]
    assert replace(WINDOWS, passes=100).bytes("backward") == WINDOWS.bytes("backward")


@CASES
def test_inputs_have_their_shapes_and_differ_with_the_seed(case):
    q, k, v, g, beta, d_output, d_state = make_inputs(replace(case, dtype="bfloat16"), 0, CPU)
    assert q.shape == k.shape == (case.batch, case.tokens, case.heads, case.key_dim)
    assert v.shape == d_output.shape == (case.batch, case.tokens, case.value_heads, case.value_dim)
    assert g.shape == beta.shape == (case.batch, case.tokens, case.value_heads) and g.dtype == torch.float32
    assert d_state.shape == (case.batch, case.value_heads, case.key_dim, case.value_dim)
    assert q.dtype == torch.bfloat16 and g.max() <= 0 <= beta.min() and (k.norm(dim=-1) - 1).abs().max() < 0.02
    assert not torch.equal(v, make_inputs(replace(case, dtype="bfloat16"), 1, CPU)[2])


@CASES
@pytest.mark.parametrize("provider", providers.OURS)
def test_operators_are_right(provider, case):
    errors = operator_check(replay_of(provider, case, CPU), case, 0, CPU, (1, 3))
    assert list(errors) == ["error_output", "error_state", "error_gradient"]
    assert 0 < min(errors.values()) and max(errors.values()) < 1e-5


@CASES
def test_ours_and_the_chain_agree_beyond_the_checked_passes(case):
    inputs = make_inputs(case, 0, CPU)
    results = []
    for provider in ("ours", "ours-chained"):
        problem = operator_problem(replay_of(provider, case, CPU), case, inputs)
        roots = problem.run(16)
        results.append([*roots, *gradients(problem, roots)])
    for ours, chain in zip(*results, strict=True):
        torch.testing.assert_close(ours, chain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("load", [providers.load_fla, providers.load_flash_qla])
def test_a_library_that_cannot_run_the_case_says_what_it_needs(load):
    with pytest.raises(ValueError, match="needs CUDA"):
        load(KERNEL_CASES["cuda"]["mid"], CPU)


@CASES
def test_transformers_form_is_right(case):
    errors = operator_check(replay_of("transformers", case, CPU), case, 0, CPU, (1, 3))
    assert max(errors.values()) < 1e-5


def test_a_missing_library_is_told_of(monkeypatch):
    monkeypatch.setitem(providers.LIBRARIES, "fla", ("no_such_library", providers.load_fla))
    with pytest.raises(ImportError, match="no_such_library is not installed"):
        replay_of("fla", ONE_WINDOW, CPU)


def test_a_library_is_called_by_the_keywords_it_documents():
    def operator(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
        assert output_final_state and cu_seqlens is None
        return tuple(gated_delta_rule(q, k, v, g, beta, scale=scale, initial_state=initial_state))

    replay = chained(functools.partial(providers.their_pass, operator))
    assert max(operator_check(replay, WINDOWS, 0, CPU).values()) < 1e-5


@pytest.mark.parametrize("head", [0, 3])
def test_a_check_sees_every_result_of_the_outermost_heads(head):
    """One wrong number in a head's gradient of v is enough."""

    def replay(q, k, v, g, beta, *, passes, window):
        spoilt = torch.zeros_like(v)
        spoilt[-1, 3, head, 1] = 1
        return gated_delta_rule(q, k, v + (v * spoilt - (v * spoilt).detach()), g, beta)

    errors = operator_check(replay, GROUPED, 0, CPU, (1,))
    assert max(errors["error_output"], errors["error_state"]) < 1e-5 < 1e-3 < errors["error_gradient"]


def test_what_is_wrong_or_raises_is_left_out_with_its_reason():
    def fails():
        raise ImportError("not installed\nat all")

    notes = []
    checks = {"ours": lambda: {"error_output": 1e-6}, "torch": lambda: {"error_output": float("inf")}, "fla": fails}
    assert right_ones(checks, "float32", lambda *note: notes.append(note)) == {
        "ours": {"error_output": 1e-6, "error_bound": 1e-4}
    }
    assert notes[0][0] == "torch" and notes[0][1].startswith("is WRONG and not timed: error_output = inf")
    assert notes[1] == ("fla", "is not timed: not installed")
    with pytest.raises(ImportError):
        right_ones({"ours": fails}, "float32", notes.append)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_is_timed_and_what_it_keeps_is_counted(mode):
    problem = operator_problem(replay_of("ours", ONE_WINDOW, CPU), ONE_WINDOW, make_inputs(ONE_WINDOW, 0, CPU))
    figures = measure({"ours": run_of(problem, 1, mode, CPU)}, 3, CPU, None)["ours"]
    assert 0 < figures["ms_p20"] <= figures["ms_median"] <= figures["ms_p80"]
    assert figures["peak_extra_mib"] == ""  # of CUDA alone
    assert (figures["saved_mib"] == "") if mode == "forward" else (figures["saved_mib"] > 0)


def test_runs_take_turns_after_a_warm_up():
    order = []
    runs = {name: Run(lambda name=name: (order.append(name), (float(len(order)), 2.0))[1]) for name in "ab"}
    figures = measure(runs, 2, CPU, None)
    assert "".join(order) == "ababab"  # the first of each is not counted
    assert figures["a"]["ms_median"] == 4 and figures["b"]["ms_median"] == 5 and figures["a"]["peak_extra_mib"] == 2


def test_running_out_of_memory_is_told_of_and_gives_no_figures():
    def greedy():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken():
        raise RuntimeError("broken")

    notes = []
    figures = measure({"greedy": Run(greedy), "ours": Run(lambda: (1.0, 0.0))}, 2, CPU, lambda *x: notes.append(x))
    assert list(figures) == ["ours"] and notes == [("greedy", "out of memory, no row")]
    with pytest.raises(RuntimeError, match="broken"):
        measure({"broken": Run(broken)}, 2, CPU, None)


def test_saved_memory_counts_storages_that_the_graph_keeps():
    x = torch.randn(256, 1024, requires_grad=True)  # 1 MiB

    def powers(passes):
        (x.detach().exp() * x).sum()  # this graph is gone when the forward ends
        y = x
        for _ in range(passes):
            y = y.exp()  # keeps its result
        return y, (y * y).sum()  # keeps y, once more

    assert saved_mib(Problem(powers, [x], []), 3) == 3
    assert saved_mib(Problem(lambda _: (x * x, x.mT @ x), [x], []), 1) == 0  # the leaf alone


@pytest.mark.parametrize("window", [None, 32], ids=["one-window", "windows"])
def test_what_ours_keeps_for_the_backward_does_not_grow_with_passes(window):
    case = Case(1, 128, 2, 2, 16, 16, window=window, dtype="float32")
    problem = operator_problem(providers.replayed, case, make_inputs(case, 0, CPU))
    few, many = (saved_mib(problem, n) for n in (4, 64))
    assert 0 < few and many <= 1.1 * few


@pytest.mark.parametrize("command", ["passes", "kernels", "train", "tune"])
def test_every_command_has_the_common_options(command):
    text = bench(command, "--help")
    assert all(f"--{name}" in text for name in ("seed", "device", "out", "help"))


def test_the_machine_is_described():
    found = harness.environment(CPU)
    assert list(found) == harness.MACHINE and found["torch"] == torch.__version__ and found["device"].startswith("cpu")


BAD = {
    "kernels": [
        *("--case tiny: cases", "--case depo,depo: cases", "--providers layer: providers", "--sweep batch: sweep"),
        *("--passes 0: passes", "--repeats 0: repeats", "--seed -1: seed", "--dtype int8: dtype"),
        "--device abacus: device",
    ],
    "passes --batch 1 --heads 2 --head-dim 8 --device cpu": [
        *("--passes 0: passes", "--passes 1,1: passes", "--passes two: passes", "--case tiny: cases"),
        *("--case mid,mid: cases", "--providers ours,theirs: providers", "--tokens 0: tokens", "--window -1: window"),
        *("--repeats 0: repeats", "--max-chained 0: max_chained", "--seed -1: seed", "--dtype int8: dtype"),
        "--device abacus: device",
    ],
    "train --device cpu": [
        *("--preset huge: presets", "--passes 0: passes", "--passes inf: passes", "--window 8,8: windows"),
        *("--checkpointing maybe: checkpointing", "--providers torch: providers", "--cuda-graph: cuda_graph"),
        *("--batch 0: batch", "--precision fp4: precision", "--repeats 0: repeats", "--seed -1: seed"),
        "--device abacus: device",
    ],
}


@pytest.mark.parametrize(
    "setting", [f"{command} {setting}" for command, settings in BAD.items() for setting in settings]
)
def test_bad_settings_are_named_and_nothing_is_written(setting, tmp_path):
    command, named = setting.split(": ")
    refuses(command, named, tmp_path)
