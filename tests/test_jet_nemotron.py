"""The port of Jet-Nemotron against plain transcriptions of it and of sleep over it, on tiny published layouts."""

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
from sleep_ops.adapters.jet_nemotron import JetNemotron, JetNemotronConfig
from sleep_ops.layers.attention import Attention
from sleep_ops.layers.jet import JetBlock

WINDOW = 5
JET = {
    "conv_size": 4,
    "dconv_generator_reduction": 8,
    "dconv_implementation": "triton",
    "expand_v": 2.6666666667,
    "head_dim": 6,
    "mode": "chunk",
    "norm_eps": "1e-5",
    "num_heads": 2,
}
CONFIG = {
    "architectures": ["JetNemotronForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "efficient_attention_config": {"jet": JET, "swa": {"window_size": 3}},
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "layer_types": ["jet", "attn", "jet", "swa", "jet"],
    "max_position_embeddings": 64,
    "max_window_layers": 5,
    "model_type": "jet_nemotron",
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.3",
    "use_cache": True,
    "use_mrope": False,
    "vocab_size": 13,
}
# config.json of the published 2B model
JET_NEMOTRON_2B = CONFIG | {
    "efficient_attention_config": {"jet": JET | {"head_dim": 96, "num_heads": 12}, "swa": {"window_size": 1152}},
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "layer_types": ["jet"] * 14 + ["attn"] + ["jet"] * 4 + ["attn", "swa", "swa"] + ["jet"] * 6,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}


def published_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published checkpoint; the head is tied, and so not among them."""
    d, f, jet = c["hidden_size"], c["intermediate_size"], c["efficient_attention_config"]["jet"]
    kv = d // c["num_attention_heads"] * c["num_key_value_heads"]
    key, heads = jet["num_heads"] * jet["head_dim"], jet["num_heads"]
    value = int(key * jet["expand_v"])
    hidden = value // jet["dconv_generator_reduction"]
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    for i, kind in enumerate(c["layer_types"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{x}.weight": (d,) for x in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.mlp.{x}_proj.weight": (f, d) for x in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (d, f)}
        mixer = f"{layer}.self_attn"
        if kind == "jet":
            shapes |= {f"{mixer}.{x}_proj.weight": (key, d) for x in "qk"}
            shapes |= {f"{mixer}.{x}_proj.weight": (value, d) for x in "vg"}
            shapes |= {f"{mixer}.{x}_proj.weight": (heads, d) for x in "ab"}
            shapes |= {f"{mixer}.o_proj.weight": (d, value), f"{mixer}.o_norm.weight": (value // heads,)}
            shapes |= {f"{mixer}.A_log": (heads,), f"{mixer}.dt_bias": (heads,)}
            generator = f"{mixer}.dynamic_conv1d.kernel_generator"
            shapes |= {f"{generator}.w1.weight": (hidden, d)}
            shapes |= {f"{generator}.w2.weight": (value * jet["conv_size"], hidden)}
            shapes |= {f"{generator}.w2.bias": (value * jet["conv_size"],)}
        else:
            shapes |= {f"{mixer}.{x}_proj.weight": (d, d) for x in "qo"} | {f"{mixer}.q_proj.bias": (d,)}
            shapes |= {f"{mixer}.{x}_proj.weight": (kv, d) for x in "kv"}
            shapes |= {f"{mixer}.{x}_proj.bias": (kv,) for x in "kv"}
    return shapes


def write_checkpoint(path):
    """A random checkpoint in the published layout."""
    path.mkdir(exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=draw, dtype=torch.float64) * 0.4 + ("norm" in name)
        for name, shape in published_shapes(CONFIG).items()
    }
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("jet-nemotron")
    write_checkpoint(path)
    return path


tokens = functools.partial(small.tokens, vocab=CONFIG["vocab_size"])


class Transcription:
    """Jet-Nemotron from a checkpoint's tensors, one text [T], token by token; no code shared with the port."""

    def __init__(self, folder):
        self.weights = load_file(folder / "model.safetensors")
        self.kinds = CONFIG["layer_types"]
        self.new = {i: (torch.zeros(2, 6, 16).double(), torch.zeros(3, 32).double()) for i in self.of("jet")}
        self.kept = {i: [] for i in self.of("attn", "swa")}

    def of(self, *kinds):
        return [i for i, kind in enumerate(self.kinds) if kind in kinds]

    def __getitem__(self, name):
        return self.weights[f"model.{name}.weight"]

    def norm(self, name, x, eps=1e-6):
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * self[name]

    def jet(self, name, x, state):
        S, conv_state = state
        generator = f"{name}.dynamic_conv1d.kernel_generator"
        kernels = F.silu(x @ self[f"{generator}.w1"].T) @ self[f"{generator}.w2"].T
        kernels = (kernels + self.weights[f"model.{generator}.w2.bias"]).view(-1, 32, 4)
        raw = torch.cat([conv_state, x @ self[f"{name}.v_proj"].T])
        q, k = (F.silu(x @ self[f"{name}.{p}_proj"].T).view(-1, 2, 6) for p in "qk")
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        beta = (x @ self[f"{name}.b_proj"].T).sigmoid()
        g = -self.weights[f"model.{name}.A_log"].exp()
        g = g * F.softplus(x @ self[f"{name}.a_proj"].T + self.weights[f"model.{name}.dt_bias"])
        out = []
        for t in range(x.shape[0]):
            v = F.silu((raw[t : t + 4].T * kernels[t]).sum(-1)).view(2, 16)
            S = S * g[t].exp()[:, None, None]
            S = S + torch.einsum("hk,hv->hkv", k[t], beta[t][:, None] * (v - torch.einsum("hkv,hk->hv", S, k[t])))
            out.append(torch.einsum("hkv,hk->hv", S, q[t]) * 6**-0.5)
        gate = F.silu(x @ self[f"{name}.g_proj"].T).view(-1, 2, 16)
        o = self.norm(f"{name}.o_norm", torch.stack(out), 1e-5) * gate
        return o.flatten(1) @ self[f"{name}.o_proj"].T, (S, raw[-3:])

    def attention(self, name, x, begin, kept, window):
        q, k, v = (
            (x @ self[f"{name}.{p}_proj"].T + self.weights[f"model.{name}.{p}_proj.bias"]).view(len(x), -1, 4)
            for p in "qkv"
        )
        own, out = [], []
        for t in range(len(x)):
            angle = (begin + t) * 1e6 ** (-torch.arange(0, 4, 2).double() / 4)
            cos, sin = angle.cos().float().repeat(2), angle.sin().float().repeat(2)
            turned = [y * cos + torch.cat([-y[:, 2:], y[:, :2]], 1) * sin for y in (q[t], k[t])]
            own.append((begin + t, turned[1], v[t]))
            seen = [e for e in kept + own if begin + t - e[0] < window]
            keys, values = (torch.stack([e[j] for e in seen]).repeat_interleave(2, 1) for j in (1, 2))
            weight = (torch.einsum("hd,shd->hs", turned[0], keys) * 0.5).softmax(-1)
            out.append(torch.einsum("hs,shd->hd", weight, values).flatten())
        return torch.stack(out) @ self[f"{name}.o_proj"].T, own

    def run(self, indices, h, begin, fast, window):
        """Layers over tokens that follow the kept ones: (h, the keys of each attention layer); fast is updated."""
        keys = {}
        for i in indices:
            x = self.norm(f"layers.{i}.input_layernorm", h)
            name = f"layers.{i}.self_attn"
            if i in fast:
                y, fast[i] = self.jet(name, x, fast[i])
            else:
                sees = 3 if self.kinds[i] == "swa" else 10**6
                y, keys[i] = self.attention(name, x, begin, self.kept[i], min(sees, window))
            h = h + y
            x = self.norm(f"layers.{i}.post_attention_layernorm", h)
            gate, up = (x @ self[f"layers.{i}.mlp.{p}_proj"].T for p in ("gate", "up"))
            h = h + (F.silu(gate) * up) @ self[f"layers.{i}.mlp.down_proj"].T
        return h, keys

    def logits(self, h):
        return self.norm("norm", h) @ self["embed_tokens"].T

    def plain(self, ids):
        return self.logits(self.run(range(5), self["embed_tokens"][ids], 0, dict(self.new), 10**6)[0])

    def sleeping(self, ids, passes, eviction, loop):
        """Algorithm 1, window by window: (logits of first passes, every jet layer's final (S, conv_state))."""
        (first, last), fast, logits = loop, dict(self.new), []
        for begin in range(0, len(ids), WINDOW):
            part, start = ids[begin : begin + WINDOW], dict(fast)
            looped, keys = self.run(range(last + 1), self["embed_tokens"][part], begin, fast, WINDOW)
            h, more = self.run(range(last + 1, 5), looped, begin, fast, WINDOW)
            keys |= more
            logits.append(self.logits(h))
            if len(part) < WINDOW:
                break
            for _ in range(passes - 1):
                for i in self.of("jet"):
                    if first <= i <= last:
                        fast[i] = (fast[i][0], start[i][1])
                looped, more = self.run(range(first, last + 1), looped, begin, fast, WINDOW)
                keys |= more
            if passes > 1:
                fast |= {i: start[i] for i in self.of("jet") if i > last}
                keys |= self.run(range(last + 1, 5), looped, begin, fast, WINDOW)[1]
            for i in self.kept:
                self.kept[i] = (self.kept[i] + keys[i])[1 - WINDOW :] if eviction == "sliding" else []
        return torch.cat(logits), fast


def assert_holds(model: JetNemotron, weights: dict):
    held = model.state_dict()
    assert torch.equal(held.pop("lm_head.weight"), weights["model.embed_tokens.weight"])
    assert sorted(held) == sorted(weights)
    for name, x in weights.items():
        assert held[name].dtype == x.dtype and torch.equal(held[name], x), name


def test_reads_a_published_checkpoint(folder):
    model = JetNemotron.from_pretrained(folder, window=WINDOW, passes=2)
    assert_holds(model, load_file(folder / "model.safetensors"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.loop == (1, 3) and model.config.passes == 2
    assert [block.fast_weights for block in model.sleep_blocks] == [True, False, True, False, True]


@pytest.mark.parametrize("max_shard_bytes", [None, 4000], ids=["one-file", "shards"])
def test_what_is_saved_is_read_again(folder, tmp_path, max_shard_bytes):
    model = JetNemotron.from_pretrained(folder, window=WINDOW, passes=3, loop=(0, 3), eviction="sliding")
    model.save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_bytes is not None)
    again = JetNemotron.from_pretrained(tmp_path)
    assert again.config == model.config
    assert_holds(again, load_file(folder / "model.safetensors"))
    assert JetNemotron.from_pretrained(tmp_path, passes=1).config == dataclasses.replace(model.config, passes=1)
    written = json.loads((tmp_path / "config.json").read_text())
    ours = {"architectures", *written} - {"sleep_ops"}
    assert {name: written[name] for name in ours} == {name: CONFIG[name] for name in ours}  # nothing else is changed


def test_untied_heads(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": False}))
    model, ids = JetNemotron.from_pretrained(tmp_path, window=None), tokens()
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    tied = JetNemotron.from_pretrained(folder, window=None)
    assert not torch.allclose(model(ids).logits, tied(ids).logits)


def test_the_published_2b_model_has_its_parameters():
    """1.96B on the model's page; by config.json and the published module definitions, with d = 1536:

    embedding, tied with the head      151936 d                                       233,373,696
    28 x MLP and two norms             3 * 8960 d + 2 d                             1,156,141,056
    4 x attention (12 heads, 2 kv)     2 d d + 2 * 256 d + d + 2 * 256                 22,028,288
    24 x jet: q, k / v, g, o / a, b    2 * 1152 d / 3 * 3072 d / 2 * 12 d             425,558,016
         A_log, dt_bias, o_norm        2 * 12 + 256                                         6,720
         kernels: w1, w2 and its bias  384 d + 384 * 12288 + 12288                    127,696,896
    final norm                         d                                                    1,536
    """
    config = JetNemotronConfig.from_checkpoint(JET_NEMOTRON_2B, window=2000, passes=4)
    with torch.device("meta"):
        model = JetNemotron(config)
    assert sum(p.numel() for p in model.parameters()) == 1_964_806_208
    held = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    assert held.pop("lm_head.weight") == (151936, 1536)
    assert held == published_shapes(JET_NEMOTRON_2B)
    assert config.loop == (7, 20)
    mixers = [layer.self_attn for layer in model.model.layers]
    assert [i for i, m in enumerate(mixers) if isinstance(m, Attention)] == [14, 19, 20, 21]
    assert [mixers[i].sliding_window for i in (14, 19, 20, 21)] == [None, None, 1152, 1152]
    assert all(m.rope_theta == 1e6 and m.head_dim == 128 for m in mixers if isinstance(m, Attention))
    (sizes,) = {
        (m.num_heads, m.head_dim, m.num_v_heads, m.head_v_dim, m.o_norm.eps) for m in mixers if isinstance(m, JetBlock)
    }
    assert sizes == (12, 96, 12, 256, 1e-5)


@pytest.mark.parametrize("window", [None, 18, 50])
def test_one_pass_over_one_window_is_the_plain_model(folder, window):
    model, ids = JetNemotron.from_pretrained(folder, window=window), tokens()
    logits = model(ids).logits
    for b in range(2):
        torch.testing.assert_close(logits[b], Transcription(folder).plain(ids[b]), rtol=1e-7, atol=1e-7)


SLEEPS = [
    pytest.param(dict(eviction=eviction, loop=loop, passes=passes), id=f"{eviction}-{loop}-N{passes}")
    for eviction, loop, passes in itertools.product(("hard", "sliding"), (None, (0, 4), (2, 4)), (1, 2, 3))
]


@pytest.mark.parametrize("options", SLEEPS)
def test_sleeps_as_written(folder, options):
    model, ids = JetNemotron.from_pretrained(folder, window=WINDOW, **options), tokens()
    out = model(ids)
    for b in range(2):
        logits, fast = Transcription(folder).sleeping(ids[b], **(options | dict(loop=model.config.loop)))
        torch.testing.assert_close(out.logits[b], logits, rtol=1e-6, atol=1e-6)
        for i, state in fast.items():
            ours = tuple(x[b] for x in out.state.blocks[i])
            torch.testing.assert_close(ours, state, rtol=1e-6, atol=1e-6)


SLEEPS_AND_REPLAYS = SLEEPS + [pytest.param(dict(sleep_kind="replay", passes=3), id="replay")]


@pytest.mark.parametrize("options", SLEEPS_AND_REPLAYS)
def test_sessions_read_as_the_model_does(folder, options):
    model, ids = JetNemotron.from_pretrained(folder, window=WINDOW, **options), tokens()
    expected = model(ids)
    single = SleepSession(model)
    logits = torch.stack([single.step(ids[:, t]) for t in range(ids.shape[1])], dim=1)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-9, atol=1e-9)
    for s, t in zip(single.state.blocks, expected.state.blocks, strict=True):
        torch.testing.assert_close(s, t, rtol=1e-9, atol=1e-9)


def test_sessions_are_saved_and_go_on(folder, tmp_path):
    model, ids = JetNemotron.from_pretrained(folder, window=WINDOW, passes=2), tokens(length=13)
    session = SleepSession(model)
    session.read(ids)
    session.save(tmp_path / "session.safetensors")
    again = SleepSession.load(
        tmp_path / "session.safetensors", JetNemotron.from_pretrained(folder, window=WINDOW, passes=2)
    )
    assert torch.equal(session.fork().generate(None, 9), again.generate(None, 9))
    with pytest.raises(ValueError, match="^path: expected a session of this model's configuration, got window"):
        SleepSession.load(tmp_path / "session.safetensors", JetNemotron.from_pretrained(folder, window=6, passes=2))


def test_padding_changes_nothing(folder):
    model, text = JetNemotron.from_pretrained(folder, window=WINDOW, passes=2), tokens(1, 13)
    ids, mask = F.pad(text, (4, 2)), F.pad(torch.ones_like(text), (4, 2))
    out = model(ids, attention_mask=mask)
    torch.testing.assert_close(out.logits[mask == 1][None], model(text).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_gradients_reach_every_parameter_through_sleep(folder, checkpointing):
    options = dict(window=WINDOW, passes=2, activation_checkpointing=checkpointing)
    model, ids = JetNemotron.from_pretrained(folder, **options), tokens()
    labels = torch.full_like(ids, -100)
    labels[:, 15:] = 1
    model(ids, labels=labels).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_loads_in_another_dtype(folder):
    model = JetNemotron.from_pretrained(folder, window=WINDOW, passes=2, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    out = model(tokens())
    assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()
    assert out.state.blocks[0].fast_weights.dtype == torch.float32


def test_new_models_start_with_static_convolutions():
    torch.manual_seed(0)
    model = JetNemotron(JetNemotronConfig.from_checkpoint(CONFIG, window=WINDOW, passes=2))
    generator = model.model.layers[0].self_attn.dynamic_conv1d.kernel_generator
    assert not generator.w2.weight.any() and generator.w2.bias.any()
    assert not model.model.layers[1].self_attn.q_proj.bias.any()
    assert 0.01 < model.model.embed_tokens.weight.std() < 0.03
    ids = tokens()
    assert model(ids[:, :-1], labels=ids[:, 1:]).loss.isfinite()


def _jet(**changes):
    return {"efficient_attention_config": {"jet": JET | changes, "swa": {"window_size": 3}}}


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(model_type="qwen2"), "config.json: model_type"),
        (dict(hidden_act="gelu"), "config.json: hidden_act"),
        (dict(rope_scaling={"rope_type": "yarn"}), "config.json: rope_scaling"),
        (dict(layer_types=None), "config.json"),
        (dict(layer_types=["jet"] * 4), "layer_types"),
        (dict(layer_types=["jet"] * 4 + ["mamba"]), "layer_types"),
        (dict(hidden_size=18), "num_attention_heads"),
        (dict(num_key_value_heads=3), "num_key_value_heads"),
        (dict(vocab_size=0), "vocab_size"),
        (dict(rms_norm_eps=0), "rms_norm_eps"),
        (dict(rope_theta=10**400), "rope_theta"),
        (dict(tie_word_embeddings="yes"), "tie_word_embeddings"),
        (dict(efficient_attention_config={"jet": JET}), "efficient_attention_config['swa']"),
        (dict(efficient_attention_config={"swa": {"window_size": 3}}), "efficient_attention_config['jet']"),
        (dict(efficient_attention_config={"jet": JET, "swa": {}}), "efficient_attention_config['swa']['window_size']"),
        (_jet(heads=2), "efficient_attention_config['jet']"),
        (_jet(num_heads=0), "efficient_attention_config['jet']['num_heads']"),
        (_jet(expand_v=2.6), "efficient_attention_config['jet']['expand_v']"),
        (_jet(expand_v=0), "efficient_attention_config['jet']['expand_v']"),
        (_jet(dconv_generator_reduction=33), "efficient_attention_config['jet']['dconv_generator_reduction']"),
        (_jet(norm_eps="small"), "efficient_attention_config['jet']['norm_eps']"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_no_jet_nemotron_is_refused(change, name):
    with pytest.raises(ValueError) as caught:
        JetNemotronConfig.from_checkpoint(CONFIG | change, window=WINDOW)
    assert str(caught.value).startswith(f"{name}: expected ") and ", got " in str(caught.value)


@pytest.mark.parametrize(
    "options, name",
    [
        (dict(), "window"),
        (dict(window=0), "window"),
        (dict(window=5, loop=(2, 5)), "loop"),
        (dict(window=5, passes=0), "passes"),
        (dict(window=5, hidden_size=32), "options"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_options_name_the_argument(folder, options, name):
    with pytest.raises(ValueError, match=f"^{name}: expected .*got "):
        JetNemotron.from_pretrained(folder, **options)


def test_a_checkpoint_of_other_layers_is_refused_by_name(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.A_log"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match="^folder: expected .*JetNemotron .*missing: model.layers.0.self_attn.A_log$"):
        JetNemotron.from_pretrained(tmp_path, window=WINDOW)
