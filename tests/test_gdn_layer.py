import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import slow_unless
from torch import nn
from torch.utils.checkpoint import checkpoint

from sleep_ops.layers.gdn import SleepGDNLayer
from sleep_ops.layers.mixer import GDNState
from sleep_ops.reference import sleep_gated_delta_rule_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLEEPS = {
    "plain": {},
    "two_passes": dict(passes=2, window=4),
    "three_passes": dict(passes=3, window=3),
    "no_window": dict(passes=2, window=None, output_pass="last"),
    "hebbian": dict(rule="hebbian"),
    "negative": dict(allow_neg_eigval=True, conv_size=3),
}


def make(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    shape = dict(num_heads=2, head_dim=8, num_v_heads=4, head_v_dim=6)
    return SleepGDNLayer(20, **(shape | options)).to(DEVICE, dtype)


def tokens(B=3, T=11, seed=1, dtype=torch.float32):
    return torch.randn(B, T, 20, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def some_state(layer, B=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return GDNState(*(torch.randn(t.shape, generator=generator).to(t) for t in layer.init_state(B)))


def close(actual, expected, **options):
    options = dict(rtol=1e-4, atol=1e-5) | options
    if isinstance(actual, tuple):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, **options)
    else:
        torch.testing.assert_close(actual, expected, **options)


def test_shapes_and_dtypes():
    layer, x = make(), tokens()
    y, state = layer(x, return_state=True)
    assert layer(x).shape == y.shape == x.shape
    assert state.fast_weights.shape == (3, 4, 8, 6) and state.fast_weights.dtype == torch.float32
    assert state.conv_tail.shape == (3, 3, 2 * 16 + 24)
    assert [t.shape for t in layer.init_state(3)] == [t.shape for t in state]
    assert layer.init_state(2, dtype=torch.bfloat16).conv_tail.dtype == torch.bfloat16
    assert make(dtype=torch.float64).init_state(2).fast_weights.dtype == torch.float64


def test_no_state_is_a_state_of_zeros():
    layer, x = make(), tokens()
    close(layer(x, return_state=True), layer(x, state=layer.init_state(3), return_state=True))


@pytest.mark.parametrize("sleep", SLEEPS)
def test_replays_what_the_reference_replays(sleep):
    layer = make(dtype=torch.float64, **SLEEPS[sleep])
    x = tokens(dtype=torch.float64)
    state = some_state(layer)

    def convolved(projection, convolution, tail, heads):
        W = convolution.weight.shape[1]
        seen = torch.cat([tail, projection(x)], 1).transpose(1, 2)
        z = F.conv1d(seen, convolution.weight[:, None], groups=seen.shape[1]).transpose(1, 2)
        return F.silu(z).unflatten(-1, (heads, -1)), seen[..., seen.shape[-1] - W + 1 :].transpose(1, 2)

    q_tail, k_tail, v_tail = state.conv_tail.split([16, 16, 24], -1)
    q, q_tail = convolved(layer.q_proj, layer.q_conv, q_tail, 2)
    k, k_tail = convolved(layer.k_proj, layer.k_conv, k_tail, 2)
    v, v_tail = convolved(layer.v_proj, layer.v_conv, v_tail, 4)
    o, fast_weights = sleep_gated_delta_rule_reference(
        q,
        k,
        v,
        layer.a_proj(x),
        layer.b_proj(x),
        passes=layer.passes,
        window=layer.window,
        output_pass=layer.output_pass,
        initial_state=state.fast_weights,
        rule=layer.rule,
        use_qk_l2norm=True,
        A_log=layer.A_log,
        dt_bias=layer.dt_bias,
        use_beta_sigmoid=True,
        allow_neg_eigval=layer.allow_neg_eigval,
    )
    gate = layer.g_proj(x).unflatten(-1, (4, 6))
    o = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * layer.o_norm.weight * F.silu(gate)
    expected = layer.o_proj(o.flatten(2)), (fast_weights, torch.cat([q_tail, k_tail, v_tail], -1))
    y, new_state = layer(x, state=state, return_state=True)
    close(y, expected[0], rtol=1e-9, atol=1e-9)
    close(new_state, expected[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, dict(passes=2, window=4), dict(passes=3, window=2)], ids=str)
def test_split_at_windows_equals_whole_run(options):
    layer, x = make(**options), tokens(T=12)
    y, state = layer(x, state=some_state(layer), return_state=True)
    parts, carried = [], some_state(layer)
    for part in x.split([4, 8], dim=1):
        out, carried = layer(part, state=carried, return_state=True)
        parts.append(out)
    close(torch.cat(parts, 1), y)
    close(carried, state)


def test_one_token_calls_equal_the_whole_run():
    layer, x = make(), tokens(T=5)
    state = some_state(layer)
    y, final = layer(x, state=state, return_state=True)
    steps, carried = [], state
    for t in range(5):
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
def test_outputs_never_depend_on_later_tokens(passes, window):
    layer, x = make(passes=passes, window=window), tokens()
    y = layer(x)
    for cut in (1, 4, 6):
        changed = x.clone()
        changed[:, cut:] = tokens(seed=9)[:, cut:]
        close(layer(changed)[:, :cut], y[:, :cut], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(layer(changed)[:, cut:], y[:, cut:])


@pytest.mark.parametrize("options", [{}, dict(passes=2, window=3)], ids=str)
@pytest.mark.parametrize("side", ["left", "right", "scattered", "lengths"])
def test_padding_changes_nothing(options, side):
    layer = make(**options)
    real = (11, 4, 1, 0)
    state = some_state(layer, B=4)
    x, mask = tokens(B=4).fill_(float("nan")), torch.zeros(4, 11, dtype=torch.long, device=DEVICE)
    rows = [tokens(B=1, T=max(n, 1), seed=n)[0, :n] for n in real]
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


@pytest.mark.parametrize("options", [{}, dict(passes=2, window=3)], ids=str)
def test_packed_sequences_equal_separate_ones(options):
    layer, x = make(**options), tokens(B=1, T=12)
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
@pytest.mark.parametrize("options", [{}, dict(passes=2, window=4), dict(conv_size=1)], ids=str)
@pytest.mark.parametrize("T", [1, 11])
def test_update_state_is_the_state_of_forward(options, lengths, T):
    layer = make(**options)
    lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE).clamp(max=T)
    results = []
    for update in (False, True):
        x = tokens(T=T).requires_grad_()
        state = GDNState(*(t.requires_grad_() for t in some_state(layer)))
        if update:
            new_state = layer.update_state(x, state, lengths=lengths)
        else:
            new_state = layer(x, state=state, lengths=lengths, return_state=True)[1]
        loss = sum((t * torch.linspace(-1, 1, t.numel(), device=DEVICE).view(t.shape)).sum() for t in new_state)
        weights = [
            p for n, p in layer.named_parameters() if n.startswith(("q_proj", "k_", "v_", "a_", "b_", "A", "dt"))
        ]
        grads = torch.autograd.grad(loss, [x, *state, *weights], allow_unused=True, materialize_grads=True)
        results.append((*new_state, *grads))
    close(*results)


def test_gradients_reach_every_parameter_the_input_and_the_state():
    layer = make(passes=2, window=4)
    x = tokens().requires_grad_()
    state = GDNState(*(t.requires_grad_() for t in some_state(layer)))
    y, new_state = layer(x, state=state, return_state=True)
    (y.square().sum() + new_state.fast_weights.square().sum()).backward()
    for name, p in [*layer.named_parameters(), ("x", x), ("fast_weights", state[0]), ("conv_tail", state[1])]:
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_published_initialisation():
    torch.manual_seed(0)
    layer = SleepGDNLayer(8, num_heads=500, head_dim=1)
    rate, step = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert 0 < rate.min() and rate.max() < 16 and abs(rate.mean() - 8) < 1
    assert step.min() > 0.999e-3 and step.max() < 1.001e-1
    assert abs(step.log().mean() - math.log(1e-2)) < 0.3
    assert torch.equal(layer.o_norm.weight, torch.ones(1))
    unset = [n for n, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)]
    assert unset == ["A_log", "dt_bias"]
    assert layer.q_conv.weight.abs().max() <= 0.5


@pytest.mark.parametrize("options", slow_unless(["{}"], [{}, dict(passes=2, window=4)]))
def test_triton_layer_equals_torch_layer(options):
    layers = [make(impl=impl, **options) for impl in ("torch", "triton")]
    results = []
    for layer in layers:
        state = GDNState(*(t.requires_grad_() for t in some_state(layer)))
        y, new_state = layer(tokens(), state=state, return_state=True)
        loss = y.square().sum() + new_state.fast_weights.square().sum()
        results.append((y, *new_state, *torch.autograd.grad(loss, [*state, *layer.parameters()])))
    close(*results, rtol=2e-2 if DEVICE == "cuda" else 1e-3, atol=2e-2 if DEVICE == "cuda" else 1e-3)


def test_autocast_keeps_gates_and_states_in_float32():
    layer, x = make(), tokens()
    y, state = layer(x, return_state=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        low, low_state = layer(x, state=layer.init_state(3), return_state=True)
        updated = layer.update_state(x, layer.init_state(3))
    assert low.dtype == torch.bfloat16 and low_state.conv_tail.dtype == torch.bfloat16
    assert low_state.fast_weights.dtype == torch.float32
    close(updated, low_state)
    close(low.float(), y, rtol=0.1, atol=0.05)
    close(low_state.fast_weights, state.fast_weights, rtol=0.1, atol=0.05)
    low.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


def test_bfloat16_layer_keeps_its_state_in_float32():
    layer = make(dtype=torch.bfloat16)
    y, state = layer(tokens(dtype=torch.bfloat16), return_state=True)
    assert y.dtype == state.conv_tail.dtype == torch.bfloat16 and state.fast_weights.dtype == torch.float32


def test_activation_checkpointing_changes_no_gradient():
    layer = make(passes=2, window=4)
    x, weights = tokens(), list(layer.parameters())
    plain = torch.autograd.grad(layer(x).square().sum(), weights)
    saved = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), weights)
    close(saved, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", slow_unless(["torch"], ["torch", "triton"]))
def test_traces_as_one_graph(impl):
    layer, x = make(impl=impl), tokens()
    # With decompositions, as inductor has them: plain aot_eager mispredicts the strides of softplus_backward.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    y, state = compiled(x, state=some_state(layer), return_state=True)
    expected = layer(x, state=some_state(layer), return_state=True)
    close((y, *state), (expected[0], *expected[1]))
    weights = list(layer.parameters())
    grads = [torch.autograd.grad(out.square().sum(), weights) for out in (y, expected[0])]
    close(*grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deep", "pickle"]
)
def test_copies_are_alike(copied):
    layer, x = make(passes=2, window=4), tokens()
    other = copied(layer)
    assert torch.equal(other(x), layer(x))
    assert [n for n, p in other.named_parameters() if getattr(p, "_no_weight_decay", False)] == ["A_log", "dt_bias"]
    fresh = make(seed=5, passes=2, window=4)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


def test_endless_passes_are_very_many():
    x, results = tokens(dtype=torch.float64), []
    for passes in (60, math.inf):
        layer = make(dtype=torch.float64, passes=passes, window=4)
        torch.nn.init.constant_(layer.dt_bias, 1)  # decays fast enough for 60 passes to converge
        results.append(layer(x, return_state=True))
    close(*results, rtol=1e-6, atol=1e-6)


class TinyTransformer(nn.Module):
    """Two pre-norm blocks whose mixers take [B, T, width] and return the same shape."""

    def __init__(self, vocab, width, mixer):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.mixers = nn.ModuleList(mixer() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, vocab)

    def forward(self, ids):
        h = self.embed(ids)
        for i in range(2):
            h = h + self.mixers[i](self.norms[2 * i](h))
            h = h + self.mlps[i](self.norms[2 * i + 1](h))
        return self.head(h)


@pytest.mark.parametrize("options", [{}, dict(passes=2, window=8)], ids=str)
def test_trains_in_place_of_an_attention_mixer(options):
    torch.manual_seed(0)
    model = TinyTransformer(16, 32, lambda: SleepGDNLayer(32, num_heads=2, head_dim=16, **options)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    half = torch.randint(16, (16, 12), device=DEVICE)
    ids = torch.cat([half, half], 1)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


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
        (dict(allow_neg_eigval="no"), "allow_neg_eigval"),
        (dict(window=0), "window"),
        (dict(window=float("nan")), "window"),
        (dict(norm_eps=float("nan")), "norm_eps"),
        (dict(output_pass="middle"), "output_pass"),
        (dict(rule="oja"), "rule"),
        (dict(impl="cuda"), "impl"),
    ],
)
def test_bad_settings_name_the_argument(change, name):
    with pytest.raises(ValueError, match=f"^{name}: expected .*got "):
        SleepGDNLayer(**(dict(hidden_size=20, num_heads=2, head_dim=8) | change))


def test_unknown_setting_is_a_type_error():
    with pytest.raises(TypeError):
        SleepGDNLayer(20, num_heads=2, head_dim=8, sleep=True)


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
        (dict(state=(torch.zeros(3, 4, 8, 6).half(), torch.zeros(3, 3, 56))), "state.fast_weights"),
        (dict(state=(torch.zeros(3, 4, 8, 6), None)), "state.conv_tail"),
        (dict(state=(torch.zeros(3, 4, 8, 6), torch.zeros(3, 3, 56, device="meta"))), "state.conv_tail"),
        (dict(state=torch.zeros(3, 4, 8, 6)), "state"),
        (dict(state=(torch.zeros(3, 4, 6, 8), torch.zeros(3, 3, 56))), "state.fast_weights"),
        (dict(state=(torch.zeros(3, 4, 8, 6), torch.zeros(3, 4, 56))), "state.conv_tail"),
    ],
)
def test_bad_inputs_name_the_argument(change, name):
    layer = make().cpu()
    with pytest.raises(ValueError, match=f"^{name}: expected .*got "):
        layer(**(dict(x=torch.zeros(3, 4, 20)) | change))
