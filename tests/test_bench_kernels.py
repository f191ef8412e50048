"""`sleep-ops bench kernels`: rows, sweeps, the first call, refusals, and the figures."""

from dataclasses import replace

import pytest
import torch
from commands import bench, is_png, read
from matplotlib.axes import Axes

from sleep_ops.bench import kernels, providers
from sleep_ops.bench.cases import KERNEL_CASES, Case
from sleep_ops.bench.harness import GRAPH_MODES, MODES
from sleep_ops.bench.kernels import COLUMNS, FIRST_CALL, SWEEPS, KernelsBenchmark
from sleep_ops.bench.plot import plot_kernels

CALL = "kernels --device cpu --case depo,jet".split()
CPU = torch.device("cpu")
TINY = {
    "depo": Case(2, 40, 2, 2, 8, 8, dtype="float32"),
    "jet": Case(1, 30, 1, 2, 8, 12, passes=3, dtype="float32"),
}


@pytest.fixture
def tiny(monkeypatch):
    for name, case in TINY.items():
        monkeypatch.setitem(KERNEL_CASES["cpu"], name, case)


def collect(**settings):
    notes = []
    benchmark = KernelsBenchmark(**{"device": "cpu", "repeats": 1, "providers": ("ours",)} | settings)
    rows = [row for rows in benchmark.run(notes.append) for row in rows]
    return rows, notes


def test_the_command_writes_every_figure(tiny, tmp_path):
    text = bench(*CALL, "--repeats", 2, "--out", tmp_path)
    rows = read(tmp_path / "kernels.csv")
    assert list(rows[0]) == COLUMNS and is_png(tmp_path / "kernels.png")
    assert len(rows) == 12 and {(row["case"], row["provider"], row["mode"]) for row in rows} == {
        (case, provider, mode) for case in TINY for provider in ("ours", "torch") for mode in MODES
    }
    for row in rows:
        case = TINY[row["case"]]
        assert [int(row[n]) for n in ("tokens", "value_heads", "value_dim", "passes", "window")] == [
            *(case.tokens, case.value_heads, case.value_dim, case.passes, case.tokens)
        ]
        assert 0 < float(row["ms_p20"]) <= float(row["ms_median"]) <= float(row["ms_p80"])
        assert float(row["gflop"]) == case.flops(row["mode"]) / 1e9
        assert float(row["mib_moved"]) == case.bytes(row["mode"]) / 2**20
        assert row["h100_floor_ms"] == row["floor_fraction"] == row["peak_extra_mib"] == ""  # float32, on the CPU
        assert (row["saved_mib"] == "") if row["mode"] == "forward" else (float(row["saved_mib"]) > 0)
        assert all(0 < float(row[f"error_{x}"]) <= float(row["error_bound"]) for x in ("output", "state", "gradient"))
    assert "depo: fla is not timed" in text and "jet: flash-qla is not timed" in text


def test_the_floor_is_an_h100s_and_the_fraction_of_cuda_alone(tiny):
    rows, _ = collect(cases=("depo",), dtype="bfloat16", providers=("torch",))
    floors = {row["mode"]: row["h100_floor_ms"] for row in rows}
    case = replace(TINY["depo"], dtype="bfloat16")
    assert floors == {mode: case.floor_ms(mode) for mode in MODES} and {row["floor_fraction"] for row in rows} == {""}
    found = kernels._least(case, "forward-graph", {"ms_median": 2 * floors["forward"]}, torch.device("cuda"))
    assert found["floor_fraction"] == 0.5


def test_small_cases_are_also_replayed_as_graphs_on_cuda(monkeypatch):
    monkeypatch.setattr(kernels, "resolve_device", torch.device)
    benchmark = KernelsBenchmark(device="cuda", first_call=True)
    modes = {name: benchmark._modes(case) for name, case in benchmark.points}
    assert modes["rule110"] == modes["mid"] == (*MODES, *GRAPH_MODES, FIRST_CALL)
    assert modes["long"] == modes["batch"] == (*MODES, FIRST_CALL)
    assert benchmark.steps == sum(map(len, modes.values()))


def test_what_cannot_be_recorded_is_told_of(monkeypatch):
    def run_of(problem, *_):
        if problem == "waits":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return problem

    notes = []
    monkeypatch.setattr(kernels, "run_of", run_of)
    found = kernels._runs({"fla": "waits", "ours": "fine"}, 1, "forward-graph", CPU, lambda *note: notes.append(note))
    assert found == {"ours": "fine"}
    assert notes == [("fla", "forward-graph: no row: operation not permitted when stream is capturing")]


@pytest.mark.parametrize("sweep", ["tokens", "window"])
def test_sweeps(tiny, monkeypatch, tmp_path, sweep):
    monkeypatch.setitem(SWEEPS, "cpu", {"tokens": (8, 20, 10**6), "window": (8, 24, 999)})
    bench(
        *CALL,
        "--providers",
        "ours",
        "--sweep",
        sweep,
        "--repeats",
        1,
        "--out",
        tmp_path,
    )
    rows = read(tmp_path / f"kernels-{sweep}.csv")
    found = {(row["case"], int(row["tokens"]), int(row["window"]), int(row["passes"])) for row in rows}
    assert found == (
        {(case, n, n, TINY[case].passes) for case in TINY for n in (8, 20)}
        if sweep == "tokens"
        else {(case, TINY[case].tokens, n, 4) for case in TINY for n in (8, 24, TINY[case].tokens)}
    )
    assert is_png(tmp_path / f"kernels-{sweep}.png")


def test_first_call(tiny, monkeypatch):
    rows, notes = collect(cases=("depo",), first_call=True)
    (row,) = [row for row in rows if row["mode"] == FIRST_CALL]
    others = [row["ms_median"] for row in rows if row["mode"] == "forward+backward"]
    assert row["ms_median"] > max(others) and row["repeats"] == 1 and row["provider"] == "ours" and not notes
    monkeypatch.setattr(kernels.sys, "executable", "/bin/false")
    rows, notes = collect(cases=("depo",), first_call=True)
    assert FIRST_CALL not in {row["mode"] for row in rows} and notes == ["depo: ours first-call: no row: no output"]


def test_a_wrong_provider_is_reported_and_not_timed(tiny, monkeypatch):
    monkeypatch.setitem(
        providers.OURS,
        "torch",
        lambda: lambda *x, **options: [1.01 * y for y in providers.replayed(*x, **options)],
    )
    rows, notes = collect(cases=("depo",), providers=("ours", "torch"))
    assert {row["provider"] for row in rows} == {"ours"} and len(notes) == 1 and "depo: torch is WRONG" in notes[0]


def test_the_figure_has_every_case_beside_its_floor(tiny, tmp_path, monkeypatch):
    rows, _ = collect(cases=("depo", "jet"), dtype="bfloat16", providers=("torch",))
    graphs = [row | {"mode": f"{row['mode']}-graph", "peak_extra_mib": ""} for row in rows if "+" in row["mode"]]
    drawn = []
    hlines = Axes.hlines
    monkeypatch.setattr(Axes, "hlines", lambda self, y, *x, **z: (drawn.append(y), hlines(self, y, *x, **z))[1])
    plot_kernels(rows + graphs, tmp_path / "cases.png")
    assert is_png(tmp_path / "cases.png")
    least = [[replace(case, dtype="bfloat16").floor_ms(mode) for case in TINY.values()] for mode in MODES]
    assert drawn == [*least, least[2]]
