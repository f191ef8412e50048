"""Several seeds: their statistics, sweeps over them in one process and in two, stopped and failing, and the demo."""

import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import is_png, leave, read, run
from rich.console import Console

from sleep_ops.cli.options import seeds_of
from sleep_ops.experiments.figures import load_figure
from sleep_ops.experiments.parallel import Run, run_all, shares
from sleep_ops.experiments.statistics import interval, paired, summary, t_quantile
from sleep_ops.experiments.sweep import paired_table, summary_table, train_runs

SETTINGS = "train.steps=30 train.batch_size=4 train.eval_samples=16 train.eval_every=15 model.hidden_size=16".split()
SWEEP = ["fig2b", "--preset", "tiny", "--device", "cpu", "--grid", "model.passes=[1,2]"]
SWEEP += [x for setting in SETTINGS for x in ("--set", setting)]
TIMES = ("seconds", "tokens_per_second")
NAMES = [f"passes={n},seed={seed}" for seed in (0, 1) for n in (1, 2)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """How many there are changes the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sweep(out, *more, code=0):
    return run("sweep", *SWEEP, "--out", out, *more, code=code)


def table(out) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read(out / "results.csv")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread):
    """A sweep over two seeds, one run after another."""
    out = tmp_path_factory.mktemp("whole")
    sweep(out, "--seeds", "0-1", "--jobs", 1)
    return out


@pytest.mark.parametrize(
    ("freedom", "expected"),  # of printed tables
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_t_quantiles_are_those_of_tables(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, abs=5e-4)


def test_t_quantiles_of_few_degrees_in_closed_form():
    for level in (0.5, 0.9, 0.99):
        assert t_quantile(1, level) == pytest.approx(math.tan(math.pi * level / 2), rel=1e-12)
        assert t_quantile(2, level) == pytest.approx(level * math.sqrt(2 / (1 - level**2)), rel=1e-12)
    with pytest.raises(ValueError, match="freedom, confidence: expected"):
        t_quantile(0)


def test_intervals_and_pairs():
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - 2.05426, 2.5 + 2.05426), abs=1e-5)
    found = summary([1.0, 2.0, 3.0, 4.0])
    assert (found["n"], found["min"], found["max"]) == (4, 1.0, 4.0) and found["std"] == pytest.approx(1.290994)
    assert math.isnan(summary([1.0])["ci_low"]) and summary([1.0])["mean"] == 1.0
    found = paired({"0": 2.0, "1": 3.0, "2": 1.0, "9": 5.0}, {"0": 1.0, "1": 1.0, "2": 1.0})
    assert (found["n"], found["mean"], found["positive"]) == (3, 1.0, 2)
    assert found["ci_high"] == pytest.approx(1 + 4.302653 / math.sqrt(3))
    assert paired({"0": 1.0}, {"1": 1.0}) is None


def rows(*given, **more):
    values = [dict(zip(("model.passes", "baseline", "seed", "exact"), row, strict=True)) for row in given]
    return [{"figure": "x", "preset": "tiny", **row, **more} for row in values]


def test_of_two_runs_of_a_seed_the_first_counts():
    found = summary_table(load_figure("fig2b", "tiny"), rows((1, "", 0, 0.5), (1, "", 1, 0.7), (1, "", 0, 0.1)))
    assert (found[0]["n"], found[0]["min"], found[0]["mean"]) == (2, 0.5, pytest.approx(0.6))


def test_pairs_are_of_equal_settings_and_seeds():
    found = paired_table(
        load_figure("fig2b", "tiny"),
        rows((1, "", 0, 0.2), (2, "", 0, 0.5), (2, "full", 0, 0.4), (1, "", 1, 0.3), (2, "", 1, 0.2), (4, "", 1, 0.9)),
    )
    assert [(r["first"], r["second"], r["n"], r["positive"]) for r in found] == [
        ("N=2", "N=1", 2, 1), ("N=4", "N=1", 1, 1), ("N=4", "N=2", 1, 1), ("N=2", "full", 1, 1),
    ]  # fmt: skip
    assert found[0]["mean"] == pytest.approx(0.1)
    two = [row | {"task.t": t} for t in (4, 6) for row in rows((1, "", 0, 0.2), (2, "", 0, 0.5))]
    assert [(r["task.t"], r["first"], r["n"]) for r in paired_table(load_figure("fig2a", "tiny"), two)] == [
        ("4", "N=2", 1),
        ("6", "N=2", 1),
    ]


def test_figures_over_levels_have_a_row_for_each():
    figure, given = load_figure("fig3", "tiny"), rows((1, "", 0, 0.2), (2, "", 0, 0.5), exact_1=0.5, exact_2=0.25)
    assert [(r["model.passes"], r["level"], r["mean"]) for r in summary_table(figure, given)] == [
        ("1", 1, 0.5), ("1", 2, 0.25), ("2", 1, 0.5), ("2", 2, 0.25),
    ]  # fmt: skip
    assert [(r["level"], r["mean"]) for r in paired_table(figure, given)] == [(1, 0.0), (2, 0.0)]


def test_levels_that_some_runs_lack():
    figure = load_figure("fig3", "tiny")
    given = rows((2, "", 0, 0.5), exact_1=0.5, exact_2=0.25) + rows((1, "", 0, 0.2), exact_1=0.125)
    for lacking in ({}, {"exact_2": ""}):  # in memory, and as a table has it
        found = [given[0], given[1] | lacking]
        assert [(r["model.passes"], r["level"], r["mean"]) for r in summary_table(figure, found)] == [
            ("2", 1, 0.5), ("2", 2, 0.25), ("1", 1, 0.125),
        ]  # fmt: skip
        assert [(r["level"], r["mean"]) for r in paired_table(figure, found)] == [(1, 0.375)]


def test_seeds_are_read():
    assert seeds_of(None, None) == (0,) and seeds_of(3, None) == (3,)
    assert seeds_of(None, "0-3") == (0, 1, 2, 3) and seeds_of(None, "0,3,5") == (0, 3, 5)
    assert seeds_of(None, "7,0-2") == (7, 0, 1, 2)


@pytest.mark.parametrize("command", [("sweep", *SWEEP), ("demo", "--device", "cpu")], ids=lambda x: x[0])
def test_bad_seeds_and_jobs_are_refused(command, tmp_path):
    given = {"3-1": "seeds: expected", "1,0-2": "seeds: expected distinct", "-1": "seeds: expected", "x": "seeds:"}
    given |= {"0,": "seeds: expected", "0-99999999999": "seeds: expected"}
    refusals = {("--seeds", text): message for text, message in given.items()}
    refusals |= {("--seeds", "0-1", "--seed", "0"): "expected --seed or --seeds", ("--jobs", "0"): "jobs: expected"}
    if command[0] == "sweep":
        refusals[("--seeds", "0-1", "--set", "train.seed=2")] = "set: expected no train.seed"
    for arguments, message in refusals.items():
        assert message in run(*command, *arguments, "--out", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_runs_are_named_by_their_seed_where_there_are_several():
    figure = load_figure("fig2b", "tiny").narrowed({"model.passes": [1, 2]})
    runs = train_runs(figure, "tiny", seeds=(0, 1), baselines=("full",))
    names = [f"{name},seed={seed}" for seed in (0, 1) for name in ("passes=1", "passes=2", "passes=2,full")]
    assert [name for name, _, _ in runs] == names
    assert [(values["seed"], config.train.seed) for _, values, config in runs] == [(0, 0)] * 3 + [(1, 1)] * 3
    assert [(name, config.train.seed) for name, _, config in train_runs(figure, "tiny", seeds=(5,))] == [
        ("passes=1", 5),
        ("passes=2", 5),
    ]


def test_cores_are_shared_out():
    cpu, cuda, threads = torch.device("cpu"), torch.device("cuda"), torch.get_num_threads()
    assert shares(None, 9, cpu) == (threads, 1) and shares(None, 9, cuda) == (1, threads)
    assert shares(3, 2, cpu) == (2, 1) and shares(None, 9, cpu, processes=2) == (1, threads)
    with pytest.raises(ValueError, match="jobs: expected 1 where several processes"):
        shares(2, 9, cpu, processes=2)


def test_a_sweep_over_seeds_writes_tables_and_plots(whole):
    found = table(whole)
    assert [row["run"] for row in found] == NAMES and [row["seed"] for row in found] == ["0", "0", "1", "1"]
    (one, two), (pair,) = read(whole / "summary.csv"), read(whole / "paired.csv")
    assert (one["model.passes"], two["model.passes"], one["n"]) == ("1", "2", "2")
    values = [float(row["exact"]) for row in found]
    assert float(one["mean"]) == pytest.approx((values[0] + values[2]) / 2)
    assert (pair["first"], pair["second"], pair["n"]) == ("N=2", "N=1", "2")
    assert float(pair["mean"]) == pytest.approx(float(two["mean"]) - float(one["mean"]))
    assert is_png(whole / "fig2b.png") and is_png(whole / "seeds.png")
    assert len(read(whole / "curves.csv")) == 8


def test_two_runs_at_a_time_come_to_the_same_and_a_failing_one_is_named(whole, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / NAMES[1]).write_text("mine")  # no folder for this run
    text = sweep(out, "--seeds", "0-1", "--jobs", 2, code=1)
    assert f"failed {NAMES[1]}: ValueError" in text and "fig2b 4/4" in text
    assert table(out) == [row for row in table(whole) if row["run"] != NAMES[1]]
    assert is_png(out / "seeds.png")
    (out / NAMES[1]).unlink()
    before = (out / NAMES[0] / "metrics.csv").read_bytes()
    sweep(out, "--seeds", "0-1", "--jobs", 1)
    assert table(out) == table(whole) and (out / NAMES[0] / "metrics.csv").read_bytes() == before
    assert read(out / "summary.csv") == read(whole / "summary.csv")
    assert "holds a run with other settings" in sweep(out, "--seeds", "0-1", "--set", "train.lr_muon=1", code=2)


@pytest.mark.parametrize(
    ("jobs", "number"),
    [
        (2, signal.SIGINT),
        (2, signal.SIGKILL),
        (1, signal.SIGTERM),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.slow),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_a_stopped_sweep_goes_on_to_the_same(whole, tmp_path, jobs, number):
    """Ctrl-C reaches every process of a terminal; a kill only the first, which can't pass it on."""
    out, more = tmp_path / "out", ["--seeds", "0-1", "--jobs", str(jobs)]
    command = [sys.executable, "-m", "sleep_ops", "sweep", *SWEEP, *more, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True
    ) as process:
        first = out / NAMES[0] / "metrics.csv"
        wait(lambda: first.exists() and process.poll() is None)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        said, _ = process.communicate(timeout=60)  # until the workers are gone too
    if process.returncode:  # not stopped after its last step
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), said
        assert number == signal.SIGKILL or f"stopped by signal {number:d}" in said
        assert len(read(out / "results.csv") if (out / "results.csv").exists() else []) < 4
    sweep(out, *more[:2], "--jobs", 1)
    assert table(out) == table(whole)


@pytest.mark.parametrize("jobs", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_second_interrupt_ends_a_sweep_at_once(tmp_path, jobs):
    command = [sys.executable, "-m", "sleep_ops", "sweep", *SWEEP, "--seeds", "0-1", "--jobs", str(jobs)]
    with subprocess.Popen(
        [*command, "--set", "train.steps=100000", "--out", str(tmp_path / "out")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        wait(lambda: (tmp_path / "out" / NAMES[0] / "metrics.csv").exists() and process.poll() is None)
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.1)
        said, _ = process.communicate(timeout=40)
    # The second one as it is, where it comes after all has been saved.
    assert process.returncode in (128 + signal.SIGINT, -signal.SIGINT) and "Traceback" not in said, said


def wait(ready) -> None:
    end = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_process_that_ends_without_a_word_is_a_failed_run():
    runs = [Run(f"run {i}", f"run {i}", leave, (i,)) for i in (3, 4, 5)]
    ended = run_all(runs, lambda *_: None, jobs=2, threads=1, console=Console(quiet=True))
    assert ended == (None, {f"run {i}": f"its process ended with {i}" for i in (3, 4, 5)})


def test_the_demo_over_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr("sleep_ops.experiments.demo.FINAL_SAMPLES", 64)
    options = ["--device", "cpu", "--steps", 2, "--passes", "1,2", "--seeds", "0,4", "--jobs", 1, "--out", tmp_path]
    text = run("demo", *options)
    assert "seeds" in text and "N=2 less N=1" in text and "of 2 seeds" in text
    assert [(r["passes"], r["seed"]) for r in read(tmp_path / "demo.csv")] == [
        ("1", "0"), ("2", "0"), ("1", "4"), ("2", "4"),
    ]  # fmt: skip
    assert (tmp_path / "passes-2,seed=4" / "config.json").exists() and is_png(tmp_path / "demo.png")
