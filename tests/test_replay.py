"""Sleep by replay passes: against a plain transcription, against the layer that replays alone, and in every use."""

import functools
import json
import math

import pytest
import small
import torch
import torch.nn.functional as F
from cases import slow_unless
from commands import read, run
from safetensors import safe_open
from safetensors.torch import save_file
from small import REPLAY, WINDOW, assert_same_state, fast_weights, same, tokens

import sleep_ops.cli
import sleep_ops.model.session
from sleep_ops import SleepGDNLayer, SleepSession, gated_delta_rule
from sleep_ops.layers.attention import rotate
from sleep_ops.layers.mixer import ReplayInputs
from sleep_ops.training import load_run

tiny = functools.partial(small.tiny, sleep_kind="replay", dt_bias=-1)


def transcription(model, ids):
    """Wake passes and replays written out for one row: (logits of every token, fast weights after the last window)."""
    c = model.config
    first, last = c.loop_range
    kept = {i: [] for i in range(len(model.blocks))}  # (position, key, value) of the tokens attention still holds
    inputs = {i: [] for i in range(len(model.blocks))}  # the inputs of the convolutions
    fast = {i: torch.zeros(1, 2, 8, 8).double() for i, b in enumerate(model.blocks) if b.fast_weights}
    logits = []

    def attention(i, x, begin):
        m = model.blocks[i].mixer
        q, k, v = (p(x).view(x.shape[1], -1, m.head_dim) for p in (m.q_proj, m.k_proj, m.v_proj))
        frequency = m.rope_theta ** (-torch.arange(0, m.head_dim, 2).double() / m.head_dim)
        out = []
        for t in range(x.shape[1]):
            angle = (begin + t) * frequency
            cos, sin = angle.cos().float()[None], angle.sin().float()[None]
            kept[i].append((begin + t, rotate(k[t], cos, sin), v[t]))
            seen = [entry for entry in kept[i] if begin + t - entry[0] < WINDOW]
            keys, values = (torch.stack([entry[n] for entry in seen]).expand(-1, q.shape[1], -1) for n in (1, 2))
            weight = (torch.einsum("hd,shd->hs", rotate(q[t], cos, sin), keys) * m.head_dim**-0.5).softmax(-1)
            out.append(torch.einsum("hs,shd->hd", weight, values).flatten())
        return m.o_proj(torch.stack(out)[None])

    def gdn(i, x):
        m = model.blocks[i].mixer
        before = sum(map(len, inputs[i]))
        inputs[i].append(x[0])
        seen = torch.cat(inputs[i])
        padded = F.pad(seen, (0, 0, m.conv_size - 1, 0))

        def convolved(projection, convolution):
            z = F.conv1d(projection(padded).T[None], convolution.weight[:, None], groups=convolution.weight.shape[0])
            return F.silu(z[0].T[before:]).view(1, x.shape[1], -1, 8)

        q, k, v = convolved(m.q_proj, m.q_conv1d), convolved(m.k_proj, m.k_conv1d), convolved(m.v_proj, m.v_conv1d)
        k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        g = -m.A_log.exp() * F.softplus(m.a_proj(x) + m.dt_bias)
        beta = m.b_proj(x).sigmoid()
        o, fast[i] = gated_delta_rule(q, k, v, g, beta, initial_state=fast[i], impl="reference")
        o = m.o_norm(o, m.g_proj(x).view(o.shape))
        return m.o_proj(o.flatten(2)), (q, k, v, g, beta)

    for begin in range(0, ids.shape[1], WINDOW):
        h, written = model.embed(ids[:, begin : begin + WINDOW]), {}
        for i, block in enumerate(model.blocks):
            x = block.mixer_norm(h)
            if block.fast_weights:
                y, written[i] = gdn(i, x)
            else:
                y = attention(i, x, begin)
            h = h + y
            h = h + block.mlp(block.mlp_norm(h))
        logits.append(model.lm_head(model.norm(h)))
        if h.shape[1] < WINDOW:
            break
        for i in range(first, last + 1):
            for _ in range(c.passes - 1 if i in fast else 0):
                fast[i] = gated_delta_rule(*written[i], initial_state=fast[i], impl="reference").final_state
        if c.eviction == "hard":
            kept = {i: [] for i in kept}
    return torch.cat(logits, dim=1), list(fast.values())


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("loop", [None, (1, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("passes", slow_unless(["5"], [2, 5]))
def test_equals_the_transcription(eviction, loop, passes):
    model, ids = tiny(eviction=eviction, loop=loop, passes=passes), tokens()
    labels = torch.full_like(ids, -100)
    labels[:, 3:4] = 2
    labels[:, 15:] = 1
    out = model(ids, labels=labels, all_logits=True)
    out.loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logits, states = zip(*(transcription(model, row[None]) for row in ids), strict=True)
    logits = torch.cat(logits)
    same(out.logits, logits)
    same(fast_weights(model, out.state), [torch.cat(rows) for rows in zip(*states, strict=True)])
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    for name, parameter in model.named_parameters():
        same(ours[name], parameter.grad, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("passes", [1, 2, 7, math.inf])
def test_one_block_is_the_layer_that_replays_alone(passes):
    model, ids = tiny(layers=("gdn",), passes=passes), tokens(length=2 * WINDOW)
    layer = SleepGDNLayer(16, num_heads=2, head_dim=8, passes=passes, window=WINDOW, output_pass="first").double()
    block = model.blocks[0]
    layer.load_state_dict(block.mixer.state_dict())
    h = model.embed(ids)
    y, state = layer(block.mixer_norm(h), return_state=True)
    h = h + y
    out = model(ids)
    same(out.logits, model.predict(h + block.mlp(block.mlp_norm(h))))
    same(tuple(out.state.blocks[0]), tuple(state))


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_one_pass_is_one_pass(eviction):
    ids = tokens()
    replaying, refining = (tiny(eviction=eviction, sleep_kind=kind)(ids) for kind in ("replay", "refine"))
    assert torch.equal(replaying.logits, refining.logits)
    for s, t in zip(replaying.state.blocks, refining.state.blocks, strict=True):
        assert all(map(torch.equal, s, t))
    assert set(replaying.state.writes) == {None}


def test_more_than_one_pass_is_not_a_refining_pass():
    ids = tokens()
    assert not torch.allclose(tiny(passes=2)(ids).logits, tiny(passes=2, sleep_kind="refine")(ids).logits)


@pytest.mark.parametrize("loop", [None, (1, 2)])
def test_endless_passes_are_very_many(loop):
    ids, labels, results = tokens(), tokens(seed=2), []
    for passes in (100, math.inf):
        model = tiny(passes=passes, loop=loop)
        out = model(ids, labels=labels)
        out.loss.backward()
        results.append([out.logits, *fast_weights(model, out.state), *(p.grad for p in model.parameters())])
    same(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("settings", REPLAY)
def test_rows_out_of_phase_live_as_if_alone(settings):
    """Prompts of different lengths, read on and put to sleep early: some rows sleep where others do not."""
    model, more = tiny(**settings), tokens(3, 8, seed=7)
    prompts = [tokens(1, n, seed=n) for n in (9, 4, 5)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, 9 - prompt.shape[1] :], mask[b, 9 - prompt.shape[1] :] = prompt[0], 1
    together = SleepSession(model)
    first = together.read(ids, mask)
    assert together.state.in_window == (4, 4, 0)
    steps = []
    for t, live in enumerate([(0, 0, 1), (1, 1, 2), (2, 2, 3)]):
        steps.append(together.step(more[:, t]))
        assert together.state.in_window == live and together.state.writes[1].k.shape[1] == max(live)
    together.sleep()
    steps += [together.step(more[:, t]) for t in range(3, 8)]
    for b, prompt in enumerate(prompts):
        alone = SleepSession(model)
        same(first[b : b + 1], alone.read(prompt))
        expected = [alone.step(more[b : b + 1, t]) for t in range(3)]
        alone.sleep()
        expected += [alone.step(more[b : b + 1, t]) for t in range(3, 8)]
        same(torch.stack(steps)[:, b : b + 1], torch.stack(expected))
        same([s[b] for s in fast_weights(model, together.state)], [s[0] for s in fast_weights(model, alone.state)])


def test_an_early_sleep_replays_what_was_read():
    model, ids = tiny(passes=4), tokens(2, 3)
    session = SleepSession(model)
    session.read(ids)
    state = session.state
    session.sleep()
    assert session.state.in_window == (0, 0) and set(session.state.writes) == {None}
    for i in (1, 3):
        awake, writes = state.blocks[i], state.writes[i]
        expected = awake.fast_weights
        for _ in range(3):
            expected = model.blocks[i].mixer.replay(writes, expected, passes=1)
        same(session.state.blocks[i].fast_weights, expected)
        assert torch.equal(session.state.blocks[i].conv_state, awake.conv_state)
    assert session.state.blocks[0].keys.shape[1] == 0 and state.blocks[0].keys.shape[1] == 3


@pytest.mark.parametrize("passes", [3, math.inf])
def test_unlabelled_windows_alone_sleep(passes):
    model, ids = tiny(passes=passes, sleep_on="unlabelled"), tokens()
    labels = torch.full_like(ids, -100)
    labels[0, WINDOW : 2 * WINDOW] = 1  # row 0 stays awake in window 1, row 1 sleeps in it
    state, part = model(ids[:, :WINDOW]).state, slice(WINDOW, 2 * WINDOW)
    out = model(ids[:, part], labels=labels[:, part], state=state).state
    slept = model(ids[:, part], state=state).state
    awake = model(ids[:, part], state=state, passes=1).state
    for row, expected in ((0, awake), (1, slept)):
        same([s[row] for s in fast_weights(model, out)], [s[row] for s in fast_weights(model, expected)])
    assert not torch.allclose(fast_weights(model, slept)[0], fast_weights(model, awake)[0])


def test_nothing_is_done_that_nothing_can_see(monkeypatch):
    model, ids = tiny(passes=9), tokens(batch=1, length=12)
    labels = torch.full_like(ids, -100)
    labels[:, 7] = 1
    calls = dict(mlp=0, gate=0, attention=0, replay=0)
    for key, module in (
        ("mlp", model.blocks[3].mlp),
        ("gate", model.blocks[3].mixer.g_proj),
        ("attention", model.blocks[0].mixer.q_proj),
    ):
        module.register_forward_hook(lambda *a, key=key: calls.__setitem__(key, calls[key] + 1))
    replay = SleepGDNLayer.replay

    def counted(*args, **kwargs):
        calls["replay"] += 1
        return replay(*args, **kwargs)

    monkeypatch.setattr(SleepGDNLayer, "replay", counted)
    loss = model(ids, labels=labels, return_state=False).loss
    # window 0 ends at the last block's state and is replayed, once for all N; window 1 is answered; window 2 not read
    assert calls == dict(mlp=1, gate=1, attention=2, replay=2)
    same(loss, model(ids, labels=labels).loss)
    assert calls["replay"] == 2 + 4
    tiny(passes=9, loop=(0, 0))(ids)
    tiny(passes=1)(ids)
    assert calls["replay"] == 2 + 4


def test_a_state_moves_with_what_it_will_replay():
    state = tiny(passes=2, loop=(1, 2))(tokens(length=8)).state
    assert [w is None for w in state.writes] == [True, False, True, True]
    moved = state.to(dtype=torch.bfloat16)
    assert {x.dtype for x in moved.writes[1]} == {torch.bfloat16}
    assert moved.blocks[1].fast_weights.dtype == torch.float32 and set(moved.start) == {None}


@pytest.mark.parametrize("settings", REPLAY)
def test_saved_sessions_go_on_as_if_never_saved(settings, tmp_path):
    model = tiny(**settings)
    session = SleepSession(model)
    session.read(tokens(2, 12))
    fork = session.fork()
    session.save(tmp_path / "session")
    loaded = SleepSession.load(tmp_path / "session", model)
    assert loaded.passes == fork.passes == settings["passes"]
    assert_same_state(model, loaded.state, session.state)
    more = tokens(2, 9, seed=2)
    logits = session.read(more)
    assert torch.equal(loaded.read(more), logits) and torch.equal(fork.read(more), logits)


def test_sessions_keep_to_their_kind(tmp_path):
    replaying, refining = tiny(passes=2), tiny(passes=2, sleep_kind="refine")
    session = SleepSession(replaying)
    session.read(tokens(1, 7))
    session.save(tmp_path / "session")
    with pytest.raises(ValueError, match="^path: .*sleep_kind 'replay'"):
        SleepSession.load(tmp_path / "session", refining)

    session = SleepSession(refining)
    session.read(tokens(1, 7))
    session.save(tmp_path / "session")
    with safe_open(tmp_path / "session", framework="pt") as file:
        tensors, header = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    del header["digest"]
    config = json.loads(header["config"])
    assert config.pop("sleep_kind") == "refine"
    header["config"] = json.dumps(config)
    header["digest"] = sleep_ops.model.session._digest(tensors, header)
    save_file(tensors, tmp_path / "old", metadata=header)
    old, more = SleepSession.load(tmp_path / "old", refining), tokens(1, 6, seed=3)
    assert torch.equal(old.read(more), session.read(more))
    with pytest.raises(ValueError, match="^path: .*sleep_kind 'refine'"):
        SleepSession.load(tmp_path / "old", replaying)


def test_passes_that_do_not_converge_are_refused_and_change_nothing():
    model = tiny(passes=math.inf)
    torch.nn.init.constant_(model.blocks[3].mixer.A_log, -200.0)  # no decay, and fewer tokens than key dims
    session = SleepSession(model)
    session.read(tokens(2, 4))
    before = session.state
    for act in (lambda: session.read(tokens(2, 4)), session.sleep, lambda: model(tokens())):
        with pytest.raises(ValueError, match="^passes: .*math.inf"):
            act()
    assert session.state is before
    assert model(tokens(), passes=50).logits.isfinite().all()


def test_bad_calls_name_the_argument():
    refining, replaying, ids = tiny(sleep_kind="refine"), tiny(), tokens()
    with pytest.raises(ValueError, match="^passes: .*'replay' only"):
        refining(ids, passes=math.inf)
    with pytest.raises(ValueError, match="^passes: .*'replay' only"):
        SleepSession(refining, passes=math.inf)
    with pytest.raises(ValueError, match="^state: .*'replay'"):
        replaying(ids, state=refining(ids).state)
    with pytest.raises(ValueError, match="^state: .*'refine'"):
        refining(ids, state=replaying(ids).state)
    with pytest.raises(ValueError, match="^passes: expected 1, .*got inf"):
        replaying(ids, state=replaying(ids[:, :3]).state, passes=math.inf)


def test_endless_replays_from_the_command_line(tmp_path):
    small = "--t 2 --strings 2 --bits 6 --width 16 --heads 2 --layers attn-gdn --batch 8 --steps 1 --eval-samples 8"
    train = ("train", "rule110", *small.split(), "--device", "cpu", "--out", tmp_path / "run", "--passes", "inf")
    assert "passes:" in run(*train, code=2) and not (tmp_path / "run").exists()
    assert "sleep_kind:" in run(*train, "--sleep-kind", "dream", code=2)
    assert "finished" in run(*train, "--sleep-kind", "replay")
    config = load_run(tmp_path / "run", device="cpu")[2].config
    assert (config.sleep_kind, config.passes) == ("replay", math.inf)
    evaluate = ("eval", tmp_path / "run", "--samples", 8, "--device", "cpu")
    run(*evaluate, "--passes", "1,3,inf", "--out", tmp_path / "eval.csv")
    assert [row["passes"] for row in read(tmp_path / "eval.csv")] == ["1", "3", "inf"]
    assert "trained with N=inf" in run(*evaluate)
    assert "passes:" in run(*evaluate, "--passes", "1,few", code=2)


def test_writes_of_a_layer_replay_its_window():
    torch.manual_seed(0)
    layer = SleepGDNLayer(16, num_heads=2, head_dim=8, num_v_heads=4, head_v_dim=6).double()
    x, mask = torch.randn(3, 7, 16).double(), torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = mask[2, 4:] = 0
    _, state, writes = layer(x, attention_mask=mask, return_writes=True)
    _, updated, again = layer(x, output=False, return_writes=True)
    same(tuple(updated), tuple(layer(x, return_state=True)[1]))
    same(tuple(again), tuple(layer(x, return_writes=True)[2]))
    sleeping = SleepGDNLayer(16, num_heads=2, head_dim=8, num_v_heads=4, head_v_dim=6, passes=4).double()
    sleeping.load_state_dict(layer.state_dict())
    expected = sleeping(x, attention_mask=mask, return_state=True)[1].fast_weights
    same(layer.replay(writes, state.fast_weights, passes=3), expected)
    lengths = mask.sum(1)
    filler = torch.arange(7) >= lengths[:, None]  # counts for nothing
    filled = ReplayInputs(*(w.masked_fill(filler.view(3, 7, *[1] * (w.dim() - 2)), 1.0) for w in writes))
    same(layer.replay(filled, state.fast_weights, passes=3, lengths=lengths), expected)


@pytest.mark.parametrize(
    "name, change",
    [
        ("writes", dict(writes=torch.zeros(2, 3, 2, 8))),
        ("writes.k", dict(k=torch.zeros(2, 3, 1, 8))),
        ("writes.k", dict(k=torch.zeros(2, 0, 2, 8))),
        ("writes.v", dict(v=torch.zeros(2, 3, 2, 8).double())),
        ("writes.a", dict(a=torch.zeros(2, 3))),
        ("writes.b", dict(b=torch.zeros(2, 4, 2))),
        ("fast_weights", dict(fast_weights=torch.zeros(1, 2, 8, 8))),
        ("fast_weights", dict(fast_weights=None)),
        ("passes", dict(passes=0)),
        ("passes", dict(passes=1.5)),
        ("lengths", dict(lengths=torch.tensor([1, 4]))),
    ],
    ids=str,
)
def test_bad_replays_name_the_argument(name, change):
    layer = SleepGDNLayer(16, num_heads=2, head_dim=8)
    heads, gates = torch.zeros(2, 3, 2, 8), torch.zeros(2, 3, 2)
    writes = ReplayInputs(heads, heads, gates, gates)
    arguments = dict(writes=writes, fast_weights=torch.zeros(2, 2, 8, 8), passes=2)
    for key, value in change.items():
        if key in ReplayInputs._fields:
            key, value = "writes", writes._replace(**{key: value})
        arguments[key] = value
    with pytest.raises(ValueError, match=f"^{name}: expected .*got "):
        layer.replay(**arguments)
