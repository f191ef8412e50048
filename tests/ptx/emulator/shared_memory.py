"""Shared memory of programs: loads, stores, cp.async, barriers, and races between warps over its bytes."""

import numpy as np
from ptx.emulator.arithmetic import B1, B2, B4, RAW
from ptx.emulator.parse import Unsupported

SHARED_BASE = 1024  # where shared memory starts in its window; what wgmma swizzles are counted from is aligned to this


class SharedMemory:
    """The part of a Machine that reads and writes shared memory."""

    def _shared_offsets(self, ins, address, width, rows):
        """Byte offsets in `flat` of addresses, one per row of the machine's arrays, and which are out of bounds (0)."""
        place = address.astype(np.int64) - SHARED_BASE
        bad = (place < 0) | (place > self.launch.shared_size - width)
        if bad.any():
            note = f"shared access of {width} bytes at {int(place[bad].flat[0])} of {self.launch.shared_size}"
            self.report("bounds", ins, note, count=int(bad.sum()))
            place = np.where(bad, 0, place)
        if (place % width).any():
            self.report("bounds", ins, f"misaligned shared access of {width} bytes")
        return place + rows * self.launch.shared_stride, bad

    def load_shared(self, ins, address, size, count, predicate):
        lanes = slice(None) if predicate is None else np.flatnonzero(self.full(predicate))
        offsets, bad = self._shared_offsets(ins, address[lanes], size * count, self.row[lanes])
        if self.launch.emulator.checks:
            self._watch_read(ins, offsets, size * count, self.warp[lanes], self.thread[lanes])
        result = []
        for i in range(count):
            values = self.flat[size][offsets // size + i]
            if bad.any():
                values[bad] = np.array(-1).astype(RAW[size])
            if predicate is not None:
                full = np.full(self.lanes, -1).astype(RAW[size])
                full[lanes] = values
                values = full
            result.append(values)
        return result

    def store_shared(self, ins, address, size, count, predicate, values):
        lanes = slice(None) if predicate is None else np.flatnonzero(self.full(predicate))
        offsets, bad = self._shared_offsets(ins, address[lanes], size * count, self.row[lanes])
        if self.launch.emulator.checks:
            new = np.stack([v[lanes] for v in values], -1).view(B1)
            self._watch_write(ins, offsets, size * count, self.warp[lanes], self.thread[lanes], new)
        for i in range(count):
            self.flat[size][(offsets // size + i)[~bad]] = values[i][lanes][~bad]

    def _granules(self, offsets, width):
        g = self.launch.program.granule
        return offsets[..., None] // g + np.arange(max(1, width // g))

    def _watch_read(self, ins, offsets, width, warp, thread):
        index = self._granules(offsets, width)
        others = self.wrote_words[index] & self.launch.not_mine[warp][:, None]
        if others.any():
            at = index[others != 0]
            note = "read of shared bytes another warp wrote, with no barrier between"
            self.report("race", ins, note, int(self.write_ins.reshape(-1)[at[0]]), len(at))
        busy = self.busy.reshape(-1)[index] & B1(1)
        if busy.any():
            self.report(
                "race", ins, "read of shared bytes that a cp.async not waited for writes", None, int(busy.sum())
            )
        if thread is not None:
            last = self.write_thread.reshape(-1)[index]
            wrong = (last != 0) & (last != thread.astype(B2)[:, None] + B2(1)) & (others == 0)
            if wrong.any():
                note = "read of shared bytes another thread of the warp wrote, with no bar.warp.sync between"
                self.report("warp-order", ins, note, int(self.write_ins.reshape(-1)[index[wrong][0]]), int(wrong.sum()))
        unset = ~self.written.reshape(-1)[index]
        if unset.any():
            self.report("uninit", ins, "read of shared bytes never written", None, int(unset.sum()))
        self.read.reshape(-1)[index * self.launch.warp_bytes + warp[:, None]] = 1
        self.read_ins.reshape(-1)[index] = ins.index

    def _watch_write(self, ins, offsets, width, warp, thread, new):
        """new: the bytes written, [n, width], or None where they are not known yet."""
        index = self._granules(offsets, width)
        mine = self.launch.not_mine[warp][:, None]
        others = self.read_words[index] & mine
        if others.any():
            at = index[others != 0]
            note = "write to shared bytes another warp read, with no barrier between"
            self.report("race", ins, note, int(self.read_ins.reshape(-1)[at[0]]), len(at))
        others = self.wrote_words[index] & mine
        if others.any() and new is not None:
            g = self.launch.program.granule
            there = self.flat[1][index[..., None] * g + np.arange(g)]
            wrong = (others != 0) & (there != new.reshape(*index.shape, -1)).any(-1)
            if wrong.any():
                note = "write to shared bytes another warp wrote otherwise, with no barrier between"
                self.report("race", ins, note, int(self.write_ins.reshape(-1)[index[wrong][0]]), int(wrong.sum()))
        busy = self.busy.reshape(-1)[index]
        if busy.any():
            who = "a wgmma not waited for reads" if (busy & B1(2)).any() else "a cp.async not waited for writes"
            self.report("race", ins, f"write to shared bytes that {who}", None, int((busy != 0).sum()))
        if new is not None and len(offsets) > 1:
            # Lanes of this very instruction at one place must agree.
            order = np.argsort(offsets, kind="stable")
            same = offsets[order[1:]] == offsets[order[:-1]]
            bytes_ = new.reshape(len(offsets), -1)
            if same.any() and (same & (bytes_[order[1:]] != bytes_[order[:-1]]).any(-1)).any():
                self.report("race", ins, "threads write different values to the same shared bytes at once")
        self.wrote.reshape(-1)[index * self.launch.warp_bytes + warp[:, None]] = 1
        self.written.reshape(-1)[index] = True
        self.generic.reshape(-1)[index] = ins.parts[0] != "cp"
        self.write_ins.reshape(-1)[index] = ins.index
        if thread is not None:
            self.write_thread.reshape(-1)[index] = thread.astype(B2)[:, None] + B2(1)

    def barrier(self):
        self.wrote.fill(0)
        self.read.fill(0)
        self.write_thread.fill(0)
        self.epoch = next(self.epochs)

    def warp_barrier(self):
        self.write_thread.fill(0)

    def fence_proxy(self):
        self.generic.fill(False)

    def copy_async(self, ins, target, source, size, bytes_read, predicate):
        """The source is read at once; the target holds NaN until the group is waited for."""
        active = np.ones(self.lanes, bool) if predicate is None else self.full(predicate).copy()
        reads = active if bytes_read is None else active & (bytes_read > 0)
        if bytes_read is not None and not np.isin(bytes_read[active], (0, size)).all():
            raise Unsupported("a cp.async that reads part of its size")
        words = np.stack(self.load_global(ins, source, 4, size // 4, reads), -1)
        words[~reads] = 0
        offsets, bad = self._shared_offsets(ins, np.where(active, target, B4(SHARED_BASE)), size, self.row)
        active &= ~bad
        lanes = np.flatnonzero(active)
        entry = {"ins": ins, "size": size, "active": active, "offsets": offsets - self.base, "words": words}
        self.copies[-1].append(entry)
        if self.launch.emulator.checks:
            self._watch_write(ins, offsets[lanes], size, self.warp[lanes], None, None)
            self.busy.reshape(-1)[self._granules(offsets[lanes], size)] |= B1(1)
        for i in range(size // 4):
            self.flat[4][offsets[lanes] // 4 + i] = B4(0xFFFFFFFF)

    def commit_copies(self):
        self.copies.append([])

    def wait_copies(self, left: int):
        """Finishes all groups but the last `left`."""
        done = self.copies[: len(self.copies) - 1 - left]
        self.copies = self.copies[len(done) :]
        for entry in (e for group in done for e in group):
            lanes, size = np.flatnonzero(entry["active"]), entry["size"]
            offsets = (entry["offsets"] + self.base)[lanes]
            if self.launch.emulator.checks:
                index = self._granules(offsets, size)
                self.busy.reshape(-1)[index] &= B1(0xFE)
                self._watch_write(entry["ins"], offsets, size, self.warp[lanes], self.thread[lanes], None)
            for i in range(size // 4):
                self.flat[4][offsets // 4 + i] = entry["words"][lanes, i]
