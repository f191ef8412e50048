"""Presets, baselines, figures: that they build, run in miniature, go on where they stopped, and are drawn."""

import json
import shutil
from dataclasses import fields

import hf_models
import pytest
import torch
from commands import read, run
from test_adapter_loading import word_tokenizer

from sleep_ops import HybridConfig, SleepHybridModel
from sleep_ops.cli.options import _NAMES
from sleep_ops.cli.train import task_commands
from sleep_ops.experiments.figures import figure_names, load_figure
from sleep_ops.experiments.presets import BASELINES, SIZES, preset, run_config, set_value
from sleep_ops.experiments.sweep import RESULTS_FILE, train_runs
from sleep_ops.tasks import TASKS, build_task
from sleep_ops.tasks.gsm_infinite.task import VOCABULARY
from sleep_ops.training import TrainConfig, load_run

TRAINED = sorted(set(TASKS) - {"text"})  # text has no data of its own


def settings(task: str, size: str, **changes) -> dict:
    found = preset(task, size)
    found["task"]["name"] = task
    for name, value in changes.items():
        set_value(found, name.replace("__", "."), value)
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("task", TRAINED)
def test_every_preset_is_a_run(task, size):
    config = run_config(task, settings(task, size))
    built, model = build_task(config.task), HybridConfig.from_dict(config.model)
    assert model.vocab_size == built.vocab_size and model.window == built.window
    assert model.window < built.seq_len  # something is evicted


def test_a_smaller_preset_is_the_larger_one_where_it_says_nothing():
    paper, small, tiny = (run_config("depo", settings("depo", size)) for size in SIZES)
    assert paper.train.batch_size == small.train.batch_size == 128 and tiny.train.batch_size == 64
    assert paper.train.lr_muon == small.train.lr_muon != tiny.train.lr_muon
    assert paper.model["layers"] == ("attn", "jet") * 5


@pytest.mark.parametrize("task", TRAINED)
def test_every_tiny_preset_trains_from_the_command_line(task, tmp_path):
    options = "--preset tiny --steps 2 --batch 4 --eval-every 2 --eval-samples 8 --device cpu".split()
    text = run("train", task.replace("_", "-"), *options, "--out", tmp_path)
    assert "finished" in text and "chance" in text
    assert load_run(tmp_path, device="cpu")[3] == 2
    assert "chance" in run("eval", tmp_path, "--samples", 8, "--batch", 4, "--device", "cpu", "--passes", "1,2")


def test_a_tasks_options_and_a_presets_settings_meet(tmp_path):
    options = "--preset tiny --t 3 --bits 6 --width 16 --heads 2 --layers attn-gdn --steps 1 --batch 4".split()
    options += "--reinject --backprop-passes 1 --eval-samples 8 --device cpu --eviction sliding --loop 1:1".split()
    run("train", "rule110", *options, "--out", tmp_path)
    config, task, model, _ = load_run(tmp_path, device="cpu")
    assert (task.t, task.bits, task.strings, model.config.window) == (3, 6, 2, 6)
    assert (model.config.passes, model.config.reinject, model.config.backprop_passes) == (2, True, 1)
    assert (model.config.eviction, model.config.loop, config.train.lr_muon) == ("sliding", (1, 1), 5e-3)


@pytest.mark.parametrize("task", TRAINED)
def test_every_setting_of_task_and_recipe_has_an_option_without_a_default(task):
    options = {p.name: p for p in task_commands()[task.replace("_", "-")].params}
    names = {_NAMES.get(f.name, f.name) for owner in (TrainConfig, TASKS[task]) for f in fields(owner)}
    assert all(options[name].default is None and options[name].help for name in names)


def test_baselines_spend_the_same_otherwise():
    given = settings("rule110", "tiny", model__passes=3)
    plain = HybridConfig.from_dict(run_config("rule110", given).model)
    found = {name: run_config("rule110", given, name) for name in BASELINES}
    models = {name: HybridConfig.from_dict(c.model) for name, c in found.items()}
    assert all(m.passes == 1 for m in models.values()) and plain.passes == 3
    assert models["depth"].layers == plain.layers * 3 and models["depth"].window == plain.window
    assert models["loop"].tied_repeats == 3 and models["loop"].layers == plain.layers
    assert models["state"].gdn_head_v_dim == 3 * plain.hidden_size // plain.num_heads
    assert models["full"].window is None
    assert build_task(found["repeat"].task).repeats == 3 and models["repeat"] == HybridConfig.from_dict(
        plain.to_dict() | {"passes": 1}
    )
    for config in models.values():
        SleepHybridModel(config)
    depo = settings("depo", "tiny", model__passes=3)
    repeated = build_task(run_config("depo", depo, "repeat").task)
    assert repeated.repeats == 3 and repeated.seq_len > build_task(run_config("depo", depo).task).seq_len


def test_tied_repeats_are_the_same_blocks_with_states_of_their_own():
    """The logits of a model three times as deep whose blocks are equal."""
    values = dict(vocab_size=7, hidden_size=16, layers=("attn", "gdn"), window=5, num_heads=2, initializer_range=0.3)
    torch.manual_seed(0)
    tied = SleepHybridModel(HybridConfig(**values, tied_repeats=3)).double()
    deep = SleepHybridModel(HybridConfig(**values | {"layers": ("attn", "gdn") * 3})).double()
    state = deep.state_dict()
    for name in state:
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[1] = str(int(parts[1]) % 2)
        state[name] = tied.state_dict()[".".join(parts)]
    deep.load_state_dict(state)
    ids = torch.randint(0, 7, (2, 13))
    torch.testing.assert_close(tied(ids).logits, deep(ids).logits, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in tied.parameters()) < sum(p.numel() for p in deep.parameters())


def test_baselines_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="baseline: expected one of"):
        run_config("rule110", settings("rule110", "tiny"), "luck")
    with pytest.raises(ValueError, match="its context can't be repeated"):
        run_config("word_problem", settings("word_problem", "tiny"), "repeat")
    replayed = settings("rule110", "tiny", model__passes="inf", model__sleep_kind="replay", model__reinject=False)
    with pytest.raises(ValueError, match="passes: expected a finite number"):
        run_config("rule110", replayed, "depth")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", figure_names())
def test_every_figure_is_a_grid_of_runs(name, size):
    figure = load_figure(name, size)
    points = figure.points()
    assert len(points) == len({json.dumps(p) for p in points}) > 1 and "model.passes" in figure.grid
    if figure.kind == "train":
        runs = train_runs(figure, size, baselines=("depth", "full"))
        assert len({folder for folder, _, _ in runs}) == len(runs) > len(points)
    if figure.x == "level":
        assert figure.levels == sorted(figure.levels)


def test_the_papers_numbers_stand_in_the_papers_setting_alone():
    assert load_figure("fig2b").reference == [[1, 0.10], [2, 0.20], [3, 0.30], [4, 0.30]]
    assert load_figure("fig2b", "small").reference == []
    assert load_figure("fig2b").set == {"task.t": 32, "train.steps": 97600}
    # 97600 steps of 512 sequences of 100 tokens
    assert 97600 * 512 * 100 == pytest.approx(5e9, rel=0.01)


SMALL = "--preset tiny --set train.steps=4 --set train.batch_size=4 --set train.eval_samples=8".split()
SMALL += "--set train.eval_every=2 --set model.hidden_size=16 --device cpu --jobs 1".split()


def table(folder):
    return read(folder / RESULTS_FILE)


def test_a_sweep_runs_goes_on_and_is_drawn(tmp_path):
    out = tmp_path / "sweep"
    text = run("sweep", "fig2b", *SMALL, "--baselines", "loop,full", "--out", out)
    rows = table(out)
    assert [(r["model.passes"], r["baseline"]) for r in rows] == [
        ("1", ""), ("2", ""), ("3", ""), ("4", ""), ("4", "loop"), ("4", "full"),
    ]  # fmt: skip
    assert all(float(r["step"]) == 4 and 0 <= float(r["exact"]) <= 1 for r in rows)
    assert "fig2b.png" in "".join(text.split()) and (out / "fig2b.png").stat().st_size > 10_000

    metrics = out / "passes=2" / "metrics.csv"
    before = metrics.read_bytes()  # speeds included: not run again
    trained = (out / "passes=4" / "metrics.csv").read_text()
    for path in sorted((out / "passes=4").rglob("*"), reverse=True):  # as if stopped before this run
        path.rmdir() if path.is_dir() else path.unlink()
    run("sweep", "fig2b", *SMALL, "--baselines", "loop,full", "--out", out)
    assert metrics.read_bytes() == before
    drop = lambda text: [line.split(",")[:8] for line in text.splitlines()]  # noqa: E731 - all but speed and memory
    assert drop((out / "passes=4" / "metrics.csv").read_text()) == drop(trained)
    table_before = table(out)
    assert {r["run"]: r["exact"] for r in table_before} == {r["run"]: r["exact"] for r in rows}

    # without the baselines their rows stay, and what was not run again keeps its row as it was
    run("sweep", "fig2b", *SMALL, "--out", out)
    assert table(out) == table_before
    curves = [(r["run"], float(r["step"])) for r in read(out / "curves.csv")]
    assert curves == [(r["run"], step) for r in table_before for step in (2.0, 4.0)]
    assert all(r["revision"] and r["threads"] for r in table_before)

    run("plot", "fig2b", "--preset", "tiny", "--out", out, "--image", tmp_path / "again.svg")
    assert "<svg" in (tmp_path / "again.svg").read_text()
    assert "expected the sweep of fig2a" in run("plot", "fig2a", "--preset", "tiny", "--out", out, code=2)
    assert "expected the folder of a sweep" in run("plot", "fig2a", "--out", tmp_path / "none", code=2)


def test_a_sweep_over_other_values(tmp_path):
    run("sweep", "fig2a", *SMALL, "--grid", "task.t=[2,3]", "--grid", "model.passes=[3]", "--out", tmp_path)
    assert [(r["task.t"], r["model.passes"]) for r in table(tmp_path)] == [("2", "3"), ("3", "3")]
    for grid, message in (("task.t=2", "grid task.t: expected a list"), ("task.bits=[3]", "grid: expected one of")):
        assert message in " ".join(run("sweep", "fig2a", "--grid", grid, "--out", tmp_path, code=2).split())


def test_runs_with_and_without_stages_are_in_one_table(tmp_path):
    grid = ("--grid", "task.t=[2,3]", "--grid", "model.passes=[1]", "--set", "task.first_t=2")
    run("sweep", "fig2a", *SMALL, *grid, "--out", tmp_path)
    assert [r["task.t"] for r in table(tmp_path)] == ["2", "3"]
    assert [r["task.t"] for r in read(tmp_path / "summary.csv")] == ["2", "3"]
    assert {r["run"] for r in read(tmp_path / "curves.csv")} == {r["run"] for r in table(tmp_path)}


def test_a_sweeps_folder_is_of_runs_with_the_same_settings(tmp_path):
    one = ("sweep", "fig2b", *SMALL, "--grid", "model.passes=[1]")
    run(*one, "--out", tmp_path)
    before = (tmp_path / RESULTS_FILE).read_bytes()
    two = ("sweep", "fig2b", *SMALL, "--grid", "model.passes=[2]", "--out", tmp_path)
    text = " ".join(run(*two, "--set", "train.batch_size=3", code=2).split())
    assert "out: expected a folder of runs with the same settings" in text and "train.batch_size" in text
    assert (tmp_path / RESULTS_FILE).read_bytes() == before and not (tmp_path / "passes=2").exists()
    run(*two)
    assert len(table(tmp_path)) == 2 and (tmp_path / "paired.csv").exists()
    run(*one, "--fresh", "--out", tmp_path)
    assert len(table(tmp_path)) == 1 and not (tmp_path / "paired.csv").exists()
    for given in (("--grid", "model.passes=[2,2]"), ("--baselines", "loop,loop")):
        assert "expected distinct ones" in " ".join(run("sweep", "fig2b", *given, "--out", tmp_path, code=2).split())


def test_replay_to_the_fixed_point_stands_beside_other_passes():
    changes = {"model.sleep_kind": "replay", "model.reinject": False}
    figure = load_figure("fig2b", "tiny").narrowed({"model.passes": ["inf", 2]})
    assert [name for name, *_ in train_runs(figure, "tiny", changes=changes)] == ["passes=inf", "passes=2"]


def test_a_figure_over_levels_of_difficulty(tmp_path):
    run("sweep", "fig3", *SMALL, "--grid", "model.passes=[1,2]", "--out", tmp_path)
    rows = table(tmp_path)
    assert len(rows) == 2 and all(f"exact_{k}" in rows[0] for k in (1, 2))
    assert (tmp_path / "fig3.png").stat().st_size > 10_000


def test_a_figure_draws_the_levels_there_are(tmp_path):
    run("sweep", "fig3", *SMALL, "--set", "task.max_hops=1", "--grid", "model.passes=[1]", "--out", tmp_path)
    assert "exact_1" in table(tmp_path)[0] and "exact_2" not in table(tmp_path)[0]
    assert (tmp_path / "fig3.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_figure_from_a_checkpoint(tmp_path):
    """Problems in the checkpoint's own tokens, a warm-up, a run for each N; stopped between two, it goes on."""
    folder = tmp_path / "checkpoint"
    words = [w for w in VOCABULARY if w.strip() == w and w]
    model = hf_models.build("qwen3_5", vocab_size=len(words) + 2)
    model.save_pretrained(folder)
    word_tokenizer(folder, words, whitespace=False)
    small = "--preset tiny --model".split() + [folder] + "--set train.steps=2 --set train.batch_size=4".split()
    small += "--set train.warm_steps=1 --set data.problems=24 --set data.eval_problems=12 --device cpu".split()
    out = tmp_path / "out"
    run("sweep", "fig5", *small, "--out", out)
    rows = table(out)
    assert [r["model.passes"] for r in rows] == ["1", "2"] and {"exact_1", "exact_2", "majority_1"} <= rows[0].keys()
    assert (out / "fig5.png").exists() and (out / "passes=2" / "model" / "config.json").exists()
    run("plot", "fig5", "--preset", "tiny", "--out", out, "--image", tmp_path / "fig5.svg")
    assert "<!-- commonest answer -->" in (tmp_path / "fig5.svg").read_text()
    lines = [json.loads(line) for line in (out / "data" / "train.jsonl").read_text().splitlines()]
    assert len(lines) == 24 and {line["op"] for line in lines} == {1, 2}
    assert all(150 - 40 < line["length"] <= 200 for line in lines)  # within a sentence of the wanted lengths

    def weights(passes):
        return (out / f"passes={passes}" / "model" / "model.safetensors").read_bytes()

    first, second = weights(1), weights(2)
    shutil.rmtree(out / "passes=2")
    run("sweep", "fig5", *small, "--out", out)
    assert (weights(1), weights(2)) == (first, second) and table(out) == rows
    changed = small + ["--set", "data.problems=25"]
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for setting in ("data.lengths=[1,2]", "model.eviction=soft", "train.warm_steps=-1"):
        run("sweep", "fig5", *changed, "--fresh", "--set", setting, "--out", out, code=2)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert "data: expected" in " ".join(run("sweep", "fig5", *changed, "--out", out, code=2).split())
    assert "data.problems: expected an integer" in " ".join(
        run("sweep", "fig5", *small, "--set", "data.problems=0", "--out", out, code=2).split()
    )
    assert len((out / "data" / "train.jsonl").read_text().splitlines()) == 24
    assert "data.problem: expected one of" in " ".join(
        run("sweep", "fig5", *small, "--set", "data.problem=3", "--out", out, code=2).split()
    )
    other = run("sweep", "fig5", *small, "--grid", "model.passes=[3]", "--set", "train.lr_muon=1", "--out", out, code=2)
    assert "out: expected a folder of runs with the same settings" in " ".join(other.split())
    assert not (out / "passes=3").exists()
    run("sweep", "fig5", *changed, "--fresh", "--out", out)
    assert len((out / "data" / "train.jsonl").read_text().splitlines()) == 25
    out = tmp_path / "seeds"
    run("sweep", "fig5", *small, "--grid", "model.passes=[2]", "--seeds", "0-1", "--jobs", 2, "--out", out)
    assert [(r["run"], r["seed"]) for r in table(out)] == [("passes=2,seed=0", "0"), ("passes=2,seed=1", "1")]
    assert {r["n"] for r in read(out / "summary.csv")} == {"2"} and (out / "seeds.png").exists()


@pytest.mark.slow
def test_the_throughput_figure_is_the_benchmark(tmp_path):
    run("sweep", "fig6", "--preset", "tiny", "--device", "cpu", "--set", "train.repeats=1", "--out", tmp_path)
    found = {(r["passes"], r["window"]) for r in read(tmp_path / "train.csv")}
    assert found == {("1", "8"), ("1", "12"), ("2", "8"), ("2", "12")} and (tmp_path / "train.png").exists()
    (tmp_path / "train.png").unlink()
    run("plot", "fig6", "--preset", "tiny", "--out", tmp_path)
    assert (tmp_path / "train.png").stat().st_size > 10_000
    assert "with train.csv" in " ".join(run("plot", "fig6", "--out", tmp_path / "none", code=2).split())


def test_sweeps_are_listed_and_bad_ones_refused(tmp_path):
    assert all(name in run("sweep") for name in figure_names())
    refusals = {
        ("fig9",): "figure: expected one of",
        ("fig2a", "--preset", "huge"): "preset: expected one of",
        ("fig2a", "--set", "train.speed=3"): "train.speed: expected one of",
        ("fig2a", "--set", "steps=3"): "name: expected task.FIELD",
        ("fig2a", "--set", "train.steps"): "set: expected NAME=VALUE",
        ("fig2a", "--baselines", "luck"): "baseline: expected one of",
        ("fig4",): "model: expected a checkpoint folder",
        ("fig2a", "--model", "x"): "model: expected none",
        ("fig6", "--set", "train.steps=3"): "set: expected",
        ("fig6", "--model", "x"): "model, baselines: expected none",
        ("fig6", "--baselines", "depth"): "model, baselines: expected none",
        ("fig2b", "--set", "model.passes=3"): "does not vary itself, got 'model.passes'",
        ("fig5", "--model", "x", "--set", "model.passes=3"): "does not vary itself, got 'model.passes'",
        ("fig2b", "--set", "train.lr_muon=abc"): "lr_muon: expected a number > 0, got 'abc'",
        ("fig2b", "--set", "task.held_out=abc"): "held_out: expected 0, or a fraction",
        ("fig2b", "--grid", 'model.passes=[1,"two"]'): "grid model.passes: expected integers >= 1",
        ("fig6", "--preset", "tiny", "--grid", 'window=["a"]'): "windows: expected distinct integers >= 1",
    }
    for arguments, message in refusals.items():
        text = run("sweep", *arguments, "--device", "cpu", "--out", tmp_path / "out", code=2)
        assert message in " ".join(text.split()), text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", TRAINED)
def test_instances_are_printed_and_exported(task, tmp_path):
    options = [f"--task-option={k}={v}" for k, v in preset(task, "tiny")["task"].items()]
    text = run("data", task, "--count", 2, *options)
    assert len(text.strip()) > 20
    assert run("data", task.replace("_", "-"), "--count", 2, *options) == text  # as `train` spells it
    out = tmp_path / "data.jsonl"
    run("data", task, "--count", 5, "--split", "eval", "--seed", 3, *options, "--out", out)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 5 and records[0] != records[1]
    first = records[0]
    if task == "gsm_infinite":
        assert {"prompt", "answer", "op", "id", "template", "length", "solution"} <= first.keys()
    else:
        built = TASKS[task](**preset(task, "tiny")["task"])
        batch = built.batch(3, 0, 5, split="eval")
        assert first["input_ids"] == batch.input_ids[0].tolist() and first["labels"] == batch.labels[0].tolist()
        assert first["text"] == built.render(batch.input_ids[0], batch.labels[0])


def test_data_refuses_what_cannot_be(tmp_path):
    refusals = {
        ("poetry",): "task: expected one of",
        ("text",): "task: expected one of",
        ("rule110", "--count", "0"): "count, seed: expected",
        ("rule110", "--task-option", "depth=3"): "task_option: expected settings of rule110",
        ("rule110", "--split", "test"): "split: expected one of",
        ("rule110", "--out", str(tmp_path)): "out: expected a JSONL file",
    }
    for arguments, message in refusals.items():
        assert message in " ".join(run("data", *arguments, code=2).split())
