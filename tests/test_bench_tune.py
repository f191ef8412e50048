"""The table of launch settings, and `sleep-ops bench tune`, which measures and rewrites it: all that needs no GPU."""

import ast
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
from commands import bench, read, refuses

from sleep_ops.bench import tune
from sleep_ops.bench.cases import Case
from sleep_ops.bench.tune import Compiled, Rejected, Tried, TuneBenchmark, check_resources, in_table, launches, search
from sleep_ops.kernels import configs
from sleep_ops.kernels import launches as table
from sleep_ops.kernels.configs import architecture, chunk_config, launch_key, launch_row

TABLE = Path(__file__).parent.parent / "kernels" / "launches.py"
ROW = (64, (16, 4, 1), (64, 8, 3), (32, 4, 2), (16, 4, 1))
KEY = ("16-bit", 128, 64, "sm90")


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU, up to the first call of it."""
    monkeypatch.setattr(tune, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("sleep_ops.kernels.configs._known_architecture", lambda device: "sm90")


@pytest.mark.parametrize("T", [1, 16, 17, 64, 1 << 15])
@pytest.mark.parametrize(("K", "V"), [(16, 16), (60, 128), (128, 100), (128, 512), (256, 64), (200, 8)])
def test_default_rows(K, V, T):
    """Chunks and value tiles of 32 in 16 bits up to K = 128, else 16; never wider than V, nor the chunk than T."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        size = 16 if dtype == torch.float32 or K > 128 else 32
        config = chunk_config(K, V, T, dtype, "sm00")
        assert config == chunk_config(K, V, T, dtype) and config.chunk == (16 if T <= 16 else size)
        block = min(size, max(16, V))
        assert {(launch.block_v, launch.warps) for launch in config[2:]} == {(block, 4)}
        stages = 1 if dtype == torch.float32 else 2
        assert [launch.stages for launch in config[1:]] == [1, stages, stages, 1]


def test_hoppers_row():
    """Chunks of 64 with wide tiles; a sweep that leaves multiprocessors idle has narrower ones and one more stage."""
    config = chunk_config(128, 128, 1000, torch.bfloat16, "sm90")
    assert config.chunk == 64 and config.scan == (64, 4, 2)
    gpu = torch.device("cuda")
    with mock.patch.object(configs, "multiprocessors", lambda device: 132):
        assert configs.sweep_launch(config.scan, 66, 128, gpu) == config.scan
        assert configs.sweep_launch(config.scan, 66, 128, gpu, light=True) == (64, 4, 3)
        assert configs.sweep_launch(config.scan, 65, 128, gpu) == (32, 4, 3)
        assert configs.sweep_launch(config.scan, 65, 128, gpu, light=True) == (32, 4, 3)
        narrow = chunk_config(128, 128, 1000, torch.bfloat16).scan
        assert configs.sweep_launch(narrow, 1, 128, gpu) == narrow
    assert configs.sweep_launch(config.scan, 1, 128, torch.device("cpu")) == config.scan


def test_the_most_particular_row_is_taken():
    order = [("16-bit", None, None, None), ("16-bit", None, None, "sm90"), ("16-bit", 128, None, None)]
    order += [("16-bit", 128, None, "sm90"), ("16-bit", 128, 64, None), ("16-bit", 128, 64, "sm90")]
    assert launch_key(100, 40, torch.float16, "sm90") == order[-1]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(table.LAUNCHES, clear=True))
        for n, key in enumerate(order):
            stack.enter_context(in_table("LAUNCHES", key, (n,)))
            assert launch_row(100, 40, torch.float16, "sm90") == (n,)
        assert launch_row(100, 40, torch.float16, None) == (4,)
        assert launch_row(100, 80, torch.float16, "sm90") == (3,)
        assert launch_row(64, 40, torch.float16, "sm90") == (1,)
    assert launch_row(100, 40, torch.float16, "sm90") == table.LAUNCHES[order[1]]


def test_other_gpus_and_dims_keep_their_rows():
    with in_table("LAUNCHES", KEY, ROW):
        assert launch_row(128, 64, torch.bfloat16, "sm90") == ROW
        for K, V, dtype, arch in ((128, 64, torch.bfloat16, "sm100"), (128, 64, torch.float32, "sm90")):
            assert launch_row(K, V, dtype, arch) != ROW
        assert launch_row(128, 128, torch.bfloat16, "sm90") != ROW
        config = chunk_config(128, 40, 1000, torch.bfloat16, "sm90")
        assert config.chunk == 64 and config.scan == (64, 8, 3)
        assert [chunk_config(128, 40, T, torch.bfloat16, "sm90").chunk for T in (1, 16, 17, 32, 33)] == [
            16,
            16,
            32,
            32,
            64,
        ]
    assert KEY not in table.LAUNCHES


def test_the_cpu_has_no_architecture():
    assert architecture(torch.device("cpu")) is None


def test_the_table_is_rewritten_as_it_stands_and_with_rows(tmp_path, monkeypatch):
    text = TABLE.read_text()
    for name in tune.TABLES:
        assert tune.with_table(text, name, getattr(table, name)) == text
    path = tmp_path / "launches.py"
    path.write_text(text)
    monkeypatch.setattr(table, "__file__", str(path))
    windows = {("float32", None, None, None): (16, (16, 8, 1), (16, 8, 1))}
    rows = {("LAUNCHES", KEY): ROW, ("LAUNCHES", ("16-bit", 256, None, None)): ROW}
    assert tune.write_rows(rows | {("SINGLE_CHUNK_LAUNCHES", key): row for key, row in windows.items()}) == path
    scope = {}
    exec(path.read_text(), scope)
    assert scope["LAUNCHES"] == table.LAUNCHES | {KEY: ROW, ("16-bit", 256, None, None): ROW}
    assert scope["SINGLE_CHUNK_LAUNCHES"] == table.SINGLE_CHUNK_LAUNCHES | windows
    assert list(scope["LAUNCHES"])[-1] == KEY and scope["__doc__"] == table.__doc__
    style = [sys.executable, "-m", "ruff", "format", "--check", "--config", str(TABLE.parent.parent / "pyproject.toml")]
    assert subprocess.run([*style, str(path)], capture_output=True).returncode == 0


def test_the_search_keeps_the_fastest_launch_of_every_kernel():
    """With times that are a sum over kernels it ends at the best of each, having left out what is rejected."""
    kernels = tune.TABLES["LAUNCHES"]
    wanted = dict(zip(kernels, ((16, 2, 1), (64, 4, 3), (32, 8, 1), (16, 4, 2)), strict=True))
    seen = []

    def trial(row, to_beat):
        seen.append((row, to_beat))
        if row[2][0] == 128:
            raise Rejected("too wide")
        pairs = zip(row[1:], wanted.values(), strict=True)
        return {"ms_median": sum(a != b for x, y in pairs for a, b in zip(x, y, strict=True))}

    base = (64, (32, 4, 1), (32, 4, 2), (32, 4, 2), (32, 4, 1))
    tried = list(search(base, kernels, {kernel: launches(kernel, 128) for kernel in kernels}, trial))
    best = min((x for x in tried if x.times), key=lambda x: x.times["ms_median"])
    assert best.row == (64, *wanted.values()) and tried[0] == Tried("tokens", base, tried[0].times, "")
    assert len(tried) == len(seen) == 1 + sum(len(launches(kernel, 128)) for kernel in kernels)
    assert {x.verdict for x in tried if x.row[2][0] == 128} == {"too wide"}
    for n, (_, to_beat) in enumerate(seen):
        assert to_beat == min((x.times["ms_median"] for x in tried[:n] if x.times), default=float("inf"))


def test_candidates_are_no_wider_than_the_values():
    assert {block for block, _, _ in launches("scan", 64)} == {16, 32, 64}
    assert {warps for _, warps, _ in launches("grad", 16)} == {4, 8} and len(launches("prepare", 128)) == 3


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (dict(traps=True), "chunk_grad: the compiler left a trap"),
        (dict(spill_bytes=833), "chunk_grad: spills 833 bytes, at most 832 expected"),
        (dict(shared_bytes=1001), "chunk_grad: needs 1001 bytes of shared memory, at most 1000 expected"),
    ],
    ids=["trap", "spills", "shared"],
)
def test_what_the_compiler_made_of_a_candidate_decides(fault, why):
    fine = Compiled("chunk_grad", 832, 1000, False)
    check_resources([fine, fine], 1000)
    with pytest.raises(Rejected, match=f"^{why}$"):
        check_resources([fine, fine._replace(**fault)], 1000)


SCRIPT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:  # of a GPU that is not here
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
from sleep_ops.bench.tune import compiling_only, in_table
from sleep_ops.ops.chunk_triton import TritonPass
from sleep_ops.ops.rule import RuleOptions
q, k, v = (torch.randn(1, 40, 1, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
g, beta = (torch.zeros(1, 40, 1, requires_grad=True) for _ in range(2))
for chunk in (32, 64):
    row = (chunk, (16, 4, 1), (16, 4, 2), (16, 4, 2), (16, 4, 1))
    with in_table("LAUNCHES", ("16-bit", 16, 16, None), row), compiling_only() as compiled:
        output, state = TritonPass(k, v, g, beta, RuleOptions()).run(q, None, 0.25)
        torch.autograd.grad(output.float().sum() + state.sum(), [q, k, v, g, beta])
    print([(x.kernel, x.traps, x.spill_bytes, x.shared_bytes > 0) for x in compiled])
"""


def test_compiling_without_launching(tmp_path):
    """A forward and backward pass with nothing but a target: every kernel is compiled and looked at, none runs."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line, gradient in zip(done.stdout.splitlines(), ("chunk_grad_kernel", "chunk_grad_long_kernel"), strict=True):
        kernels = ast.literal_eval(line)
        assert [kernel for kernel, *_ in kernels] == [
            *("chunk_prepare_kernel", "chunk_scan_kernel", "chunk_scan_kernel", "chunk_reverse_kernel"),
            *(gradient, "gate_backward_kernel"),
        ]
        for kernel, traps, spills, shared in kernels[:-1]:
            assert not traps and shared and spills <= (32 if kernel == "chunk_grad_long_kernel" else 0), kernel


def test_it_refuses_a_machine_without_a_gpu(tmp_path):
    text = bench("tune", "--device", "cpu", "--out", tmp_path / "out", "--write", code=2)
    assert "device: expected an NVIDIA GPU" in text and not list(tmp_path.iterdir())


def test_the_command_prints_and_writes_the_best_rows(gpu, tmp_path, monkeypatch):
    class Trial:
        def __init__(self, case: Case, table, key, repeats, seed, device):
            assert case.passes == 1
            self.short = table == "SINGLE_CHUNK_LAUNCHES"
            assert key == ("16-bit", *((64, 64) if self.short else (128, case.value_dim)), "sm90")

        def __call__(self, row, to_beat):
            launch = row[1] if self.short else row[2]
            if row[-1][1] == 8:
                raise Rejected("WRONG: a race")
            return dict.fromkeys(("ms_median", "ms_p20", "ms_p80"), 100 / launch[0] + abs(row[0] - 32))

    monkeypatch.setattr(tune, "Trial", Trial)
    monkeypatch.setattr(tune, "environment", lambda device: dict.fromkeys(tune.MACHINE, ""))
    emulated = []
    monkeypatch.setattr(tune, "emulated_faults", lambda table, key, row: emulated.append((table, key, row)) or [])
    monkeypatch.setattr(tune, "emulator", lambda: Path("rows.py"))
    path = tmp_path / "launches.py"
    path.write_text(TABLE.read_text())
    monkeypatch.setattr(table, "__file__", str(path))
    text = bench(
        "tune", "--chunks", "16,32", "--kernels", "scan,grad,single_chunk_forward", "--write", "--out", tmp_path
    )
    best = (32, (16, 1, 1), (128, 4, 1), (64, 4, 2), (32, 4, 3))
    assert f"long: ('16-bit', 128, 128, 'sm90'): {best}" in text and f"wrote {path}" in text
    assert ("LAUNCHES", ("16-bit", 128, 128, "sm90"), best) in emulated and len(emulated) == 3
    scope = {}
    exec(path.read_text(), scope)
    assert scope["LAUNCHES"] == table.LAUNCHES | {("16-bit", 128, V, "sm90"): best for V in (128, 256)}
    short = {("16-bit", 64, 64, "sm90"): (32, (64, 1, 1), (64, 2, 1))}
    assert scope["SINGLE_CHUNK_LAUNCHES"] == table.SINGLE_CHUNK_LAUNCHES | short
    rows = read(tmp_path / "tune.csv")
    assert list(rows[0]) == tune.COLUMNS
    assert len(rows) == TuneBenchmark(chunks=(16, 32), kernels=("scan", "grad", "single_chunk_forward")).steps
    races = 2 * 2 * len(launches("grad", 128)) // 2
    assert sum(row["verdict"] == "WRONG: a race" and row["ms_median"] == "" for row in rows) == races
    assert {(row["table"], row["single_chunk_forward"] == "", row["grad"] == "") for row in rows} == {
        ("LAUNCHES", True, False),
        ("SINGLE_CHUNK_LAUNCHES", False, True),
    }


def test_a_row_that_races_as_compiled_is_refused_and_the_next_best_taken(monkeypatch):
    tried = [Tried("scan", (n,), {"ms_median": 9.0 - n}, "") for n in range(4)]
    monkeypatch.setattr(tune, "emulator", lambda: Path("rows.py"))
    monkeypatch.setattr(tune, "emulated_faults", lambda table, key, row: ["sm_90: race: ..."] if row[0] > 1 else [])
    found = list(tune.emulated(tried, "LAUNCHES", KEY))
    assert [(x.row, x.verdict) for x in found] == [((3,), "sm_90: race: ..."), ((2,), "sm_90: race: ..."), ((1,), "")]
    assert {x.varied for x in found} == {"emulated"}


def test_no_row_is_written_where_none_can_be_emulated(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "emulator", lambda: None)
    text = bench("tune", "--write", "--out", tmp_path / "out", code=2)
    assert "write: expected a checkout" in text and not list(tmp_path.iterdir())


def test_grad_is_varied_first(gpu):
    """It asks for most: where the row that holds does not compile for a chunk, nothing else is found before that."""
    for name in ("long", "jet"):
        assert [list(varied) for _, varied in TuneBenchmark()._searches(name)] == [
            ["grad", "reverse", "scan", "prepare"]
        ] * 3
    ((base, varied),) = TuneBenchmark()._searches("rule110")
    assert base == (32, (32, 1, 1), (64, 2, 1))
    assert list(varied) == ["single_chunk_backward", "single_chunk_forward"]


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("--case tiny", "cases"),
        ("--case long,depo", "cases"),
        ("--case rule110 --dtype float32 --kernels windows", "kernels"),
        ("--chunks 128", "chunks"),
        ("--chunks 16,16", "chunks"),
        ("--kernels step", "kernels"),
        ("--dtype int8", "dtype"),
        ("--repeats 0", "repeats"),
        ("--seed -1", "seed"),
    ],
)
def test_bad_settings_are_named_and_nothing_is_written(gpu, tmp_path, command, named):
    refuses(f"tune {command}", named, tmp_path)
