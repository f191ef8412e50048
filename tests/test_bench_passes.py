"""The benchmark of replay passes: what it writes, what it refuses, and what it leaves out."""

import pytest
import torch
from commands import bench, is_png, read

from sleep_ops import gated_delta_rule
from sleep_ops.bench import passes as passes_benchmark
from sleep_ops.bench import providers
from sleep_ops.bench.cases import PASSES_CASES, Case
from sleep_ops.bench.checks import ERRORS
from sleep_ops.bench.harness import MODES
from sleep_ops.bench.passes import COLUMNS, PROVIDERS, PassesBenchmark, layer_check

CPU = torch.device("cpu")
ONE_WINDOW = Case(batch=2, tokens=70, heads=3, value_heads=3, key_dim=8, value_dim=8, dtype="float32")
WINDOWS = Case(1, 200, 2, 2, 16, 16, window=80, dtype="float32")
TINY = "passes --batch 1 --tokens 48 --heads 2 --head-dim 8 --window 20 --repeats 2 --device cpu".split()


def tiny(**settings):
    sizes = dict(batch=1, tokens=24, heads=2, head_dim=8, repeats=1, device="cpu", cases=("mid",), passes=(1,))
    return PassesBenchmark(**sizes | settings)


def read_passes(folder):
    return read(folder / "passes.csv")


def collect(benchmark):
    notes = []
    return [row for rows in benchmark.run(notes.append) for row in rows], notes


def test_the_command_writes_every_figure(tmp_path):
    out = tmp_path / "deep" / "bench"
    text = bench(*TINY, "--passes", "1,2,4", "--max-chained", 2, "--providers", "ours,ours-chained,layer", "--out", out)
    rows = read_passes(out)
    assert list(rows[0]) == COLUMNS
    measured = {(row["case"], row["provider"], row["mode"], int(row["passes"])) for row in rows}
    assert len(rows) == len(measured) and measured == {
        (case, provider, mode, n)
        for case in ("mid", "windows")
        for provider in ("ours", "ours-chained", "layer")
        for mode in MODES
        for n in (1, 2, 4)
        if provider != "ours-chained" or n <= 2
    }
    for row in rows:
        assert 0 < float(row["ms_p20"]) <= float(row["ms_median"]) <= float(row["ms_p80"])
        assert (row["saved_mib"] == "") if row["mode"] == "forward" else (float(row["saved_mib"]) > 0)
        assert row["peak_extra_mib"] == ""  # of CUDA alone
        assert all(0 < float(row[f"error_{x}"]) <= float(row["error_bound"]) for x in ("output", "state", "gradient"))
        assert row["torch"] == torch.__version__ and row["device"] and row["window"] == "20"
    assert is_png(out / "passes.png")
    assert sorted(path.name for path in out.iterdir()) == ["passes.csv", "passes.png"]
    assert "ours-chained is timed up to N = 2" in text


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "out: expected a folder" in bench(*TINY, "--out", tmp_path / "file", code=2)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_interrupted_run_leaves_whole_rows(tmp_path, monkeypatch):
    measure, calls = passes_benchmark.measure, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(passes_benchmark, "measure", interrupted)
    bench(*TINY, "--passes", "1,2", "--case", "mid", "--providers", "ours", "--out", tmp_path, code=130)
    assert [(row["passes"], row["mode"]) for row in read_passes(tmp_path)] == [
        ("1", "forward"),
        ("1", "backward"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["passes.csv"]


def test_a_missing_library_is_a_note(tmp_path, monkeypatch):
    monkeypatch.setitem(providers.LIBRARIES, "fla", ("no_such_library", providers.load_fla))
    text = bench(*TINY, "--case", "mid", "--passes", 1, "--providers", "ours,fla", "--out", tmp_path)
    assert "mid: fla is not timed: no_such_library is not installed" in text
    assert {row["provider"] for row in read_passes(tmp_path)} == {"ours"}
    text = bench(*TINY, "--case", "mid", "--passes", 1, "--providers", "fla", "--out", tmp_path / "none", code=1)
    assert "nothing was timed" in text and not (tmp_path / "none").exists()


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_provider_is_reported_and_not_timed(monkeypatch, factor):
    def wrong(*arguments):
        output, state = gated_delta_rule(*arguments[:5], initial_state=arguments[5])
        return output * factor, state

    monkeypatch.setattr(providers, "our_pass", wrong)
    rows, notes = collect(tiny(providers=("ours", "ours-chained")))
    assert {row["provider"] for row in rows} == {"ours"}
    assert len(notes) == 1 and "ours-chained is WRONG" in notes[0] and "error_output" in notes[0]


def test_running_out_of_memory_is_a_note_and_no_row(monkeypatch):
    def greedy(*tokens, passes, window):
        if passes > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gated_delta_rule(*tokens)

    monkeypatch.setitem(providers.OURS, "ours", lambda: greedy)
    monkeypatch.setattr(passes_benchmark, "operator_check", lambda *_: dict.fromkeys(ERRORS[:3], 0.0))
    rows, notes = collect(tiny(providers=("ours",), passes=(2, 3)))
    assert {row["passes"] for row in rows} == {2} and len(rows) == 3
    assert notes == [f"mid: ours, N = 3, {mode}: out of memory, no row" for mode in MODES]


@pytest.mark.parametrize("case", [ONE_WINDOW, WINDOWS], ids=["one-window", "windows"])
def test_the_layer_is_right(case):
    errors = layer_check(case, 0, CPU)
    assert 0 < min(errors.values()) and max(errors.values()) < 1e-4


def test_the_defaults_are_those_of_the_table():
    assert PassesBenchmark().providers == PROVIDERS and PassesBenchmark().cases == tuple(PASSES_CASES["cuda"])
    assert PASSES_CASES["cuda"]["mid"] == Case(8, 2048, 16, 16, 128, 128)
    assert PASSES_CASES["cuda"]["windows"] == Case(1, 32768, 16, 16, 128, 128, window=2048)


def test_what_was_not_measured_in_time_has_an_empty_panel(tmp_path):
    """One step of several: the forward alone, and no memory."""
    command = "passes --case mid --tokens 6 --batch 1 --heads 2 --head-dim 4 --window 3 --repeats 1 --passes 1"
    command += f" --providers ours --device cpu --seconds 0.001 --out {tmp_path}"
    bench(*command.split())
    assert {p.name for p in tmp_path.iterdir()} == {"passes.csv", "passes.png"}
