"""What both kinds of sleep promise, by refining passes and by replays, with every option that might break it."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from cases import slow_unless
from small import HYBRIDS, REFINE, REPLAY, VOCAB, WINDOW, assert_same_state, hybrid, same, tiny, tokens

from sleep_ops import HybridConfig, SleepHybridModel, SleepSession
from sleep_ops.training.memory import LiveBytes

BOTH = pytest.mark.parametrize("kind", ["refine", "replay"])
SETTINGS = pytest.mark.parametrize("settings", REFINE + REPLAY)

CAUSAL = {
    f"{e}-{p}-{n}-{s}": dict(eviction=e, loop=p, passes=n, sleep_on=s)
    for e, p, n, s in itertools.product(("hard", "sliding"), (None, (1, 2)), (1, 3), ("every", "unlabelled"))
}
QUICK = ["hard-None-1-every", "hard-None-3-every", "sliding-(1, 2)-3-every", "sliding-(1, 2)-3-unlabelled"]
CAUSAL = slow_unless(QUICK, CAUSAL.values(), ids=CAUSAL)
CAUSAL += [
    pytest.param(dict(passes=2, conv_boundary="zero"), id="conv-zero"),
    pytest.param(dict(passes=2, rule="hebbian"), id="hebbian"),
    pytest.param(dict(passes=2, allow_neg_eigval=True, conv_size=1), id="negative-eigenvalues"),
    pytest.param(dict(passes=2, gdn_num_v_heads=4, gdn_head_v_dim=6), id="grouped-values"),
]


@pytest.mark.parametrize("settings", CAUSAL + REPLAY)
def test_no_logit_depends_on_a_later_token(settings):
    model, ids = tiny(**settings), tokens(batch=1)
    labels = torch.full_like(ids, -100)
    labels[:, 10:] = 1
    before = model(ids, labels=labels, all_logits=True).logits
    for t in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 1) % VOCAB
        after = model(changed, labels=labels, all_logits=True).logits
        same(after[:, :t], before[:, :t], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize(
    "build, settings",
    [
        pytest.param(build, *p.values, id=f"{build.__name__}-{p.id}", marks=p.marks)
        for build, params in ((tiny, REPLAY), (hybrid, HYBRIDS))
        for p in params
    ],
)
def test_token_by_token_chunks_and_at_once_agree(build, settings):
    model, ids = build(**settings), tokens()
    whole, length = SleepSession(model), ids.shape[1]
    logits = whole.read(ids, all_logits=True)
    same(model(ids).logits, logits, rtol=1e-9, atol=1e-9)
    single = SleepSession(model)
    same(torch.stack([single.step(ids[:, t]) for t in range(length)], dim=1), logits)
    assert_same_state(model, single.state, whole.state)
    for cuts in (range(length + 1), (0, 3, 4, 12, length), (0, 5, 10, length), (0, 16, length)):
        chunked = SleepSession(model)
        last = [chunked.read(ids[:, a:b]) for a, b in itertools.pairwise(cuts)]
        same(torch.stack(last, 1), logits[:, [c - 1 for c in cuts[1:]]], rtol=1e-9, atol=1e-9)
        assert_same_state(model, chunked.state, whole.state)


@SETTINGS
def test_padding_and_packing_change_nothing(settings):
    model = tiny(**settings)
    texts = [tokens(1, n, seed=n) for n in (13, 10, 3)]
    whole = [model(t) for t in texts]
    width = 16
    for side in ("left", "right"):
        ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
        for b, text in enumerate(texts):
            place = slice(width - text.shape[1], width) if side == "left" else slice(0, text.shape[1])
            ids[b, place], mask[b, place] = text[0], 1
        out = model(ids, attention_mask=mask)
        for b, one in enumerate(whole):
            same(out.logits[b][mask[b] == 1], one.logits[0])
            for s, t, block in zip(out.state.blocks, one.state.blocks, model.blocks, strict=True):
                if block.fast_weights:
                    same(s.fast_weights[b], t.fast_weights[0])
                    same(s.conv_state[b], t.conv_state[0])
    packed = model(torch.cat(texts, dim=1), cu_seqlens=torch.tensor([0, 13, 23, 26]))
    same(packed.logits, torch.cat([o.logits for o in whole], dim=1))


@SETTINGS
@pytest.mark.parametrize("recompute", ["block", "window"])
def test_however_much_is_recomputed_at_a_time_gradients_are_the_same(settings, recompute):
    ids, labels, grads = tokens(), tokens(seed=2), []
    for changes in ({}, dict(activation_checkpointing=True, recompute=recompute)):
        model = tiny(**settings, **changes).train()
        model(ids, labels=labels).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name in grads[0]:
        same(grads[0][name], grads[1][name])


def test_what_is_stored_for_windows_does_not_grow_with_the_passes():
    stored = {}
    for recompute in ("pass", "block", "window"):
        for passes in (2, 5):
            model = tiny(passes=passes, activation_checkpointing=True, recompute=recompute).train()
            with LiveBytes() as live:
                loss = model(tokens(2, 6 * WINDOW), labels=tokens(2, 6 * WINDOW), return_state=False).loss
                stored[recompute, passes] = sum(live.now.values())
            loss.backward()
    assert stored["window", 5] == stored["window", 2] < stored["pass", 2] < stored["pass", 5]
    assert stored["pass", 5] < stored["block", 5]


@SETTINGS
def test_activation_checkpointing_recomputes_and_changes_no_gradient(settings):
    ids, labels, grads, runs = tokens(), tokens(seed=2), [], []
    for checkpointing in (False, True):
        model = tiny(**settings, activation_checkpointing=checkpointing)
        mixer, calls, replays = model.blocks[1].mixer, [], []
        model.blocks[1].mlp.register_forward_hook(lambda *a, calls=calls: calls.append(1))
        mixer.replay = lambda *a, f=mixer.replay, replays=replays, **k: (replays.append(1), f(*a, **k))[1]
        model(ids, labels=labels).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
        runs.append((len(calls), len(replays)))
    assert runs[1] == (2 * runs[0][0], 2 * runs[0][1])
    awake = (4, 3) if "sleep_kind" in settings else (4 + 3 * (settings["passes"] - 1), 0)
    assert runs[0] == awake
    for name in grads[0]:
        same(grads[0][name], grads[1][name], rtol=1e-12, atol=1e-12)
        assert grads[0][name].abs().sum() > 0, name


@SETTINGS
def test_gradients_reach_every_parameter(settings):
    model = tiny(**settings)
    ids = tokens()
    labels = torch.full_like(ids, -100)
    labels[:, 15:] = 1
    model(ids, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@BOTH
def test_an_unlabelled_window_may_be_read_in_two_calls(kind):
    model, ids = tiny(passes=3, sleep_on="unlabelled", sleep_kind=kind), tokens(batch=1)
    labels = torch.full_like(ids, -100)
    labels[:, 1] = 1  # window 0 stays awake although its second half has no loss
    whole = model(ids, labels=labels, all_logits=True)
    first = model(ids[:, :3], labels=labels[:, :3])
    second = model(ids[:, 3:], state=first.state, loss_mask=torch.zeros(1, 15, dtype=torch.bool), all_logits=True)
    same(second.logits, whole.logits[:, 3:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind, passes", [("refine", 2), ("replay", 3)])
def test_gradients_go_through_the_state_of_an_earlier_call(kind, passes):
    model = tiny(passes=passes, sleep_kind=kind, dt_bias=-1 if kind == "replay" else None)
    ids, labels = tokens(length=13), tokens(length=13, seed=4).masked_fill(torch.arange(13) < 8, -100)
    model(ids, labels=labels).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    state = model(ids[:, :8]).state
    assert state.in_window == (3, 3) and (kind == "refine" or state.writes[1].k.requires_grad)
    model(ids[:, 8:], labels=labels[:, 8:], state=state).loss.backward()
    for name, parameter in model.named_parameters():
        same(parameter.grad, expected[name], atol=1e-10)
    model.zero_grad()
    cut = state.detach()
    assert not any(x.requires_grad for s in cut.blocks + cut.writes if s is not None for x in s)
    model(ids[:, 8:], labels=labels[:, 8:], state=cut).loss.backward()
    assert not torch.allclose(model.embed.weight.grad, expected["embed.weight"])


@BOTH
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_trains_and_reads_on_the_device_in_low_precision(eviction, kind, device):
    """bfloat16 autocast against the same model in float32: losses, gradients and a session's logits."""
    torch.manual_seed(0)
    config = dict(vocab_size=VOCAB, hidden_size=64, layers=("attn", "gdn") * 2, window=24, num_heads=2, passes=3)
    model = SleepHybridModel(HybridConfig(**config, sleep_kind=kind, eviction=eviction)).to(device)
    ids, labels = (tokens(4, 60, seed=seed).to(device) for seed in (1, 2))
    mask = (torch.arange(60) >= 50).expand(4, 60)

    def run(low: bool):
        model.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=low):
            loss = model(ids, labels=labels, loss_mask=mask).loss
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    exact, gradient = run(low=False)
    loss, low_gradient = run(low=True)
    assert abs(loss - exact) < 0.02 * exact
    assert (low_gradient - gradient).norm() < 0.1 * gradient.norm()
    session = SleepSession(model)
    with torch.autocast(device, dtype=torch.bfloat16):
        session.read(ids[:, :10])
    assert session.read(ids[:, 10:31]).isfinite().all()  # a window begun in another precision
    session = SleepSession(model)
    logits = torch.cat([session.read(ids[:, :31], all_logits=True), session.read(ids[:, 31:], all_logits=True)], dim=1)
    with torch.no_grad():
        same(logits, model(ids).logits, rtol=2e-3, atol=2e-3)
    assert session.generate(None, 5).device.type == device


@pytest.mark.parametrize(
    "settings",
    [dict(eviction="sliding"), dict(sleep_kind="replay", passes=3), dict(sleep_kind="replay", passes=math.inf)],
    ids=["refine", "replay", "replay-inf"],
)
def test_configuration_round_trip_as_strict_json(settings):
    config = tiny(loop=(1, 2), **settings).config
    assert HybridConfig.from_dict(config.to_dict()) == config
    assert HybridConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config
    assert dataclasses.replace(config, passes=2).sleep_kind == settings.get("sleep_kind", "refine")


@pytest.mark.parametrize(
    "name, change",
    [
        ("window", dict(window=0)),
        ("window", dict(window=float("nan"))),
        ("passes", dict(passes=0)),
        ("passes", dict(passes=True)),
        ("loop", dict(loop=(2, 1))),
        ("loop", dict(loop=(0, 4))),
        ("eviction", dict(eviction="soft")),
        ("sleep_on", dict(sleep_on="sometimes")),
        ("conv_boundary", dict(conv_boundary="none")),
        ("layers", dict(layers=("attn", "mamba"))),
        ("layers", dict(layers=())),
        ("layers", dict(layers=3)),
        ("loop", dict(loop=3)),
        ("gdn_num_heads", dict(gdn_num_heads=0)),
        ("gdn_num_v_heads", dict(gdn_num_v_heads=3)),
        ("rope_theta", dict(rope_theta=float("nan"))),
        ("initializer_range", dict(initializer_range=-1.0)),
        ("allow_neg_eigval", dict(allow_neg_eigval="yes")),
        ("rule", dict(rule="gamma")),
        ("impl", dict(impl="cuda")),
        ("num_kv_heads", dict(num_kv_heads=3)),
        ("num_heads", dict(num_heads=3, num_kv_heads=None)),
        ("attention_backend", dict(attention_backend="fast")),
        ("passes", dict(window=None, passes=2)),
        ("sleep_kind", dict(sleep_kind="dream")),
        ("sleep_kind", dict(sleep_kind=None)),
        ("passes", dict(passes=0, sleep_kind="replay")),
        ("passes", dict(passes=2.0, sleep_kind="replay")),
        ("passes", dict(passes=math.nan, sleep_kind="replay")),
        ("passes", dict(passes=-math.inf, sleep_kind="replay")),
        ("passes", dict(passes="inf", sleep_kind="replay")),
        ("passes", dict(passes=math.inf, sleep_kind="refine")),
        ("passes", dict(passes=math.inf, window=None, sleep_kind="replay")),
    ],
    ids=str,
)
def test_bad_configuration_names_the_field(name, change):
    with pytest.raises(ValueError, match=f"^{name}: expected .*got "):
        tiny(**change)
