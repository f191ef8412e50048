"""`sleep-ops bench launches`: recording the launches of a call, and all around it that needs no GPU."""

import functools
from dataclasses import replace

import pytest
import torch
from commands import bench, read

from sleep_ops.bench import launches
from sleep_ops.bench.cases import Case, make_inputs
from sleep_ops.bench.harness import MACHINE, Run
from sleep_ops.bench.launches import LaunchesBenchmark, record, recording
from sleep_ops.bench.providers import operator_problem, replayed

CPU = torch.device("cpu")
CASE = Case(1, 20, 1, 1, 16, 16, dtype="float32")  # two chunks of 16

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's work; a GPU times them")


def problem(case: Case = CASE):
    return operator_problem(functools.partial(replayed, impl="triton"), case, make_inputs(case, 0, CPU))


@interpreted
def test_launches_of_a_call_in_order_and_by_direction():
    found = record(problem(), 1)
    assert [launch.kernel for launch in found if launch.direction == "forward"] == [
        "chunk_prepare_kernel",
        "chunk_scan_kernel",
    ]
    backward = [launch.kernel for launch in found if launch.direction == "backward"]
    assert backward[-3:] == ["chunk_reverse_kernel", "chunk_grad_kernel", "gate_backward_kernel"]
    assert found[0].grid == (2, 1)


@interpreted
def test_a_launch_repeated_writes_the_same_again():
    x = problem()
    with torch.no_grad(), recording() as found:
        output, state = x.run(1)
    want = output.clone(), state.clone()
    output.zero_(), state.zero_()
    for _, _, again in found:
        again()
    assert torch.equal(output, want[0]) and torch.equal(state, want[1]) and state.any()


def test_recording_leaves_triton_as_it_was():
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    before = JITFunction.run, InterpretedFunction.run
    with pytest.raises(KeyError), recording():
        assert JITFunction.run is not before[0]
        raise KeyError
    assert (JITFunction.run, InterpretedFunction.run) == before


@pytest.fixture
def untimed(monkeypatch):
    """As if there were a GPU on which a launch takes 2 ms and the call 16."""
    monkeypatch.setattr(launches, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(launches, "environment", lambda device: dict.fromkeys(MACHINE, "x"))
    monkeypatch.setattr(launches, "make_inputs", lambda case, seed, device: make_inputs(case, seed, CPU))
    monkeypatch.setattr(launches, "replay_of", lambda *_: functools.partial(replayed, impl="triton"))
    monkeypatch.setattr(launches, "measure", lambda runs, repeats, device, tell: {n: times(r) for n, r in runs.items()})
    monkeypatch.setattr(launches, "_alone", lambda again, device: Run(lambda: (2.0, 0.0)))
    monkeypatch.setattr(launches, "run_of", lambda *_: Run(lambda: (16.0, 0.0)))
    monkeypatch.setitem(launches.KERNEL_CASES["cuda"], "long", CASE)
    monkeypatch.setitem(launches.KERNEL_CASES["cuda"], "rule110", replace(CASE, tokens=10))


def times(run: Run) -> dict:
    return dict.fromkeys(("ms_median", "ms_p20", "ms_p80"), run.sample()[0])


@interpreted
def test_the_command_writes_a_row_for_every_launch(untimed, tmp_path):
    text = bench("launches", "--case", "long,rule110", "--out", tmp_path)
    rows = read(tmp_path / "launches.csv")
    assert list(rows[0]) == launches.COLUMNS and (tmp_path / "launches.png").exists()
    assert {(row["call_ms"], row["share"]) for row in rows} == {("16.0", "0.125")}
    short = [row["kernel"] for row in rows if row["case"] == "rule110"]
    assert short == ["single_chunk_forward_kernel", "single_chunk_backward_kernel"] or "gate_backward_kernel" in short
    assert "chunk_scan" in text and "12%" in text


@interpreted
def test_a_case_that_cannot_be_recorded_is_told_of(untimed, tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(launches, "_alone", refuse)
    text = bench("launches", "--case", "rule110", "--out", tmp_path, code=1)
    assert "rule110: no row: operation not permitted when stream is capturing" in text and "nothing was timed" in text


def test_it_refuses_a_machine_without_a_gpu(tmp_path):
    assert "device: expected an NVIDIA GPU" in bench("launches", "--device", "cpu", "--out", tmp_path / "out", code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [dict(cases=("tiny",)), dict(passes=0), dict(dtype="int8"), dict(repeats=0)], ids=str)
def test_bad_settings_are_named(untimed, bad):
    with pytest.raises(ValueError, match=f"^{next(iter(bad))}: expected"):
        LaunchesBenchmark(**bad)
