"""LoRA: what learns and what stays, adapters alone and merged, two phases, going on after any stop."""

import json
import os
import socket
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import slow_unless
from commands import run as invoke
from hf_models import build, tokens
from rich.console import Console
from safetensors.torch import load_file
from test_adapter_loading import plain
from test_finetune import SMALL, TRAIN, agree, config, losses, same, weights

from sleep_ops.adapters.hf import from_pretrained, insert_fast_weights, sleepify
from sleep_ops.adapters.loading import load_model, underlying
from sleep_ops.adapters.lora import add_lora, is_base, merge_lora, save_adapter
from sleep_ops.training import RunConfig, Trainer, load_run
from sleep_ops.training.checkpoint import list_checkpoints, load_checkpoint
from sleep_ops.training.finetune import finetune

peft = pytest.importorskip("peft", reason="adapters are peft's")
QUIET = Console(quiet=True)
FAMILIES: dict = {
    "qwen3_5": {},
    "olmo_hybrid": {},
    "qwen3_next": {},
    "llama": {"insert": (1, 3)},
    "ouro": {"insert": (0, 2)},
    "jet_nemotron": {},
    "qwen3_5_moe": {},
}
LORA = dict(rank=4)
ROUNDED = replace(TRAIN, param_dtype="bf16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: plain(root / family, family) for family in FAMILIES}


def tuned(folder, **options):
    """A configuration with LoRA."""
    lora = {name: options.pop(name) for name in ("lora", "lora_alpha", "lora_targets") if name in options}
    return replace(config(folder, **options), **{"lora": 4} | lora)


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def drawn(model):
    """With adapters and inserted blocks that do something."""
    for p in model.parameters():
        if p.requires_grad and p.dim() > 1:
            torch.nn.init.normal_(p, std=0.05)
    return model.eval()


def adapted(folder, **options):
    torch.manual_seed(0)
    return add_lora(load_model(folder, window=8, passes=2, **options), **LORA)


@pytest.mark.parametrize("family", slow_unless(["qwen3_5", "llama"], FAMILIES))
def test_adapters_begin_at_nothing_come_back_and_can_be_merged(family, folders, tmp_path):
    start = load_model(folders[family], window=8, passes=2, **FAMILIES[family]).eval()
    model, ids = adapted(folders[family], **FAMILIES[family]).eval(), tokens(2, 20)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, start(ids).logits)
        expected = drawn(model)(ids).logits
        assert not torch.allclose(expected, start(ids).logits, atol=1e-3)
    linear = {name for name, m in underlying(start).named_modules() if isinstance(m, torch.nn.Linear)}
    found = {name for name, m in underlying(model).named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    experts = hasattr(underlying(model).config, "num_experts")
    assert found == {x for x in linear if x.startswith("model.layers.") and not (experts and ".mlp." in x)}
    for name, p in model.named_parameters():
        learns = "lora_" in name or "fast_weights" in name
        assert p.requires_grad == learns and is_base(p) != learns, name
    save_adapter(model, tmp_path / "adapter", folders[family])
    again = load_model(folders[family], window=8, passes=2, **FAMILIES[family])
    add_lora(again, **LORA, start=tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, expected)
        plain_again = merge_lora(model)
        torch.testing.assert_close(plain_again(ids).logits, expected, rtol=1e-3, atol=1e-4)
    assert [name for name, _ in plain_again.named_parameters()] == [name for name, _ in start.named_parameters()]


@pytest.mark.parametrize("family", slow_unless(["llama"], ["qwen3_5", "llama"]))
def test_peft_reads_the_adapter(family, folders, tmp_path):
    model, ids = drawn(adapted(folders[family], **FAMILIES[family])), tokens(2, 20)
    save_adapter(model, tmp_path, folders[family])
    base = build(family)
    if family == "llama":
        insert_fast_weights(base, FAMILIES[family]["insert"])
    theirs = peft.PeftModel.from_pretrained(sleepify(base, window=8, passes=2), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, model(ids).logits)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folders[family])


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A checkpoint in bfloat16, but for one tensor."""
    folder = tmp_path_factory.mktemp("half")
    model = build("llama").bfloat16()
    model.model.norm.weight = torch.nn.Parameter(1 + torch.rand(64) / 100)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def straight(half, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    finetune(tuned(half, insert=(1, 3), train=ROUNDED), out, console=QUIET)
    return out


def test_the_base_is_held_in_bfloat16_alone(half, tmp_path):
    full = tuned(half, insert=(1, 3), train=ROUNDED, warm_steps=0).phases(tmp_path)[0].run
    run = Trainer(full, tmp_path / "run", console=QUIET)
    for name, p in run.model.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    frozen = {name: p.data_ptr() for name, p in run.model.named_parameters() if not p.requires_grad}
    with run.layout.gathered():
        assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}
        assert frozen == {name: p.data_ptr() for name, p in run.model.named_parameters() if not p.requires_grad}
    run.fit(1)
    learnt = {p for optimizer in run.optimizers.values() for group in optimizer.param_groups for p in group["params"]}
    assert learnt == {p for p in run.model.parameters() if p.requires_grad}
    assert {p.dtype for p in learnt} == {torch.float32}
    assert all(("lora_" in name) <= (p in run.optimizers["adamw"].state) for name, p in run.model.named_parameters())


def test_a_checkpoint_of_the_run_holds_what_learns(straight):
    names = load_checkpoint(list_checkpoints(straight / "full/checkpoints")[-1]).tensors
    kept = {name.removeprefix("model.") for name in names if name.startswith("model.")}
    assert kept and all("lora_" in name or "fast_weights" in name for name in kept)
    states = {name.split(".", 1)[1].rpartition(".")[0] for name in names if name.startswith("optimizer.")}
    assert states == kept


def test_what_has_no_adapter_is_written_as_it_was(half, straight):
    before, after = load_file(half / "model.safetensors"), load_file(straight / "model/model.safetensors")
    changed = {name for name, x in before.items() if not torch.equal(x, after[name])}
    assert changed and all("_proj" in name for name in changed)
    assert all(after[name].dtype == x.dtype for name, x in before.items())
    assert before["model.norm.weight"].dtype == torch.float32
    assert {name for name in after if name not in before} == {name for name in after if "fast_weights" in name}


def test_blocks_learn_first_then_adapters_too(straight):
    check_phases(straight, "llama")


def check_phases(out, family):
    """What the two phases leave in their folders."""
    assert not (out / "warm/model").exists()
    warm, full = adapter(out / "warm/adapter"), adapter(out / "adapter")
    assert warm.keys() == full.keys()
    moved = {name for name, x in warm.items() if name.endswith("lora_B.weight") and x.any()}
    mixers = ("linear_attn", ".self_attn.") if family == "jet_nemotron" else ("linear_attn",)
    assert all(any(part in name for part in mixers) for name in moved)
    assert bool(moved) == (family not in ("llama", "ouro"))
    assert all(x.any() for name, x in full.items() if name.endswith("lora_B.weight") and ".self_attn.o_proj." in name)
    fast = {name for name in full if "fast_weights" in name and name.endswith("o_proj.weight")}
    assert bool(fast) == (family in ("llama", "ouro")) and all(warm[name].any() for name in fast)
    assert not any(torch.equal(full[name], warm[name]) for name in fast)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_both_phases_of_every_family(family, folders, tmp_path):
    assert finetune(tuned(folders[family], **FAMILIES[family]), tmp_path, console=QUIET).finished
    check_phases(tmp_path, family)
    # The model is base and adapter together, in the checkpoint's own layout.
    source, merged = load_model(folders[family], window=8, **FAMILIES[family]), load_model(tmp_path / "model")
    assert merged.state_dict().keys() == source.state_dict().keys()
    _, _, trained, step = load_run(tmp_path / "full", device="cpu")
    ids = tokens(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(ids).logits, trained(ids).logits, rtol=1e-3, atol=1e-4)
    assert step == 3


@pytest.mark.slow
def test_the_model_is_an_ordinary_folder(half, straight, tmp_path):
    model = from_pretrained(straight / "model")
    assert not any("lora" in name for name in model.state_dict())
    more = tuned(straight / "model", warm_steps=0, train=replace(TRAIN, steps=1))
    assert finetune(more, tmp_path / "more", console=QUIET).finished


@pytest.mark.parametrize("stop", slow_unless(["full"], [1, 2, 3, 4], ids=["warm", "border", "full", "late"]))
def test_stopped_it_goes_on_to_the_same_bits(stop, half, straight, tmp_path):
    settings = tuned(half, insert=(1, 3), train=ROUNDED)
    finetune(settings, tmp_path, until=stop, console=QUIET)
    torch.manual_seed(123)  # whatever happens in between
    assert finetune(settings, tmp_path, console=QUIET).finished
    assert same(adapter(tmp_path / "adapter"), adapter(straight / "adapter"))
    assert same(weights(tmp_path / "model"), weights(straight / "model"))
    assert finetune(settings, tmp_path, console=QUIET) is None


def test_other_adapters_are_another_run(half, straight):
    for changes, message in (
        ({"lora": 8}, "model.lora: {'rank': 4} -> {'rank': 8}"),
        ({"lora": None}, "model.lora: {'rank': 4} -> None"),
        ({"lora_targets": ("q_proj",)}, "'targets': ..q_proj"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(tuned(half, insert=(1, 3), train=ROUNDED, **changes), straight, console=QUIET)
    assert RunConfig.load(straight / "full").model["lora"]["start"] == str((straight / "warm/adapter").resolve())


@pytest.mark.slow
def test_fresh_deletes_the_adapter_too(half, straight, tmp_path):
    settings = tuned(half, insert=(1, 3), train=ROUNDED)
    finetune(replace(settings, lora=2), tmp_path, console=QUIET)
    finetune(settings, tmp_path, resume=False, console=QUIET)
    assert same(weights(tmp_path / "model"), weights(straight / "model"))


def test_an_adapter_of_another_is_left_alone(folders, tmp_path):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ValueError, match="adapter: expected a folder to write the model to"):
        finetune(tuned(folders["qwen3_5"]), tmp_path, console=QUIET)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora": 0}, "lora: expected an integer >= 1"),
        ({"lora_alpha": 0.0}, "lora_alpha: expected a number > 0"),
        ({"lora_alpha": "2"}, "lora_alpha: expected a number > 0"),
        ({"lora": None, "lora_alpha": 2.0}, "lora_alpha: expected None without lora"),
        ({"lora": None, "lora_targets": ("q_proj",)}, "lora_targets: expected None without lora"),
        ({"lora_targets": ("",)}, "lora_targets: expected names"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(changes, message, folders):
    with pytest.raises(ValueError, match=message):
        tuned(folders["qwen3_5"], **changes)


def test_targets_have_to_be_there(folders, tmp_path):
    with pytest.raises(ValueError, match=r"lora_targets: expected some of .*q_proj.*, got \['lm_head', 'query'\]"):
        finetune(tuned(folders["qwen3_5"], lora_targets=("q_proj", "query", "lm_head")), tmp_path / "a", console=QUIET)
    with pytest.raises(ValueError, match="trainable: expected 'all' for a model without adapters on its fast weights"):
        finetune(tuned(folders["qwen3_5"], lora_targets=("q_proj",)), tmp_path / "a", console=QUIET)
    assert not (tmp_path / "a").exists()


def test_the_command(folders, tmp_path):
    task = "--task rule110 --bits 8 --strings 2 --task-option t=1 --insert 1,3".split()
    lora = "--lora 4 --lora-alpha 4 --lora-targets q_proj,v_proj".split()
    invoke("finetune", folders["llama"], *task, *SMALL, *lora, "--out", tmp_path / "out")
    run = RunConfig.load(tmp_path / "out/full")
    assert run.model["lora"] | {"start": ""} == {"rank": 4, "alpha": 4.0, "targets": ["q_proj", "v_proj"], "start": ""}
    assert "trained with N=2 to step 2" in invoke("eval", tmp_path / "out/full", "--samples", 8, "--device", "cpu")
    text = invoke("finetune", folders["llama"], *task, *SMALL, *lora, "--out", tmp_path / "out")
    assert "nothing to do" in text


def test_the_extra_is_named(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    task = "--task rule110 --bits 8 --strings 2 --lora 4".split()
    text = invoke("finetune", folders["qwen3_5"], *task, *SMALL, "--out", tmp_path / "out", code=1)
    assert "pip install 'sleep-ops[lora]'" in text and not (tmp_path / "out").exists()


WAYS = {
    "ddp": {},
    "fsdp": dict(parallel="fsdp"),
    "fsdp-call": dict(parallel="fsdp", reshard="call"),
    "hsdp": dict(parallel="fsdp", replicas=2),
}
DTYPES = ("float32", "bf16")


def shared(half, way, dtype):
    train = replace(TRAIN, param_dtype=dtype, **WAYS.get(way, {}))
    return tuned(half, insert=(1, 3), train=train)


def worker(rank, port, half, folder):
    """Everything that two processes do, so that they are started once."""
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in torchrun.items()}
    torch.set_num_threads(1)
    for way in WAYS:
        for dtype in DTYPES:
            assert finetune(shared(half, way, dtype), folder / way / dtype, console=QUIET).finished
        finetune(shared(half, way, "bf16"), folder / way / "parts", until=4, console=QUIET)
        assert finetune(shared(half, way, "bf16"), folder / way / "parts", console=QUIET).finished
    run = shared(half, "fsdp", "bf16").phases(folder)[0].run
    trainer = Trainer(run, folder / "held", console=QUIET)
    held = {name: (p.to_local().dtype, p.to_local().numel()) for name, p in trainer.model.named_parameters()}
    torch.save(held, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(half, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, half, folder), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
class TestTwoProcesses:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_they_learn_what_one_does(self, way, dtype, half, two, tmp_path):
        finetune(shared(half, "one", dtype), tmp_path, console=QUIET)
        rounding = 2e-2 if dtype == "bf16" else 2e-3
        for a, b in zip(losses(two / way / dtype), losses(tmp_path), strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=rounding, atol=0)
        found, expected = (adapter(out / "adapter") for out in (two / way / dtype, tmp_path))
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=0, atol=3e-3, msg=lambda m, name=name: f"{name}: {m}")
        found, expected = weights(two / way / dtype / "model"), weights(tmp_path / "model")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], x) for n, x in expected.items() if "norm" in n and "fast_weights" not in n)

    def test_stopped_they_go_on_to_the_same_bits(self, way, two):
        agree(two / way / "parts", two / way / "bf16", "model")


@pytest.mark.slow
def test_each_of_two_holds_half_of_the_base_in_bfloat16(two):
    for rank in range(2):
        for name, (dtype, _) in torch.load(two / f"{rank}.pt").items():
            assert dtype == (torch.float32 if "fast_weights" in name or "lora_" in name else torch.bfloat16), name
    sizes = [sum(n for _, n in torch.load(two / f"{rank}.pt").values()) for rank in range(2)]
    assert abs(sizes[0] - sizes[1]) < 0.05 * sum(sizes)
