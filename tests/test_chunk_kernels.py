"""The chunk kernels and their custom operators: the 2x rule on every case, their maps, settings and reach."""

import pytest
import torch
from cases import CASES, Case, check_two_times, evaluate, float16_is_slow, make_inputs, single_pass, slow_unless
from judge import exact, relative_error

from sleep_ops.kernels import chunk_prepare
from sleep_ops.kernels.configs import chunk_config
from sleep_ops.ops import chunk_triton
from sleep_ops.ops.chunk_torch import TorchPass
from sleep_ops.ops.chunk_triton import TritonPass, _chunk_offsets, _num_chunks
from sleep_ops.ops.launching import as_rows
from sleep_ops.ops.rule import RuleOptions
from sleep_ops.reference import gated_delta_rule_reference
from sleep_ops.verify.yardstick import RoundedPass

GATED = next(case for case in CASES if case.id == "grouped-gated")
chunk_gated_delta_rule_triton = single_pass(TritonPass)
PACKED = next(case for case in CASES if case.id == "packed-empty-ends")
TWO = slow_unless(["packed-empty-ends"], [GATED, PACKED])
LONG_CHUNKS = [
    Case("grouped-gated", T=75, dims=(20, 40), heads=(1, 2), options=GATED.options),
    Case("packed", lengths=(70, 0, 1), heads=(1, 2), options=GATED.options | {"allow_neg_eigval": True}),
    Case("hebbian-gated", T=65, B=2, heads=(1, 2), rule="hebbian", options=GATED.options),
    Case("no-states", T=64, keys="zero", initial_state=False, options={"use_qk_l2norm": True}),
    Case("plain", T=70, dims=(64, 64), final_cotangent=False),
]
QUICK = ["T1", "T65", "K60-V16", "K128-V128", "grouped-gated", "gated-negative-eigenvalues", "hebbian"]
QUICK += ["packed-empty-ends", "packed-one", "no-states", "gate-extreme", "gate-zero-beta-two-repeated-keys"]
QUICK += ["beta-zero", "keys-zero-normalised"]


def through_the_map(kind: type):
    """As `single_pass`, but the final state comes from the pass as a map, P S + R."""

    def function(q, k, v, g, beta, *, scale, initial_state, cu_seqlens=None, **options):
        tokens = kind(k, v, g, beta, RuleOptions(**options), cu_seqlens=cu_seqlens)
        P, R = tokens.transition()
        return tokens.run(q, initial_state, scale)[0], P @ initial_state + R

    return function


@pytest.mark.parametrize("case", [GATED, PACKED, LONG_CHUNKS[2]], ids=str)
def test_the_yardstick_rounds_and_does_nothing_else(case):
    inputs = make_inputs(case, torch.bfloat16, "cpu")
    truth = evaluate(gated_delta_rule_reference, case, inputs, torch.float64)
    for name, value in evaluate(single_pass(RoundedPass), case, inputs, torch.float64).items():
        exact(value, truth[name])
    rounding, found = (evaluate(single_pass(kind), case, inputs) for kind in (RoundedPass, TorchPass))
    for name in ("final_state", "dg", "dinitial_state"):
        assert relative_error(rounding[name], truth[name]) > 10 * relative_error(found[name], truth[name]), name


@pytest.mark.parametrize("case", slow_unless(QUICK, CASES))
def test_two_times_rule(case, dtype, device):
    if device == "cpu" and not case.interpretable:
        pytest.skip("too large for Triton's interpreter: needs a GPU")
    check_two_times(chunk_gated_delta_rule_triton, case, dtype, device)


@pytest.mark.parametrize("case", slow_unless(["packed", "no-states", "plain", "grouped-gated"], LONG_CHUNKS))
def test_two_times_rule_with_chunks_of_64(case, dtype, device, chunks_of_64):
    assert chunk_config(*case.dims, 70, dtype).chunk == 64
    check_two_times(chunk_gated_delta_rule_triton, case, dtype, device)


def with_scores(q, k, v, g, beta, *, scale, initial_state=None, cu_seqlens=None, **options):
    """As single_pass(TritonPass), but the pass knows its queries, and keeps their products with keys."""
    one_pass = TritonPass(k, v, g, beta, RuleOptions(**options), cu_seqlens=cu_seqlens, q=q)
    assert (one_pass.QK is None) == (options.get("rule") == "hebbian")
    return one_pass.run(q, initial_state, scale)


@pytest.mark.parametrize("case", slow_unless(["packed", "grouped-gated"], LONG_CHUNKS))
@pytest.mark.parametrize("heads_together", [True, False], ids=["heads together", "heads apart"])
def test_products_kept_for_few_programs(case, heads_together, dtype, device, chunks_of_64, monkeypatch):
    monkeypatch.setattr(chunk_triton, "few_programs", lambda *_: True)
    monkeypatch.setattr(chunk_prepare, "heads_together", lambda _, heads, __: heads if heads_together else 1)
    check_two_times(with_scores, case, dtype, device)


@pytest.mark.parametrize("case", LONG_CHUNKS[1:3], ids=str)
@float16_is_slow
def test_maps_of_passes_with_chunks_of_64(case, dtype, device, chunks_of_64):
    check_two_times(through_the_map(TritonPass), case, dtype, device, plain=through_the_map(RoundedPass))


@pytest.mark.parametrize("size", [2.0**-8, 2.0**10])
@float16_is_slow
def test_queries_and_keys_of_any_norm(size, dtype, device, chunks_of_64):
    """Normalised inside, they may be as short or long as their dtype allows."""

    def resized(function):
        return lambda q, k, **others: function(q=size * q, k=size * k, **others)

    functions = {"specification": gated_delta_rule_reference, "plain": single_pass(RoundedPass)}
    functions = {name: resized(function) for name, function in functions.items()}
    check_two_times(resized(chunk_gated_delta_rule_triton), LONG_CHUNKS[0], dtype, device, **functions)


def test_views_are_read_in_place(device):
    x = torch.zeros(2, 5, 24, device=device)
    for view, stride in ((x.unflatten(-1, (3, 8)), 24), (x[..., 8:].unflatten(-1, (2, 8)), 24)):
        rows, row_stride = as_rows(view)
        assert rows.data_ptr() == view.data_ptr() and row_stride == stride
    transposed = x.unflatten(-1, (3, 8)).transpose(1, 2)
    assert as_rows(transposed)[0].is_contiguous() and as_rows(transposed)[1] == 40
    assert as_rows(x[:, 1:].unflatten(-1, (3, 8)))[1] == 24


def test_rows_too_far_apart_are_copied():
    """Offsets inside a chunk are 32 bits. On "meta", which has the strides and not the memory."""
    for stride, stays in ((2**24, True), (2**25, False), (2**40, False)):
        view = torch.empty_strided((1, 4, 2, 8), (0, stride, 8, 1), device="meta")
        assert as_rows(view)[1] == (stride if stays else 16)


def test_chunk_bound_holds_every_packing():
    for lengths in ([1] * 7, [0, 0, 33], [16, 32, 17], [64], [0, 5, 0]):
        ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        total = int(ends[-1])
        bound, offsets = _num_chunks(torch.zeros(1, total, 1, 1), ends, 16), _chunk_offsets(ends, 16)
        assert offsets.tolist() == [0, *torch.tensor([-(-n // 16) for n in lengths]).cumsum(0).tolist()]
        assert bound >= offsets[-1]


def test_short_sequences_get_short_chunks():
    assert [chunk_config(64, 64, T, torch.float16).chunk for T in (1, 16, 17, 100)] == [16, 16, 32, 32]


def test_tokens_behind_the_last_border_get_zeros(device, poisoned):
    """On a GPU borders are not read by the host: what stands behind them reaches nothing, and nothing is left there."""
    case = Case("tail", lengths=(7, 13), options=GATED.options)
    inputs = make_inputs(case, torch.float32, device)
    inputs["cu_seqlens"] = inputs["cu_seqlens"].clone()
    inputs["cu_seqlens"][-1] = 15
    poisoned()
    got = evaluate(chunk_gated_delta_rule_triton, case, inputs)
    for name, x in got.items():
        assert x.isfinite().all(), name
        if name in ("output", "dq", "dk", "dv", "dg", "dbeta"):
            assert x[:, :15].any() and not x[:, 15:].any(), name
