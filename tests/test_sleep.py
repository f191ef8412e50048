"""Sleep against a plain transcription of Algorithm 1, and what every option must not break."""

import dataclasses

import pytest
import torch
from small import REFINE, VOCAB, WINDOW, fast_weights, tiny, tokens

from sleep_ops import HybridConfig
from sleep_ops.layers.attention import rotate


def transcription(model, ids, passes, eviction, loop, sleeps=lambda w: True, boundary="snapshot"):
    """Algorithm 1 with the settled choices, written out: one row, explicit keys, no shared code with `sleep.py`.

    Returns the first-pass logits of every token and the fast weights after the last window.
    """
    first, last = loop or (0, len(model.blocks) - 1)
    depth = len(model.blocks)
    fast = {i: b.mixer.init_state(1) for i, b in enumerate(model.blocks) if b.fast_weights}
    kept = {i: [] for i, b in enumerate(model.blocks) if not b.fast_weights}
    logits = []

    def attention(mixer, x, begin, old):
        heads = lambda y: y.view(x.shape[1], -1, mixer.head_dim)  # noqa: E731
        q, k, v = heads(mixer.q_proj(x)), heads(mixer.k_proj(x)), heads(mixer.v_proj(x))
        own, out = [], []
        frequency = mixer.rope_theta ** (-torch.arange(0, mixer.head_dim, 2).double() / mixer.head_dim)
        for t in range(x.shape[1]):
            angle = (begin + t) * frequency
            cos, sin = angle.cos().float()[None], angle.sin().float()[None]
            own.append((begin + t, rotate(k[t], cos, sin), v[t]))
            seen = [(p, kk, vv) for p, kk, vv in old + own if begin + t - p < WINDOW]
            keys, values = torch.stack([e[1] for e in seen]), torch.stack([e[2] for e in seen])
            score = torch.einsum("hd,shd->hs", rotate(q[t], cos, sin), keys.expand(-1, q.shape[1], -1))
            weight = (score * mixer.head_dim**-0.5).softmax(-1)
            out.append(torch.einsum("hs,shd->hd", weight, values.expand(-1, q.shape[1], -1)).flatten())
        return mixer.o_proj(torch.stack(out)[None]), own

    def run(indices, h, begin, states):
        keys = {}
        for i in indices:
            block = model.blocks[i]
            x = block.mixer_norm(h)
            if block.fast_weights:
                y, states[i] = block.mixer(x, state=states[i], return_state=True)
            else:
                y, keys[i] = attention(block.mixer, x, begin, kept[i])
            h = h + y
            h = h + block.mlp(block.mlp_norm(h))
        return h, keys

    for w, begin in enumerate(range(0, ids.shape[1], WINDOW)):
        part = ids[:, begin : begin + WINDOW]
        start = dict(fast)
        h, keys = run(range(0, last + 1), model.embed(part), begin, fast)
        looped = h
        h, more = run(range(last + 1, depth), h, begin, fast)
        keys |= more
        logits.append(model.lm_head(model.norm(h)))
        if part.shape[1] < WINDOW:
            break
        if passes > 1 and sleeps(w):
            h = looped
            for _ in range(passes - 1):
                for i in range(first, last + 1):
                    if i in fast:
                        conv_state = start[i].conv_state
                        fast[i] = fast[i]._replace(conv_state=conv_state if boundary == "snapshot" else conv_state * 0)
                h, more = run(range(first, last + 1), h, begin, fast)
                keys |= more
            for i in range(last + 1, depth):
                if i in fast:
                    fast[i] = start[i]
            keys |= run(range(last + 1, depth), h, begin, fast)[1]
        for i in kept:
            kept[i] = (kept[i] + keys[i])[-(WINDOW - 1) :] if eviction == "sliding" else []
    return torch.cat(logits, dim=1), [fast[i].fast_weights for i in fast]


@pytest.mark.parametrize("settings", REFINE)
def test_equals_the_transcription(settings):
    model = tiny(**settings)
    ids = tokens()
    out = model(ids)
    for b in range(2):
        logits, fast = transcription(model, ids[b : b + 1], **settings)
        torch.testing.assert_close(out.logits[b : b + 1], logits, rtol=1e-7, atol=1e-7)
        ours = [s[b : b + 1] for s in fast_weights(model, out.state)]
        torch.testing.assert_close(ours, fast, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_gradients_equal_the_transcription(eviction):
    model = tiny(eviction=eviction, loop=(1, 2), passes=3)
    ids = tokens(batch=1)
    labels = torch.full_like(ids, -100)
    labels[:, 3:4] = 2
    labels[:, 15:] = 1
    model(ids, labels=labels).loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logits, _ = transcription(model, ids, 3, eviction, (1, 2))
    torch.nn.functional.cross_entropy(logits[0], labels[0]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_conv_boundary_zero():
    model = tiny(passes=2, conv_boundary="zero")
    ids = tokens(batch=1)
    logits, _ = transcription(model, ids, 2, "hard", None, boundary="zero")
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-7, atol=1e-7)
    assert not torch.allclose(tiny(passes=2)(ids).logits, logits)


def test_unlabelled_windows_alone_sleep():
    model = tiny(passes=3, sleep_on="unlabelled")
    ids = tokens(batch=2)
    labels = torch.full_like(ids, -100)
    labels[0, WINDOW : 2 * WINDOW] = 1  # row 0 stays awake in window 1, row 1 sleeps in it
    labels[:, 15:] = 1
    out = model(ids, labels=labels, all_logits=True)
    for b, awake in ((0, {1}), (1, set())):
        logits, _ = transcription(model, ids[b : b + 1], 3, "hard", None, sleeps=lambda w, awake=awake: w not in awake)
        torch.testing.assert_close(out.logits[b : b + 1], logits, rtol=1e-7, atol=1e-7)


def test_loss_is_the_mean_over_marked_positions():
    model = tiny(passes=2)
    ids, labels = tokens(), tokens(seed=2)
    mask = torch.rand(labels.shape, generator=torch.Generator().manual_seed(3)) < 0.3
    logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(logits[mask], labels[mask])
    torch.testing.assert_close(model(ids, labels=labels, loss_mask=mask).loss, expected)
    torch.testing.assert_close(model(ids, labels=labels.masked_fill(~mask, -100)).loss, expected)


def test_logits_of_windows_with_loss_only():
    model = tiny(passes=2)
    ids = tokens()
    labels = torch.full_like(ids, -100)
    labels[1, 7] = 0
    labels[0, 16] = 3
    out = model(ids, labels=labels)
    assert out.positions.tolist() == [5, 6, 7, 8, 9, 15, 16, 17]
    torch.testing.assert_close(out.logits, model(ids).logits[:, out.positions])
    everything = model(ids, labels=labels, all_logits=True)
    assert everything.logits.shape == (2, 18, VOCAB)
    torch.testing.assert_close(everything.loss, out.loss)


def test_hard_eviction_leaves_only_the_fast_weights():
    model = tiny(passes=2)
    ids = tokens(batch=1, length=2 * WINDOW)
    changed = ids.clone()
    changed[:, 1] = (changed[:, 1] + 1) % VOCAB
    state, other = model(ids[:, :WINDOW]).state, model(changed[:, :WINDOW]).state
    later = ids[:, WINDOW:]
    assert not torch.allclose(model(later, state=state).logits, model(later, state=other).logits)

    def forget(state):
        return state._replace(
            blocks=tuple(
                type(s)(*(x * 0 for x in s)) if b.fast_weights else s
                for b, s in zip(model.blocks, state.blocks, strict=True)
            )
        )

    assert torch.equal(model(later, state=forget(state)).logits, model(later, state=forget(other)).logits)


def test_sliding_eviction_keeps_the_last_tokens():
    model = tiny(eviction="sliding", layers=("attn",), passes=1)  # one block: sees exactly L positions
    ids = tokens(batch=1, length=13)
    before = model(ids).logits
    for t in range(13):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        moved = (model(changed).logits - before).abs().amax(-1)[0] > 1e-9
        assert moved.tolist() == [t <= i < t + WINDOW for i in range(13)]
    assert all(s.keys.shape[1] <= 2 * WINDOW for s in model(ids).state.blocks)


def test_one_pass_is_the_ordinary_hybrid():
    wide = tiny(window=None)
    ids = tokens()
    narrow = tiny(window=32)
    torch.testing.assert_close(wide(ids).logits, narrow(ids, passes=1).logits)
    torch.testing.assert_close(narrow(ids, passes=4).logits, narrow(ids, passes=1).logits)  # no window is full


def test_padded_loss_equals_the_unpadded():
    model = tiny(passes=2)
    ids, labels = tokens(1, 12), tokens(1, 12, seed=5)
    expected = model(ids, labels=labels).loss
    pad = torch.zeros(1, 4, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(ids)], dim=1)
    out = model(torch.cat([pad, ids], 1), labels=torch.cat([pad, labels], 1), attention_mask=mask)
    torch.testing.assert_close(out.loss, expected)


def test_dead_work_is_not_done():
    model = tiny(passes=2)
    ids = tokens(batch=1, length=12)
    labels = torch.full_like(ids, -100)
    labels[:, 10:] = 1
    calls = {"mlp": 0, "q": 0, "head": 0}
    for key, module in (("mlp", model.blocks[3].mlp), ("q", model.blocks[3].mixer.g_proj), ("head", model.lm_head)):
        module.register_forward_hook(lambda *a, key=key: calls.__setitem__(key, calls[key] + 1))
    model(ids, labels=labels)
    # two full windows: awake (fed back, so whole), then the last pass ends at the last block's state; then the answer
    assert calls == {"mlp": 3, "q": 3, "head": 1}
    calls.update(mlp=0, q=0, head=0)
    model(ids, labels=labels, passes=1)
    assert calls == {"mlp": 1, "q": 1, "head": 1}


def test_state_of_a_last_full_window_only_on_request():
    model = tiny(passes=3)
    ids = tokens(length=2 * WINDOW)
    kept = model(ids, labels=ids)
    dropped = model(ids, labels=ids, return_state=False)
    assert dropped.state is None and kept.state.position == (10, 10) and kept.state.in_window == (0, 0)
    assert torch.equal(kept.loss, dropped.loss)


@pytest.mark.parametrize("lengths", ((10, 10), (5, 10), (10, 7)), ids=str)
def test_what_nothing_sees_does_not_sleep_to_the_same_bits(lengths, monkeypatch):
    """Full windows at the end of the text sleep for a state alone, though logits of every window are wanted."""
    model, slept = tiny(passes=3), []
    sleep = type(model.stack).sleep
    monkeypatch.setattr(type(model.stack), "sleep", lambda *a, **k: slept.append(k["rows"]) or sleep(*a, **k))
    ids, mask = tokens(length=2 * WINDOW), torch.arange(2 * WINDOW) < torch.tensor(lengths)[:, None]
    found, times = [], []
    for return_state in (True, False):
        slept.clear()
        found.append(model(ids, attention_mask=mask, return_state=return_state).logits)
        times.append(sum(map(any, slept)))
    assert torch.equal(*found)
    assert times == [2, 1]


def test_nothing_is_read_that_no_loss_can_see():
    model = tiny(passes=3)
    ids = tokens(batch=1)
    labels = torch.full_like(ids, -100)
    labels[:, 6] = 1
    calls = []
    model.blocks[0].register_forward_hook(lambda *a: calls.append(1))
    out = model(ids, labels=labels, return_state=False)
    assert len(calls) == 4  # window 0 awake and twice asleep, window 1 awake
    torch.testing.assert_close(out.loss, model(ids, labels=labels).loss)


def test_padding_may_hold_any_token():
    model = tiny(passes=2)
    ids = tokens(1, 8)
    padded = torch.cat([torch.full((1, 3), -100), ids], dim=1)
    out = model(padded, attention_mask=padded >= 0)
    torch.testing.assert_close(out.logits[:, 3:], model(ids).logits)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("input_ids", dict(input_ids=torch.zeros(2, 3))),
        ("input_ids", dict(input_ids=torch.full((2, 3), VOCAB))),
        ("input_ids", dict(input_ids=torch.zeros(3, dtype=torch.long))),
        ("labels", dict(labels=torch.zeros(2, 4, dtype=torch.long))),
        ("labels", dict(labels=torch.full((2, 6), -100))),
        ("labels", dict(labels=torch.full((2, 6), VOCAB))),
        ("labels", dict(labels=torch.ones(2, 6))),
        ("labels", dict(labels=[[1] * 6] * 2)),
        ("input_ids", dict(input_ids=[[1, 2]])),
        ("input_ids", dict(input_ids=torch.ones(2, 6, dtype=torch.bool))),
        ("input_ids", dict(input_ids=torch.ones(2, 6, dtype=torch.long, device="meta"))),
        ("cu_seqlens", dict(input_ids=torch.ones(1, 6, dtype=torch.long), cu_seqlens=torch.tensor(3.0))),
        ("state", dict(state=3)),
        ("state", dict(state=tiny(layers=("gdn", "attn")).init_state(2))),
        ("loss_mask", dict(loss_mask=torch.ones(1, 6))),
        ("loss_mask", dict(loss_mask=torch.ones(2, 6, dtype=torch.long))),
        ("loss_mask", dict(labels=tokens(2, 6), loss_mask=torch.full((2, 6), float("nan")))),
        *((name, {"labels": tokens(2, 6), name: "no"}) for name in ("all_logits", "return_logits", "return_state")),
        ("attention_mask", dict(attention_mask=torch.ones(2, 5))),
        ("attention_mask", dict(attention_mask=torch.zeros(2, 6))),
        ("passes", dict(passes=0)),
        ("passes", dict(passes=1.5)),
        ("cu_seqlens", dict(cu_seqlens=torch.tensor([0, 4, 2, 6]))),
        ("state", dict(input_ids=torch.zeros(3, 6, dtype=torch.long))),
    ],
)
def test_bad_input_names_the_argument(name, arguments):
    model = tiny()
    given = dict(input_ids=tokens(2, 6))
    if name == "state" and "state" not in arguments:
        given["state"] = model(tokens(2, 6)).state
    if name == "cu_seqlens":
        given["input_ids"] = tokens(1, 6)
    with pytest.raises(ValueError, match=f"^{name}:"):
        model(**(given | arguments))


@pytest.mark.parametrize(
    "changes",
    [dict(window=2), dict(num_kv_heads=2), dict(head_dim=16), dict(gdn_head_v_dim=2), dict(conv_size=3)]
    + [dict(hidden_size=24, head_dim=8, gdn_head_dim=8), dict(reinject=True), dict(loop_gate=True)],
    ids=str,
)
def test_states_of_other_models_are_refused(changes):
    """In the middle of a window; their own go on."""
    settings = dict(passes=2, window=WINDOW)
    model, other, ids = tiny(**settings), tiny(**(settings | changes)), tokens(2, 8)
    states = [m(ids).state for m in (model, other)]
    for m, state in zip((model, other), states, strict=True):
        assert m(ids, state=state).state.position == (16, 16)
    for m, state in ((other, states[0]), (model, states[1])):
        if m is other or "window" not in changes:
            with pytest.raises(ValueError, match="^state: expected .*got "):
                m(ids, state=state)


def test_unknown_keys_and_changes_of_a_configuration():
    config = tiny().config
    with pytest.raises(ValueError, match="sleepy"):
        HybridConfig.from_dict(config.to_dict() | {"sleepy": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 3
