"""The tensors given to a launch: loads, stores, and races between programs and warps over them."""

import bisect
import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from ptx.emulator.arithmetic import B1, B4, B8, RAW


@dataclass(eq=False)
class Region:
    """Bytes [start, end) that a kernel may touch; views of it start at `base`, a multiple of 16."""

    name: str
    start: int
    end: int
    granule: int

    def __post_init__(self):
        self.base = self.start & ~15
        size = (self.end - self.base + 15) & ~15
        raw = np.frombuffer((ctypes.c_uint8 * size).from_address(self.base), B1)
        self.views = {n: raw.view(t) for n, t in RAW.items()}
        n = size // self.granule + 1
        # By whom last written and read: programs (number + 1; -1 for several), epochs (between barriers) and warps.
        self.writer, self.reader = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self.write_epoch, self.read_epoch = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.write_warp, self.read_warps = np.zeros(n, np.int16), np.zeros(n, B4)


class Memory:
    """The tensors given to a launch; overlapping ones are one region."""

    def __init__(self, tensors: dict[str, Any]):
        spans = []
        for name, x in tensors.items():
            if x.numel():
                extent = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
                spans.append((x.data_ptr(), x.data_ptr() + extent * x.element_size(), x.element_size(), name))
        merged = []
        for start, end, size, name in sorted(spans):
            if merged and start < merged[-1][1]:
                old = merged[-1]
                merged[-1] = (old[0], max(end, old[1]), min(size, old[2]), f"{old[3]}+{name}")
            else:
                merged.append((start, end, size, name))
        self.regions = [Region(name, start, end, size) for start, end, size, name in merged]
        self.starts = [r.start for r in self.regions]

    def find(self, address: int) -> Region | None:
        i = bisect.bisect_right(self.starts, address) - 1
        return self.regions[i] if i >= 0 and address < self.regions[i].end else None


class GlobalMemory:
    """The part of a Machine that loads from tensors and stores to them."""

    def _regions(self, ins, address, width, predicate):
        """Yields a region, active lanes that access it, and their byte offsets from its base."""
        lanes = np.arange(self.lanes) if predicate is None else np.flatnonzero(self.full(predicate))
        memory = self.launch.memory
        while len(lanes):
            where = address[lanes]
            region = memory.find(int(where[0]))
            if region is None:
                inside = np.zeros(len(lanes), bool)
                outside = np.array([memory.find(int(a)) is None for a in where])
            else:
                inside = (where >= B8(region.start)) & (where <= B8(region.end - width))
                outside = (where >= B8(region.start)) & (where < B8(region.end)) & ~inside
            if outside.any():
                thread = lanes[outside][0]
                near = min(memory.regions, key=lambda r: abs(int(where[outside][0]) - r.start))
                note = f"tensor access of {width} bytes at {near.name} + {int(where[outside][0]) - near.start}"
                note += f" (its size {near.end - near.start}), thread {self.thread[thread]}"
                self.report("bounds", ins, note, count=int(outside.sum()))
            if inside.any():
                offsets = (where[inside] - B8(region.base)).astype(np.int64)
                if (offsets % width).any():
                    self.report("bounds", ins, f"misaligned access of {width} bytes to {region.name}")
                yield region, lanes[inside], offsets
            lanes = lanes[~(inside | outside)]

    def load_global(self, ins, address, size, count, predicate):
        result = [np.full(self.lanes, -1).astype(RAW[size]) for _ in range(count)]
        for region, lanes, offsets in self._regions(ins, address, size * count, predicate):
            index = offsets // size
            for i in range(count):
                result[i][lanes] = region.views[size][index + i]
            if self.launch.emulator.checks:
                self._watch_global(ins, region, lanes, offsets, size * count, None)
        return result

    def store_global(self, ins, address, size, count, predicate, values):
        for region, lanes, offsets in self._regions(ins, address, size * count, predicate):
            index = offsets // size
            if self.launch.emulator.checks:
                new = np.stack([v[lanes] for v in values], -1).view(B1).reshape(len(lanes), -1)
                self._watch_global(ins, region, lanes, offsets, size * count, new)
            for i in range(count):
                region.views[size][index + i] = values[i][lanes]

    def _watch_global(self, ins, region, lanes, offsets, width, new):
        """Reports races over elements of a tensor; `new` are the bytes of a store [lanes, width]."""
        g = region.granule
        index = offsets[:, None] // g + np.arange(max(1, width // g))
        program = (self.programs[self.row[lanes]] + 1).astype(np.int32)[:, None]
        warp = self.warp[lanes]
        writer = region.writer[index]
        if new is None:
            if ((writer != 0) & (writer != program)).any():
                self.report("race", ins, f"{region.name} is read by one program and written by another")
            fresh = (writer == program) & (region.write_epoch[index] == self.epoch)
            if (fresh & (region.write_warp[index] != warp[:, None])).any():
                self.report("race", ins, f"{region.name} is read after another warp's write, with no barrier between")
            reader = region.reader[index]
            region.reader[index] = np.where((reader == 0) | (reader == program), program, -1)
            for w in range(self.launch.warps):
                mine = index[warp == w]
                old = np.where(region.read_epoch[mine] == self.epoch, region.read_warps[mine], B4(0))
                region.read_warps[mine] = old | B4(1 << w)
                region.read_epoch[mine] = self.epoch
            return
        reader = region.reader[index]
        if ((reader != 0) & (reader != program)).any():
            self.report("race", ins, f"{region.name} is written by one program and read by another")
        fresh = (region.read_epoch[index] == self.epoch) & (reader != 0)
        if (fresh & ((region.read_warps[index] & ~(B4(1) << warp.astype(B4))[:, None]) != 0)).any():
            self.report("race", ins, f"{region.name} is written after another warp's read, with no barrier between")
        again = (writer != 0) & ((writer != program) | (region.write_epoch[index] == self.epoch))
        region.writer[index], region.write_epoch[index] = program, self.epoch
        region.write_warp[index] = warp[:, None]
        parts = new.reshape(len(lanes), -1, min(g, width))
        if again.any():
            there = region.views[1][index[..., None] * g + np.arange(min(g, width))]
            if (again & (there != parts).any(-1)).any():
                self.report("race", ins, f"{region.name} is written twice, with different values")
        # Two lanes of this very instruction at one place must agree.
        order = np.argsort(index[:, 0], kind="stable")
        same = index[order[1:], 0] == index[order[:-1], 0]
        if same.any() and (same & (new[order[1:]] != new[order[:-1]]).any(-1)).any():
            self.report("race", ins, f"{region.name} is written at once with different values")
