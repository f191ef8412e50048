"""Matrices between shared memory and registers, and wgmma, with what it may read and when."""

import functools

import numpy as np
from ptx.emulator.arithmetic import B1, B2, B4, F2, F4, from_bf16
from ptx.emulator.parse import Unsupported
from ptx.emulator.shared_memory import SHARED_BASE
from ptx.emulator.tensor_cores import descriptor_offsets, left_fragment


class Matrices:
    """The part of a Machine for ldmatrix, stmatrix and wgmma."""

    def _matrix_rows(self, ins, address, count):
        """Offsets [warps, count, 8] of the rows, of 16 bytes, whose addresses lanes 0 .. 8 count - 1 give."""
        lanes = (np.arange(self.lanes).reshape(-1, 32)[:, : 8 * count]).reshape(-1)
        offsets, bad = self._shared_offsets(ins, address[lanes], 16, self.row[lanes])
        return lanes, offsets, bad

    def load_matrix(self, ins, address, count, trans):
        lanes, offsets, bad = self._matrix_rows(ins, address, count)
        if self.launch.emulator.checks:
            self._watch_read(ins, offsets, 16, self.warp[lanes], self.thread[lanes])
        words = self.flat[4][(offsets // 4)[:, None] + np.arange(4)]
        words[bad] = B4(0xFFFFFFFF)
        words = words.reshape(-1, count, 8, 4)
        if trans:
            words = np.ascontiguousarray(words.view(B2).transpose(0, 1, 3, 2)).view(B4)
        return [words[:, i].reshape(-1) for i in range(count)]

    def store_matrix(self, ins, address, values, trans):
        count = len(values)
        lanes, offsets, bad = self._matrix_rows(ins, address, count)
        words = np.stack([v.reshape(-1, 8, 4) for v in values], 1)
        if trans:
            words = np.ascontiguousarray(words.view(B2).transpose(0, 1, 3, 2)).view(B4)
        words = words.reshape(-1, 4)
        if self.launch.emulator.checks:
            self._watch_write(ins, offsets, 16, self.warp[lanes], self.thread[lanes], words.view(B1))
        self.flat[4][((offsets // 4)[:, None] + np.arange(4))[~bad]] = words[~bad]

    def _shared_operand(self, ins, type_, descriptors, rows, transposed):
        """[groups, rows, k] of a wgmma operand in shared memory, float32, and its granules [groups, ...]."""
        per_group = descriptors.reshape(-1, 128)
        if (per_group != per_group[:, :1]).any():
            raise Unsupported(f"threads of a warp group differ over a descriptor: {ins.text}")
        distinct, which = np.unique(per_group[:, 0], return_inverse=True)
        size = 4 if type_ == "tf32" else 2
        places = np.stack([descriptor_offsets(int(d), rows, 32, size, transposed) for d in distinct])[which]
        places = places - SHARED_BASE
        bad = (places < 0) | (places > self.launch.shared_size - size)
        if bad.any():
            note = f"wgmma reads shared memory at {int(places[bad].min())} .. {int(places[bad].max()) + size - 1}"
            note += f" of {self.launch.shared_size}"
            self.report("bounds", ins, note, count=int(bad[0].sum()))
        row = np.arange(len(per_group)) // (self.launch.threads // 128)
        offsets = np.where(bad, 0, places) + (row * self.launch.shared_stride)[:, None, None]
        raw = self.flat[size][offsets // size]
        if type_ == "tf32":
            values = (raw & B4(0xFFFFE000)).view(F4)
        else:
            values = from_bf16(raw) if type_ == "bf16" else raw.view(F2).astype(F4)
        values[bad] = np.nan
        return values, offsets // self.launch.program.granule, ~bad

    def wgmma(self, ins, type_, n, k, old, a, b, keep, trans_a, trans_b, now=False):
        """D + A B of every warp group, D and a register A of its 64 rows by fours of warps.

        At once, or with Emulator.late (unless `now`) when it is waited for, until when its D stays as it was.
        """
        reads = []
        if isinstance(a, list):
            left = left_fragment(a, type_)
            left = left.reshape(-1, 64, left.shape[-1])
        else:
            left, index, good = self._shared_operand(ins, type_, a, 64, trans_a)
            reads += [(index[:, 16 * w : 16 * w + 16], good[:, 16 * w : 16 * w + 16], w) for w in range(4)]
        right, index, good = self._shared_operand(ins, type_, b, n, trans_b)
        reads += [(index, good, w) for w in range(4)]
        if self.launch.emulator.checks and not now:
            self._watch_wgmma(ins, reads)
        if self.launch.emulator.late and not now:
            again = functools.partial(self.wgmma, ins, type_, n, k, None, a, b, keep, trans_a, trans_b, now=True)
            self.delayed.append((self.groups, [x.value for x in ins.operands[0].value], again))
            return old
        if now:
            old = [self.registers[x.value] for x in ins.operands[0].value]
        product = left @ right.transpose(0, 2, 1)
        product = product.reshape(-1, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, -1)
        if keep.all():
            product = product + np.stack(old).view(F4)
        elif keep.any():
            product = np.where(keep, product + np.stack(old).view(F4), product)
        return product.view(B4)

    def _watch_wgmma(self, ins, reads):
        per_program = self.launch.threads // 128
        for index, good, w in reads:
            at, inverse = index[good], np.nonzero(good)[0]
            warp = inverse % per_program * 4 + w
            others = self.wrote_words[at] & self.launch.not_mine[warp]
            if others.any():
                first = at[others != 0][0]
                note = "wgmma reads shared bytes another warp wrote, with no barrier between"
                self.report("race", ins, note, int(self.write_ins.reshape(-1)[first]), int((others != 0).sum()))
            if (self.busy.reshape(-1)[at] & B1(1)).any():
                self.report("race", ins, "wgmma reads shared bytes that a cp.async not waited for writes")
            stale = self.generic.reshape(-1)[at]
            if stale.any():
                note = "wgmma reads shared bytes written since the last fence.proxy.async"
                self.report("proxy", ins, note, int(self.write_ins.reshape(-1)[at[stale][0]]), int(stale.sum()))
            unset = ~self.written.reshape(-1)[at]
            if unset.any():
                self.report("uninit", ins, "wgmma reads shared bytes never written", None, int(unset.sum()))
            self.busy.reshape(-1)[at] |= B1(2)
            base = np.arange(len(index)) // per_program * (self.launch.shared_stride // self.launch.program.granule)
            index = index.reshape(len(index), -1) - base[:, None]
            entry = {"ins": ins, "index": index, "good": good.reshape(len(good), -1), "w": w}
            self.products[-1].append(entry)

    def commit_wgmma(self):
        self.products.append([])
        self.groups += 1

    def wait_wgmma(self, left: int):
        """Finishes all groups but the last `left`: only then do their reads count as done before a barrier."""
        finished = self.groups - left
        while self.delayed and self.delayed[0][0] < finished:
            _, registers, product = self.delayed.pop(0)
            for register, value in zip(registers, product(), strict=True):
                self.registers[register] = value
        done = self.products[: len(self.products) - 1 - left]
        self.products = self.products[len(done) :]
        if not any(done):
            return
        self.busy &= B1(0xFD)
        for entry in (e for group in self.products for e in group):
            self.busy.reshape(-1)[self._entry_granules(entry)[0]] |= B1(2)
        for entry in (e for group in done for e in group):
            at, warp = self._entry_granules(entry)
            self.read.reshape(-1)[at * self.launch.warp_bytes + warp] = 1
            self.read_ins.reshape(-1)[at] = entry["ins"].index

    def _entry_granules(self, entry):
        """Granules a wgmma reads, in this machine's arrays, and the warp for which it reads each."""
        per_program, good = self.launch.threads // 128, entry["good"]
        group = np.nonzero(good)[0]
        base = group // per_program * (self.launch.shared_stride // self.launch.program.granule)
        return entry["index"][good] + base, group % per_program * 4 + entry["w"]
