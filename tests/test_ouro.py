"""The port of Ouro against plain transcriptions of Ouro and of sleep over it, on tiny checkpoints as published."""

import dataclasses
import functools
import itertools
import json

import pytest
import small
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from sleep_ops import SleepSession
from sleep_ops.adapters.ouro import Ouro, OuroConfig

VOCAB, WIDTH, HEADS, LAYERS, WINDOW = 13, 16, 2, 3, 5
JET = dict(jet_layers=(0, 2), jet_num_heads=2, jet_head_dim=4, jet_head_v_dim=6)

CONFIG = {
    "architectures": ["OuroForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "early_exit_threshold": 1.0,
    "eos_token_id": 2,
    "head_dim": WIDTH // HEADS,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "model_type": "ouro",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "total_ut_steps": 4,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}
OURO_1_4B = CONFIG | {
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
}


def published_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published checkpoint."""
    d, f = c["hidden_size"], c["intermediate_size"]
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "lm_head.weight": (c["vocab_size"], d)}
    shapes |= {"model.norm.weight": (d,), "model.early_exit_gate.weight": (1, d), "model.early_exit_gate.bias": (1,)}
    norms = ("input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2")
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj.weight": (d, d) for x in "qkvo"}
        shapes |= {f"{layer}.mlp.{x}_proj.weight": (f, d) for x in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (d, f)} | {f"{layer}.{x}.weight": (d,) for x in norms}
    return shapes


def write_checkpoint(path):
    """A random checkpoint in the published layout."""
    path.mkdir(exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=draw, dtype=torch.float64) * 0.3 + ("norm" in name)
        for name, shape in published_shapes(CONFIG).items()
    }
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ouro")
    write_checkpoint(path)
    return path


tokens = functools.partial(small.tokens, vocab=VOCAB)


def pretrained(folder, started=True, **options) -> Ouro:
    """From the folder; unless `started`, with inserted layers that do something."""
    torch.manual_seed(2)
    model = Ouro.from_pretrained(folder, **(dict(window=WINDOW) | JET | options))
    if not started:
        for name, parameter in model.model.fast_weights.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5 if "o_proj" in name else 0.3)
    return model


# Ouro and Algorithm 1 written out, for one row; `w` maps published names to tensors.


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x, position):
    """The two halves of each head as a complex number, turned. x [HEADS, D]."""
    half = x.shape[-1] // 2
    angle = position * 1e6 ** (-torch.arange(half).double() / half)
    turn = torch.complex(angle.cos().float().double(), angle.sin().float().double())
    return torch.view_as_real(torch.complex(x[..., :half], x[..., half:]) * turn).transpose(-1, -2).flatten(-2)


def ouro_layer(w, i, h, begin=0, kept=(), window=10**6):
    """h [T, WIDTH] of the positions from `begin` -> (h, their [(position, key, value)]); kept: those before them."""
    name = f"model.layers.{i}"
    x = rms(h, w[f"{name}.input_layernorm.weight"])
    q, k, v = ((x @ w[f"{name}.self_attn.{c}_proj.weight"].T).view(len(h), HEADS, -1) for c in "qkv")
    own, out = [], []
    for t in range(len(h)):
        own.append((begin + t, rotated(k[t], begin + t), v[t]))
        seen = [entry for entry in (*kept, *own) if begin + t - entry[0] < window]
        keys, values = torch.stack([e[1] for e in seen]), torch.stack([e[2] for e in seen])
        score = torch.einsum("hd,shd->hs", rotated(q[t], begin + t), keys) / q.shape[-1] ** 0.5
        out.append(torch.einsum("hs,shd->hd", score.softmax(-1), values).flatten())
    y = torch.stack(out) @ w[f"{name}.self_attn.o_proj.weight"].T
    h = h + rms(y, w[f"{name}.input_layernorm_2.weight"])
    x = rms(h, w[f"{name}.post_attention_layernorm.weight"])
    gate, up, down = (w[f"{name}.mlp.{c}_proj.weight"].T for c in ("gate", "up", "down"))
    return h + rms((F.silu(x @ gate) * (x @ up)) @ down, w[f"{name}.post_attention_layernorm_2.weight"]), own


def plain_ouro(w, ids, steps):
    """ids [T] -> logits [T, steps, VOCAB] and exit probabilities [T, steps]."""
    h, logits, probabilities = w["model.embed_tokens.weight"][ids], [], []
    left = torch.ones(len(ids), dtype=torch.float64)
    for step in range(steps):
        for i in range(LAYERS):
            h, _ = ouro_layer(w, i, h)
        h = rms(h, w["model.norm.weight"])
        logits.append(h @ w["lm_head.weight"].T)
        stop = torch.sigmoid(h @ w["model.early_exit_gate.weight"][0] + w["model.early_exit_gate.bias"])
        probabilities.append(left * stop if step < steps - 1 else left)
        left = left * (1 - stop)
    return torch.stack(logits, 1), torch.stack(probabilities, 1)


def sleeping_ouro(model, ids, passes, eviction):
    """Algorithm 1 over ids [T]: first-pass logits [T, VOCAB], and the inserted layers' fast weights after it."""
    w = dict(model.named_parameters())
    inserted = dict(zip(model.config.jet_layers, model.model.fast_weights, strict=True))
    fast = {i: layer.mixer.init_state(1) for i, layer in inserted.items()}
    kept, logits = {i: [] for i in range(LAYERS)}, []
    for begin in range(0, len(ids), WINDOW):
        part, start = ids[begin : begin + WINDOW], dict(fast)
        h = w["model.embed_tokens.weight"][part]
        for n in range(passes if len(part) == WINDOW else 1):
            keys = {}
            for i in range(LAYERS):
                h, keys[i] = ouro_layer(w, i, h, begin, kept[i], WINDOW)
                if i in inserted:
                    x = rms(h, inserted[i].mixer_norm.weight)
                    fast[i] = fast[i]._replace(conv_state=start[i].conv_state)
                    y, fast[i] = inserted[i].mixer(x[None], state=fast[i], return_state=True)
                    h = h + y[0]
            h = rms(h, w["model.norm.weight"])
            if n == 0:
                logits.append(h @ w["lm_head.weight"].T)
        kept = {i: (kept[i] + keys[i])[1 - WINDOW :] if eviction == "sliding" else [] for i in kept}
    return torch.cat(logits), [s.fast_weights for s in fast.values()]


@pytest.mark.parametrize("steps", [None, 1, 6], ids=["published", "one", "six"])
def test_plain_ouro(folder, steps):
    model, ids = pretrained(folder, started=False), tokens()
    out = model.step_logits(ids, steps=steps)
    assert out.logits.shape == (2, 18, steps or 4, VOCAB)
    w = load_file(folder / "model.safetensors")
    for row in range(2):
        logits, probabilities = plain_ouro(w, ids[row], steps or 4)
        torch.testing.assert_close(out.logits[row], logits, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out.exit_probabilities[row], probabilities, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.exit_probabilities.sum(-1), torch.ones(2, 18, dtype=torch.float64))


def test_plain_ouro_with_padding(folder):
    model, ids = pretrained(folder), tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 9:] = 0
    out = model.step_logits(ids, mask)
    for row, columns in ((0, slice(4, None)), (1, slice(None, 9))):
        alone = model.step_logits(ids[row : row + 1, columns])
        for padded, exact in zip(out, alone, strict=True):
            torch.testing.assert_close(padded[row : row + 1, columns], exact)
    assert not out.logits[mask == 0].any() and not out.exit_probabilities[mask == 0].any()


def test_plain_ouro_is_causal(folder):
    model, ids = pretrained(folder, started=False), tokens()
    torch.testing.assert_close(model.step_logits(ids[:, :7]).logits, model.step_logits(ids).logits[:, :7])


@pytest.mark.parametrize("mixer", ["jet", "gdn"])
@pytest.mark.parametrize("window, passes", [(None, 1), (18, 1), (18, 4)], ids=["endless", "N1", "N4"])
def test_the_start_is_ouro(folder, mixer, window, passes):
    model, ids = pretrained(folder, mixer=mixer, window=window, passes=passes), tokens()
    assert torch.equal(model(ids).logits, model.step_logits(ids, steps=1).logits[:, :, 0])


OPTIONS = [
    pytest.param(eviction, passes, mixer, id=f"{eviction}-N{passes}-{mixer}")
    for eviction, passes, mixer in itertools.product(("hard", "sliding"), (1, 2, 4), ("jet", "gdn"))
]


@pytest.mark.parametrize("eviction, passes, mixer", OPTIONS)
def test_sleep_equals_the_transcription(folder, eviction, passes, mixer):
    model, ids = pretrained(folder, started=False, eviction=eviction, passes=passes, mixer=mixer), tokens()
    out = model(ids)
    memories = [s.fast_weights for s, b in zip(out.state.blocks, model.sleep_blocks, strict=True) if b.fast_weights]
    assert len(memories) == 2
    for row in range(2):
        logits, fast = sleeping_ouro(model, ids[row], passes, eviction)
        torch.testing.assert_close(out.logits[row], logits, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close([x[row : row + 1] for x in memories], fast, rtol=1e-7, atol=1e-7)


def test_more_passes_and_inserted_layers_matter(folder):
    ids = tokens()
    logits = [pretrained(folder, started=False, passes=n)(ids).logits for n in (1, 2, 3)]
    for one, other in itertools.combinations(logits, 2):
        assert torch.equal(one[:, :WINDOW], other[:, :WINDOW])
        assert (one[:, WINDOW:] - other[:, WINDOW:]).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_gradients_equal_the_transcription(folder, eviction, checkpointing):
    options = dict(eviction=eviction, passes=3, activation_checkpointing=checkpointing)
    model, ids = pretrained(folder, started=False, **options), tokens(batch=1) % (VOCAB - 1)
    ids[0, 1] = VOCAB - 1  # seen in the first window alone
    labels = torch.full_like(ids, -100)
    labels[:, 15:] = 1
    model(ids, labels=labels).loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert {n for n, _ in model.named_parameters()} - set(ours) == {
        f"model.early_exit_gate.{x}" for x in ("weight", "bias")
    }
    model.zero_grad()
    F.cross_entropy(sleeping_ouro(model, ids[0], 3, eviction)[0], labels[0]).backward()
    for name, gradient in ours.items():
        expected = model.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        assert gradient.abs().max() > 0, name
    assert ours["model.embed_tokens.weight"][VOCAB - 1].abs().max() > 0


def test_new_layers_can_begin_to_learn(folder):
    model, ids = pretrained(folder, passes=2), tokens()
    model(ids, labels=ids).loss.backward()
    for layer in model.model.fast_weights:
        assert layer.mixer.o_proj.weight.grad.abs().max() > 0


READINGS = [
    pytest.param(dict(eviction="hard", passes=1), id="hard-N1"),
    pytest.param(dict(eviction="hard", passes=3), id="hard-N3"),
    pytest.param(dict(eviction="sliding", passes=3), id="sliding-N3"),
    pytest.param(dict(eviction="sliding", passes=2, mixer="gdn"), id="sliding-N2-gdn"),
    pytest.param(dict(eviction="hard", passes=3, sleep_kind="replay"), id="replay-N3"),
]


@pytest.mark.parametrize("options", READINGS)
def test_sessions_read_alike_at_once_by_chunks_and_by_token(folder, options):
    model, ids = pretrained(folder, started=False, **options), tokens()
    expected = model(ids)
    for sizes in ([18], [3, 7, 1, 7], [1] * 18):
        session = SleepSession(model)
        logits = torch.cat([session.read(part, all_logits=True) for part in ids.split(sizes, dim=1)], dim=1)
        torch.testing.assert_close(logits, expected.logits, rtol=1e-7, atol=1e-7)
        for mine, theirs in zip(session.state.blocks, expected.state.blocks, strict=True):
            torch.testing.assert_close(tuple(mine), tuple(theirs), rtol=1e-7, atol=1e-7)


def test_a_saved_session_goes_on(folder, tmp_path):
    model, ids = pretrained(folder, started=False, passes=2), tokens()
    session = SleepSession(model)
    session.read(ids)
    session.save(tmp_path / "session")
    again = SleepSession.load(tmp_path / "session", model)
    assert torch.equal(again.generate(max_new_tokens=9), session.generate(max_new_tokens=9))
    other = pretrained(folder, passes=2, jet_layers=(0, 1))
    with pytest.raises(ValueError, match="jet_layers"):
        SleepSession.load(tmp_path / "session", other)


def test_padding_changes_nothing(folder):
    model, ids = pretrained(folder, started=False, passes=2), tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 9:] = 0
    logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[:1, 4:], model(ids[:1, 4:]).logits)
    torch.testing.assert_close(logits[1:, :9], model(ids[1:, :9]).logits)


@pytest.mark.parametrize("mixer", ["jet", "gdn"])
def test_ouro_1_4b(mixer):
    with torch.device("meta"):
        model = Ouro(OuroConfig.from_checkpoint(OURO_1_4B, window=2000, passes=4, mixer=mixer))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    own = {name: shape for name, shape in shapes.items() if not name.startswith("model.fast_weights.")}
    assert own == published_shapes(OURO_1_4B)
    count = sum(model.get_parameter(name).numel() for name in own)
    assert count == 1_434_652_673
    inserted = sum(p.numel() for p in model.model.fast_weights.parameters())
    assert 0.05 * count < inserted < 0.1 * count
    assert model.config.jet_layers == (3, 7, 11, 15, 19, 23)
    assert [i for i, block in enumerate(model.sleep_blocks) if block.fast_weights] == [4, 9, 14, 19, 24, 29]
    assert model.settings.total_ut_steps == 4 and model.settings.rope_theta == 1e6


@pytest.mark.parametrize(
    "layers, expected", [(24, (3, 7, 11, 15, 19, 23)), (48, (7, 15, 23, 31, 39, 47)), (3, (0, 1, 2))]
)
def test_default_places(layers, expected):
    config = OuroConfig.from_checkpoint(CONFIG | {"num_hidden_layers": layers}, window=5)
    assert config.jet_layers == expected


def test_without_inserted_layers(folder):
    model, ids = pretrained(folder, jet_layers=(), passes=2), tokens()
    assert dict(model.named_parameters()).keys() == published_shapes(CONFIG).keys()
    w = load_file(folder / "model.safetensors")
    logits = torch.cat([plain_ouro(w, part, 1)[0] for part in ids[0].split(WINDOW)])[:, 0]
    torch.testing.assert_close(model(ids[:1]).logits[0], logits, rtol=1e-6, atol=1e-6)  # rotary: relative positions


def test_saving_and_loading_again(folder, tmp_path):
    model, ids = pretrained(folder, started=False, passes=3, eviction="sliding"), tokens()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_bytes=20_000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    for name in ("whole", "shards"):
        again = Ouro.from_pretrained(tmp_path / name)
        assert again.config == model.config
        assert torch.equal(again(ids).logits, model(ids).logits)
    changed = Ouro.from_pretrained(tmp_path / "whole", passes=1, eviction="hard")
    same = Ouro(dataclasses.replace(model.config, passes=1, eviction="hard")).double()
    same.load_state_dict(model.state_dict())
    assert torch.equal(changed(ids).logits, same(ids).logits)
    assert (changed.config.passes, changed.config.window) == (1, WINDOW)
    with pytest.raises(ValueError, match="options: .*jet_layers"):
        Ouro.from_pretrained(tmp_path / "whole", jet_layers=(0, 1))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=["stored", "float32", "bfloat16"])
def test_dtype_of_loaded_weights(folder, dtype):
    model = pretrained(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.float64}
    assert model(tokens()).logits.dtype == (dtype or torch.float64)
    marked = {name.split(".")[-1] for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert {"A_log", "dt_bias"} <= marked


def test_incomplete_checkpoints_are_refused(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.input_layernorm_2.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match="missing: model.layers.1.input_layernorm_2.weight"):
        pretrained(tmp_path)
    pretrained(folder).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.fast_weights.1.mixer.o_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing: model.fast_weights.1.mixer.o_proj.weight"):
        Ouro.from_pretrained(tmp_path)


def test_tied_embeddings(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": True}))
    model = pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_where_the_rotary_base_stands():
    published = {name: value for name, value in CONFIG.items() if not name.startswith("rope")}
    newer = published | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert OuroConfig.from_checkpoint(newer, window=5).rope_theta == 5e5


REFUSED = [
    pytest.param({"model_type": "qwen3"}, {}, "model_type: expected 'ouro', got 'qwen3'", id="another-model"),
    pytest.param({"hidden_act": "gelu"}, {}, "hidden_act", id="activation"),
    pytest.param({"use_sliding_window": True}, {}, "use_sliding_window", id="sliding-window"),
    pytest.param({"rope_scaling": {"type": "linear", "factor": 2.0}}, {}, "rope_scaling", id="rope-scaling"),
    pytest.param({"rope_theta": None}, {}, "rope_theta", id="no-rotary-base"),
    pytest.param({"num_hidden_layers": None}, {}, "num_hidden_layers", id="no-layers"),
    pytest.param({"head_dim": 5}, {}, "head_dim", id="odd-head-dim"),
    pytest.param({"num_key_value_heads": 3}, {}, "num_key_value_heads", id="groups"),
    pytest.param({"total_ut_steps": 0}, {}, "total_ut_steps", id="no-steps"),
    pytest.param({}, dict(loop=(0, 1)), "loop", id="partial-loop"),
    pytest.param({}, dict(jet_layers=(0, 3)), "jet_layers", id="beyond-the-layers"),
    pytest.param({}, dict(jet_layers=(1, 0)), "jet_layers", id="descending"),
    pytest.param({}, dict(jet_layers=3), "jet_layers", id="not-a-tuple"),
    pytest.param({}, dict(mixer="mamba"), "mixer", id="mixer"),
    pytest.param({}, dict(jet_head_dim=0), "jet_head_dim", id="no-keys"),
    pytest.param({}, dict(passes=0), "passes", id="no-passes"),
    pytest.param({}, dict(windows=3), "windows", id="unknown-option"),
]


@pytest.mark.parametrize("published, options, message", REFUSED)
def test_refused_configurations(published, options, message):
    with pytest.raises(ValueError, match=message):
        OuroConfig.from_checkpoint(CONFIG | published, **(dict(window=5) | options))


def test_a_window_is_asked_for():
    with pytest.raises(ValueError, match="window: expected tokens per window"):
        OuroConfig.from_checkpoint(CONFIG)


def test_bad_steps_are_refused(folder):
    with pytest.raises(ValueError, match="steps"):
        pretrained(folder).step_logits(tokens(), steps=0)
