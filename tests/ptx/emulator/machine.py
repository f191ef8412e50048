"""Programs of a launch running in lockstep."""

import itertools
from typing import Any

import numpy as np
from ptx.emulator.arithmetic import B1, B2, B4, RAW
from ptx.emulator.global_memory import GlobalMemory
from ptx.emulator.matrices import Matrices
from ptx.emulator.parse import Instruction, Unsupported
from ptx.emulator.registers import NOTHING
from ptx.emulator.shared_memory import SharedMemory


class Machine(GlobalMemory, SharedMemory, Matrices):
    """Some programs (CTAs) of a launch, one after another along the lanes, all at the same instruction."""

    epochs = itertools.count(1)
    # Arrays with a row per program.
    ROWS = ("shared", "wrote", "read", "written", "generic", "write_thread", "write_ins", "read_ins", "busy")

    def __init__(self, launch, programs: np.ndarray):
        self.launch, self.programs = launch, programs
        self.registers: list[Any] = [None] * len(launch.program.widths)
        count, size, granules = len(programs), launch.shared_stride, launch.shared_stride // launch.program.granule
        self.shared = np.full((count, size), 0xFF, B1)
        # Per granule since the last barrier: a byte for every warp that wrote it, or read it.
        self.wrote = np.zeros((count, granules * launch.warp_bytes), B1)
        self.read = np.zeros_like(self.wrote)
        self.written = np.zeros((count, granules), bool)  # at all
        self.generic = np.zeros((count, granules), bool)  # by other than cp.async, with no proxy fence since
        self.write_thread = np.zeros((count, granules), B2)  # number + 1, since the last barrier or warp barrier
        self.write_ins = np.zeros((count, granules), np.int32)
        self.read_ins = np.zeros((count, granules), np.int32)
        self.busy = np.zeros((count, granules), B1)  # cp.async under way: 1, wgmma: 2
        self.copies: list[list[dict]] = [[]]  # groups of cp.async, the last one open
        self.products: list[list[dict]] = [[]]  # the same of wgmma reads
        self.groups, self.delayed = 0, []  # groups of wgmma committed, and wgmmas to be done when they are waited for
        self.epoch = next(self.epochs)
        self.in_flight = ((), NOTHING)  # committed groups of wgmma registers, and the open one
        self._index()

    def _index(self) -> None:
        launch, count = self.launch, len(self.programs)
        threads = launch.threads
        self.lanes = count * threads
        self.thread = np.tile(np.arange(threads, dtype=B4), count)
        self.lane, self.warp = self.thread & B4(31), (self.thread >> B4(5)).astype(np.int64)
        self.row = np.repeat(np.arange(count), threads)
        self.base = self.row * launch.shared_stride
        self.flat = {n: self.shared.reshape(-1).view(t) for n, t in RAW.items()}
        word = launch.warp_word
        self.wrote_words, self.read_words = self.wrote.reshape(-1).view(word), self.read.reshape(-1).view(word)
        x, y, _ = launch.grid
        place = np.repeat(self.programs, threads).astype(B4)
        self.specials = {"%tid.x": self.thread, "%laneid": self.lane, "%warpid": self.warp.astype(B4)}
        self.specials |= {"%ctaid.x": place % B4(x), "%ctaid.y": place // B4(x) % B4(y), "%ctaid.z": place // B4(x * y)}
        numbers = {"%ntid.x": threads, "%tid.y": 0, "%tid.z": 0, "%ntid.y": 1, "%ntid.z": 1}
        numbers |= {f"%nctaid.{axis}": n for axis, n in zip("xyz", launch.grid, strict=True)}
        self.specials |= {name: np.full(self.lanes, n, B4) for name, n in numbers.items()}

    def select(self, rows: np.ndarray) -> "Machine":
        """Some of these programs, on their own from here."""
        other = object.__new__(Machine)
        other.__dict__.update(self.__dict__)
        lanes = np.repeat(rows, self.launch.threads)
        other.programs = self.programs[rows]
        other.registers = [None if r is None else r[lanes] for r in self.registers]
        for name in self.ROWS:
            setattr(other, name, getattr(self, name)[rows].copy())
        groups = np.repeat(rows, max(1, self.launch.threads // 128))

        def cut(entry):
            by = {self.lanes: lanes, len(groups): groups}
            return {k: v[by[len(v)]] if isinstance(v, np.ndarray) else v for k, v in entry.items()}

        other.copies = [[cut(x) for x in group] for group in self.copies]
        other.products = [[cut(x) for x in group] for group in self.products]
        if self.delayed:
            raise Unsupported("programs part while wgmmas are under way")
        other._index()
        return other

    def special(self, name: str) -> np.ndarray:
        if name not in self.specials:
            raise Unsupported(name)
        return self.specials[name]

    def param(self, position: int, dtype) -> np.ndarray:
        return np.full(self.lanes, self.launch.values[position].view(dtype))

    def full(self, x) -> np.ndarray:
        return x if np.ndim(x) else np.full(self.lanes, x)

    def choose(self, predicate, new, old) -> np.ndarray:
        return self.full(new) if old is None else np.where(predicate, new, old)

    def branch(self, taken, target, other, ins):
        rows = self.full(taken).reshape(len(self.programs), -1)
        some, every = rows.any(1), rows.all(1)
        if (some != every).any():
            raise Unsupported(f"threads of a program part at {ins.text} ({ins.where})")
        if every.all():
            return target
        if not every.any():
            return other
        self.parted = every, target, other
        return None

    def report(self, kind: str, ins: Instruction, note: str, other: int | None = None, count: int = 1) -> None:
        self.launch.emulator.report(self.launch.program, kind, ins, note, other, count)

    def shuffle(self, mode, value, by, clamp):
        segment, limit = (clamp >> B4(8)) & B4(31), (clamp & B4(31)).astype(np.int64)
        lane, by = self.lane.astype(np.int64), (by & B4(31)).astype(np.int64)
        segment = segment.astype(np.int64)
        top, bottom = (lane & segment) | (limit & ~segment), lane & segment
        if mode == "up":
            source = lane - by
            valid = source >= top
        elif mode == "down":
            source = lane + by
            valid = source <= top
        elif mode == "bfly":
            source = lane ^ by
            valid = source <= top
        else:
            source = bottom | (by & ~segment)
            valid = source <= top
        source = np.where(valid, source, lane) + np.arange(self.lanes) // 32 * 32
        return value[source], valid
