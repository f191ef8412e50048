"""`sleep-ops bench train`: rows, refusals, what a step is, and that the model written with fla's layers is the same."""

import dataclasses
import re
import sys
import types
from contextlib import nullcontext

import pytest
import torch
from commands import bench, is_png, read
from matplotlib.axes import Axes
from torch import nn

from sleep_ops import GDNState, HybridConfig, SleepGDNLayer, SleepHybridModel
from sleep_ops.bench import fla_hybrid, training
from sleep_ops.bench.plot import plot_training
from sleep_ops.bench.training import COLUMNS, PRESETS, NotMeasured, Point, TrainBenchmark, Trained, build, make_batch

CPU = torch.device("cpu")
FAST = "train --device cpu --repeats 1 --batch 2 --providers ours".split()


def trained():
    return Trained(build("ours", PRESETS["tiny"], 0, CPU), nullcontext)


def test_the_command_writes_every_figure(tmp_path):
    text = bench(*FAST, "--passes", "1,3", "--window", "13,20,99", "--providers", "ours,fla", "--out", tmp_path)
    rows = read(tmp_path / "train.csv")
    assert list(rows[0]) == COLUMNS and is_png(tmp_path / "train.png")
    keys = ("window", "passes", "checkpointing", "mode", "provider")
    assert {tuple(row[key] for key in keys) for row in rows} == {
        (window, n, way, "eager", "ours") for window in ("13", "20") for n in "13" for way in ("off", "on")
    }
    assert len(rows) == 8 and "tiny: fla is not timed" in text
    for row in rows:
        assert float(row["tokens_per_second"]) == pytest.approx(2 * 40 / float(row["ms_median"]) * 1e3)
        assert (row["batch"], row["layers"], row["width"], row["precision"]) == ("2", "2", "32", "float32")
        assert row["peak_mib"] == "" and int(row["parameters"]) > 1000


@pytest.mark.parametrize("column", ["passes", "window"])
def test_the_figure_is_against_passes_or_where_there_is_one_n_against_windows(tmp_path, monkeypatch, column):
    row = {"preset": "x", "provider": "ours", "mode": "eager", "checkpointing": "off", "precision": "bf16", "batch": 1}
    row |= {"tokens": 9, "layers": 2, "width": 8, "device": "GPU", "passes": 2, "window": 24, "peak_mib": 10.0}
    rows = [row | {column: n, "tokens_per_second": 1.0 * n} for n in (3, 5, 7)]
    drawn, line = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *x, **y: (drawn.append((*x, y["label"])), line(self, *x, **y))[1])
    plot_training(rows, tmp_path / "train.png")
    label = f"ours eager, checkpointing off, {'L = 24' if column == 'passes' else 'N = 2'}"
    assert drawn == [([3, 5, 7], y, "o-", label) for y in ([3.0, 5.0, 7.0], [10.0] * 3)]


def test_windows_that_hold_the_whole_text_leave_nothing_to_time(tmp_path):
    assert "nothing was timed" in bench(*FAST, "--window", "40", "--out", tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


def test_the_presets_are_the_models_they_are_named_after():
    sizes = {}
    for name, preset in PRESETS.items():
        model = build("ours", preset, 0, torch.device("meta"))
        sizes[name] = sum(p.numel() for p in model.parameters())
        last = (preset.tokens - 1) // min(preset.windows) * min(preset.windows)
        assert preset.tokens - preset.answer >= last, "loss outside the last window"
    assert 1.3e9 < sizes["1.4b"] < 1.5e9 and 20e6 < sizes["depo"] < 50e6 and 2e6 < sizes["rule110"] < 5e6
    rule110, depo, large = (PRESETS[name] for name in ("rule110", "depo", "1.4b"))
    assert (rule110.batch, rule110.tokens, rule110.windows, len(rule110.model["layers"])) == (512, 100, (24,), 4)
    assert (depo.batch, depo.tokens, depo.windows, len(depo.model["layers"])) == (128, 360, (75,), 10)
    assert (large.tokens, large.windows, len(large.model["layers"])) == (12000, (512, 1024, 2048, 4096), 24)


def test_points_are_those_that_can_be(monkeypatch):
    monkeypatch.setattr(training, "resolve_device", torch.device)
    benchmark = TrainBenchmark(device="cuda", cuda_graph=True, passes=(2, 1), windows=(24, 100, 500))
    ours, theirs = (benchmark.points("rule110", provider) for provider in ("ours", "fla"))
    modes = ("eager", "cuda-graph")
    assert ours == [Point(n, 24, mode, way) for mode in modes for way in ("off", "on") for n in (1, 2)]
    assert theirs == [Point(n, 24, "eager", "off") for n in (1, 2)]
    assert benchmark.presets == ("rule110", "depo", "1.4b")
    assert TrainBenchmark(device="cpu").presets == ("tiny",)
    assert benchmark.steps == sum(len(benchmark.points(p, w)) for p in benchmark.presets for w in ("ours", "fla"))


def test_a_step_changes_every_parameter_and_leaves_no_gradient():
    one, batch = trained(), make_batch(PRESETS["tiny"], 0, CPU)
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    assert batch.loss_mask.sum() == 8 * 4 and (batch.labels != -100).equal(batch.loss_mask)
    loss = one(batch)
    assert loss.item() > 0 and not loss.requires_grad
    for name, p in one.model.named_parameters():
        assert p.grad is None and not torch.equal(p, before[name]), name


@pytest.mark.parametrize("way", ["off", "on"])
def test_a_point_is_what_the_model_runs(monkeypatch, way):
    one, batch = trained(), make_batch(PRESETS["tiny"], 0, CPU)
    seen = []
    forward = SleepHybridModel.forward
    monkeypatch.setattr(
        SleepHybridModel, "forward", lambda self, *x, **y: (seen.append(self.config), forward(self, *x, **y))[1]
    )
    figures = one.measure(batch, Point(3, 9, "eager", way), 2, CPU)
    assert list(figures) == ["ms_median", "ms_p20", "ms_p80", "tokens_per_second", "peak_mib"]
    assert len(seen) == 3 and {(c.passes, c.window, c.activation_checkpointing) for c in seen} == {(3, 9, way == "on")}


@pytest.mark.parametrize(
    ("mode", "fault", "why"),
    [
        ("eager", torch.OutOfMemoryError("CUDA out of memory"), "out of memory, no row"),
        ("cuda-graph", RuntimeError("operation not permitted\nmore"), "no row: operation not permitted"),
        ("cuda-graph", None, "no graph serves it"),
        ("eager", float("nan"), "WRONG, no row: the loss is nan"),
    ],
    ids=["memory", "recording", "kind", "nan"],
)
def test_what_cannot_be_measured_says_why(monkeypatch, mode, fault, why):
    def step(*_, **__):
        if isinstance(fault, Exception):
            raise fault
        return torch.tensor(fault) if fault is not None else None

    one, batch = trained(), make_batch(PRESETS["tiny"], 0, CPU)
    monkeypatch.setattr(training, "StepGraphs", lambda *_: step)
    if mode == "eager":
        monkeypatch.setattr(one, "_loss_and_gradients", step)
    with pytest.raises(NotMeasured, match=f"^{why}$"):
        one.measure(batch, Point(2, 9, mode, "off"), 1, CPU)
    assert one.graphs is None


def test_an_error_of_our_own_is_not_hidden(monkeypatch):
    one = trained()

    def step(_):
        raise RuntimeError("broken")

    monkeypatch.setattr(one, "_loss_and_gradients", step)
    with pytest.raises(RuntimeError, match="^broken$"):
        one.measure(make_batch(PRESETS["tiny"], 0, CPU), Point(1, 9, "eager", "off"), 1, CPU)


class GatedDeltaNet(nn.Module):
    """Stands in for fla's layer: its arguments, its cache, our arithmetic."""

    def __init__(self, hidden_size, expand_v=2, head_dim=256, num_heads=6, layer_idx=None):
        super().__init__()
        assert expand_v == 1
        self.layer, self.layer_idx = SleepGDNLayer(hidden_size, num_heads=num_heads, head_dim=head_dim), layer_idx

    def forward(self, hidden_states, past_key_values=None, use_cache=False):
        assert use_cache
        state = self.layer.init_state(hidden_states.shape[0])
        if len(past_key_values) > self.layer_idx:
            kept = past_key_values[self.layer_idx]
            (conv_state, *_) = kept["conv_state"]
            state = GDNState(kept["recurrent_state"], state.conv_state if conv_state is None else conv_state)
        y, state = self.layer(hidden_states, state=state, return_state=True)
        conv_states = (state.conv_state, None, None)
        past_key_values.update(
            layer_idx=self.layer_idx, recurrent_state=state.fast_weights, conv_state=conv_states, offset=y.shape[1]
        )
        return y, None, past_key_values


@pytest.mark.parametrize("labelled", [3, 30], ids=["last-window", "everywhere"])
@pytest.mark.parametrize("passes", [1, 3])
def test_the_model_with_flas_layers_is_the_same_model(monkeypatch, passes, labelled):
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.layers", types.SimpleNamespace(GatedDeltaNet=GatedDeltaNet))
    preset = dataclasses.replace(PRESETS["tiny"], batch=2, answer=labelled)
    config = HybridConfig(**preset.model | {"layers": ("attn", "gdn") * 2}, window=12, passes=passes)
    torch.manual_seed(0)
    ours, theirs = SleepHybridModel(config), fla_hybrid.FlaHybrid(config)
    renamed = {}
    for name, value in ours.state_dict().items():
        block = re.match(r"blocks\.(\d+)\.(\w+)\.(.*)", name)
        if block:
            i, part, rest = block.groups()
            inner = "layer." if part == "mixer" and config.layers[int(i)] == "gdn" else ""
            name = f"{part}s.{i}.{inner}{rest}"
        renamed[name] = value
    theirs.load_state_dict(renamed)
    batch = make_batch(preset, 0, CPU)
    losses = [
        m(batch.input_ids, labels=batch.labels, loss_mask=batch.loss_mask, return_state=False).loss
        for m in (ours, theirs)
    ]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, m.embed.weight)[0] for loss, m in zip(losses, (ours, theirs), strict=True)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_fla_says_why_it_cannot_run(monkeypatch):
    config = HybridConfig(**PRESETS["tiny"].model, window=12)
    monkeypatch.setattr(fla_hybrid.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="fla is not installed"):
        fla_hybrid.load_fla_hybrid(config, CPU)
    monkeypatch.setattr(fla_hybrid.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="needs CUDA"):
        fla_hybrid.load_fla_hybrid(config, CPU)
