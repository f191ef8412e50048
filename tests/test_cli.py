"""The command line: help, what a run leaves behind, resuming, refusals, and the demo in miniature."""

import inspect
import math
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pytest
import typer
from commands import read, run
from rich.console import Console
from typer.testing import CliRunner

import sleep_ops.cli
from sleep_ops.cli.common import print_evaluations
from sleep_ops.cli.options import Fields, all_but, command, docstring
from sleep_ops.experiments.demo import CPU, CUDA, Scale, choose_scale, run_demo
from sleep_ops.experiments.presets import preset, run_config
from sleep_ops.files import read_csv
from sleep_ops.tasks import Rule110
from sleep_ops.training import TrainConfig, Trainer, load_run

SMALL = "--t 2 --strings 2 --bits 6 --width 16 --heads 2 --layers attn-gdn --batch 8 --steps 6 --device cpu".split()
SMALL += "--eval-every 3 --eval-samples 16 --checkpoint-every 2 --passes 2".split()


def losses(folder):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_csv(folder / "metrics.csv")]


@pytest.mark.parametrize("command", ["train rule110", "finetune", "eval", "demo", "recall", "bench passes"])
def test_every_command_has_the_common_options(command):
    text = run(*command.split(), "--help")
    for name in ("--seed", "--device", "--out", "--help"):
        assert name in text


def commands(command=None, path=()):
    """(path, command) of every one that is no group."""
    command = typer.main.get_command(sleep_ops.cli.app) if command is None else command
    if not hasattr(command, "list_commands"):
        return [(" ".join(path), command)]
    names = command.list_commands(command.context_class(command))
    return [x for n in names for x in commands(command.get_command(command.context_class(command), n), (*path, n))]


def test_every_option_says_what_it_is():
    found = commands()
    assert len(found) == 21
    assert [f"{path} {p.name}" for path, command in found for p in command.params if not p.help] == []


@dataclass(frozen=True)
class Example:
    """An example.

    first, second  two numbers,
                   of any kind.
    names          some
    left_out       of the options.
    batch_size: of a batch.
    """

    first: int | float
    second: float = 0.5
    names: tuple[str, ...] | None = ("a", "b")
    left_out: int = 3
    batch_size: int | None = None


def test_options_are_those_of_the_fields():
    """Names, types, defaults and help; a value that is read; and what was given alone."""
    got = {}
    app = typer.Typer()

    @app.command()
    @command
    def full(settings: Annotated[dict, Fields(Example, all_but(Example, "left_out"))]):
        got.update(settings)

    @app.command()
    @command
    def some(settings: Annotated[dict, Fields(Example(2, second=4.0), given=True)]):
        got.update(settings)

    def call(*arguments, code=0):
        got.clear()
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == code, result.output
        return got

    assert call("full", "--first", "inf") == {"first": math.inf, "second": 0.5, "names": ("a", "b"), "batch_size": None}
    assert call("full", "--first", "3", "--names", "x", "--batch", "7") | {"second": 1} == {
        **{"first": 3, "second": 1, "names": ("x",), "batch_size": 7}
    }
    call("full", code=2)
    assert call("some", "--left-out", "0") == {"left_out": 0} and call("some") == {}
    assert docstring(Example(1))["first"] == docstring(Example)["second"] == "two numbers, of any kind."
    parameters = inspect.signature(full).parameters
    assert {name: p.default for name, p in parameters.items()} == {"first": ..., "second": 0.5} | {
        **{"names": "a,b", "batch": None}
    }


def test_no_command_shows_the_help():
    assert "train" in run("--help") and "rule110" in run("train", "--help") and "passes" in run("bench", "--help")


def test_the_papers_rule_110_is_the_default_of_the_library():
    settings = preset("rule110", "paper")
    settings["task"]["name"] = "rule110"
    config = run_config("rule110", settings)
    assert config.train == TrainConfig() and config.task == Rule110().to_dict()


def test_the_stage_of_training_is_told(tmp_path):
    text = run("train", "rule110", *SMALL, "--steps", 30, "--first-t", 1, "--stage-loss", 99, "--out", tmp_path / "run")
    assert re.search(r"stage of training *│ 1 ", text)
    assert [row["stage"] for row in read(tmp_path / "run/eval.csv")] == ["0"] * 6 + ["1"] * 4


def test_train_eval_and_resume(tmp_path):
    out = tmp_path / "run"
    assert "finished" in run("train", "rule110", *SMALL, "--out", out)
    assert {p.name for p in out.iterdir()} >= {"config.json", "metrics.csv", "eval.csv", "checkpoints"}
    text = run("eval", out, "--passes", "1,3", "--samples", 32, "--device", "cpu", "--out", tmp_path / "eval.csv")
    assert "chance" in text and "trained with N=2 to step 6" in text
    rows = read(tmp_path / "eval.csv")
    assert [(row["passes"], row["samples"]) for row in rows] == [("1", "32.0"), ("3", "32.0")]

    parts = tmp_path / "parts"
    assert "at step 3 of 6" in run("train", "rule110", *SMALL, "--out", parts, "--until", 3)
    assert "going on from step 3" in run("train", "rule110", *SMALL, "--out", parts)
    assert losses(parts) == losses(out) and len(losses(out)) == 6

    assert "train.lr_muon" in run("train", "rule110", *SMALL, "--lr-muon", "1e-3", "--out", parts, code=2)
    run("train", "rule110", *SMALL, "--lr-muon", "1e-3", "--out", parts, "--fresh")
    assert losses(parts) != losses(out)


def test_a_finished_run_goes_on_with_more_steps(tmp_path):
    def trained(out, *more, code=0):
        return run("train", "rule110", *SMALL, "--out", out, *more, code=code)

    out, parts = tmp_path / "run", tmp_path / "parts"
    trained(out, "--until", 4)
    assert "train.steps: 6 -> 9" in trained(out, "--steps", 9, code=2)  # not before it is finished
    trained(out)
    first = losses(out)
    assert "train.steps: 6 -> 5" in trained(out, "--steps", 5, code=2)
    assert "train.lr_muon" in trained(out, "--steps", 9, "--lr-muon", "1e-3", code=2)
    shutil.copytree(out, parts)
    assert "going on from step 6" in (text := trained(out, "--steps", 9)) and "finished" in text
    assert losses(out)[:6] == first and len(losses(out)) == 9
    rates = [row["lr_muon"] for row in read_csv(out / "metrics.csv")]
    train = load_run(out, device="cpu")[0].train
    assert rates[6:] == [train.lr_muon * train.learning_rate_factor(step) for step in (6, 7, 8)]
    trained(parts, "--steps", 9, "--until", 7)
    trained(parts, "--steps", 9)
    assert losses(parts) == losses(out)
    assert "nothing to do" in trained(out, "--steps", 9)


def test_every_model_setting_reaches_the_model(tmp_path):
    extra = "--layers gdn-attn-gdn --loop 1:2 --eviction sliding --sleep-on unlabelled --window 5 --head-dim 4".split()
    extra += "--trainable fast_weights --micro-batch 3".split()
    extra += "--conv-boundary zero --rule hebbian --neg-eigval --init-std 0.1 --boundary zero".split()
    run(
        "train",
        "rule110",
        *SMALL,
        *extra,
        "--activation-checkpointing",
        "--held-out",
        0,
        "--steps",
        1,
        "--out",
        tmp_path,
    )
    config, task, model, step = load_run(tmp_path, device="cpu")
    c = model.config
    assert (c.layers, c.loop, c.eviction, c.sleep_on) == (("gdn", "attn", "gdn"), (1, 2), "sliding", "unlabelled")
    assert (config.train.trainable, config.train.micro_batch) == ("fast_weights", 3)
    assert (c.window, c.head_dim, c.conv_boundary, c.rule, c.passes) == (5, 4, "zero", "hebbian", 2)
    assert (
        c.initializer_range == 0.1
        and c.allow_neg_eigval
        and c.activation_checkpointing
        and task.boundary == "zero"
        and step == 1
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--t", "-1"), "t:"),
        (("--bits", "2"), "bits:"),
        (("--passes", "0"), "passes:"),
        (("--window", "0"), "window:"),
        (("--layers", "attn-mamba"), "layers:"),
        (("--loop", "1"), "loop:"),
        (("--loop", "0:9"), "loop:"),
        (("--eviction", "soft"), "eviction:"),
        (("--init-std", "0"), "init_std:"),
        (("--width", "17"), "num_heads:"),
        (("--steps", "0"), "steps:"),
        (("--lr-muon", "0"), "lr_muon:"),
        (("--lr-muon", "nan"), "lr_muon:"),
        (("--warmup", "0.9", "--decay", "0.9"), "warmup"),
        (("--precision", "fp4"), "precision:"),
        (("--device", "abacus"), "device:"),
        (("--until", "0"), "until:"),
        (("--steps", "many"), "integer"),
        (("--no-such-option",), "no-such-option"),
        (("--cuda-graph",), "cuda_graph:"),
    ],
    ids=" ".join,
)
def test_bad_settings_are_refused_and_nothing_is_written(tmp_path, arguments, named):
    out = tmp_path / "run"
    named_in = run("train", "rule110", *SMALL, "--out", out, *arguments, code=2)
    assert named in named_in
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "nowhere"),
        ("eval", "nowhere", "--passes", "two"),
        ("demo", "--passes", "1,1", "--device", "cpu", "--out", "x"),
        ("demo", "--passes", "0", "--device", "cpu", "--out", "x"),
        ("demo", "--steps", "0", "--device", "cpu", "--out", "x"),
        ("bench", "passes", "--passes", "0", "--out", "x"),
        ("recall", "--codewords", "1000000000000000", "--out", "x"),
        ("recall", "--memories", "1000000000000000", "--out", "x"),
        ("recall", "--key-dim", "1000000000000000", "--out", "x"),
        ("recall", "--loads", "0.5,1e300", "--out", "x"),
        ("bench", "passes", "--dtype", "int8", "--out", "x"),
        ("bench", "passes", "--device", "abacus", "--out", "x"),
    ],
    ids=" ".join,
)
def test_other_refusals(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert "expected" in run(*arguments, code=2)
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_whole_checkpoint_fails(tmp_path):
    run("train", "rule110", *SMALL, "--steps", 1, "--out", tmp_path)
    for file in tmp_path.glob("checkpoints/*/*.safetensors"):
        file.unlink()
    assert "none of its 1 checkpoints is whole" in run("eval", tmp_path, code=1)


def miniature(passes=(1, 2)):
    train = TrainConfig(
        steps=4, batch_size=8, eval_every=2, eval_samples=16, checkpoint_every=2, device="cpu", lr_muon=5e-3
    )
    return Scale(Rule110(t=2, strings=2, bits=10, held_out=0.125), 16, 2, 0.1, train, passes)


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setattr("sleep_ops.experiments.demo.FINAL_SAMPLES", 64)
    console = Console(record=True, width=160, file=Path("/dev/null").open("w"))
    assert run_demo(miniature(), tmp_path, console=console) == (None, {})
    rows = read_csv(tmp_path / "demo.csv")
    assert [(r["passes"], r["tokens"], r["samples"]) for r in rows] == [(1, 4 * 8 * 22, 64), (2, 4 * 8 * 22, 64)]
    curves = read_csv(tmp_path / "curves.csv")
    assert [(r["passes"], r["step"]) for r in curves] == [(1, 2), (1, 4), (2, 2), (2, 4)]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    recall = (tmp_path / "recall.csv").read_bytes()
    text = console.export_text()
    assert "chance" in text and "N=2" in text and "least squares" in text

    # Done once, it only evaluates again; the same data order and initialisation serve every N.
    before = (tmp_path / "passes-2/metrics.csv").read_bytes()
    run_demo(miniature(), tmp_path, console=console)
    assert (tmp_path / "passes-2/metrics.csv").read_bytes() == before and read_csv(tmp_path / "demo.csv") == rows
    assert (tmp_path / "recall.csv").read_bytes() == recall
    with pytest.raises(ValueError, match="passes-1.*train.seed"):
        run_demo(Scale(**vars(miniature()) | {"train": TrainConfig(seed=3, device="cpu")}), tmp_path, console=console)


def test_demo_scales():
    assert choose_scale("cpu", 0).passes == CPU.passes
    assert choose_scale("cpu", 5, (1, 3), 7).train.seed == 5
    assert (CUDA.task.seq_len, CUDA.task.window, CUDA.task.t, CUDA.hidden_size) == (100, 24, 8, 256)
    assert CUDA.train.steps * CUDA.train.batch_size * CUDA.task.seq_len == 40_960_000


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "precious").write_text("mine")
    (tmp_path / "metrics.csv").write_text("mine")
    message = run("train", "rule110", *SMALL, "--steps", 1, "--out", tmp_path, code=2)
    assert "checkpoints or metrics.csv" in message and "--fresh" in message
    assert (tmp_path / "checkpoints" / "precious").read_text() == (tmp_path / "metrics.csv").read_text() == "mine"
    (tmp_path / "file").touch()
    assert "expected a folder" in run("train", "rule110", *SMALL, "--steps", 1, "--out", tmp_path / "file", code=2)


def contents(folder):
    """Every path under a folder, with what is in it: a file's bytes, where a link leads."""
    paths = [p for p in sorted(folder.rglob("*")) if p.name != ".lock"]
    return {p: p.readlink() if p.is_symlink() else p.read_bytes() if p.is_file() else None for p in paths}


@pytest.mark.parametrize(
    "command",
    [
        ("train", "rule110", *SMALL),
        ("demo", "--device", "cpu"),
        ("recall",),
        ("bench", "passes", "--device", "cpu"),
        ("sweep", "fig2a", "--preset", "tiny", "--device", "cpu"),
        ("verify", "--device", "cpu"),
        ("data", "rule110"),
        ("eval", "a-run"),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("place", ["file/below/it", "link/below", f"{'long' * 100}/below"], ids=lambda x: x[:4])
def test_an_out_that_cannot_be_made_is_refused(tmp_path, monkeypatch, command, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    before = contents(tmp_path)
    message = run(*command, "--out", place, code=2)
    assert "out: expected a folder that can be written, got " in message and place[:4] in message
    assert "Errno" not in message and contents(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sleep_ops.files.tempfile.mkdtemp", full)
    assert "(No space left on device)" in run("train", "rule110", *SMALL, "--out", tmp_path / "run", code=2)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of 6 steps with checkpoints at 2 and 4, stopped there."""
    out = tmp_path_factory.mktemp("begun") / "run"
    run("train", "rule110", *SMALL, "--until", 4, "--out", out)
    return out


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tensorboard", "a file"),
        ("checkpoints", "a file"),
        ("checkpoints", "a link to nothing"),
        ("metrics.csv", "a folder"),
        (".lock", "a folder"),
        ("config.json", "a folder"),
    ],
)
def test_a_run_folder_with_files_for_folders_is_refused(tmp_path, begun, name, kind):
    out = tmp_path / "run"
    shutil.copytree(begun, out)
    path = out / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    {"a file": path.touch, "a folder": path.mkdir, "a link to nothing": lambda: path.symlink_to("nowhere")}[kind]()
    before = contents(out)
    message = run("train", "rule110", *SMALL, "--out", out, code=2)
    assert f"{name}: expected" in message and f"in a run folder, got {kind}" in message and "Errno" not in message
    assert contents(out) == before


def test_a_newest_checkpoint_that_is_a_dangling_link_is_passed_over(tmp_path, begun):
    out, newest = tmp_path / "run", tmp_path / "run/checkpoints/step-00000004"
    shutil.copytree(begun, out)
    newest.rename(tmp_path / "moved")
    newest.symlink_to("nowhere")
    message = run("train", "rule110", *SMALL, "--out", out)
    assert "passed over" in message and "going on from step 2" in message and "finished" in message
    assert newest.is_dir() and not newest.is_symlink()
    shutil.rmtree(newest)
    newest.symlink_to(tmp_path / "moved")  # a link to a whole one serves, and deleting it leaves that whole
    run("train", "rule110", *SMALL, "--out", out, "--fresh")
    assert (tmp_path / "moved/manifest.json").is_file()


def test_more_steps_that_are_not_taken_change_nothing(tmp_path):
    def trained(*more):
        return run("train", "rule110", *SMALL, *more, "--out", tmp_path)

    trained("--steps", 4)
    assert "nothing to do" in trained("--steps", 8, "--until", 2)
    assert "nothing to do" in trained("--steps", 4)


def test_a_folder_may_have_brackets_in_its_name(tmp_path):
    out = tmp_path / "a[" / "5]"
    assert "[/5]: finished" in "".join(run("train", "rule110", *SMALL, "--steps", 2, "--out", out).split("\n"))
    assert "[/5]: already at step 2" in "".join(run("train", "rule110", *SMALL, "--steps", 2, "--out", out).split("\n"))


def test_a_number_of_passes_is_evaluated_once(tmp_path):
    run("train", "rule110", *SMALL, "--steps", 2, "--out", tmp_path)
    for given in (("eval", tmp_path), ("probe", tmp_path, "--out", tmp_path / "probe")):
        text = run(*given, "--passes", "1,1", "--device", "cpu", code=2)
        assert "passes: expected distinct ones, got '1 more than once'" in text


def test_eval_of_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "file: expected a run folder, got a file" in run("eval", tmp_path / "file", code=2)


def test_a_signal_during_the_last_step_stops_nothing(tmp_path, monkeypatch):
    evaluate = Trainer.evaluate

    def interrupted(self, samples=None):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(self, samples)

    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    command = ("train", "rule110", *SMALL, "--eval-every", 0, "--steps", 2, "--out", tmp_path)
    text = run(*command)
    assert "finished" in text and "goes on" not in text and "nothing to do" in run(*command)


def test_a_second_trainer_in_the_same_folder_is_refused(tmp_path):
    fcntl = pytest.importorskip("fcntl", reason="no file locks on this system")
    run("train", "rule110", *SMALL, "--steps", 2, "--until", 1, "--out", tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process" in run("train", "rule110", *SMALL, "--steps", 2, "--out", tmp_path, code=2)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    run("train", "rule110", *SMALL, "--steps", 2, "--out", tmp_path)
    assert "nothing to do" in run("train", "rule110", *SMALL, "--steps", 2, "--out", tmp_path)
    assert "expected a CSV file" in run("eval", tmp_path, "--out", tmp_path, code=2)


def test_chance_is_said_of_an_accuracy_alone():
    for metric, known in (("exact", True), ("loss", False)):
        console = Console(record=True, width=80)
        task = SimpleNamespace(metric=metric, chance=lambda: {"majority": 0.25})
        print_evaluations(console, task, [(1, {metric: 0.5})])
        assert ("25.00%" in console.export_text()) == known and "0.2500" not in console.export_text()
