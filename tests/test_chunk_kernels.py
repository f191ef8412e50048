"""The chunk kernels and their custom operators: the 2x rule on every case, operator contracts, and determinism."""

import pytest
import torch
from cases import (
    CASES,
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
from torch.utils.checkpoint import checkpoint

from sleep_ops.kernels import chunk_grad, chunk_grad_split, chunk_prepare, chunk_scan
from sleep_ops.kernels.configs import chunk_config, scales_rows
from sleep_ops.kernels.launches import LAUNCHES
from sleep_ops.ops.chunk_torch import TorchPass
from sleep_ops.ops.chunk_triton import TritonPass, _chunk_offsets, _num_chunks
from sleep_ops.ops.launching import as_rows
from sleep_ops.reference import gated_delta_rule_reference

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


@pytest.fixture
def chunks_of_64(monkeypatch):
    """As if the table asked for them, as `bench tune` may find it should."""
    for width in ("float32", "16-bit"):
        monkeypatch.setitem(LAUNCHES, (width, None, None, None), (64, (32, 4, 1), (32, 4, 2), (32, 4, 2), (32, 4, 1)))


@pytest.fixture(params=["table", "64"])
def chunks(request):
    """With the table's chunks, and with those of 64 tokens."""
    if request.param == "64":
        request.getfixturevalue("chunks_of_64")


def through_the_map(kind: type):
    """As `single_pass`, but the final state comes from the pass as a map, P S + R."""

    def function(q, k, v, g, beta, *, scale, initial_state, **options):
        tokens = kind(k, v, g, beta, **options)
        P, R = tokens.transition()
        return tokens.run(q, initial_state, scale)[0], P @ initial_state + R

    return function


@pytest.mark.parametrize("case", slow_unless(QUICK, CASES))
def test_two_times_rule(case, dtype, device):
    if device == "cpu" and not case.interpretable:
        pytest.skip("too large for Triton's interpreter: needs a GPU")
    check_two_times(chunk_gated_delta_rule_triton, case, dtype, device)


@pytest.mark.parametrize("case", slow_unless(["packed", "no-states", "plain", "grouped-gated"], LONG_CHUNKS))
def test_two_times_rule_with_chunks_of_64(case, dtype, device, chunks_of_64):
    assert chunk_config(*case.dims, 70, dtype).chunk == 64
    check_two_times(chunk_gated_delta_rule_triton, case, dtype, device)


@pytest.mark.parametrize("case", LONG_CHUNKS[1:3], ids=str)
@float16_is_slow
def test_maps_of_passes_with_chunks_of_64(case, dtype, device, chunks_of_64):
    check_two_times(through_the_map(TritonPass), case, dtype, device, plain=through_the_map(TorchPass))


@pytest.mark.parametrize("size", [2.0**-8, 2.0**10])
@float16_is_slow
def test_queries_and_keys_of_any_norm(size, dtype, device, chunks_of_64):
    """Normalised inside, they may be as short or long as their dtype allows."""

    def resized(function):
        return lambda q, k, *others, **options: function(size * q, size * k, *others, **options)

    functions = {"specification": gated_delta_rule_reference, "plain": single_pass(TorchPass)}
    functions = {name: resized(function) for name, function in functions.items()}
    check_two_times(resized(chunk_gated_delta_rule_triton), LONG_CHUNKS[0], dtype, device, **functions)


def test_which_sweeps_scale_rows():
    config = chunk_config(128, 128, 1000, torch.bfloat16)
    assert not scales_rows(config, torch.bfloat16, "sm90")
    long = config._replace(chunk=64)
    assert [scales_rows(long, torch.bfloat16, arch) for arch in (None, "sm80", "sm90", "gfx942")] == [1, 0, 1, 0]
    assert not scales_rows(long, torch.float16, "sm90")


@pytest.mark.parametrize("case", TWO)
def test_state_only(case, device, chunks):
    inputs = make_inputs(case, torch.float32, device)
    whole = evaluate(gated_delta_rule_reference, case, inputs | {"d_output": torch.zeros_like(inputs["v"])})

    def without_q(q, *tensors, **options):
        output, state = chunk_gated_delta_rule_triton(None, *tensors, **options)
        assert output is None
        return 0 * q.sum() + torch.zeros_like(inputs["v"]), state

    for name, value in evaluate(without_q, case, inputs).items():
        if name != "output":
            assert relative_error(value, whole[name].double()) < 1e-5, name


@pytest.mark.parametrize("case", TWO)
def test_everything_is_written(case, device, poisoned, chunks):
    """With every buffer full of NaN before its kernel starts, no NaN comes out."""
    inputs = make_inputs(case, torch.float32, device)
    expected = evaluate(chunk_gated_delta_rule_triton, case, inputs)
    poisoned(chunk_prepare, chunk_scan, chunk_grad, chunk_grad_split)
    for name, value in evaluate(chunk_gated_delta_rule_triton, case, inputs).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("case", TWO)
def test_same_bits_every_run(case, dtype, device, chunks):
    inputs = make_inputs(case, dtype, device)
    first, second = (evaluate(chunk_gated_delta_rule_triton, case, inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_split_sequence_equals_whole(device):
    case = Case("split", T=70)
    inputs = make_inputs(case, torch.float32, device)
    tokens = [inputs[name] for name in ("q", "k", "v", "g", "beta")]
    options = {"scale": 0.25}
    output, final_state = chunk_gated_delta_rule_triton(*tokens, initial_state=inputs["initial_state"], **options)
    state, outputs = inputs["initial_state"], []
    for first, last in ((0, 17), (17, 64), (64, 70)):
        part = [x[:, first:last] for x in tokens]
        part_output, state = chunk_gated_delta_rule_triton(*part, initial_state=state, **options)
        outputs.append(part_output)
    torch.testing.assert_close(torch.cat(outputs, 1), output)
    torch.testing.assert_close(state, final_state)


@pytest.mark.parametrize(
    ("rule", "form", "packed", "scaled"),
    [
        ("delta", "output", False, True),
        pytest.param("hebbian", "output", True, False, marks=pytest.mark.slow),
        pytest.param("delta", "state", False, False, marks=pytest.mark.slow),
        pytest.param("delta", "widened", True, True, marks=pytest.mark.slow),
    ],
)
def test_opcheck(rule, form, packed, scaled, device):
    case = Case("opcheck", T=20, heads=(1, 2), lengths=(5, 15) if packed else (), options=GATED.options, rule=rule)
    inputs = make_inputs(case, torch.float32, device)
    q, k, v, g, beta, state, A_log, dt_bias = (inputs[name].detach().requires_grad_() for name in NAMES)
    packing = (inputs["cu_seqlens"], _chunk_offsets(inputs["cu_seqlens"], 32))
    prepared = (k, g, beta, A_log, dt_bias, *packing, 20, 16, rule, True, 1.0)
    torch.library.opcheck(torch.ops.sleep_ops.chunk_prepare, prepared)
    G, active, A = (x.detach() for x in torch.ops.sleep_ops.chunk_prepare(*prepared))
    torch.library.opcheck(torch.ops.sleep_ops.inverse_norms, (k.detach(),))
    rq, rk = (torch.ops.sleep_ops.inverse_norms(x.detach()) if scaled else None for x in (q, k))
    factors = (rk, G.requires_grad_(), active.requires_grad_(), A if rule == "delta" else None)
    start = None if form == "widened" else state
    query = (q, k, v, rq) if form == "output" else (None, k, v, None)
    swept = (*query, *factors, start, *packing, 20, 0.25, True, form == "widened")
    torch.library.opcheck(torch.ops.sleep_ops.chunk_scan, swept)


@pytest.mark.parametrize("case", TWO)
def test_compiles_without_graph_breaks(case, device, chunks):
    inputs = make_inputs(case, torch.float32, device)
    expected = evaluate(chunk_gated_delta_rule_triton, case, inputs)
    compiled = torch.compile(chunk_gated_delta_rule_triton, fullgraph=True, backend="aot_eager")
    for name, value in evaluate(compiled, case, inputs).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
def test_activation_checkpointing(device):
    inputs = make_inputs(GATED, torch.float32, device)
    expected = evaluate(chunk_gated_delta_rule_triton, GATED, inputs)

    def checkpointed(*args, **options):
        return checkpoint(chunk_gated_delta_rule_triton, *args, use_reentrant=False, **options)

    for name, value in evaluate(checkpointed, GATED, inputs).items():
        assert torch.equal(value, expected[name]), name


def test_autocast_casts_nothing(device):
    inputs = make_inputs(GATED, torch.float32, device)
    expected = evaluate(chunk_gated_delta_rule_triton, GATED, inputs)
    with torch.autocast(device, torch.bfloat16):
        results = evaluate(chunk_gated_delta_rule_triton, GATED, inputs)
    for name, value in results.items():
        assert torch.equal(value, expected[name]), name


def test_only_wanted_gradients(device):
    """Frozen inputs get no gradient, and either result alone can be differentiated."""
    inputs = make_inputs(Case("frozen", T=20), torch.float32, device)
    tokens = [inputs[name] for name in ("q", "k", "v", "g", "beta")]
    value = tokens[2].requires_grad_()
    output, final_state = chunk_gated_delta_rule_triton(*tokens, scale=0.25)
    for root in (output, final_state):
        (gradient,) = torch.autograd.grad(root.sum(), value, retain_graph=True)
        assert gradient.isfinite().all() and gradient.any()


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


def test_strided_parameters_and_borders(device):
    """Every small tensor may be a view: a column, an expanded row, every second entry."""
    inputs = make_inputs(PACKED, torch.float32, device)
    expected = evaluate(chunk_gated_delta_rule_triton, PACKED, inputs)
    for name in ("A_log", "dt_bias", "cu_seqlens"):
        inputs[name] = torch.stack([inputs[name], 99 + 0 * inputs[name]], -1)[..., 0]
        assert not inputs[name].is_contiguous() or inputs[name].numel() == 1
    for name, value in evaluate(chunk_gated_delta_rule_triton, PACKED, inputs).items():
        assert torch.equal(value, expected[name]), name


def test_tokens_behind_the_last_border_get_zeros(device, poisoned):
    """On a GPU borders are not read by the host: what stands behind them reaches nothing, and nothing is left there."""
    case = Case("tail", lengths=(7, 13), options=GATED.options)
    inputs = make_inputs(case, torch.float32, device)
    inputs["cu_seqlens"] = inputs["cu_seqlens"].clone()
    inputs["cu_seqlens"][-1] = 15
    poisoned(chunk_prepare, chunk_scan, chunk_grad, chunk_grad_split)
    got = evaluate(chunk_gated_delta_rule_triton, case, inputs)
    for name, x in got.items():
        assert x.isfinite().all(), name
        if name in ("output", "dq", "dk", "dv", "dg", "dbeta"):
            assert x[:, :15].any() and not x[:, 15:].any(), name
