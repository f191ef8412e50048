"""Replay at constant cost: N passes against N chained reference passes, precision, memory, windows, segments."""

import functools
import math

import pytest
import torch
from cases import GATED, NEGATIVE, Case, arguments, check_two_times, slow_unless
from judge import close, exact, identical, kept_bytes, outcome, relative_error

from sleep_ops.kernels.configs import num_segments
from sleep_ops.ops.affine import Transition, apply_power
from sleep_ops.ops.gated_delta_rule import delta_rule_state, gated_delta_rule, sleep_gated_delta_rule
from sleep_ops.ops.windows import Windows
from sleep_ops.reference import sleep_gated_delta_rule_reference

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
    Case("short", T=21, dims=(32, 6), heads=(2, 4), B=2, options=NEGATIVE),
    Case("short-packed", lengths=(15, 0, 21, 1), dims=(32, 6), heads=(1, 2)),
    Case("short-hebbian", T=21, dims=(32, 6), heads=(1, 2), rule="hebbian", gate="extreme"),
    Case("short-no-states", T=21, dims=(32, 6), initial_state=False, final_cotangent=False, gate="reset"),
    Case("short-gate-zero-beta-two", T=21, dims=(32, 6), gate="zero", beta="two"),
]


WINDOWS = {"one": None, "ragged": 16, "even": 10, "longer": 200}


@pytest.mark.parametrize("passes", slow_unless(["1", "2", "5"], [1, 2, 3, 4, 5, 8, 64]))
@pytest.mark.parametrize("window", slow_unless(["one", "ragged", "longer"], WINDOWS.values(), WINDOWS))
@pytest.mark.parametrize("output_pass", ["first", "last"])
@pytest.mark.parametrize("case", REPLAYS, ids=str)
def test_equals_chained_reference_passes(case, output_pass, window, passes):
    tensors, options = arguments(case)
    options |= {"passes": passes, "window": window, "output_pass": output_pass}
    got, want = (outcome(f, tensors, **options) for f in (sleep_gated_delta_rule, sleep_gated_delta_rule_reference))
    largest = {name: x.abs().max().clamp(min=1) for name, x in want.items()}
    got, want = ({name: x / largest[name] for name, x in found.items()} for found in (got, want))
    exact(got, want, atol=1e-11)


@pytest.mark.parametrize("borders", [(), (0, 40, 35)], ids=["batch", "packed"])
@pytest.mark.parametrize("output_pass", ["first", "last"])
@pytest.mark.parametrize("window", [None, 40], ids=str)
def test_infinite_passes_are_very_many(window, output_pass, borders):
    tensors, options = arguments(Case("long", T=75, heads=(1, 2), dims=(4, 3), lengths=borders, options=NEGATIVE))
    options |= {"window": window, "output_pass": output_pass}
    got, want = (outcome(sleep_gated_delta_rule, tensors, passes=n, **options) for n in (math.inf, 60))
    exact(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("window", [None, 12], ids=["one", "windows"])
@pytest.mark.parametrize("passes", [2, 3, 5, math.inf], ids=str)
@pytest.mark.parametrize("case", [*REPLAYS[:4], *REPLAYS[9:12]], ids=str)
def test_state_alone(case, passes, window, impl):
    tensors, options = arguments(case)
    options |= {"passes": passes, "window": window}
    q = tensors.pop("q").detach()

    def whole(**tensors):
        return sleep_gated_delta_rule(q, **tensors).final_state

    exact(outcome(delta_rule_state, tensors, impl=impl, **options), outcome(whole, tensors, **options))


PRECISION = [
    Case("one-window", T=75, B=2, heads=(2, 4), dims=(16, 24), options=NEGATIVE),
    Case("packed", lengths=(15, 0, 64, 1, 33), heads=(1, 2), options=GATED),
    Case("hebbian", T=40, B=3, heads=(2, 4), dims=(8, 6), rule="hebbian", options=GATED),
    Case("gate-zero", T=40, gate="zero"),
    Case("K20-V40", T=33, dims=(20, 40), heads=(1, 2)),
    Case("K128-V128", T=130, heads=(1, 2), dims=(128, 128), options=GATED),
    Case("short", T=24, B=2, heads=(1, 2), dims=(64, 24), options=NEGATIVE),
    # The initial state's gradient has passed decays of e^-34, whose logarithms round by 2e-6.
    Case("T75-K128", T=75, dims=(128, 32), options=GATED, amplification=2),
]


def chained(q, k, v, g, beta, *, initial_state=None, passes, window, cu_seqlens, **options):
    """Pass after pass, window after window, by the PyTorch form."""
    kwargs = {"cu_seqlens": cu_seqlens, **options}
    if cu_seqlens is not None or window is None:
        for _ in range(passes):
            output, initial_state = gated_delta_rule(
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
    tensors, _ = arguments(Case("error", T=96, dims=(32, 32), heads=(1, 4), gate=gate), dtype)
    rounded = {name: x.detach() for name, x in tensors.items() if name != "q"}
    truth = {name: x.double() for name, x in rounded.items()}
    rounding = {torch.float32: 2**-22, torch.float16: 2**-12, torch.bfloat16: 2**-9}[dtype]
    for passes in (1, 8, 64, 1024):
        for window in (None, 24):
            got, want = (delta_rule_state(**x, passes=passes, window=window) for x in (rounded, truth))
            allowed = (passes if gate == "zero" else min(passes, 64)) * rounding * 2
            assert relative_error(got, want) <= allowed, (passes, window)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 15, 64, 1000])
def test_power_of_a_map_on_a_state(n):
    generator = torch.Generator().manual_seed(0)
    P, R, state = (torch.randn(2, 3, 6, m, generator=generator, dtype=torch.float64) for m in (6, 4, 4))
    transition = Transition(P / torch.linalg.matrix_norm(P, ord=2)[..., None, None], R)
    want = state
    for _ in range(n):
        want = transition.apply(want)
    exact(apply_power(transition, n, state), want)
    exact(transition.power(n).apply(state), want)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("window", slow_unless(["windows"], [None, 64], ids=["one", "windows"]))
def test_what_the_backward_keeps_does_not_grow(window, impl, device):
    if impl == "triton" and device == "cuda":
        pytest.skip("counts CPU tensors")
    tensors, _ = arguments(Case("memory", T=256, heads=(1, 2), initial_state=False), torch.float32)
    one, few, many = (
        kept_bytes(lambda n=n: sleep_gated_delta_rule(**tensors, passes=n, window=window, impl=impl))
        for n in (1, 3, 1024)
    )
    assert many <= 1.01 * few
    if impl == "triton":  # one pass, and P, R and two states of 1 KiB for each window of two heads
        assert few <= one + 4 * 2 * 1024 * (256 // (window or 256)) + 1024


@pytest.mark.parametrize("window", [None, 12], ids=["one", "windows"])
def test_short_windows_keep_some_small_matrices_more(window):
    """Some 5 log2 N of T x T for each window and head."""
    tensors, _ = arguments(Case("memory", T=24, heads=(1, 2), dims=(64, 64), initial_state=False), torch.float32)
    few, many = (kept_bytes(lambda n=n: sleep_gated_delta_rule(**tensors, passes=n, window=window)) for n in (3, 1024))
    length = window or 24
    assert many <= few + 2 * (24 // length) * 6 * 10 * length**2 * 4


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("case", slow_unless(["packed"], PRECISION[:2]))
def test_one_pass_is_the_pass(case, impl, device):
    tensors, options = arguments(case, torch.float32, device)
    got = outcome(sleep_gated_delta_rule, tensors, passes=1, window=20, impl=impl, **options)
    identical(got, outcome(gated_delta_rule, tensors, impl=impl, **options))


@pytest.mark.slow
def test_changing_numbers_of_passes_compile():
    tensors, _ = arguments(Case("compile", T=12), torch.float32)
    compiled = torch.compile(sleep_gated_delta_rule, fullgraph=True, backend="aot_eager")
    for passes in (5, 7, 20, 33):
        got, want = (f(**tensors, passes=passes) for f in (compiled, sleep_gated_delta_rule))
        close(got.final_state, want.final_state)


@pytest.mark.parametrize("output_pass", ["first", "last"])
def test_endless_passes_over_closed_gates_hand_on_the_state(output_pass):
    """Windows of padding change nothing, however often they are replayed."""
    tensors, _ = arguments(Case("closed", T=30, B=2, dims=(4, 6), heads=(1, 2)))
    tensors = {name: x.detach() for name, x in tensors.items()}
    for name in ("g", "beta"):
        tensors[name][0, 10:] = 0
    tensors["g"][1] -= 0.1
    options = {"window": 10, "output_pass": output_pass}
    got, want = (sleep_gated_delta_rule(**tensors, passes=n, **options) for n in (math.inf, 100_000))
    exact(tuple(got), tuple(want), rtol=1e-6, atol=1e-6)


def test_endless_passes_over_bad_numbers_are_refused():
    tensors, _ = arguments(Case("nan", T=20), torch.float32)
    tensors.pop("q")
    tensors["k"].data[0, 3] = math.nan
    with pytest.raises(ValueError, match="^passes: expected passes that converge.*got nan"):
        delta_rule_state(**tensors, passes=math.inf)


def test_a_bad_sequence_spoils_no_other():
    tensors, options = arguments(Case("nan", lengths=(5, 31), initial_state=False))
    tensors["k"].data[0, 35] = math.nan
    output, _ = sleep_gated_delta_rule(**tensors, passes=3, window=10, **options)
    for gradient in torch.autograd.grad(output[:, :5].sum(), list(tensors.values())):
        assert gradient[:, :5].isfinite().all()


def test_borders_written_anew_before_the_backward_change_no_gradient():
    def gradients(later):
        tensors, options = arguments(Case("packed", lengths=(0, 17, 23), dims=(8, 6), heads=(1, 2)))
        out = sleep_gated_delta_rule(**tensors, **options, passes=4)
        options["cu_seqlens"].copy_(torch.tensor(later))
        return torch.autograd.grad(out.output.sum() + out.final_state.square().sum(), list(tensors.values()))

    identical(gradients([0, 0, 40, 40]), gradients([0, 0, 17, 40]))


@pytest.mark.parametrize("window", [None, 16], ids=["one", "windows"])
@pytest.mark.parametrize("case", [REPLAYS[1], REPLAYS[3], REPLAYS[9]], ids=str)
def test_what_inference_mode_made_is_replayed_outside(case, window):
    tensors, options = arguments(case)
    options |= {"passes": 4, "window": window}
    with torch.inference_mode():
        made = {name: x.detach().clone() for name, x in tensors.items()}
    got, want = (sleep_gated_delta_rule(**x, **options) for x in (made, tensors))
    identical([x.detach() for x in got], [x.detach() for x in want])


PLACES = [(2, 12, 4, None), (2, 10, 4, None), (2, 10, None, None), (1, 20, 4, (0, 7, 7, 8, 20)), (1, 9, 9, (0, 4, 9))]


@pytest.mark.parametrize("batch, tokens, window, borders", PLACES)
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
    tensors, options = arguments(case)
    exact(*(outcome(gated_delta_rule, tensors, segments=n, **options) for n in (segments, 1)))


@pytest.mark.parametrize("case", slow_unless(["ragged-no-states"], SEGMENTED[1:3]))
def test_segments_two_times_rule(case, dtype, device):
    for impl in ("torch", "triton"):
        check_two_times(functools.partial(gated_delta_rule, segments=3, impl=impl), case, dtype, device)


def test_long_sequences_of_few_heads_are_cut():
    def cut(heads, tokens):
        return num_segments(heads, 128, 128, tokens, torch.bfloat16, 132)

    assert cut(4, 32768) > 4 and cut(1, 8192) == 16
    assert cut(4, 1024) == 1 and cut(64, 32768) == 1
