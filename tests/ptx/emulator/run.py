"""Launches of compiled kernels, what they report, and Triton compiling and launching here."""

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
from ptx.emulator.arithmetic import B8, RAW, TYPES
from ptx.emulator.global_memory import Memory
from ptx.emulator.machine import Machine
from ptx.emulator.parse import Block, Instruction, Parser, Program, Unsupported
from ptx.emulator.registers import touched_too_early
from ptx.emulator.translate import Translator
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes that a program may have
MAX_LANES = 2048  # threads emulated at once
MAX_WARPS = 8  # of a program: the checks keep a byte for each, in a word


class Launch:
    """One launch of a compiled kernel on a grid."""

    def __init__(self, emulator: "Emulator", program: Program, metadata, grid: tuple, values: list, memory: Memory):
        self.emulator, self.program, self.grid = emulator, program, grid
        self.values, self.memory = values, memory
        self.warps = metadata.num_warps
        if self.warps > MAX_WARPS:
            raise Unsupported(f"{self.warps} warps")
        self.threads = 32 * self.warps
        self.shared_size = metadata.shared
        self.shared_stride = (metadata.shared + 1023) // 1024 * 1024 or 1024
        self.warp_bytes = 1 << (self.warps - 1).bit_length()
        self.warp_word = RAW[self.warp_bytes]
        everyone = np.full((max(self.warps, 4), self.warp_bytes), 0xFF, np.uint8)
        for w in range(len(everyone)):
            everyone[w, w % self.warp_bytes] = 0
        self.not_mine = everyone.view(self.warp_word).reshape(-1)  # for each warp, the bytes of the others

    def run(self) -> None:
        total = int(np.prod(self.grid))
        at_once = max(1, MAX_LANES // self.threads)
        counts: collections.Counter = collections.Counter()
        with np.errstate(all="ignore"):
            for first in range(0, total, at_once):
                self._run(np.arange(first, min(first + at_once, total)), counts)
        self.emulator.count(self, counts)

    def _run(self, programs: np.ndarray, counts: collections.Counter) -> None:
        blocks = self.program.blocks
        waiting = [(Machine(self, programs), 0)]
        while waiting:
            machine, block = waiting.pop()
            while block != -1:
                counts[block] += len(machine.programs)
                if self.emulator.checks:
                    self._watch_registers(machine, blocks[block])
                following = blocks[block].code(machine, machine.registers)
                if following is None:
                    rows, following, other = machine.parted
                    waiting.append((machine.select(~rows), other))
                    machine = machine.select(rows)
                block = following
            for entry in (e for group in machine.products for e in group[:1]):
                machine.report("wgmma", entry["ins"], "never waited for")

    @staticmethod
    def _watch_registers(machine: Machine, block: Block) -> None:
        before = machine.in_flight
        if before not in block.in_flight:
            block.in_flight[before] = touched_too_early(before, block.instructions)
        machine.in_flight, found = block.in_flight[before]
        for ins, note in found:
            machine.report("wgmma", ins, note)


@dataclass
class Report:
    """kind: see the package. where: "file:line" of the kernel's source. other: the instruction it conflicts with."""

    kind: str
    kernel: str
    instruction: str
    where: str
    note: str
    other: str = ""
    count: int = 0

    def __str__(self) -> str:
        other = f"\n      after {self.other}" if self.other else ""
        return f"{self.kind}: {self.kernel} {self.where}: {self.note} (x{self.count})\n      {self.instruction}{other}"


class Emulator:
    """What the launches of one architecture reported, and how many instructions of each kind their kernels ran.

    checks: for races, uninitialised shared memory and so on, besides accesses out of bounds. late: a wgmma reads shared
    memory when it is waited for, not when it is issued, so that what overwrites it too early shows in the results.
    change(kernel's name, PTX) -> the PTX to run in its place.
    """

    def __init__(
        self, arch: int, checks: bool = True, late: bool = False, change: Callable[[str, str], str] | None = None
    ):
        if arch not in SHARED_LIMIT:
            raise ValueError(f"arch: expected one of {tuple(SHARED_LIMIT)}, got {arch!r}")
        self.arch, self.checks, self.late, self.change = arch, checks, late, change
        self.found: dict[tuple, Report] = {}
        self.counts: dict[str, collections.Counter] = {}
        self.seconds = 0.0

    @property
    def reports(self) -> list[Report]:
        return list(self.found.values())

    def summary(self) -> str:
        """The reports, a line or three each."""
        return "\n".join(map(str, self.reports)) or "no reports"

    def report(self, program: Program, kind: str, ins: Instruction, note: str, other: int | None, count: int) -> None:
        """other: number of the instruction it conflicts with."""
        key = (kind, program.name, ins.index, note.split(" at ")[0])
        if key not in self.found:
            text = "" if other is None else _text(program, other)
            self.found[key] = Report(kind, program.name, ins.text[:150], ins.where, note, text)
        self.found[key].count += count

    def count(self, launch: Launch, times: collections.Counter) -> None:
        """times: programs that ran each block."""
        total = self.counts.setdefault(launch.program.name, collections.Counter())
        for block, number in times.items():
            for ins in launch.program.blocks[block].instructions:
                total[ins.kind] += number

    def launch(self, kernel: CompiledKernel, grid: tuple[int, int, int], arguments: tuple) -> None:
        """Runs a compiled kernel on the bound arguments of its JITFunction."""
        begin = time.perf_counter()
        metadata, signature = kernel.metadata, kernel.src.signature
        if metadata.shared > SHARED_LIMIT[self.arch]:
            raise MemoryError(f"{metadata.name}: {metadata.shared} bytes of shared memory")
        if getattr(metadata, "num_ctas", 1) != 1 or metadata.global_scratch_size or metadata.profile_scratch_size:
            raise Unsupported("clusters or scratch memory")
        ptx = kernel.asm["ptx"]
        program = _translated(ptx if self.change is None else self.change(metadata.name, ptx))
        values: list[Any] = []
        tensors = {}
        for name, type_, value in _leaves(signature, signature.values(), arguments):
            if type_[0] == "*":
                tensors[name] = value
                value = value.data_ptr()
            values.append(value)
        values += [0, 0]  # scratch memory of the kernel's and of a profiler's
        packed = []
        for (type_, _), value in zip(program.params.values(), values, strict=True):
            dtype = np.dtype(TYPES[type_])
            bits = np.array(value, dtype) if dtype.kind == "f" else np.array(value & ((1 << 64) - 1), B8).astype(dtype)
            packed.append(bits.view(RAW[dtype.itemsize])[()])
        Launch(self, program, metadata, grid, packed, Memory(tensors)).run()
        self.seconds += time.perf_counter() - begin


def _leaves(names: Iterable[str], types: Iterable, values: Iterable) -> Iterator[tuple[str, str, Any]]:
    """Name, type and value of every argument at run time, inside tuples too."""
    for name, type_, value in zip(names, types, values, strict=True):
        if isinstance(type_, tuple):
            yield from _leaves((f"{name}.{field}" for field in value._fields), type_, value)
        elif type_ != "constexpr":
            yield name, type_, value


def _text(program: Program, index: int) -> str:
    ins = next(i for b in program.blocks for i in b.instructions if i.index == index)
    return f"{ins.text[:100]} ({ins.where})"


@functools.lru_cache(maxsize=256)
def _translated(ptx: str) -> Program:
    program = Parser(ptx).program()
    Translator(program)
    return program


class _Driver:
    """What triton.runtime asks of a GPU's driver."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a device of its own for each architecture, for what Triton keeps by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.arch, 10)


@contextlib.contextmanager
def emulated(arch: int, **options) -> Iterator[Emulator]:
    """Triton compiles for sm_`arch` and launches here, on CPU tensors. `options` are those of Emulator.

    Triton must have been imported without TRITON_INTERPRET. ptxas, which takes longest, does not run.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: expected it unset where kernels are compiled")
    emulator = Emulator(arch, **options)

    def launcher(kernel: CompiledKernel) -> Callable:
        def launch(x, y, z, stream, function, packed, metadata, enter, exit_, *arguments):
            emulator.launch(kernel, (x, y, z), arguments)

        return launch

    replaced = {
        (CompiledKernel, "run"): property(launcher),
        (CompiledKernel, "launch_metadata"): lambda *arguments: None,
        (CUDABackend, "make_cubin"): lambda *arguments: b"",
        (CUDABackend, "hash"): lambda backend: f"ptx only, {arch}",  # Triton's cache must know that ptxas has not run
    }
    originals = {place: place[0].__dict__[place[1]] for place in replaced}
    for place, value in replaced.items():
        setattr(*place, value)
    active = triton.runtime.driver._active  # none is made: without a GPU that fails
    triton.runtime.driver.set_active(_Driver(arch))
    try:
        yield emulator
    finally:
        for place, value in originals.items():
            setattr(*place, value)
        triton.runtime.driver._active = active
