"""Model FLOPs against products that are counted, peaks by device, memory, and where they are written."""

import math

import pytest
import torch
from rich.console import Console
from small import tokens
from test_adapter_loading import plain

from sleep_ops import HybridConfig, SleepHybridModel
from sleep_ops.adapters.loading import load_model
from sleep_ops.adapters.lora import add_lora
from sleep_ops.files import read_csv
from sleep_ops.tasks import Rule110
from sleep_ops.training import RunConfig, TrainConfig, Trainer
from sleep_ops.training.logs import ProgressBar
from sleep_ops.training.usage import ModelFlops, _Block, peak_flops, peak_memory

SIZES = dict(vocab_size=11, hidden_size=64, layers=("attn", "gdn", "attn", "gdn"), window=6, num_heads=4)
CASES = {
    "refine": dict(passes=3),
    "loop": dict(passes=3, loop=(1, 2)),
    "sliding": dict(passes=2, eviction="sliding", loop=(0, 2)),
    "unlabelled": dict(passes=3, sleep_on="unlabelled"),
    "replay": dict(passes=4, sleep_kind="replay"),
    "tied": dict(passes=2, tied_repeats=2),
    "one": {},
}


def counted(model, ids, labels):
    """FLOPs of the linear modules in one forward."""
    total, hooks = [0], []

    def count(module, inputs, _):
        total[0] += 2 * module.weight.numel() * inputs[0][..., 0].numel()

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            hooks.append(module.register_forward_hook(count))
    model(ids, labels=labels, loss_mask=labels != -100, return_state=False)
    for hook in hooks:
        hook.remove()
    return total[0]


def marked(ids, first, last):
    labels = torch.full_like(ids, -100)
    labels[:, first:last] = ids[:, first:last]
    return labels


@pytest.mark.parametrize("place", [(0, 30), (16, 20), (3, 4)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_products_of_weights_are_those_that_are_counted(case, place, monkeypatch):
    torch.manual_seed(0)
    model, ids = SleepHybridModel(HybridConfig(**SIZES | CASES[case])), tokens(2, 30)
    labels = marked(ids, *place)
    expected = counted(model, ids, labels)
    monkeypatch.setattr(_Block, "_state", lambda self, keys: 0)
    found = ModelFlops(model)(labels != -100)
    # Filters and norms are counted too; blocks behind the loop once, whether outputs are awaited or read again.
    assert 0.95 * expected < found / 3 < 1.15 * expected


def test_attention_and_delta_rule_by_hand():
    settings = SIZES | dict(layers=("attn", "gdn"), window=None)
    flops = ModelFlops(SleepHybridModel(HybridConfig(**settings)))
    attention, delta = flops.blocks
    assert attention._state(10) == 4 * 64 * 10 and delta._state(10) == 6 * 4 * 16 * 16
    size = sum(p.numel() for p in SleepHybridModel(HybridConfig(**settings)).parameters()) - 64 * 11 - 64
    found = flops(torch.ones(2, 5, dtype=torch.bool))
    assert found == 10 * (6 * size + 3 * (4 * 64 * 3 + 6 * 4 * 16 * 16))


def test_passes_without_gradient_and_frozen_weights_cost_less():
    mask = torch.ones(1, 24, dtype=torch.bool)
    costs = [ModelFlops(SleepHybridModel(HybridConfig(**SIZES, passes=3, backprop_passes=n)))(mask) for n in (1, 2)]
    first = ModelFlops(SleepHybridModel(HybridConfig(**SIZES, passes=3)))(mask, 1)
    assert (costs[1] - first) / (costs[0] - first) == pytest.approx((3 + 3) / (3 + 1))
    frozen = SleepHybridModel(HybridConfig(**SIZES)).requires_grad_(False)
    assert 0.6 < ModelFlops(frozen)(mask) / first < 0.75
    assert math.isnan(ModelFlops(torch.nn.Linear(2, 2))(mask))


@pytest.mark.parametrize("family", ["qwen3_5", "ouro"])
def test_pretrained_models_and_experts(family, tmp_path):
    mask = torch.ones(2, 20, dtype=torch.bool)
    insert = (1,) if family == "ouro" else None
    model = load_model(plain(tmp_path / "plain", family), window=8, passes=2, insert=insert)
    full = ModelFlops(model)(mask)
    lora = ModelFlops(add_lora(model, rank=2))(mask)
    assert 0.6 * full < lora < full
    if family == "qwen3_5":
        experts = ModelFlops(load_model(plain(tmp_path / "experts", "qwen3_5_moe"), window=8, passes=2))
        parameters = sum(p.numel() for p in experts.model.model.model.layers.parameters())
        assert sum(block.parameters for block in experts.blocks) < 0.9 * parameters


def test_peaks_of_devices(monkeypatch):
    names = {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA B200": 2250e12,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert math.isnan(peak_flops(torch.device("cuda"))) and math.isnan(peak_flops(torch.device("cpu")))


def test_memory_is_in_bytes():
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(1 << 26)
    assert before > 1 << 26 and peak_memory(torch.device("cpu")) >= before and block.numel()


TASK = Rule110(t=2, strings=2, bits=6)


def trainer(out, steps=3):
    train = TrainConfig(steps=steps, batch_size=4, eval_every=0, eval_samples=4, checkpoint_every=0, device="cpu")
    return Trainer(
        RunConfig(TASK.to_dict(), HybridConfig(**SIZES).to_dict(), train), out, extend=True, console=Console(quiet=True)
    )


def test_they_are_in_the_log_and_older_logs_go_on(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    run.fit()
    rows = read_csv(tmp_path / "metrics.csv")
    assert all(math.isnan(row["mfu"]) and row["peak_memory"] > 1 << 20 for row in rows)
    lines = [line.split(",")[:9] for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    (tmp_path / "metrics.csv").write_text("\n".join(map(",".join, lines)) + "\n")  # as it was without these columns
    again = trainer(tmp_path, steps=4)
    again.peak = 1e12
    again.fit()
    rows = read_csv(tmp_path / "metrics.csv")
    assert [math.isnan(row["mfu"]) for row in rows] == [True, True, True, False]
    last, flops = rows[-1], again.flops(again._make_batch(3).loss_mask)
    assert last["mfu"] == pytest.approx(flops * last["tokens_per_second"] / (4 * TASK.seq_len) / 1e12)


def test_the_bar_leaves_out_what_is_not_known():
    console = Console(record=True, width=200, force_terminal=False)
    row = dict(step=2, loss=0.5, tokens_per_second=1234.0, mfu=math.nan, peak_memory=3 * 2**30)
    for known in (row, row | {"mfu": 0.412}):
        with ProgressBar(console, "train", 0, 2) as bar:
            bar.update(known, "  1 skipped")
    first, second = console.export_text().splitlines()
    assert first.endswith("1,234 tokens/s  3.0 GiB  1 skipped") and "MFU" not in first
    assert "tokens/s  41.2% MFU  3.0 GiB" in second
