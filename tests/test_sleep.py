"""Sleep against a plain transcription of Algorithm 1, and what every option must not break."""

import dataclasses
import itertools

import pytest
import torch
from cases import slow_unless

from sleep_ops import HybridConfig, SleepHybridModel, SleepSession
from sleep_ops.layers.attention import rotate

VOCAB, WINDOW = 11, 5
OPTIONS = [
    pytest.param(eviction, loop, passes, id=f"{eviction}-{'all' if loop is None else 'middle'}-N{passes}", marks=marks)
    for eviction, loop, passes in itertools.product(("hard", "sliding"), (None, (1, 2)), (1, 2, 3))
    for marks in [pytest.mark.slow if passes == 2 else ()]
]


def tiny(**changes) -> SleepHybridModel:
    torch.manual_seed(0)
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=16,
        layers=("attn", "gdn", "attn", "gdn"),
        window=WINDOW,
        num_heads=2,
        num_kv_heads=1,
        initializer_range=0.3,
    )
    return SleepHybridModel(HybridConfig(**(settings | changes))).double()


def tokens(batch=2, length=18, seed=1):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


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
                        tail = start[i].conv_tail
                        fast[i] = fast[i]._replace(conv_tail=tail if boundary == "snapshot" else tail * 0)
                h, more = run(range(first, last + 1), h, begin, fast)
                keys |= more
            for i in range(last + 1, depth):
                if i in fast:
                    fast[i] = start[i]
            keys |= run(range(last + 1, depth), h, begin, fast)[1]
        for i in kept:
            kept[i] = (kept[i] + keys[i])[-(WINDOW - 1) :] if eviction == "sliding" else []
    return torch.cat(logits, dim=1), [fast[i].fast_weights for i in fast]


@pytest.mark.parametrize("eviction, loop, passes", OPTIONS)
def test_equals_the_transcription(eviction, loop, passes):
    model = tiny(eviction=eviction, loop=loop, passes=passes)
    ids = tokens()
    out = model(ids)
    for b in range(2):
        logits, fast = transcription(model, ids[b : b + 1], passes, eviction, loop)
        torch.testing.assert_close(out.logits[b : b + 1], logits, rtol=1e-7, atol=1e-7)
        ours = [
            s.fast_weights[b : b + 1] for s, m in zip(out.state.blocks, model.blocks, strict=True) if m.fast_weights
        ]
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


@pytest.mark.parametrize("options", CAUSAL)
def test_no_logit_depends_on_a_later_token(options):
    model = tiny(**options)
    ids = tokens(batch=1)
    labels = torch.full_like(ids, -100)
    labels[:, 10:] = 1
    before = model(ids, labels=labels, all_logits=True).logits
    for t in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 1) % VOCAB
        after = model(changed, labels=labels, all_logits=True).logits
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(after[:, t], before[:, t])


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


@pytest.mark.parametrize("eviction, loop, passes", OPTIONS)
def test_padding_and_packing_change_nothing(eviction, loop, passes):
    model = tiny(eviction=eviction, loop=loop, passes=passes)
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
            torch.testing.assert_close(out.logits[b][mask[b] == 1], one.logits[0], rtol=1e-8, atol=1e-8)
            for s, t, block in zip(out.state.blocks, one.state.blocks, model.blocks, strict=True):
                if block.fast_weights:
                    torch.testing.assert_close(s.fast_weights[b], t.fast_weights[0], rtol=1e-8, atol=1e-8)
                    torch.testing.assert_close(s.conv_tail[b], t.conv_tail[0], rtol=1e-8, atol=1e-8)
    packed = model(torch.cat(texts, dim=1), cu_seqlens=torch.tensor([0, 13, 23, 26]))
    torch.testing.assert_close(packed.logits, torch.cat([o.logits for o in whole], dim=1), rtol=1e-8, atol=1e-8)


def test_padded_loss_equals_the_unpadded():
    model = tiny(passes=2)
    ids, labels = tokens(1, 12), tokens(1, 12, seed=5)
    expected = model(ids, labels=labels).loss
    pad = torch.zeros(1, 4, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(ids)], dim=1)
    out = model(torch.cat([pad, ids], 1), labels=torch.cat([pad, labels], 1), attention_mask=mask)
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("eviction, loop, passes", OPTIONS)
def test_activation_checkpointing_changes_no_gradient(eviction, loop, passes):
    ids, labels = tokens(), tokens(seed=2)
    grads = []
    for checkpointing in (False, True):
        model = tiny(eviction=eviction, loop=loop, passes=passes, activation_checkpointing=checkpointing)
        model(ids, labels=labels).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eviction, loop, passes", OPTIONS)
def test_gradients_reach_every_parameter(eviction, loop, passes):
    model = tiny(eviction=eviction, loop=loop, passes=passes)
    ids = tokens()
    labels = torch.full_like(ids, -100)
    labels[:, 15:] = 1
    model(ids, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


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
    assert dropped.state is None and kept.state.seen == (10, 10) and kept.state.live == (0, 0)
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


def test_an_unlabelled_window_may_be_read_in_two_calls():
    model = tiny(passes=3, sleep_on="unlabelled")
    ids = tokens(batch=1)
    labels = torch.full_like(ids, -100)
    labels[:, 1] = 1  # window 0 stays awake although its second half has no loss
    whole = model(ids, labels=labels, all_logits=True)
    first = model(ids[:, :3], labels=labels[:, :3])
    second = model(ids[:, 3:], state=first.state, loss_mask=torch.zeros(1, 15, dtype=torch.bool), all_logits=True)
    torch.testing.assert_close(second.logits, whole.logits[:, 3:], rtol=1e-9, atol=1e-9)


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


def test_gradients_go_through_the_state_of_an_earlier_call():
    model = tiny(passes=2)
    ids, labels = tokens(length=13), tokens(length=13, seed=4).masked_fill(torch.arange(13) < 8, -100)
    model(ids, labels=labels).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    state = model(ids[:, :8]).state
    model(ids[:, 8:], labels=labels[:, 8:], state=state).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-10)
    model.zero_grad()
    model(ids[:, 8:], labels=labels[:, 8:], state=state.detach()).loss.backward()
    assert not torch.allclose(model.embed.weight.grad, expected["embed.weight"])


def test_padding_may_hold_any_token():
    model = tiny(passes=2)
    ids = tokens(1, 8)
    padded = torch.cat([torch.full((1, 3), -100), ids], dim=1)
    out = model(padded, attention_mask=padded >= 0)
    torch.testing.assert_close(out.logits[:, 3:], model(ids).logits)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_trains_and_reads_on_the_device_in_low_precision(eviction, device):
    """bfloat16 autocast against the same model in float32: losses, gradients and a session's logits."""
    torch.manual_seed(0)
    config = dict(vocab_size=VOCAB, hidden_size=64, layers=("attn", "gdn") * 2, window=24, num_heads=2, passes=3)
    model = SleepHybridModel(HybridConfig(**config, eviction=eviction)).to(device)
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(0, VOCAB, (4, 60), generator=generator).to(device) for _ in range(2))
    mask = (torch.arange(60) >= 50).expand(4, 60)  # stays on the CPU

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
    logits = torch.cat([session.read(ids[:, :31], all_logits=True), session.read(ids[:, 31:], all_logits=True)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits, rtol=2e-3, atol=2e-3)
    assert session.generate(None, 5).device.type == device


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
    "name, value",
    [
        ("window", 0),
        ("window", float("nan")),
        ("passes", 0),
        ("passes", True),
        ("loop", (2, 1)),
        ("loop", (0, 4)),
        ("eviction", "soft"),
        ("sleep_on", "sometimes"),
        ("conv_boundary", "none"),
        ("layers", ("attn", "mamba")),
        ("layers", ()),
        ("layers", 3),
        ("loop", 3),
        ("gdn_num_heads", 0),
        ("gdn_num_v_heads", 3),
        ("rope_theta", float("nan")),
        ("initializer_range", -1.0),
        ("allow_neg_eigval", "yes"),
        ("rule", "gamma"),
        ("impl", "cuda"),
        ("num_kv_heads", 3),
        ("num_heads", 3),
        ("attention_backend", "fast"),
    ],
)
def test_bad_configuration_names_the_field(name, value):
    with pytest.raises(ValueError, match=f"^{name}:"):
        tiny(**{name: value, **({"num_kv_heads": None} if name == "num_heads" else {})})


def test_configuration_round_trip_and_unknown_keys():
    config = tiny(loop=(1, 2), eviction="sliding").config
    assert HybridConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="sleepy"):
        HybridConfig.from_dict(config.to_dict() | {"sleepy": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 3
    with pytest.raises(ValueError, match="^passes:"):
        tiny(window=None, passes=2)
