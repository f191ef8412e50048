"""Folders of safetensors: what is read into a module, what is refused and why, what is written."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sleep_ops.adapters.checkpoint import load_weights, read_config, save_weights
from sleep_ops.layers.gdn import SleepGDNLayer


class Model(nn.Module):
    """Two tied names, a buffer that is saved and one that isn't, a parameter with a mark."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 7, bias=False)
        self.register_buffer("steps", torch.tensor([3]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.layers[0].bias._no_weight_decay = True
        if tied:
            self.head.weight = self.embed.weight


def model(seed=0, tied=True):
    torch.manual_seed(seed)
    return Model(tied)


def empty(tied=True):
    with torch.device("meta"):
        made = Model(tied)
    made.scratch = torch.zeros(2)
    return made


def assert_equal(a: nn.Module, b: nn.Module):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.fixture
def folder(tmp_path):
    save_weights(model(), tmp_path, {"width": 4})
    return tmp_path


@pytest.mark.parametrize("target", [empty, lambda tied: model(1, tied)], ids=["meta", "filled"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("max_shard_bytes", [None, 150, 1], ids=["one-file", "shards", "shard-per-tensor"])
def test_written_and_read_again(tmp_path, max_shard_bytes, tied, target):
    original, other = model(tied=tied), target(tied)
    save_weights(original, tmp_path / "new", {"width": 4}, max_shard_bytes=max_shard_bytes)
    assert load_weights(other, tmp_path / "new") == []
    assert_equal(other, original)
    assert read_config(tmp_path / "new") == {"width": 4}
    assert (other.head.weight is other.embed.weight) == tied
    assert other.layers[0].bias._no_weight_decay and all(type(p) is nn.Parameter for p in other.parameters())
    assert not list((tmp_path / "new").glob("*.partial"))


def test_one_file_in_the_published_layout(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        layers = [f"layers.{i}.{name}" for i in range(3) for name in ("weight", "bias")]
        assert sorted(file.keys()) == sorted(["embed.weight", *layers, "steps"])  # the tied head is not repeated


def test_shards_in_the_published_layout(tmp_path):
    save_weights(model(), tmp_path, {}, max_shard_bytes=150)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", *files, "model.safetensors.index.json"]
    sizes = {file: sum(x.nbytes for x in load_file(tmp_path / file).values()) for file in files}
    assert max(sizes.values()) <= 150 and sum(sizes.values()) == index["metadata"]["total_size"]
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)


def test_a_newer_save_replaces_the_older_layout(tmp_path):
    for seed, size in enumerate((100, None, 200, 100)):
        save_weights(model(seed), tmp_path, {}, max_shard_bytes=size)
        other = empty()
        load_weights(other, tmp_path)
        assert_equal(other, model(seed))
        assert (tmp_path / "model.safetensors").exists() == (size is None)


def test_loaded_weights_outlive_their_file(folder):
    other = empty()
    load_weights(other, folder)
    (folder / "model.safetensors").write_bytes(bytes((folder / "model.safetensors").stat().st_size))
    assert_equal(other, model())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype_is_that_of_floating_tensors(folder, dtype):
    other = empty()
    load_weights(other, folder, dtype=dtype)
    assert {p.dtype for p in other.parameters()} == {dtype} and other.steps.dtype == torch.int64
    assert_equal(other, model().to(dtype))


def test_stored_dtypes_are_kept(tmp_path):
    mixed = model()
    mixed.layers[1].bfloat16()
    save_weights(mixed, tmp_path, {})
    other = model(1)
    load_weights(other, tmp_path)
    assert_equal(other, mixed)


@pytest.mark.parametrize("names", [("embed.weight", "head.weight"), ("head.weight",)], ids=["both", "second"])
def test_tied_weights_by_any_of_their_names(tmp_path, names):
    tensors = model().state_dict()
    kept = {n: x.clone() for n, x in tensors.items() if n not in ("embed.weight", "head.weight") or n in names}
    save_file(kept, tmp_path / "model.safetensors")
    other = empty()
    load_weights(other, tmp_path)
    assert_equal(other, model())
    if len(names) == 2:
        save_file(kept | {"head.weight": kept["head.weight"] + 1}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="^folder: expected .*tied, got other values"):
            load_weights(other, tmp_path)
        assert_equal(other, model())


def test_former_names_are_read(tmp_path):
    layer, other = (SleepGDNLayer(16, num_heads=2, head_dim=8) for _ in range(2))
    save_file({n.replace("_conv1d", "_conv"): x for n, x in layer.state_dict().items()}, tmp_path / "model.safetensors")
    load_weights(other, tmp_path)
    assert_equal(other, layer)


def test_inserted_layers_may_be_missing(folder):
    class Longer(Model):
        def __init__(self):
            super().__init__()
            self.new = nn.Linear(4, 2)

    with torch.device("meta"):
        longer = Longer()
    with pytest.raises(ValueError, match=r"got missing: new.weight, new.bias$"):
        load_weights(longer, folder)
    with pytest.raises(
        ValueError, match=r"^missing_ok: expected .* got some on the meta device: new.weight, new.bias$"
    ):
        load_weights(longer, folder, missing_ok=("new.",))
    assert longer.embed.weight.is_meta
    longer.new = nn.Linear(4, 2)
    before = longer.new.weight.detach().clone()
    assert load_weights(longer, folder, dtype=torch.float64, missing_ok=("new.",)) == ["new.weight", "new.bias"]
    assert torch.equal(longer.new.weight, before.double())
    assert torch.equal(longer.embed.weight, model().embed.weight.double())


def test_names_may_be_mapped_and_left_out(tmp_path):
    tensors = {f"model.{n}": x.clone() for n, x in model(tied=False).state_dict().items()}
    save_file(tensors | {"rotary.frequency": torch.ones(2)}, tmp_path / "model.safetensors")
    other = empty(tied=False)
    load_weights(other, tmp_path, rename=lambda n: n.removeprefix("model.") if n.startswith("model.") else None)
    assert_equal(other, model(tied=False))
    with pytest.raises(ValueError, match="^rename: expected one tensor for 'head.weight', got .* and "):
        load_weights(other, tmp_path, rename=lambda n: "head.weight")


def test_every_wrong_name_is_listed_and_nothing_changed(tmp_path):
    tensors = {n: x.clone() for n, x in model(tied=False).state_dict().items()}
    del tensors["layers.0.weight"], tensors["layers.2.bias"]
    tensors |= {"layers.1.bias": torch.zeros(5), "layers.3.bias": torch.zeros(4), "gate": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    other = model(1, tied=False)
    with pytest.raises(ValueError) as caught:
        load_weights(other, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"folder: expected the weights of this Model in {tmp_path}, got missing: ")
    assert "missing: layers.0.weight, layers.2.bias;" in message
    assert "unexpected: gate, layers.3.bias;" in message
    assert message.endswith("wrongly shaped: layers.1.bias [5] instead of [4]")
    assert_equal(other, model(1, tied=False))


def test_of_very_many_wrong_names_some_are_listed(tmp_path):
    save_file({f"extra.{i:02d}": torch.zeros(1) for i in range(50)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unexpected: extra.00, .*extra.19 and 30 more$"):
        load_weights(nn.Module(), tmp_path)


def _truncate(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-8])


def _rewrite(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


DAMAGE = {
    "missing-shard": (
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        "got none of the name model-00002-of-00003.safetensors",
    ),
    "truncated-shard": (lambda f: _truncate(f, "model-00002-of-00003.safetensors"), "model-00002-of-00003.* be read"),
    "not-safetensors": (
        lambda f: (f / "model-00001-of-00003.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "model-00001-of-00003.* be read",
    ),
    "empty-shard": (
        lambda f: (f / "model-00003-of-00003.safetensors").write_bytes(b""),
        "model-00003-of-00003.* be read",
    ),
    "moved-shard": (
        lambda f: (f / "model-00001-of-00003.safetensors").replace(f / "model-00002-of-00003.safetensors"),
        "got none of the name model-00001",
    ),
    "index-not-json": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "JSON in"),
    "index-without-map": (lambda f: _rewrite(f, lambda index: index.pop("weight_map")), "a weight_map in"),
    "index-says-too-much": (
        lambda f: _rewrite(f, lambda i: i["weight_map"].update({"gate": "model-00001-of-00003.safetensors"})),
        "model-00001-of-00003.safetensors to hold what its index says, got a file without gate$",
    ),
    "index-points-elsewhere": (
        lambda f: _rewrite(f, lambda i: i["weight_map"].update({"steps": "../model.safetensors"})),
        "to name files of its folder, got '../model.safetensors'",
    ),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    save_weights(model(), tmp_path, {}, max_shard_bytes=150)
    damage(tmp_path)
    other = model(1)
    with pytest.raises(ValueError, match=f"^folder: expected .*{message}"):
        load_weights(other, tmp_path)
    assert_equal(other, model(1))


def test_what_is_not_there_is_not_found(tmp_path, folder):
    for missing in (tmp_path / "nothing", tmp_path / "sub"):
        with pytest.raises(FileNotFoundError, match="^folder: expected model.safetensors in .*found none"):
            load_weights(empty(), missing)
        with pytest.raises(FileNotFoundError, match="^folder: expected config.json in .*found none"):
            read_config(missing)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="^folder: expected a JSON object in .*got list"):
        read_config(folder)


@pytest.mark.parametrize("size", [0, -1, 1.5, True], ids=str)
def test_bad_shard_size(tmp_path, size):
    with pytest.raises(ValueError, match="^max_shard_bytes: expected .*got "):
        save_weights(model(), tmp_path, {}, max_shard_bytes=size)


def test_a_failed_save_leaves_the_older_one(folder, monkeypatch):
    monkeypatch.setattr("sleep_ops.adapters.checkpoint.json.dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_weights(model(1), folder, {})
    monkeypatch.undo()
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    other = empty()
    load_weights(other, folder)
    assert_equal(other, model())
