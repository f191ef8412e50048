"""Replay at constant cost: N passes against N chained reference passes, precision, memory, windows, compile."""

import functools
import math

import pytest
import torch
from cases import GATED, Case, check_two_times, make_inputs, relative_error, slow_unless

from sleep_ops.ops import gated_delta_rule as operators
from sleep_ops.ops.affine import Transition, apply_power
from sleep_ops.ops.gated_delta_rule import delta_rule_state, sleep_gated_delta_rule
from sleep_ops.ops.windows import Windows
from sleep_ops.reference import sleep_gated_delta_rule_reference

NAMES = ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias")
NEGATIVE = GATED | {"allow_neg_eigval": True}
REPLAYS = [
    Case("one-window", T=40, dims=(8, 6), heads=(1, 2), B=2),
    Case("gated", T=40, dims=(8, 6), heads=(2, 4), options=NEGATIVE),
    Case("hebbian", T=40, dims=(8, 6), heads=(1, 2), rule="hebbian", gate="extreme"),
    Case("packed", lengths=(15, 0, 40, 1), dims=(8, 6), heads=(1, 2), options=NEGATIVE),
    Case("no-states", T=40, dims=(6, 8), initial_state=False, final_cotangent=False),
    Case("gate-zero-beta-two", T=40, dims=(8, 6), gate="zero", beta="two"),
    Case("gate-zero-repeated-keys", T=40, dims=(8, 6), gate="zero", beta="one", keys="repeated"),
    Case("gate-extreme", T=40, dims=(8, 6), gate="extreme", beta="two"),
    Case("more-values-than-keys", T=20, dims=(4, 24)),
]


def evaluate(function, case, inputs, **options):
    """Output, final state and every gradient of `function`, in the dtype of its inputs."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in NAMES if inputs[name] is not None}
    results = function(**leaves, cu_seqlens=inputs["cu_seqlens"], rule=case.rule, **case.options, **options)
    cotangents = [inputs["d_output"], inputs["d_final_state"]]
    total = sum((x * c.to(x)).sum() for x, c in zip(results, cotangents, strict=True) if c is not None)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    gradients = (torch.zeros_like(x) if d is None else d for x, d in zip(leaves.values(), gradients, strict=True))
    names = ["output", "final_state", *(f"d{name}" for name in leaves)]
    return dict(zip(names, [*results, *gradients], strict=True))


def double(inputs):
    return {name: x.double() if x is not None and x.is_floating_point() else x for name, x in inputs.items()}


@pytest.mark.parametrize("passes", slow_unless(["1", "2", "5"], [1, 2, 3, 4, 5, 8, 64]))
@pytest.mark.parametrize("window", slow_unless(["one", "ragged"], [None, 16, 10], ids=["one", "ragged", "even"]))
@pytest.mark.parametrize("output_pass", ["first", "last"])
@pytest.mark.parametrize("case", REPLAYS, ids=str)
def test_equals_chained_reference_passes(case, output_pass, window, passes):
    inputs = double(make_inputs(case, torch.float32, "cpu"))
    options = {"passes": passes, "window": window, "output_pass": output_pass}
    got = evaluate(sleep_gated_delta_rule, case, inputs, **options)
    want = evaluate(sleep_gated_delta_rule_reference, case, inputs, **options)
    for name in want:
        bound = 1e-11 * max(1.0, want[name].abs().max().item())
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("window", [None, 12], ids=["one", "windows"])
@pytest.mark.parametrize("passes", [2, 3, 5, math.inf], ids=str)
@pytest.mark.parametrize("case", REPLAYS[:4], ids=str)
def test_state_alone(case, passes, window):
    inputs = double(make_inputs(case, torch.float32, "cpu"))
    options = {"passes": passes, "window": window, "cu_seqlens": inputs["cu_seqlens"], **case.options}
    tensors = {name: inputs[name] for name in NAMES if name != "q"}
    whole = sleep_gated_delta_rule(inputs["q"], **tensors, rule=case.rule, **options).final_state
    torch.testing.assert_close(delta_rule_state(**tensors, rule=case.rule, **options), whole)


PRECISION = [
    Case("one-window", T=75, B=2, heads=(2, 4), dims=(16, 24), options=NEGATIVE),
    Case("packed", lengths=(15, 0, 64, 1, 33), heads=(1, 2), options=GATED),
    Case("hebbian", T=40, B=3, heads=(2, 4), dims=(8, 6), rule="hebbian", options=GATED),
    Case("gate-zero", T=40, gate="zero"),
    Case("K20-V40", T=33, dims=(20, 40), heads=(1, 2)),
    Case("K128-V128", T=130, heads=(1, 2), dims=(128, 128), options=GATED),
]


def chained(q, k, v, g, beta, *, initial_state=None, passes, window, cu_seqlens, **options):
    """Pass after pass, window after window, by the PyTorch form."""
    kwargs = {"cu_seqlens": cu_seqlens, **options}
    if cu_seqlens is not None or window is None:
        for _ in range(passes):
            output, initial_state = operators.gated_delta_rule(
                q, k, v, g, beta, impl="torch", initial_state=initial_state, **kwargs
            )
        return output, initial_state
    outputs = []
    for first in range(0, k.shape[1], window):
        part = [x[:, first : first + window] for x in (q, k, v, g, beta)]
        output, initial_state = chained(
            *part, initial_state=initial_state, passes=passes, window=None, cu_seqlens=None, **options
        )
        outputs.append(output)
    return torch.cat(outputs, 1), initial_state


@pytest.mark.parametrize("window", [None, 20], ids=["one", "windows"])
@pytest.mark.parametrize("passes", slow_unless(["5"], [2, 5]))
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("case", slow_unless(["gate-zero", "K20-V40", "K128-V128"], PRECISION))
def test_two_times_rule(case, impl, passes, window, dtype, device):
    if impl == "triton" and device == "cpu" and not case.interpretable:
        pytest.skip("too large for Triton's interpreter: needs a GPU")
    window = None if case.lengths else window
    plain, specification = (
        functools.partial(f, passes=passes, window=window) for f in (chained, sleep_gated_delta_rule_reference)
    )
    function = functools.partial(sleep_gated_delta_rule, passes=passes, window=window, impl=impl)
    check_two_times(function, case, dtype, device, specification=specification, plain=plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", ["zero", "random"])
def test_error_grows_no_faster_than_the_passes(gate, dtype):
    """As the docstring says: N roundings of a pass, fewer with decay."""
    case = Case("error", T=96, dims=(32, 32), heads=(1, 4), gate=gate)
    inputs = make_inputs(case, dtype, "cpu")
    exact = double(inputs)
    rounding = {torch.float32: 2**-22, torch.float16: 2**-12, torch.bfloat16: 2**-9}[dtype]
    for passes in (1, 8, 64, 1024):
        errors = []
        for window in (None, 24):
            options = {"passes": passes, "window": window, "rule": "delta"}
            tensors = ("k", "v", "g", "beta", "initial_state")
            got = delta_rule_state(**{n: inputs[n] for n in tensors}, **options)
            want = delta_rule_state(**{n: exact[n] for n in tensors}, **options)
            errors.append(relative_error(got, want))
        assert max(errors) <= (passes if gate == "zero" else min(passes, 64)) * rounding * 2, (passes, errors)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 15, 64, 1000])
def test_power_of_a_map_on_a_state(n):
    generator = torch.Generator().manual_seed(0)
    P, R, state = (torch.randn(2, 3, 6, m, generator=generator, dtype=torch.float64) for m in (6, 4, 4))
    transition = Transition(P / torch.linalg.matrix_norm(P, ord=2)[..., None, None], R)
    want = state
    for _ in range(n):
        want = transition.apply(want)
    torch.testing.assert_close(apply_power(transition, n, state), want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(transition.power(n).apply(state), want, rtol=1e-10, atol=1e-10)


def kept_for_backward(**options):
    case = Case("memory", T=256, dims=(16, 16), heads=(1, 2))
    inputs = make_inputs(case, torch.float32, "cpu")
    leaves = [inputs[name].requires_grad_() for name in NAMES[:5]]
    kept = []

    def pack(x):
        kept.append(x.untyped_storage())  # alive until counted: no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        sleep_gated_delta_rule(*leaves, **options)
    return sum({x.data_ptr(): x.nbytes() for x in kept}.values())


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("window", slow_unless(["windows"], [None, 64], ids=["one", "windows"]))
def test_what_the_backward_keeps_does_not_grow(window, impl, device):
    if impl == "triton" and device == "cuda":
        pytest.skip("counts CPU tensors")
    few, many = (kept_for_backward(passes=n, window=window, impl=impl) for n in (3, 1024))
    assert many <= 1.01 * few
    if impl == "triton":  # one pass, and P, R and two states of 1 KiB for each window of two heads
        states = 4 * 2 * 1024 * (256 // (window or 256))
        assert few <= kept_for_backward(passes=1, window=window, impl=impl) + states + 1024


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("case", slow_unless(["packed"], PRECISION[:2]))
def test_one_pass_is_the_pass(case, impl, device):
    inputs = make_inputs(case, torch.float32, device)
    got = evaluate(sleep_gated_delta_rule, case, inputs, passes=1, window=20, impl=impl)
    want = evaluate(operators.gated_delta_rule, case, inputs, impl=impl)
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.slow
def test_changing_numbers_of_passes_compile():
    inputs = make_inputs(Case("compile", T=12), torch.float32, "cpu")
    tokens = [inputs[name] for name in NAMES[:5]]
    compiled = torch.compile(sleep_gated_delta_rule, fullgraph=True, backend="aot_eager")
    for passes in (5, 7, 20, 33):
        got, want = (f(*tokens, passes=passes) for f in (compiled, sleep_gated_delta_rule))
        torch.testing.assert_close(got.final_state, want.final_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("output_pass", ["first", "last"])
def test_endless_passes_over_closed_gates_hand_on_the_state(output_pass):
    """Windows of padding change nothing, however often they are replayed."""
    inputs = double(make_inputs(Case("closed", T=30, B=2, dims=(4, 6), heads=(1, 2)), torch.float32, "cpu"))
    for name in ("g", "beta"):
        inputs[name][0, 10:] = 0
    tensors = {name: inputs[name] for name in NAMES[:6]}
    options = {"window": 10, "output_pass": output_pass}
    inputs["g"][1] -= 0.1
    got = sleep_gated_delta_rule(**tensors, passes=math.inf, **options)
    want = sleep_gated_delta_rule(**tensors, passes=100_000, **options)
    torch.testing.assert_close(got.output, want.output, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.final_state, want.final_state, rtol=1e-6, atol=1e-6)


def test_endless_passes_over_bad_numbers_are_refused():
    inputs = make_inputs(Case("nan", T=20), torch.float32, "cpu")
    inputs["k"][0, 3] = math.nan
    with pytest.raises(ValueError, match="^passes: expected passes that converge.*got nan"):
        delta_rule_state(*(inputs[name] for name in NAMES[1:5]), passes=math.inf)


def test_a_bad_sequence_spoils_no_other():
    inputs = double(make_inputs(Case("nan", lengths=(5, 31)), torch.float32, "cpu"))
    inputs["k"][0, 35] = math.nan
    leaves = [inputs[name].requires_grad_() for name in NAMES[:5]]
    output, _ = sleep_gated_delta_rule(*leaves, passes=3, window=10, cu_seqlens=inputs["cu_seqlens"])
    for gradient in torch.autograd.grad(output[:, :5].sum(), leaves):
        assert gradient[:, :5].isfinite().all()


@pytest.mark.parametrize("packed", slow_unless(["packed"], [False, True], ids=["batch", "packed"]))
@pytest.mark.parametrize("impl", slow_unless(["torch"], ["torch", "triton"]))
def test_compiles_whole(impl, packed, device):
    device = device if impl == "triton" else "cpu"
    case = Case("compile", T=30, heads=(1, 2), lengths=(7, 23) if packed else (), options=GATED)
    inputs = make_inputs(case, torch.float32, device)
    options = {"passes": 5, "window": 12, "impl": impl}
    compiled = torch.compile(sleep_gated_delta_rule, fullgraph=True, backend="aot_eager")
    want = evaluate(sleep_gated_delta_rule, case, inputs, **options)
    for name, value in evaluate(compiled, case, inputs, **options).items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("case", [PRECISION[0], PRECISION[1]], ids=str)
def test_same_bits_every_run(case, dtype, device):
    inputs = make_inputs(case, dtype, device)
    options = {"passes": 6, "window": 20}
    first, second = (evaluate(sleep_gated_delta_rule, case, inputs, impl="triton", **options) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


WINDOWS = [(2, 12, 4, None), (2, 10, 4, None), (2, 10, None, None), (1, 20, 4, (0, 7, 7, 8, 20)), (1, 9, 9, (0, 4, 9))]


@pytest.mark.parametrize("batch, tokens, window, borders", WINDOWS)
def test_windows_are_where_they_should_be(batch, tokens, window, borders):
    cu_seqlens = None if borders is None else torch.tensor(borders)
    windows = Windows(batch, tokens, window, cu_seqlens, torch.device("cpu"))
    x = torch.arange(batch * tokens).view(batch, tokens, 1)
    rows = windows.split(x)
    if windows.cu_seqlens is None:
        found = [row.flatten().tolist() for row in rows]
    else:
        ends = windows.cu_seqlens.tolist()
        found = [rows[0, a:b].flatten().tolist() for a, b in zip(ends[:-1], ends[1:], strict=True)]
    ends = [tokens * b for b in range(batch + 1)] if borders is None else borders
    sequences = list(zip(ends[:-1], ends[1:], strict=True))
    size = window or tokens
    want = [[list(range(a, min(a + size, end))) for a in range(first, end, size)] for first, end in sequences]
    assert [row for row in found if row] == [row for rows in want for row in rows]
    assert torch.equal(windows.join(rows), x)

    numbers = torch.arange(len(found))
    for j, step in enumerate(windows.by_step(numbers)):
        for n, w in enumerate(step.tolist()):
            there = windows.present is None or windows.present[n, j]
            assert (found[w] == want[n][j]) if there else j >= len(want[n])
    back = windows.by_window(windows.by_step(numbers))
    assert [n for n, row in zip(back.tolist(), found, strict=True) if row] == [n for n, r in enumerate(found) if r]


SEGMENTED = [
    Case("long", T=300, B=2, heads=(1, 2), options=NEGATIVE),
    Case("ragged-no-states", T=200, dims=(8, 6), initial_state=False),
    Case("packed", lengths=(150, 0, 64, 3), heads=(1, 2)),
    Case("short-packed", lengths=(40, 50), heads=(1, 2)),
    Case("hebbian", T=130, rule="hebbian", gate="extreme"),
]


@pytest.mark.parametrize("segments", [2, 3, 100])
@pytest.mark.parametrize("case", SEGMENTED, ids=str)
def test_segments_change_nothing(case, segments):
    inputs = double(make_inputs(case, torch.float32, "cpu"))
    got = evaluate(operators.gated_delta_rule, case, inputs, segments=segments)
    want = evaluate(operators.gated_delta_rule, case, inputs, segments=1)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", slow_unless(["ragged-no-states"], SEGMENTED[1:3]))
def test_segments_two_times_rule(case, dtype, device):
    for impl in ("torch", "triton"):
        check_two_times(functools.partial(operators.gated_delta_rule, segments=3, impl=impl), case, dtype, device)


def test_long_sequences_of_few_heads_are_cut():
    from sleep_ops.kernels.configs import num_segments

    def cut(heads, tokens):
        return num_segments(heads, 128, 128, tokens, torch.bfloat16, 132)

    assert cut(4, 32768) > 4 and cut(1, 8192) == 16
    assert cut(4, 1024) == 1 and cut(64, 32768) == 1


@pytest.mark.parametrize("segments", [0, -1, 2.0, True, "auto"])
def test_bad_segments_are_named(segments):
    inputs = make_inputs(Case("bad", T=4), torch.float32, "cpu")
    with pytest.raises(ValueError, match="^segments: expected .*got"):
        operators.gated_delta_rule(*(inputs[name] for name in NAMES[:5]), segments=segments)
