"""`sleep-ops verify`: steps in their order and time, going on, the report; and the steps that are its own."""

import functools
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from commands import read
from commands import run as run_command

from sleep_ops.bench import kernels, passes, training, tune
from sleep_ops.bench import launches as bench_launches
from sleep_ops.files import write_csv
from sleep_ops.tasks import Rule110
from sleep_ops.training import TrainConfig
from sleep_ops.verify import checks, graph, machine, report, rule110, run, steps
from sleep_ops.verify.problems import problems
from sleep_ops.verify.run import FAILED, LEFT_OUT, PASSED, STOPPED, Outcome, Verification, run_limited, shares
from sleep_ops.verify.steps import STEPS, Place, Step

CPU = torch.device("cpu")


def python(code: str):
    return lambda place, seconds: [sys.executable, "-c", code]


def step(name: str, code: str = "", **settings) -> Step:
    return Step(name, f"what {name} does", python(code), **({"least": 1} | settings))


def verification(out: Path, *chosen: Step, resume=True) -> Verification:
    return Verification(Place(out, CPU), steps=chosen, resume=resume)


def go(found: Verification, seconds: float = 60.0) -> dict[str, str]:
    """How every step ended."""
    found.run(seconds, lambda step: None, lambda step, outcome: None)
    return {name: x.outcome for name, x in found.outcomes.items()}


verify = functools.partial(run_command, "verify", "--device", "cpu")


def test_time_is_shared_by_weight_and_no_step_has_nine_minutes():
    light, heavy = step("light", weight=1), step("heavy", weight=3)
    assert shares([light, heavy], 100) == {"light": 25, "heavy": 75}
    found = shares([light, heavy], 36000)
    assert found == {"light": 530, "heavy": 530} and max(found.values()) + run.GRACE <= 540
    assert shares([], 100) == {}


def test_the_last_that_would_have_too_little_gives_its_time_to_the_others():
    first, long, last = step("first", least=10), step("long", least=50), step("last", least=40)
    assert shares([first, long, last], 150) == dict.fromkeys(("first", "long", "last"), 50)
    assert shares([first, long, last], 119) == {"first": 59.5, "long": 59.5}
    assert shares([first, long, last], 60) == {"first": 60}
    assert shares([first, long, last], 9) == {}


def test_what_a_step_does_not_need_goes_to_those_after_it(tmp_path):
    limits = verification(tmp_path, step("a"), step("b"), step("c"))
    go(limits, 60)
    first, second, third = (limits.outcomes[name].limit for name in "abc")
    assert first == 20 and 25 < second <= 30 and 50 < third <= 60


def test_the_same_again_goes_on_with_what_has_not_passed(tmp_path):
    count = "import pathlib; p = pathlib.Path(r'%s'); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    flag = tmp_path / "repaired"
    chosen = [
        step("fine", count % (tmp_path / "fine.txt")),
        step("broken", f"import os, sys; sys.exit(not os.path.exists(r'{flag}'))"),
        step("absent", needs=("tool no-such-tool",)),
    ]
    out = tmp_path / "out"
    assert go(verification(out, *chosen)) == {"fine": PASSED, "broken": FAILED, "absent": LEFT_OUT}
    flag.touch()
    again = verification(out, *chosen)
    assert again.outcomes["broken"].why == "exit code 1" and again.done == 1
    assert go(again) == {"fine": PASSED, "broken": PASSED, "absent": LEFT_OUT} and again.passed
    assert (tmp_path / "fine.txt").read_text() == "x"
    assert go(verification(out, *chosen, resume=False)) and (tmp_path / "fine.txt").read_text() == "xx"


def test_fresh_deletes_what_is_its_own_and_nothing_else(tmp_path):
    chosen = step("one", files=("one.csv",), folders=("runs",))
    go(verification(tmp_path, chosen))
    for name in ("one.csv", "theirs.csv"):
        (tmp_path / name).touch()
    (tmp_path / "runs").mkdir()
    verification(tmp_path, chosen, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.csv"]


def test_a_step_that_takes_too_long_is_stopped_with_its_children(tmp_path):
    child = "import time, pathlib; time.sleep(3); pathlib.Path(r'%s').touch()" % (tmp_path / "survived")
    code = f"import subprocess, sys; print('begun'); subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    assert go(verification(tmp_path, step("slow", code), step("next")), 3) == {"slow": STOPPED, "next": PASSED}
    assert time.monotonic() - begin < 3
    time.sleep(max(0, begin + 4 - time.monotonic()))
    assert not (tmp_path / "survived").exists() and (tmp_path / "slow.log").read_text() == "begun\n"


def test_a_stopped_process_may_save_first(tmp_path):
    code = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(1)))\n"
    assert (
        run_limited([sys.executable, "-u", "-c", f"{code}time.sleep(60)"], tmp_path / "log", 1.5, dict(os.environ))
        is None
    )
    assert (tmp_path / "log").read_text() == "saved\n"


def test_a_signal_to_end_leaves_no_step_behind(tmp_path):
    code = "import os, signal; os.kill(os.getppid(), signal.SIGTERM); import time; time.sleep(60)"
    before, begin = signal.getsignal(signal.SIGTERM), time.monotonic()
    with pytest.raises(KeyboardInterrupt), run.terminated_like_interrupted():
        go(verification(tmp_path, step("one", code), step("two")))
    assert time.monotonic() - begin < 10 and signal.getsignal(signal.SIGTERM) is before
    assert go(verification(tmp_path, step("one"), step("two"))) == {"one": PASSED, "two": PASSED}


def test_a_program_that_is_not_there_fails(tmp_path):
    assert run_limited(["no-such-program"], tmp_path / "log", 5, {}) == 127
    assert "no-such-program" in (tmp_path / "log").read_text()


def test_a_benchmark_that_leaves_ours_out_as_wrong_has_failed(tmp_path):
    said = "{} is WRONG and not timed: error_output = 1, at most 0.05 expected"
    chosen = [step(name, f"print('long: {said.format(name)}')") for name in ("ours", "fla")]
    found = verification(tmp_path, *chosen)
    assert go(found) == {"ours": FAILED, "fla": PASSED} and not found.passed
    assert found.outcomes["ours"].why == f"it says: long: {said.format('ours')}"


def test_figures_of_an_attempt_before_do_not_stand_beside_a_failure(tmp_path):
    (tmp_path / "one.csv").write_text("x\n1\n")
    go(verification(tmp_path, step("one", "raise SystemExit(1)", files=("one.csv",))))
    assert not (tmp_path / "one.csv").exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(needs=("cuda",)), "it needs an NVIDIA GPU"),
        (dict(needs=("module no_such_module",)), "it needs no_such_module, which is not installed"),
        (dict(needs=("tool no-such-tool",)), "it needs no-such-tool, which is not on the PATH"),
        (dict(needs=("checkout",)), "it needs a checkout, with its tests/ptx"),
        (
            dict(least=99),
            "it needs at least 99 s, and 50 s were left for it and what follows; a larger --budget has it",
        ),
    ],
    ids=["cuda", "module", "tool", "checkout", "time"],
)
def test_what_is_left_out_says_why(tmp_path, changes, why):
    found = verification(tmp_path, step("one", **changes))
    assert go(found, 50) == {"one": LEFT_OUT} and found.outcomes["one"].why == why and found.passed
    assert f"- one: {why}." in report.lines(found)


def test_a_failure_stands_in_the_report_and_the_exit_code(tmp_path, monkeypatch):
    chosen = (step("fine"), step("broken", "print('what went wrong'); raise SystemExit(3)"))
    monkeypatch.setattr(run, "STEPS", chosen)
    text = verify("--out", tmp_path, code=1)
    assert "broken: failed after" in text and "1 passed, 1 failed" in text
    written = (tmp_path / "report.md").read_text()
    assert "| broken | what broken does | failed |" in written
    assert "**Failed**: exit code 3." in written and "what went wrong" in written
    monkeypatch.setattr(run, "STEPS", chosen[:1])
    assert "fine: passed" in verify("--out", tmp_path / "other")


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "inf"])
def test_budgets_are_positive_and_finite(tmp_path, budget):
    text = verify("--budget", budget, "--out", tmp_path / "out", code=2)
    assert "budget: expected a number of minutes > 0" in text and not (tmp_path / "out").exists()


def test_other_bad_settings(tmp_path):
    assert "device: expected auto, cpu" in verify("--device", "tpu", "--out", tmp_path / "out", code=2)
    (tmp_path / "file").touch()
    assert "out: expected a folder that can be written, got a file" in verify("--out", tmp_path / "file", code=2)


def test_results_of_other_code_are_not_mixed_with_new_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "STEPS", (step("one"),))
    verify("--out", tmp_path)
    monkeypatch.setattr(run, "code", lambda: "0123456789ab")
    text = verify("--out", tmp_path, code=2)
    assert "out: expected results for code 0123456789ab" in text and "--fresh" in text
    verify("--out", tmp_path, "--fresh")
    assert json.loads((tmp_path / run.STATE_FILE).read_text())["settings"]["code"] == "0123456789ab"
    (tmp_path / run.STATE_FILE).write_text("[]")
    assert f"out: expected the {run.STATE_FILE} of a verification" in verify("--out", tmp_path, code=2)


BENCHED = [
    pytest.param(s, device, id=f"{s.name}-{device}")
    for s in STEPS
    for device in ("cpu", "cuda")
    if "bench" in s.command(Place(Path(), CPU), 9) and (device == "cuda" or "cuda" not in s.needs)
]


@pytest.mark.parametrize(("chosen", "device"), BENCHED)
def test_commands_of_the_benchmarks_are_ones_they_take(chosen, device, monkeypatch):
    for module in (kernels, passes, training, tune, bench_launches):
        monkeypatch.setattr(module, "resolve_device", lambda name: torch.device(device))
    monkeypatch.setattr("sleep_ops.kernels.configs._known_architecture", lambda where: "sm90")
    taken = []

    def note(console, benchmark, path, seconds):
        taken.append((benchmark.steps, path, seconds))
        raise typer.Exit(0)

    monkeypatch.setattr("sleep_ops.cli.bench._measure", note)
    command = chosen.command(Place(Path("here"), torch.device(device)), 9)
    run_command(*command[3:])
    assert taken[0][0] > 0 and taken[0][1:] == (Path("here") / chosen.files[0], 9.0)


def test_every_step_is_in_the_report_and_its_modules_exist():
    assert {s.name.partition("-")[0] for s in STEPS} == set(report.SECTIONS)
    assert len({s.name for s in STEPS}) == len(STEPS)
    for chosen in STEPS:
        command = chosen.command(Place(Path("out"), torch.device("cuda")), 9)
        (name,) = [word for word in command if word.startswith("sleep_ops")] or ["sleep_ops"]
        assert __import__(name, fromlist=["_"]), name


def test_a_checkout_is_where_the_emulated_tests_are(monkeypatch, tmp_path):
    assert steps.checkout() == Path(__file__).parents[1]
    monkeypatch.setattr("sleep_ops.kernels.launches.__file__", str(tmp_path / "kernels" / "launches.py"))
    assert steps.checkout() is None


def test_a_benchmark_stops_when_its_time_is_over(tmp_path):
    command = ["bench", "kernels", "--device", "cpu", "--case", "rule110", "--providers", "ours", "--repeats", "1"]
    assert "stopped after 1e-06 s, at 1 of 3" in run_command(*command, "--seconds", "1e-6", "--out", tmp_path)
    assert [row["mode"] for row in read(tmp_path / "kernels.csv")] == ["forward"]
    for bad in ("0", "nan", "inf"):
        text = run_command(*command, "--seconds", bad, "--out", tmp_path, code=2)
        assert "seconds: expected a number > 0" in text


def test_the_first_steps_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "STEPS", [s for s in STEPS if s.name in ("machine", "launches")])
    text = verify("--out", tmp_path, "--budget", "1")
    assert "machine: passed" in text and "launches: left out: it needs an NVIDIA GPU" in text
    written = (tmp_path / "report.md").read_text()
    assert f"| torch | {torch.__version__}" in written and "| fla-core |" in written
    assert "## Left out" in written and "[machine.csv](machine.csv)" in written


def test_what_is_missing_is_named_with_what_goes_on_without_it(monkeypatch):
    monkeypatch.setitem(machine.OPTIONAL, "no_such_module", ("no-such-dist", "nothing is lost"))
    rows = {row["item"]: row for row in machine.machine(CPU)}
    assert rows["no-such-dist"] == {"item": "no-such-dist", "found": "missing", "without": "nothing is lost"}
    assert rows["pytest"]["found"] == pytest.__version__ and rows["pytest"]["without"] == ""


def test_every_operator_is_right_in_pytorch(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "HAS_TRITON", False)
    assert checks.run(tmp_path, "cpu")
    rows = read(tmp_path / checks.FILE)
    assert {row["verdict"] for row in rows} == {"right"} and {row["same_bits"] for row in rows} == {"True"}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"} and list(rows[0]) == checks.COLUMNS
    results = {row["result"] for row in rows if row["case"] == "gates inside"}
    leaves = ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias")
    assert results == {"result 0", "result 1", *(f"d{name}" for name in leaves)}


def chosen_problem(operator: str):
    return next(x for x in problems(large=False) if x.operator == operator and x.interpreted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's work")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "operator", ["gated_delta_rule", "delta_rule_state", "gated_delta_rule_step", "gated_rms_norm"]
)
def test_kernels_are_checked_in_the_interpreter(operator, dtype):
    rows = checks.check(chosen_problem(operator), "triton", dtype, CPU)
    assert {row["verdict"] for row in rows} == {"right"} and {row["same_bits"] for row in rows} == {""}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter's work")
def test_every_operator_is_right_in_the_interpreter(tmp_path):
    assert checks.run(tmp_path, "cpu")
    rows = read(tmp_path / checks.FILE)
    assert {row["operator"] for row in rows} == {row["operator"] for row in rows if row["impl"] == "triton"}


def test_large_problems_are_for_gpus():
    small, large = ({(x.operator, x.case) for x in problems(size)} for size in (False, True))
    assert small < large and ("gated_delta_rule", "128 x 128, 300 tokens") in large - small
    assert checks.plan(torch.device("cuda"), short=True) == [("triton", "bfloat16")]
    assert checks.plan(torch.device("cuda"), short=False)[0] == ("triton", "bfloat16")


def spoilt(how):
    """The norm's problem with its PyTorch form spoilt, or spoilt in the second run alone."""
    problem, calls = chosen_problem("gated_rms_norm"), []

    def call(impl, **leaves):
        results = problem.call(impl, **leaves)
        if impl == "reference":
            return results
        calls.append(impl)
        if how == "raises":
            raise RuntimeError("out of memory\nand more")
        if how == "gradient":
            x = leaves["gate"]
            return (results[0] + 1e-3 * (x - x.detach()),)
        return tuple(x + 1e-7 * len(calls) for x in results)

    return problem._replace(call=call)


@pytest.mark.parametrize("how", ["gradient", "bits", "raises"])
def test_what_is_wrong_is_found(how, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(checks, "problems", lambda large: [spoilt(how)])
    assert not checks.run(tmp_path, "cpu")
    rows = [row for row in read(tmp_path / checks.FILE) if row["dtype"] == "float32"]
    bad = {row["result"] for row in rows if row["verdict"].startswith("WRONG")}
    assert bad == {"gradient": {"dgate"}, "bits": {"result 0"}, "raises": {""}}[how]
    text = "\n".join(report._checks(rows, []))
    assert "1 of them wrong" in text and ("WRONG: out of memory" in text or how != "raises")


def test_checks_for_which_there_is_no_time_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert checks.run(tmp_path, "cpu", seconds=0)
    rows = read(tmp_path / checks.FILE)
    cases = {(row["case"], row["operator"], row["dtype"]) for row in rows if row["verdict"] == "right"}
    skipped = [row for row in rows if row["verdict"] == checks.LEFT_OUT]
    assert len(cases) == 1 and f"{len(skipped)} cases left out for time" in report._checks(rows, [])[0]


@pytest.fixture
def tiny(monkeypatch):
    """Trainings of a tiny model."""
    for module in (graph, rule110):
        scale = module.choose_scale("cpu", 0)
        recipe = TrainConfig(steps=6, batch_size=4, device="cpu", eval_samples=4)
        scale = replace(scale, task=Rule110(t=2, strings=2, bits=6), hidden_size=16, num_heads=2, train=recipe)
        monkeypatch.setattr(module, "choose_scale", lambda device, seed, scale=scale: scale)
    monkeypatch.setattr(rule110, "EVERY", 2)
    monkeypatch.setattr(rule110, "EVALUATED", 4)


def test_eager_and_recorded_steps_are_compared(tmp_path, tiny, monkeypatch, capsys):
    assert graph.run(tmp_path, "cpu", steps=2)
    rows = read(tmp_path / graph.FILE)
    assert len(rows) == 2 and "2 of 2 losses are the same bits" in report._graph(rows, [])[0]
    runs = iter([[{"loss": 1.0}], [{"loss": 1.01}]])
    monkeypatch.setattr(graph, "read_csv", lambda path: next(runs))
    assert not graph.run(tmp_path, "cpu", steps=1)
    assert "up to 1.0e-02 of themselves apart" in capsys.readouterr().out


def test_rule_110_goes_on_where_its_time_was_over(tmp_path, tiny):
    for steps_so_far in (2, 4):
        assert rule110.run(tmp_path, "cpu", seconds=0)
        rows = read(tmp_path / rule110.FILE)
        assert [int(row["step"]) for row in rows] == list(range(1, steps_so_far + 1))
    assert [row["exact"] != "" for row in rows] == [False, True, False, True] and (tmp_path / rule110.PLOT).exists()
    assert rule110.run(tmp_path, "cpu", seconds=600) and len(read(tmp_path / rule110.FILE)) == 6
    assert "6 steps" in report._rule110(read(tmp_path / rule110.FILE), [])[0]


def test_a_run_that_does_not_learn_is_told_of(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(rule110, "LEARNS_IN", 1)
    monkeypatch.setattr(rule110, "fmean", lambda losses: 1.0)
    assert not rule110.run(tmp_path, "cpu", seconds=0)


GPU_ROWS = {
    "launches": (bench_launches.COLUMNS, {"ms_median": "0.5", "share": "0.25", "call_ms": "2.0"}),
    "tune-long": (tune.COLUMNS, {"ms_median": "0.5", "tokens": "32", "scan": "(64, 4, 2)"}),
    "kernels": (kernels.COLUMNS, {"ms_median": "0.5", "floor_fraction": "0.4", "mode": "forward+backward-graph"}),
    "passes": (passes.COLUMNS, {"ms_median": "0.5", "mode": "forward+backward", "passes": "4"}),
    "train": (training.COLUMNS, {"ms_median": "0.5", "tokens_per_second": "1000.0", "peak_mib": "2000.0"}),
}
TELLING = {
    "launches": "| the GPU | the GPU |",
    "tune-long": "(in use) | 0.5 |",
    "kernels": "a prediction",
    "passes": "N = 4",
    "train": "2,000",
}


@pytest.mark.parametrize("name", GPU_ROWS)
def test_figures_of_a_gpu_stand_in_the_report(tmp_path, name):
    columns, given = GPU_ROWS[name]
    (chosen,) = [s for s in STEPS if s.name == name]
    write_csv(tmp_path / chosen.files[0], [dict.fromkeys(columns, "the GPU") | given])
    (tmp_path / f"{name}.log").write_text("long: fla is not timed: none\njet: fla is not timed: none\n")
    found = verification(tmp_path, chosen)
    found.outcomes[name] = Outcome(PASSED, 1.0, 2.0)
    text = "\n".join(report.lines(found))
    assert TELLING[name] in text and "- fla is not timed: none (long, jet)" in text and "the GPU" in text


def test_what_other_programs_end_with_stands_in_the_report():
    assert report._last_line([], ["...", "117 passed, 2 deselected in 80.1s"]) == ["117 passed, 2 deselected in 80.1s"]
    assert report._last_line([], ["========= ERROR SUMMARY: 0 errors"]) == ["ERROR SUMMARY: 0 errors"]
    assert report._last_line([], []) == []
