"""The gated delta rule as a layer, against the reference, and in place of attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from small import DEVICE, close, make, some_state, vectors
from torch import nn

from sleep_ops.layers.gdn import SleepGDNLayer
from sleep_ops.reference import sleep_gated_delta_rule_reference

SLEEPS = {
    "plain": {},
    "two_passes": dict(passes=2, window=4),
    "three_passes": dict(passes=3, window=3),
    "no_window": dict(passes=2, window=None, output_pass="last"),
    "hebbian": dict(rule="hebbian"),
    "negative": dict(allow_neg_eigval=True, conv_size=3),
}


@pytest.mark.parametrize("sleep", SLEEPS)
def test_replays_what_the_reference_replays(sleep):
    layer = make(SleepGDNLayer, dtype=torch.float64, **SLEEPS[sleep])
    x = vectors(dtype=torch.float64)
    state = some_state(layer)

    def convolved(projection, convolution, conv_state, heads):
        W = convolution.weight.shape[1]
        seen = torch.cat([conv_state, projection(x)], 1).transpose(1, 2)
        z = F.conv1d(seen, convolution.weight[:, None], groups=seen.shape[1]).transpose(1, 2)
        return F.silu(z).unflatten(-1, (heads, -1)), seen[..., seen.shape[-1] - W + 1 :].transpose(1, 2)

    q_state, k_state, v_state = state.conv_state.split([16, 16, 24], -1)
    q, q_state = convolved(layer.q_proj, layer.q_conv1d, q_state, 2)
    k, k_state = convolved(layer.k_proj, layer.k_conv1d, k_state, 2)
    v, v_state = convolved(layer.v_proj, layer.v_conv1d, v_state, 4)
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
    expected = layer.o_proj(o.flatten(2)), (fast_weights, torch.cat([q_state, k_state, v_state], -1))
    y, new_state = layer(x, state=state, return_state=True)
    close(y, expected[0], rtol=1e-9, atol=1e-9)
    close(new_state, expected[1], rtol=1e-9, atol=1e-9)


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
    assert layer.q_conv1d.weight.abs().max() <= 0.5


@pytest.mark.parametrize("saved", ["fla", "before"])
def test_weights_of_fla_and_of_former_names_load(saved):
    """fla's filters are those of an nn.Conv1d; this layer's were called q_conv, k_conv and v_conv before."""
    model, other = (nn.Sequential(SleepGDNLayer(16, num_heads=2, head_dim=8)) for _ in range(2))
    weights = model.state_dict()
    for name in [n for n in weights if "conv1d" in n]:
        weight = weights.pop(name)
        name, weight = (name, weight[:, None]) if saved == "fla" else (name.replace("conv1d", "conv"), weight)
        weights[name] = weight
    other.load_state_dict(weights)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


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


def test_negative_eigenvalues_are_allowed_or_not():
    with pytest.raises(ValueError, match="^allow_neg_eigval: expected .*got "):
        SleepGDNLayer(20, num_heads=2, head_dim=8, allow_neg_eigval="no")
