"""One way in and out for every family: calls, weights, inserted blocks, tokenizers, refusals."""

import json
import subprocess
import sys

import pytest
import torch
from hf_models import VOCAB, build, config, tokens, transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from sleep_ops import SleepSession
from sleep_ops.adapters.checkpoint import WEIGHTS_FILE
from sleep_ops.adapters.hf import from_pretrained
from sleep_ops.adapters.jet_nemotron import JetNemotron, JetNemotronConfig
from sleep_ops.adapters.loading import SleepingTransformer, left_out, load_model, save_model
from sleep_ops.adapters.ouro import Ouro, OuroConfig
from sleep_ops.model.sleeping import sleeping
from sleep_ops.tokenizer import load_tokenizer

SETTINGS = dict(window=8, passes=2, eviction="sliding")
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2)


def ouro(**options):
    return Ouro(OuroConfig(window=None, jet_layers=(), **SIZES | options))


def jet_nemotron():
    jet = dict(num_heads=2, head_dim=8, expand_v=2.0, dconv_generator_reduction=4)
    config = JetNemotronConfig(
        window=None,
        num_key_value_heads=1,
        layer_types=("jet", "attn", "swa", "jet"),
        efficient_attention_config={"jet": jet, "swa": {"window_size": 6}},
        **SIZES,
    )
    return JetNemotron(config)


def plain(folder, family):
    """A folder as its publisher would have it, without anything of this project in its configuration."""
    torch.manual_seed(0)
    model = {"ouro": ouro, "jet_nemotron": jet_nemotron}.get(family, lambda: build(family))()
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("sleep_ops", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


FAMILIES = {
    "qwen3_5": {},
    "olmo_hybrid": {},
    "llama": {"insert": (1, 3)},
    "ouro": {"insert": (0, 2)},
    "jet_nemotron": {"loop": (1, 2)},
}


def started(model):
    """With inserted blocks that do something."""
    for name, parameter in model.named_parameters():
        if "fast_weights" in name and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_called_alike_and_comes_back_the_same(family, tmp_path):
    model = started(load_model(plain(tmp_path / "plain", family), **SETTINGS, **FAMILIES[family]))
    ids = tokens(2, 20)
    labels = torch.full_like(ids, -100)
    labels[:, 18:] = ids[:, 18:]
    with torch.no_grad():
        out = model(ids, labels=labels, loss_mask=labels != -100, return_state=False)
        alone = model(ids, labels=labels, loss_mask=labels != -100, return_logits=False)
        every, fewer = model(ids), model(ids, passes=1)
    assert alone.logits is None and alone.positions is None and alone.state.position == (20, 20)
    torch.testing.assert_close(alone.loss, out.loss)
    assert out.positions.tolist() == [16, 17, 18, 19] and out.logits.shape == (2, 4, VOCAB) and out.state is None
    assert every.positions.tolist() == list(range(20)) and every.loss is None and every.state.position == (20, 20)
    torch.testing.assert_close(every.logits[:, 16:], out.logits)
    loss = torch.nn.functional.cross_entropy(every.logits[:, 18:].flatten(0, 1), ids[:, 18:].flatten())
    torch.testing.assert_close(out.loss, loss)
    assert not torch.allclose(fewer.logits[:, 16:], out.logits)
    read_on = model(ids[:, 10:], state=model(ids[:, :10]).state)
    torch.testing.assert_close(read_on.logits, every.logits[:, 10:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(SleepSession(model).read(ids), every.logits[:, -1], rtol=1e-4, atol=1e-5)

    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    settings = sleeping(again).settings
    assert (settings.window, settings.passes, settings.eviction) == (8, 2, "sliding")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, every.logits)
    skeleton = load_model(tmp_path / "saved", weights=False)
    assert {k: v.shape for k, v in skeleton.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    skeleton.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(skeleton.eval()(ids).logits, every.logits)


def test_padding_changes_nothing(tmp_path):
    model, ids = load_model(plain(tmp_path, "qwen3_5"), **SETTINGS), tokens(1, 12)
    padded = torch.nn.functional.pad(ids, (3, 0))
    with torch.no_grad():
        out = model(padded, attention_mask=(torch.arange(15) >= 3).long()[None])
        torch.testing.assert_close(out.logits[:, 3:], model(ids).logits, rtol=1e-4, atol=1e-5)
    assert out.positions.tolist() == list(range(15))


def test_a_saved_folder_is_an_ordinary_one(tmp_path):
    model = load_model(plain(tmp_path / "plain", "qwen3_5"), **SETTINGS)
    assert isinstance(model, SleepingTransformer) and model.sleep.settings.passes == 2
    save_model(model, tmp_path / "saved")
    theirs = from_pretrained(tmp_path / "saved")
    assert set(theirs.state_dict()) == set(build("qwen3_5").state_dict())
    assert torch.equal(theirs(tokens(1, 20)).logits, model(tokens(1, 20)).logits)


def test_new_blocks_come_from_the_random_seed(tmp_path):
    folder, found = plain(tmp_path, "llama"), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(load_model(folder, insert=(1,), **SETTINGS).model.model.fast_weights["1"].mixer.q_proj.weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_parameters_are_float32_whatever_is_stored(tmp_path):
    build("qwen3_5", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(tmp_path, **SETTINGS).parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(tmp_path, dtype=torch.bfloat16, **SETTINGS).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_written_in_the_dtypes_of_the_source(family, tmp_path):
    folder = plain(tmp_path / "plain", family)
    weights = {name: x.bfloat16() for name, x in load_file(folder / WEIGHTS_FILE).items()}
    odd = "model.norm.weight"
    weights[odd] = weights[odd].float() + 2**-12
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    model = started(load_model(folder, **SETTINGS, **FAMILIES[family]))
    expected = {name: p.clone() for name, p in model.named_parameters()}
    save_model(model, tmp_path / "saved", source=folder)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    saved = load_file(tmp_path / "saved" / WEIGHTS_FILE)
    assert saved.keys() >= weights.keys() and torch.equal(saved[odd], weights[odd])
    assert {name for name, x in saved.items() if x.dtype == torch.float32} == {odd}
    again = load_model(tmp_path / "saved")
    for name, p in again.named_parameters():
        torch.testing.assert_close(p, expected[name].bfloat16().float() if "fast" in name else expected[name])


def with_vision(folder):
    """A folder as Qwen3.5's are published: text and images, A_log in float32 and all else in bfloat16."""
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=64)
    vision = transformers.Qwen3_5VisionConfig(**vision, num_position_embeddings=16).to_dict()
    torch.manual_seed(0)
    whole = transformers.Qwen3_5Config(text_config=config("qwen3_5").to_dict(), vision_config=vision)
    transformers.Qwen3_5ForConditionalGeneration(whole).save_pretrained(folder)
    weights = load_file(folder / WEIGHTS_FILE)
    weights = {name: x if "A_log" in name else x.bfloat16() for name, x in weights.items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return folder


def test_of_a_model_with_vision_the_language_model_is_written_in_its_dtypes(tmp_path):
    folder = with_vision(tmp_path / "published")
    assert left_out(folder) == ["vision"] and left_out(plain(tmp_path / "plain", "qwen3_5")) == []
    save_model(load_model(folder, **SETTINGS), tmp_path / "saved", source=folder)
    saved = load_file(tmp_path / "saved" / WEIGHTS_FILE)
    assert (
        {name for name, x in saved.items() if x.dtype == torch.float32} == {n for n in saved if "A_log" in n} != set()
    )
    again, stored = load_model(tmp_path / "saved"), load_file(folder / WEIGHTS_FILE)
    name = "layers.0.linear_attn.in_proj_qkv.weight"
    assert torch.equal(again.state_dict()[f"model.model.{name}"], stored[f"model.language_model.{name}"].float())


def word_tokenizer(folder, words=("a", "b", "c"), *, whitespace=True):
    """Words as tokens; with whitespace=False marks are words of their own too."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(("<unk>", "<end>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if whitespace else pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)


@pytest.mark.parametrize("family", ["qwen3_5", "ouro", "jet_nemotron"])
def test_the_tokenizer_comes_along(family, tmp_path):
    folder = plain(tmp_path / "plain", family)
    with pytest.raises(ValueError, match="tokenizer: expected a folder with one of tokenizer.json"):
        load_tokenizer(folder)
    word_tokenizer(folder)
    save_model(load_model(folder, **SETTINGS), tmp_path / "saved", source=folder)
    assert load_tokenizer(tmp_path / "saved")("b c a")["input_ids"] == [3, 4, 2]


def test_no_code_of_a_folder_is_asked_for(tmp_path, monkeypatch):
    """Ouro is published with code of its own, which transformers asks to run even for the tokenizer."""
    folder = plain(tmp_path, "ouro")
    word_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_ouro.OuroConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    assert load_tokenizer(folder)("b c a")["input_ids"] == [3, 4, 2]


def test_what_cannot_be_is_refused(tmp_path):
    folders = {family: plain(tmp_path / family, family) for family in ("qwen3_5", "llama", "jet_nemotron", "ouro")}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"version": 1, "train": {}}')
    for folder in (tmp_path / "nowhere", tmp_path / "run"):
        with pytest.raises(ValueError, match="folder: expected a checkpoint folder.*model_type"):
            load_model(folder, window=8)
    with pytest.raises(ValueError, match="settings: expected some of window.*'layers'"):
        load_model(folders["qwen3_5"], window=8, layers=3)
    with pytest.raises(ValueError, match="insert_fast_weights"):
        load_model(folders["llama"], window=8)
    with pytest.raises(ValueError, match="insert: expected None for jet_nemotron"):
        load_model(folders["jet_nemotron"], window=8, insert=(1,))
    for family in folders:
        with pytest.raises(ValueError, match="window: expected"):
            load_model(folders[family], insert=(1,) if family == "llama" else None)
    save_model(load_model(folders["llama"], window=8, insert=(1,)), tmp_path / "saved")
    with pytest.raises(ValueError, match="insert: expected None for a folder with inserted blocks"):
        load_model(tmp_path / "saved", insert=(2,))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    for wrong in (True, [1], {}, {"layers": [1], "heads": 2}):
        (tmp_path / "saved" / "config.json").write_text(json.dumps(config | {"fast_weights": wrong}))
        with pytest.raises(ValueError, match="fast_weights: expected in the configuration.*layers.*num_heads"):
            load_model(tmp_path / "saved", window=8)
    for wrong, name in (({"layers": "1"}, "layers"), ({"layers": [1], "num_heads": "x"}, "num_heads")):
        (tmp_path / "saved" / "config.json").write_text(json.dumps(config | {"fast_weights": wrong}))
        with pytest.raises(ValueError, match=f"{name}: expected"):
            load_model(tmp_path / "saved", window=8)

    config = json.loads((folders["qwen3_5"] / "config.json").read_text())
    (folders["qwen3_5"] / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(ValueError, match="folder: expected the weights that .* describes"):
        load_model(folders["qwen3_5"], window=8)
    (folders["ouro"] / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_model(folders["ouro"], window=8)


@pytest.mark.parametrize("family", ["qwen3_5", "llama"])
def test_transformers_makes_up_no_weights(family, tmp_path):
    """Which it does, with a warning, for names that are missing and, where allowed, for other shapes."""
    folder = plain(tmp_path, family)
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.3.self_attn.q_proj.weight"]
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, file, metadata={"format": "pt"})
    insert = (1, 3) if family == "llama" else None
    with pytest.raises(ValueError, match="^folder: expected the weights that .* describes, got ") as error:
        load_model(folder, window=8, insert=insert)
    assert "missing: model.layers.3.self_attn.q_proj.weight; wrongly shaped: model.norm.weight [3]" in str(error.value)
    with pytest.raises(ValueError, match="missing: model.layers.3.self_attn.q_proj.weight; wrongly shaped"):
        from_pretrained(folder, window=8)


@pytest.mark.slow
def test_without_transformers_the_ports_work_and_the_extra_is_named(tmp_path):
    plain(tmp_path / "ouro", "ouro")
    word_tokenizer(plain(tmp_path / "qwen3_5", "qwen3_5"))
    code = "import importlib.metadata as m, sys\nsys.modules['transformers'] = None\n"
    code += "def missing(name): raise m.PackageNotFoundError(name)\n"
    code += "m.version = missing\n"
    code += "from sleep_ops.adapters.loading import load_model\nfrom sleep_ops.tokenizer import load_tokenizer\n"
    code += "print(type(load_model('ouro', window=8)).__name__)\n"
    code += "for call in (lambda: load_model('qwen3_5', window=8), lambda: load_tokenizer('qwen3_5')):\n"
    code += "    try: call()\n    except ImportError as error: print(error)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    assert first == "Ouro" and len(others) == 2 and all("pip install 'sleep-ops[hf]'" in line for line in others)


@pytest.mark.parametrize("family", ["qwen3_5", "ouro"])
def test_large_models_are_written_in_several_files(family, tmp_path, monkeypatch):
    model = load_model(plain(tmp_path / "plain", family), **SETTINGS)
    monkeypatch.setattr("sleep_ops.adapters.loading.SHARD_BYTES", 10**5)
    save_model(model, tmp_path / "saved", source=tmp_path / "plain")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 1
    found, expected = load_model(tmp_path / "saved").state_dict(), model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], x) for name, x in expected.items())
