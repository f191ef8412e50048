"""The benchmark of replay passes: what it writes, what it refuses, what it leaves out, and that its providers agree."""

import csv
import functools
import inspect
import re

import pytest
import torch
from typer.testing import CliRunner

import sleep_ops.cli
from sleep_ops import bench, gated_delta_rule
from sleep_ops.bench import CASES, COLUMNS, MODES, PROVIDERS, Case, PassesBenchmark, Problem

CPU = torch.device("cpu")
ONE_WINDOW = Case(batch=2, tokens=70, heads=3, head_dim=8, window=None, dtype="float32")
WINDOWS = Case(batch=1, tokens=200, heads=2, head_dim=16, window=80, dtype="float32")
TINY = "--batch 1 --tokens 48 --heads 2 --head-dim 8 --window 20 --repeats 2 --device cpu".split()


def run(*arguments, code=0):
    result = CliRunner().invoke(sleep_ops.cli.app, ["bench", "passes", *map(str, arguments)])
    error = "" if result.exception is None else repr(result.exception)
    assert result.exit_code == code, result.output + error
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m", "", result.output))


def read(folder):
    with (folder / "passes.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def tiny(**settings):
    sizes = dict(batch=1, tokens=24, heads=2, head_dim=8, repeats=1, device="cpu", cases=("mid",), passes=(1,))
    return PassesBenchmark(**sizes | settings)


def collect(benchmark):
    notes = []
    return [row for rows in benchmark.run(notes.append) for row in rows], notes


def test_the_command_writes_every_figure(tmp_path):
    out = tmp_path / "deep" / "bench"
    text = run(*TINY, "--passes", "1,2,4", "--max-chained", 2, "--providers", "ours,ours-chained,layer", "--out", out)
    rows = read(out)
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
    assert (out / "passes.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["passes.csv", "passes.png"]
    assert "ours-chained is timed up to N = 2" in text


def test_defaults_of_the_command_are_those_of_the_benchmark():
    parameters = inspect.signature(sleep_ops.cli.bench_passes).parameters
    for name in ("batch", "tokens", "heads", "head_dim", "window", "dtype", "max_chained", "repeats", "seed", "device"):
        assert parameters[name].default == getattr(PassesBenchmark(), name), name
    for name, option in {"passes": "passes", "cases": "case", "providers": "providers"}.items():
        assert parameters[option].default == ",".join(map(str, getattr(PassesBenchmark(), name)))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--passes", "0"), "passes:"),
        (("--passes", "1,1"), "passes:"),
        (("--passes", "two"), "passes:"),
        (("--case", "tiny"), "cases:"),
        (("--case", "mid,mid"), "cases:"),
        (("--providers", "ours,theirs"), "providers:"),
        (("--tokens", "0"), "tokens:"),
        (("--window", "-1"), "window:"),
        (("--repeats", "0"), "repeats:"),
        (("--max-chained", "0"), "max_chained:"),
        (("--seed", "-1"), "seed:"),
        (("--dtype", "int8"), "dtype:"),
        (("--device", "abacus"), "device:"),
    ],
    ids=" ".join,
)
def test_bad_settings_are_named_and_nothing_is_written(tmp_path, arguments, named):
    text = run(*TINY, "--out", tmp_path / "out", *arguments, code=2)
    assert named in text and "expected" in text
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "out: expected a folder" in run(*TINY, "--out", tmp_path / "file", code=2)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_interrupted_run_leaves_whole_rows(tmp_path, monkeypatch):
    measure, calls = bench.measure, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(bench, "measure", interrupted)
    run(*TINY, "--passes", "1,2", "--case", "mid", "--providers", "ours", "--out", tmp_path, code=130)
    assert [(row["passes"], row["mode"]) for row in read(tmp_path)] == [("1", "forward"), ("1", "backward")]
    assert [path.name for path in tmp_path.iterdir()] == ["passes.csv"]


def test_a_missing_library_is_a_note(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.LIBRARIES, "fla", ("no_such_library", bench.load_fla))
    text = run(*TINY, "--case", "mid", "--passes", 1, "--providers", "ours,fla", "--out", tmp_path)
    assert "mid: fla is not timed: no_such_library is not installed" in text
    assert {row["provider"] for row in read(tmp_path)} == {"ours"}
    text = run(*TINY, "--case", "mid", "--passes", 1, "--providers", "fla", "--out", tmp_path / "none", code=1)
    assert "nothing was timed" in text and not (tmp_path / "none").exists()


@pytest.mark.parametrize("load", [bench.load_fla, bench.load_flash_qla])
def test_a_library_that_cannot_run_the_case_says_what_it_needs(load):
    with pytest.raises(ValueError, match="needs CUDA"):
        load(CASES["cuda"]["mid"], CPU)


def test_a_library_is_called_by_the_keywords_it_documents():
    def operator(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
        assert output_final_state and cu_seqlens is None
        return tuple(gated_delta_rule(q, k, v, g, beta, scale=scale, initial_state=initial_state))

    replay = bench.chained(functools.partial(bench.their_pass, operator))
    assert max(bench.operator_check(replay, WINDOWS, 0, CPU).values()) < 1e-5


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_provider_is_reported_and_not_timed(monkeypatch, factor):
    def wrong(*arguments):
        output, state = gated_delta_rule(*arguments[:5], initial_state=arguments[5])
        return output * factor, state

    monkeypatch.setattr(bench, "our_pass", wrong)
    rows, notes = collect(tiny(providers=("ours", "ours-chained")))
    assert {row["provider"] for row in rows} == {"ours"}
    assert len(notes) == 1 and "ours-chained is WRONG" in notes[0] and "error_output" in notes[0]


def test_running_out_of_memory_is_a_note_and_no_row():
    def run(passes):
        if passes > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x.exp(), x.sin()

    x, notes = torch.ones(3, requires_grad=True), []
    problems = {"greedy": Problem(run, [x], [torch.ones(3)] * 2)}
    assert set(bench.measure(problems, 2, MODES[2], 2, CPU, notes.append)) == {"greedy"} and not notes
    assert bench.measure(problems, 3, MODES[2], 2, CPU, notes.append) == {}
    assert notes == ["greedy, N = 3, forward+backward: out of memory, no row"]


@pytest.mark.parametrize("case", [ONE_WINDOW, WINDOWS], ids=["one-window", "windows"])
@pytest.mark.parametrize("provider", ["ours", "ours-chained"])
def test_operators_are_right(provider, case):
    errors = bench.operator_check(bench.replay_of(provider, case, CPU), case, 0, CPU)
    assert list(errors) == ["error_output", "error_state", "error_gradient"]
    assert 0 < min(errors.values()) and max(errors.values()) < 1e-5


@pytest.mark.parametrize("case", [ONE_WINDOW, WINDOWS], ids=["one-window", "windows"])
def test_the_layer_is_right(case):
    errors = bench.layer_check(case, 0, CPU)
    assert 0 < min(errors.values()) and max(errors.values()) < 1e-4


@pytest.mark.parametrize("case", [ONE_WINDOW, WINDOWS], ids=["one-window", "windows"])
def test_ours_and_the_chain_agree_beyond_the_checked_passes(case):
    inputs = bench.make_inputs(case, 0, CPU)
    results = []
    for provider in ("ours", "ours-chained"):
        problem = bench.operator_problem(bench.replay_of(provider, case, CPU), case, inputs)
        roots = problem.run(16)
        results.append([*roots, *bench.gradients(problem, roots)])
    for ours, chain in zip(*results, strict=True):
        torch.testing.assert_close(ours, chain, rtol=1e-4, atol=1e-4)


def test_every_case_has_its_sizes_on_both_devices():
    assert CASES["cuda"].keys() == CASES["cpu"].keys() and PassesBenchmark().providers == PROVIDERS
    assert CASES["cuda"]["mid"] == Case(8, 2048, 16, 128, None, "bfloat16")
    assert CASES["cuda"]["windows"] == Case(1, 32768, 16, 128, 2048, "bfloat16")


def test_saved_memory_counts_storages_that_the_graph_keeps():
    x = torch.randn(256, 1024, requires_grad=True)  # 1 MiB

    def powers(passes):
        (x.detach().exp() * x).sum()  # this graph is gone when the forward ends
        y = x
        for _ in range(passes):
            y = y.exp()  # keeps its result
        return y, (y * y).sum()  # keeps y, once more

    assert bench.saved_mib(Problem(powers, [x], []), 3) == 3
    assert bench.saved_mib(Problem(lambda _: (x * x, x.mT @ x), [x], []), 1) == 0  # the leaf alone


@pytest.mark.parametrize("window", [None, 32], ids=["one-window", "windows"])
def test_what_ours_keeps_for_the_backward_does_not_grow_with_passes(window):
    case = Case(batch=1, tokens=128, heads=2, head_dim=16, window=window, dtype="float32")
    problem = bench.operator_problem(bench.replayed, case, bench.make_inputs(case, 0, CPU))
    few, many = (bench.saved_mib(problem, n) for n in (4, 64))
    assert 0 < few and many <= 1.1 * few
