"""What every mixer with fast weights promises, whatever it computes."""

import copy
import math
import pickle

import pytest
import torch
from cases import slow_unless
from small import DEVICE, MIXERS, close, make, some_state, vectors
from torch.utils.checkpoint import checkpoint

from sleep_ops.layers.jet import JetBlock
from sleep_ops.layers.mixer import GDNState

PLAIN_OR_SLEEPING = pytest.mark.parametrize("options", [{}, dict(passes=2, window=3)], ids=["plain", "two_passes"])


@pytest.fixture(params=MIXERS.values(), ids=MIXERS)
def mixer(request):
    return request.param


def test_shapes_and_dtypes(mixer):
    layer, x = make(mixer), vectors()
    y, state = layer(x, return_state=True)
    assert layer(x).shape == y.shape == x.shape
    assert state.fast_weights.shape == (3, 4, 8, 6) and state.fast_weights.dtype == torch.float32
    assert state.conv_state.shape == (3, 3, 24 if mixer is JetBlock else 2 * 16 + 24)
    assert [t.shape for t in layer.init_state(3)] == [t.shape for t in state]
    assert layer.init_state(2, dtype=torch.bfloat16).conv_state.dtype == torch.bfloat16
    assert make(mixer, dtype=torch.float64).init_state(2).fast_weights.dtype == torch.float64


def test_no_state_is_a_state_of_zeros(mixer):
    layer, x = make(mixer), vectors()
    close(layer(x, return_state=True), layer(x, state=layer.init_state(3), return_state=True))


@pytest.mark.parametrize(
    "options", [{}, dict(passes=2, window=4), dict(passes=3, window=2)], ids=["plain", "two_passes", "three_passes"]
)
def test_split_at_windows_equals_whole_run(mixer, options):
    layer, x = make(mixer, **options), vectors(T=12)
    y, state = layer(x, state=some_state(layer), return_state=True)
    parts, carried = [], some_state(layer)
    for part in x.split([4, 8], dim=1):
        out, carried = layer(part, state=carried, return_state=True)
        parts.append(out)
    close(torch.cat(parts, 1), y)
    close(carried, state)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0), (0, 1)])
def test_runs_without_tokens(mixer, batch, tokens):
    layer = make(mixer)
    y, state = layer(vectors(batch, tokens), return_state=True)
    y, _ = layer(vectors(batch, 1) if batch == 0 else y, state=state, return_state=True)
    y.sum().backward()
    assert y.shape[0] == batch and not any(p.grad is None or p.grad.any() for p in layer.parameters())


def test_one_token_calls_equal_the_whole_run(mixer):
    layer, x = make(mixer), vectors(T=6)
    state = some_state(layer)
    y, final = layer(x, state=state, return_state=True)
    steps, carried = [], state
    for t in range(6):
        out, carried = layer(x[:, t : t + 1], state=carried, return_state=True)
        steps.append(out)
    close(torch.cat(steps, 1), y)
    close(carried, final)
    weights = list(layer.parameters())
    stepped = torch.autograd.grad(torch.cat(steps, 1).square().sum() + carried.fast_weights.square().sum(), weights)
    whole = torch.autograd.grad(y.square().sum() + final.fast_weights.square().sum(), weights)
    close(stepped, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("window", [None, 4])
def test_outputs_never_depend_on_later_tokens(mixer, passes, window):
    layer, x = make(mixer, passes=passes, window=window), vectors()
    y = layer(x)
    for cut in (1, 4, 6):
        changed = x.clone()
        changed[:, cut:] = vectors(seed=9)[:, cut:]
        close(layer(changed)[:, :cut], y[:, :cut], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(layer(changed)[:, cut:], y[:, cut:])


@PLAIN_OR_SLEEPING
@pytest.mark.parametrize("side", ["left", "right", "scattered", "lengths"])
def test_padding_changes_nothing(mixer, options, side):
    layer = make(mixer, **options)
    real = (11, 4, 1, 0)
    state = some_state(layer, B=4)
    x, mask = vectors(B=4).fill_(float("nan")), torch.zeros(4, 11, dtype=torch.long, device=DEVICE)
    rows = [vectors(B=1, T=max(n, 1), seed=n)[0, :n] for n in real]
    for b, n in enumerate(real):
        places = {"left": range(11 - n, 11), "scattered": range(0, 2 * n, 2) if n < 6 else range(n)}
        mask[b, list(places.get(side, range(n)))] = 1
        x[b, mask[b].bool()] = rows[b]
    padding = dict(lengths=mask.sum(1)) if side == "lengths" else dict(attention_mask=mask)
    y, new_state = layer(x, state=state, return_state=True, **padding)
    assert not y[mask == 0].any()
    for b, n in enumerate(real):
        alone = GDNState(*(t[b : b + 1] for t in state))
        if n == 0:
            close(tuple(t[b : b + 1] for t in new_state), alone, rtol=0, atol=0)
            continue
        expected, expected_state = layer(rows[b][None], state=alone, return_state=True)
        close(y[b, mask[b].bool()][None], expected)
        close(tuple(t[b : b + 1] for t in new_state), expected_state)
    loss = y.square().sum() + new_state.fast_weights.square().sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(layer.parameters())))


@PLAIN_OR_SLEEPING
def test_packed_sequences_equal_separate_ones(mixer, options):
    layer, x = make(mixer, **options), vectors(B=1, T=12)
    borders = (0, 5, 5, 6, 12)
    state = some_state(layer, B=4)
    cu_seqlens = torch.tensor(borders, device=DEVICE)
    y, new_state = layer(x, state=state, cu_seqlens=cu_seqlens, return_state=True)
    for n, (start, stop) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        alone = expected_state = GDNState(*(t[n : n + 1] for t in state))
        if stop > start:
            expected, expected_state = layer(x[:, start:stop], state=alone, return_state=True)
            close(y[:, start:stop], expected)
        close(tuple(t[n : n + 1] for t in new_state), expected_state)


@pytest.mark.parametrize("lengths", [None, (11, 2, 0)], ids=["full", "padded"])
@pytest.mark.parametrize(
    "options", [{}, dict(passes=2, window=4), dict(conv_size=1)], ids=["plain", "two_passes", "conv1"]
)
@pytest.mark.parametrize("T", [1, 11])
def test_the_state_without_outputs_is_the_same_for_less(mixer, options, lengths, T):
    layer = make(mixer, **options)
    lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE).clamp(max=T)
    spared = [layer.g_proj, layer.o_proj, layer.o_norm] + ([layer.q_proj] if mixer is JetBlock else [])
    results = []
    for output in (True, False):
        x = vectors(T=T).requires_grad_()
        state = GDNState(*(t.requires_grad_() for t in some_state(layer)))
        if not output:
            for module in spared:
                module.register_forward_hook(lambda *a: pytest.fail("computed for nothing"))
        given = dict(state=state, lengths=lengths, output=output)
        y, new_state = layer(x, **given, return_state=True)
        _, written, writes = layer(x, **given, return_writes=True)
        assert (y is not None) == output
        loss = sum((t * torch.linspace(-1, 1, t.numel(), device=DEVICE).view(t.shape)).sum() for t in new_state)
        unread = ("g_proj", "o_proj", "o_norm")
        weights = [p for n, p in layer.named_parameters() if not n.startswith(unread)]
        grads = torch.autograd.grad(loss, [x, *state, *weights], allow_unused=True, materialize_grads=True)
        results.append((*new_state, *written, *writes, *grads))
    close(*results)


@pytest.mark.parametrize(
    "given",
    [dict(attention_mask=[[0, 1, 1, 0, 1], [0] * 5, [1] * 5]), dict(cu_seqlens=[0, 4, 4, 5])],
    ids=["mask", "packed"],
)
def test_rows_leave_the_same_state_without_outputs(mixer, given):
    layer, given = make(mixer), {name: torch.tensor(x, device=DEVICE) for name, x in given.items()}
    x = vectors(1 if "cu_seqlens" in given else 3, 5)
    given |= dict(state=some_state(layer), return_writes=True)
    nothing, *rest = layer(x, output=False, **given)
    assert nothing is None
    close(rest, list(layer(x, **given)[1:]))


def test_replay_repeats_the_writes(mixer):
    x = vectors()
    layer, awake = make(mixer, passes=3, window=None), make(mixer)
    _, expected = layer(x, state=some_state(layer), return_state=True)
    _, state, writes = awake(x, state=some_state(awake), return_writes=True)
    close(awake.replay(writes, state.fast_weights, passes=2), expected.fast_weights)


def test_gradients_reach_every_parameter_the_input_and_the_state(mixer):
    layer = make(mixer, passes=2, window=4)
    x = vectors().requires_grad_()
    state = GDNState(*(t.requires_grad_() for t in some_state(layer)))
    y, new_state = layer(x, state=state, return_state=True)
    (y.square().sum() + new_state.fast_weights.square().sum()).backward()
    for name, p in [*layer.named_parameters(), ("x", x), ("fast_weights", state[0]), ("conv_state", state[1])]:
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("options", slow_unless(["plain"], [{}, dict(passes=2, window=4)], ["plain", "two_passes"]))
def test_triton_layer_equals_torch_layer(mixer, options):
    layers = [make(mixer, impl=impl, **options) for impl in ("torch", "triton")]
    results = []
    for layer in layers:
        state = GDNState(*(t.requires_grad_() for t in some_state(layer)))
        y, new_state = layer(vectors(), state=state, return_state=True)
        loss = y.square().sum() + new_state.fast_weights.square().sum()
        results.append((y, *new_state, *torch.autograd.grad(loss, [*state, *layer.parameters()])))
    close(*results, rtol=2e-2 if DEVICE == "cuda" else 1e-3, atol=2e-2 if DEVICE == "cuda" else 1e-3)


def test_autocast_keeps_gates_and_states_in_float32(mixer):
    layer, x = make(mixer), vectors()
    y, state = layer(x, return_state=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        low, low_state = layer(x, state=layer.init_state(3), return_state=True)
        _, updated = layer(x, state=layer.init_state(3), output=False, return_state=True)
    assert low.dtype == torch.bfloat16 and low_state.conv_state.dtype == torch.bfloat16
    assert low_state.fast_weights.dtype == torch.float32
    close(updated, low_state)
    close(low.float(), y, rtol=0.1, atol=0.05)
    close(low_state.fast_weights, state.fast_weights, rtol=0.1, atol=0.05)
    low.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


def test_bfloat16_layer_keeps_its_state_in_float32(mixer):
    layer = make(mixer, dtype=torch.bfloat16)
    y, state = layer(vectors(dtype=torch.bfloat16), return_state=True)
    assert y.dtype == state.conv_state.dtype == torch.bfloat16 and state.fast_weights.dtype == torch.float32


def test_activation_checkpointing_changes_no_gradient(mixer):
    layer = make(mixer, passes=2, window=4)
    x, weights = vectors(), list(layer.parameters())
    plain = torch.autograd.grad(layer(x).square().sum(), weights)
    saved = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), weights)
    close(saved, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "traced",
    slow_unless(
        ["gdn-torch", "jet-padded"],
        [(mixer, case) for mixer in MIXERS for case in ("torch", "triton", "padded")],
        ids="-".join,
    ),
)
def test_traces_as_one_graph(traced):
    mixer, case = traced
    layer, x = make(MIXERS[mixer], **({} if case == "padded" else dict(impl=case))), vectors()
    options = dict(lengths=torch.tensor([11, 3, 0], device=DEVICE)) if case == "padded" else {}
    # With decompositions, as inductor has them: plain aot_eager mispredicts the strides of softplus_backward.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    y, state = compiled(x, state=some_state(layer), return_state=True, **options)
    expected = layer(x, state=some_state(layer), return_state=True, **options)
    close((y, *state), (expected[0], *expected[1]))
    grads = [torch.autograd.grad(out.square().sum(), list(layer.parameters())) for out in (y, expected[0])]
    close(*grads, rtol=1e-3, atol=1e-4)


def marked(layer):
    return [n for n, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deep", "pickle"]
)
def test_copies_are_alike(mixer, copied):
    layer, x = make(mixer, passes=2, window=4), vectors()
    other = copied(layer)
    assert torch.equal(other(x), layer(x))
    assert marked(other) == ["A_log", "dt_bias"]
    fresh = make(mixer, seed=5, passes=2, window=4)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


def test_weights_that_come_later_are_marked(mixer):
    """On the meta device first, then empty, or another's assigned."""
    layer = make(mixer).to("meta")
    assert marked(copy.deepcopy(layer).to_empty(device=DEVICE)) == marked(layer) == ["A_log", "dt_bias"]
    layer.load_state_dict(make(mixer).state_dict(), assign=True)
    assert marked(layer) == ["A_log", "dt_bias"] and layer.A_log.device.type == DEVICE


def test_endless_passes_are_very_many(mixer):
    x, results = vectors(dtype=torch.float64), []
    for passes in (60, math.inf):
        layer = make(mixer, dtype=torch.float64, passes=passes, window=4)
        torch.nn.init.constant_(layer.dt_bias, 1)  # decays fast enough for 60 passes to converge
        results.append(layer(x, return_state=True))
    close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(hidden_size=0), "hidden_size"),
        (dict(num_heads=0), "num_heads"),
        (dict(num_v_heads=3), "num_v_heads"),
        (dict(head_dim=8.0), "head_dim"),
        (dict(head_v_dim=-1), "head_v_dim"),
        (dict(conv_size=0), "conv_size"),
        (dict(passes=0), "passes"),
        (dict(passes=True), "passes"),
        (dict(passes=1.5), "passes"),
        (dict(window=0), "window"),
        (dict(window=float("nan")), "window"),
        (dict(norm_eps=float("nan")), "norm_eps"),
        (dict(norm_eps=10**400), "norm_eps"),
        (dict(output_pass="middle"), "output_pass"),
        (dict(rule="oja"), "rule"),
        (dict(impl="cuda"), "impl"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_settings_name_the_argument(mixer, change, name):
    with pytest.raises(ValueError, match=f"^{name}: expected .*got "):
        mixer(**(dict(hidden_size=20, num_heads=2, head_dim=8) | change))


@pytest.mark.parametrize("batch_size", (-1, 2.0, True))
def test_states_are_of_so_many_rows(mixer, batch_size):
    with pytest.raises(ValueError, match="^batch_size: expected .*got "):
        make(mixer).init_state(batch_size)


def test_unknown_setting_is_a_type_error(mixer):
    with pytest.raises(TypeError):
        mixer(20, num_heads=2, head_dim=8, sleep=True)


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(x=torch.zeros(3, 20)), "x"),
        (dict(x=torch.zeros(3, 4, 19)), "x"),
        (dict(attention_mask=torch.ones(3, 5)), "attention_mask"),
        (dict(attention_mask=torch.ones(3, 4), lengths=torch.ones(3, dtype=torch.int64)), "lengths"),
        (dict(lengths=torch.ones(3)), "lengths"),
        (dict(lengths=torch.ones(2, dtype=torch.int64)), "lengths"),
        (dict(lengths=torch.tensor([4, 5, 0])), "lengths"),
        (dict(attention_mask=torch.ones(3, 4, dtype=torch.complex64)), "attention_mask"),
        (dict(attention_mask=[[1] * 4] * 3), "attention_mask"),
        (dict(attention_mask=torch.ones(3, 4, device="meta")), "attention_mask"),
        (dict(cu_seqlens=torch.tensor([0, 4])), "cu_seqlens"),
        (dict(x=torch.zeros(1, 4, 20), cu_seqlens=torch.tensor([0, 3])), "cu_seqlens"),
        (dict(x=torch.zeros(1, 4, 20), cu_seqlens=torch.tensor([0, 3, 2, 4])), "cu_seqlens"),
        (dict(x=torch.zeros(1, 4, 20), cu_seqlens=torch.tensor([0.0, 4.0])), "cu_seqlens"),
        (dict(x=torch.zeros(3, 4, 20).long()), "x"),
        (dict(x=torch.zeros(3, 4, 20).double()), "x"),
        (dict(x=torch.zeros(3, 4, 20, device="meta")), "x"),
        (dict(x=None), "x"),
        *((dict([(name, "no")]), name) for name in ("return_state", "return_writes", "output")),
        (dict(state=(torch.zeros(3, 4, 8, 6).half(), torch.zeros(3, 3, 56))), "state.fast_weights"),
        (dict(state=(torch.zeros(3, 4, 8, 6), None)), "state.conv_state"),
        (dict(state=(torch.zeros(3, 4, 8, 6), torch.zeros(3, 3, 56, device="meta"))), "state.conv_state"),
        (dict(state=torch.zeros(3, 4, 8, 6)), "state"),
        (dict(state=(torch.zeros(3, 4, 6, 8), torch.zeros(3, 3, 56))), "state.fast_weights"),
        (dict(state=(torch.zeros(3, 4, 8, 6), torch.zeros(3, 4, 56))), "state.conv_state"),
        (dict(state=(torch.zeros(3, 4, 8, 6), torch.zeros(3, 3, 55))), "state.conv_state"),
        (dict(state=GDNState(torch.zeros(3, 4, 8, 6), torch.zeros(3, 3, 55))), "state.conv_state"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_inputs_name_the_argument(mixer, change, name):
    layer = make(mixer).cpu()
    with pytest.raises(ValueError, match=f"^{name}: expected .*got "):
        layer(**(dict(x=torch.zeros(3, 4, 20)) | change))


BAD_PASSES = (0, -3, True, 0.5, float("nan"), -math.inf, "3")


@pytest.mark.parametrize("output", (True, False))
@pytest.mark.parametrize(
    "given, name",
    [
        *((dict(passes=passes, window=4), "passes") for passes in BAD_PASSES),
        (dict(passes=1, window=0), "window"),
        (dict(passes=2, window=True), "window"),
        (dict(window=5), "window"),
    ],
    ids=str,
)
def test_passes_of_a_call_are_checked(mixer, given, name, output):
    """As those of the layer are; a window alone would be for the passes of another."""
    with pytest.raises(ValueError, match=f"^{name}: expected .*got "):
        make(mixer, passes=3, window=4)(vectors(), **given, output=output)


@pytest.mark.parametrize("passes, window", ((1, None), (3, 4)))
@pytest.mark.parametrize("size", ((0, 5), (2, 0), (0, 0)), ids=str)
def test_an_idle_rank_has_no_tokens(mixer, size, passes, window):
    layer = make(mixer, passes=passes, window=window)
    x = torch.randn(*size, 20, device=DEVICE, requires_grad=True)
    y, state = layer(x, return_state=True)
    y.sum().backward()
    assert y.shape == x.shape and state[0].shape[0] == size[0] and not state[0].any()
    assert x.grad.shape == x.shape


def test_empty_sequences_leave_a_state_of_zeros(mixer):
    layer = make(mixer, passes=3, window=4)
    x = torch.randn(1, 6, 20, device=DEVICE)
    _, state = layer(x, cu_seqlens=torch.tensor([0, 0, 4, 4, 6], device=DEVICE), return_state=True)
    assert not state[0][[0, 2]].any() and state[0][1].any() and state[0][3].any()


def test_shapes_on_the_meta_device(mixer):
    layer = make(mixer, passes=3, window=4).to("meta")
    x = torch.empty(2, 6, 20, device="meta")
    assert layer(x).shape == x.shape
