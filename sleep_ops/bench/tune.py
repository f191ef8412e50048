"""`sleep-ops bench tune`: measures launch settings of the chunk kernels on the GPU at hand, for kernels/launches.py.

A candidate is a row of the table, tried in its place. It is compiled first, without a launch: what Triton gives up on,
replaces by a trap, spills too many registers of or gives more shared memory than there is, is left out. It is then
compared with the float64 recurrence and timed, forward and backward of one pass in one CUDA graph; one that would be
the best so far must also be right over replay passes, whose kernels are others, and give the same bits twice (what
differs from run to run is a race). One kernel after another is varied, for every length of the chunk; for a case so
short that one launch does everything, that launch. The best row is last run as compiled, on the CPU, in the emulator of
a checkout's tests: one that is wrong there or reports a race is refused, and the next best takes its place.

None of it has run on a GPU yet, save for the compiling, which needs none.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from sleep_ops.bench.cases import DTYPES, KERNEL_CASES, Case, make_inputs
from sleep_ops.bench.checks import operator_check, wrong
from sleep_ops.bench.harness import (
    GRAPH_MODES,
    MACHINE,
    TIMES,
    Problem,
    environment,
    first_line,
    gradients,
    measure,
    run_of,
)
from sleep_ops.bench.providers import operator_problem, replayed
from sleep_ops.bench.settings import TuneSettings, check_choices, check_counts, check_dtype
from sleep_ops.checks import check_seed
from sleep_ops.files import write_atomically
from sleep_ops.training.config import resolve_device

KERNELS = TuneSettings.kernels
# The kernels whose launches are in a row of each table, after its first number.
TABLES = {"LAUNCHES": KERNELS[:4], "SINGLE_CHUNK_LAUNCHES": KERNELS[4:]}
CHUNKS = TuneSettings.chunks
# Bytes a thread may spill: what the settings in use do at the most, up to K = V = 256 (tests/test_aot.py).
MAX_SPILL_BYTES = 832
REPLAYED = 4  # passes, enough to go through the map of a pass
EMULATED = 5  # of the fastest rows, at most, until one is right
COLUMNS = [
    *(*MACHINE, "case", "table", "architecture", "dtype", "key_dim", "value_dim", "varied", "tokens", *KERNELS),
    *("repeats", *TIMES, "verdict"),
]

Row = tuple  # a number of tokens, then (block_v, warps, stages) of each kernel


class Rejected(Exception):
    """Why a candidate is not timed, or cannot be the best."""


class Tried(NamedTuple):
    """A candidate, the kernel varied in it (or "tokens"), and its times or why there are none."""

    varied: str
    row: Row
    times: dict[str, float]
    verdict: str


class Compiled(NamedTuple):
    """What the compiler made of a kernel: bytes a thread spills, bytes of shared memory, whether it gave up."""

    kernel: str
    spill_bytes: int
    shared_bytes: int
    traps: bool


@dataclass(frozen=True)
class TuneBenchmark(TuneSettings):
    """Rows of the tables for the head dims of the named cases (those of `bench kernels`), each on that case.

    `run` leaves the best rows in `found`, by table and key. Raises ValueError for a setting that is unknown or out of
    range, for cases that share a row, and on anything but an NVIDIA GPU.
    """

    found: dict[tuple[str, tuple], Row] = field(default_factory=dict)

    def __post_init__(self):
        check_choices(self, cases=KERNEL_CASES["cuda"], kernels=KERNELS)
        if not self.chunks or not set(self.chunks) <= set(CHUNKS) or len(set(self.chunks)) < len(self.chunks):
            raise ValueError(f"chunks: expected distinct ones of {CHUNKS}, got {self.chunks!r}")
        check_dtype(self)
        check_counts(self, "repeats")
        check_seed(self.seed)
        device = resolve_device(self.device)
        if device.type != "cuda" or torch.version.hip:
            raise ValueError(f"device: expected an NVIDIA GPU, on which launch settings can be measured, got {device}")
        places = {}
        for name in self.cases:
            other = places.setdefault(self._place(name), name)
            if other != name:
                raise ValueError(f"cases: expected one for every row of a table, got {other} and {name} for the same")

    def _case(self, name: str) -> Case:
        case = replace(KERNEL_CASES["cuda"][name], passes=1)
        return case if self.dtype is None else replace(case, dtype=self.dtype)

    def _place(self, name: str) -> tuple[str, tuple]:
        """The table and the key in it that a case decides."""
        from sleep_ops.kernels.configs import architecture, launch_key, single_chunk_config

        case, arch = self._case(name), architecture(resolve_device(self.device))
        dims, dtype = (case.key_dim, case.value_dim), DTYPES[case.dtype]
        short = single_chunk_config(*dims, case.tokens, dtype, arch) is not None
        return "SINGLE_CHUNK_LAUNCHES" if short else "LAUNCHES", launch_key(*dims, dtype, arch)

    def _searches(self, name: str) -> list[tuple[Row, dict[str, list]]]:
        """Rows to start from, and what to vary in each."""
        from sleep_ops.kernels import launches as tables
        from sleep_ops.kernels.configs import launch_row

        case, (table, key) = self._case(name), self._place(name)
        dims, dtype = (case.key_dim, case.value_dim), DTYPES[case.dtype]
        base = launch_row(*dims, dtype, key[3], getattr(tables, table))
        # grad first: it asks for most, and until it has a launch that compiles no other can be timed.
        chosen = [kernel for kernel in reversed(TABLES[table]) if kernel in self.kernels]
        varied = {kernel: launches(kernel, key[2]) for kernel in chosen}
        sizes = self.chunks if table == "LAUNCHES" else base[:1]
        return [((size, *base[1:]), varied) for size in sizes]

    @property
    def steps(self) -> int:
        """How often `run` yields."""
        searches = [search for name in self.cases for search in self._searches(name)]
        return len(self.cases) + sum(1 + sum(map(len, varied.values())) for _, varied in searches)

    def run(
        self, tell: Callable[[str], None], show: Callable[[str], None] = lambda label: None
    ) -> Iterator[list[dict]]:
        """Yield the row of every candidate, and those emulated of each case. tell: of the best; show: of the last."""
        device = resolve_device(self.device)
        if emulator() is None:
            tell("rows are not emulated: that takes a checkout, with its tests/ptx")
        common = environment(device) | {"repeats": self.repeats}
        for name in self.cases:
            case, (table, key) = self._case(name), self._place(name)
            sizes = {"case": name, "dtype": case.dtype, "key_dim": case.key_dim, "value_dim": case.value_dim}
            sizes |= {"table": table, "architecture": key[3]}
            trial = Trial(case, table, key, self.repeats, self.seed, device)
            fastest: list[Tried] = []  # so far, the last one of all: those that were checked in full
            for base, varied in self._searches(name):
                for found in search(base, TABLES[table], varied, trial):
                    show(f"{name}: {found.varied} {found.row}")
                    if found.times and (not fastest or found.times["ms_median"] < fastest[-1].times["ms_median"]):
                        fastest.append(found)
                    yield [_csv_row(common | sizes, found, table)]
            for found in emulated(fastest[-EMULATED:], table, key):
                yield [_csv_row(common | sizes, found, table)]
                if found.verdict:
                    tell(f"{name}: {found.row} is refused: {found.verdict}")
                else:
                    self.found[table, key] = found.row
                    tell(f"{name}: {key}: {found.row}, {found.times['ms_median']:.3f} ms forward and backward")


def _csv_row(common: dict, found: Tried, table: str) -> dict:
    row = common | dict.fromkeys((*KERNELS, *TIMES), "") | found._asdict() | found.times
    row |= zip(("tokens", *TABLES[table]), found.row, strict=True)
    return {column: row[column] for column in COLUMNS}


def emulated(fastest: list[Tried], table: str, key: tuple) -> Iterator[Tried]:
    """From the last on, each with what is wrong with it as compiled for its verdict, until one is right."""
    for found in reversed(fastest):
        faults = [] if emulator() is None else emulated_faults(table, key, found.row)
        yield found._replace(varied="emulated", verdict=faults[0] if faults else "")
        if not faults:
            return


def launches(kernel: str, BV: int) -> list[tuple[int, int, int]]:
    """Candidates (block_v, warps, stages) of a kernel for values of tile BV. chunk_prepare reads no values."""
    if kernel == "prepare":
        return [(16, warps, 1) for warps in (1, 2, 4)]
    blocks = [block for block in (16, 32, 64, 128) if block <= BV]
    if kernel.startswith("single_chunk"):
        return [(block, warps, 1) for block in blocks for warps in (1, 2, 4)]
    stages = (1, 2, 3) if kernel in ("scan", "reverse") else (1, 2)
    return [(block, warps, number) for block in blocks for warps in (4, 8) for number in stages]


def search(
    base: Row, kernels: tuple[str, ...], varied: dict[str, list], trial: Callable[[Row, float], dict]
) -> Iterator[Tried]:
    """`base`, then one kernel's launch after another varied, keeping the fastest row.

    kernels: whose launches a row holds. trial(row, time to beat) -> its times; raises Rejected.
    """
    best, to_beat = base, math.inf
    for name, values in {"tokens": base[:1], **varied}.items():
        start, i = best, ("tokens", *kernels).index(name)
        for value in values:
            row = (*start[:i], value, *start[i + 1 :])
            try:
                times = trial(row, to_beat)
            except Rejected as why:
                yield Tried(name, row, {}, str(why))
                continue
            yield Tried(name, row, times, "")
            if times["ms_median"] < to_beat:
                best, to_beat = row, times["ms_median"]


class Trial:
    """Times of one pass, forward and backward, over `case` with a row in the place of `key` of a table."""

    def __init__(self, case: Case, table: str, key: tuple, repeats: int, seed: int, device: torch.device):
        self.case, self.place, self.repeats, self.seed, self.device = case, (table, key), repeats, seed, device
        self.replay = functools.partial(replayed, impl="triton")
        self.problem = operator_problem(self.replay, case, make_inputs(case, seed, device))
        self.shared_bytes = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]

    def __call__(self, row: Row, to_beat: float) -> dict[str, float]:
        with in_table(*self.place, row):
            self._check(1)
            try:
                run = run_of(self.problem, 1, GRAPH_MODES[1], self.device)
            except RuntimeError as error:
                raise Rejected(first_line(error)) from error
            reasons = []
            found = measure({"": run}, self.repeats, self.device, lambda _, why: reasons.append(why))
            if reasons:
                raise Rejected(reasons[0])
            times = {name: found[""][name] for name in TIMES}
            if times["ms_median"] < to_beat:
                self._check(REPLAYED)
                self._check_bits()
        return times

    def _check(self, passes: int) -> None:
        with compiling_only() as compiled:
            try:
                _run(self.problem, passes)
            except Exception as error:  # whatever the compiler raises
                raise Rejected(f"does not compile: {first_line(error)}") from error
        check_resources(compiled, self.shared_bytes)
        errors = operator_check(self.replay, self.case, self.seed, self.device, (passes,))
        if beyond := wrong(errors, self.case.dtype):
            raise Rejected(f"WRONG: {beyond}")

    def _check_bits(self) -> None:
        pairs = zip(_run(self.problem, 1), _run(self.problem, 1), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise Rejected("WRONG: not the same bits twice")


def _run(problem: Problem, passes: int) -> list[torch.Tensor]:
    roots = problem.run(passes)
    return [*roots, *gradients(problem, roots)]


@contextmanager
def in_table(name: str, key: tuple, row: Row):
    """The table of that name with `row` at `key`."""
    from sleep_ops.kernels import launches as tables

    table = getattr(tables, name)
    before = dict(table)
    table[key] = row
    try:
        yield
    finally:
        table.clear()
        table.update(before)


@contextmanager
def compiling_only():
    """Triton kernels are compiled where they would be launched, and nothing is; gives the list of what came of them.

    What the block computes is memory as it was found.
    """
    from triton.runtime.jit import JITFunction

    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        traps = "trap;" in kernel.asm["ptx"]
        compiled.append(Compiled(self.__name__, spill_bytes(kernel.asm["cubin"]), kernel.metadata.shared, traps))
        return kernel

    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


@functools.cache
def spill_bytes(cubin: bytes) -> int:
    """Bytes of local memory a thread needs, read from the binary as Triton's own cuobjdump shows it."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(STACK|LOCAL):(\d+)", text))
    return max(map(int, usage.values()))


def check_resources(compiled: list[Compiled], shared_bytes: int) -> None:
    """Raises Rejected for a kernel that traps, spills too much, or needs more than `shared_bytes` of shared memory."""
    for kernel in compiled:
        if kernel.traps:
            raise Rejected(f"{kernel.kernel}: the compiler left a trap")
        if kernel.spill_bytes > MAX_SPILL_BYTES:
            raise Rejected(f"{kernel.kernel}: spills {kernel.spill_bytes} bytes, at most {MAX_SPILL_BYTES} expected")
        if kernel.shared_bytes > shared_bytes:
            got = f"{kernel.shared_bytes} bytes of shared memory"
            raise Rejected(f"{kernel.kernel}: needs {got}, at most {shared_bytes} expected")


def with_table(text: str, name: str, table: dict[tuple, Row]) -> str:
    """The source of kernels/launches.py with this table in it."""
    lines = [f"    {key}: {row},\n".replace("'", '"') for key, row in table.items()]
    source = f"{name} = {{\n{''.join(lines)}}}\n"
    text, count = re.subn(rf"^{name} = \{{\n.*?^\}}\n", lambda _: source, text, flags=re.MULTILINE | re.DOTALL)
    assert count == 1
    return text


def emulator() -> Path | None:
    """The script that runs a row's kernels as compiled, without a GPU; None outside a checkout."""
    from sleep_ops.kernels import launches as tables

    script = Path(tables.__file__).resolve().parents[1] / "tests" / "ptx" / "rows.py"
    return script if script.exists() else None


def emulated_faults(table: str, key: tuple, row: Row) -> list[str]:
    """What it finds wrong with a row, in words; in another process, since it takes the place of Triton's driver."""
    script = emulator()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(script.parents[2]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(script), json.dumps([table, key, row])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return [f"not emulated: {done.stderr.strip().splitlines()[-1]}"]
    return [line for line in done.stdout.splitlines() if line]


def check_writable() -> None:
    """Raises ValueError where rows can't be emulated, and so must not be written."""
    if emulator() is None:
        raise ValueError("write: expected a checkout, whose tests/ptx runs a row before it is written, got none")


def write_rows(rows: dict[tuple[str, tuple], Row]) -> Path:
    """Put rows, by table and key, into kernels/launches.py, in the place of those with the same keys; its path."""
    from sleep_ops.kernels import launches as tables

    path = Path(tables.__file__).resolve()
    text = path.read_text()
    for name in TABLES:
        new = {key: row for (table, key), row in rows.items() if table == name}
        text = with_table(text, name, getattr(tables, name) | new)
    write_atomically(path, text.encode())
    return path
