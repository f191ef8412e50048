"""Instructions on memory, across the lanes of a warp and on matrices: calls of a machine's methods."""

import re

import numpy as np
from ptx.emulator.arithmetic import TYPES
from ptx.emulator.parse import Unsupported


class MemoryInstructions:
    """The part of a Translator for them: `op_NAME` gives the lines of Python of an instruction."""

    def op_ld(self, ins):
        space, type_ = ins.parts[1], ins.parts[-1]
        target, source = ins.operands[:2]
        if space == "param":
            name = source.value.value
            return self.write(
                target, f"m.param({self.program.params[name][1]}, {self._dtype(TYPES[type_])})", type_, ins
            )
        targets = target.value if target.kind == "vector" else (target,)
        size = TYPES[type_](0).itemsize
        load = self._memory("load", ins, source, size, len(targets), "")
        lines = [f"t = {load}"]
        for i, each in enumerate(targets):
            if each.kind != "sink":
                value = f"t[{i}]" if np.dtype(TYPES[type_]).kind == "u" else f"t[{i}].view({self._dtype(TYPES[type_])})"
                lines += self.write(each, value, type_, ins)
        return lines

    def op_st(self, ins):
        target, source = ins.operands[:2]
        sources = source.value if source.kind == "vector" else (source,)
        type_ = f"b{re.sub(r'[^0-9]', '', ins.parts[-1])}"
        values = ", ".join(f"m.full({self.read(x, type_)})" for x in sources)
        return [self._memory("store", ins, target, TYPES[type_](0).itemsize, len(sources), f", [{values}]")]

    def _memory(self, verb, ins, place, size, count, rest):
        space = ins.parts[1].split("::")[0]
        if space not in ("global", "shared") or "volatile" in ins.parts or "acquire" in ins.parts:
            raise Unsupported("state space")
        address = self._address(place, "b64" if space == "global" else "b32")
        return f"m.{verb}_{space}({self.constant(ins)}, {address}, {size}, {count}, {self.predicate(ins)}{rest})"

    def _address(self, place, type_):
        address = self.read(place.value, type_)
        if place.offset:
            address = f"{address} + {self.number(place.offset, type_)}"
        return address if place.value.kind == "register" else f"m.full({address})"

    def op_cp(self, ins):
        if ins.parts[:2] != ["cp", "async"]:
            raise Unsupported("copy")
        if "commit_group" in ins.parts:
            return ["m.commit_copies()"]
        if "wait_group" in ins.parts:
            return [f"m.wait_copies({ins.operands[0].value})"]
        if "wait_all" in ins.parts:
            return ["m.commit_copies(); m.wait_copies(0)"]
        target, source, size, *read_size = ins.operands
        bytes_read = f"m.full({self.read(read_size[0], 'b32')})" if read_size else "None"
        addresses = f"{self._address(target, 'b32')}, {self._address(source, 'b64')}"
        return [f"m.copy_async({self.constant(ins)}, {addresses}, {size.value}, {bytes_read}, {self.predicate(ins)})"]

    def op_bar(self, ins):
        if ins.parts == ["bar", "warp", "sync"]:
            return ["m.warp_barrier()"]
        if ins.parts[1] != "sync" and ins.parts[1:3] != ["cta", "sync"]:
            raise Unsupported("barrier")
        if len(ins.operands) > 1 or ins.predicate:
            raise Unsupported("a barrier of some of the threads")
        return ["m.barrier()"]

    op_barrier = op_bar

    def op_fence(self, ins):
        if ins.parts[1:3] == ["proxy", "async"]:
            return ["m.fence_proxy()"]
        if ins.parts[1:2] == ["mbarrier_init"]:
            raise Unsupported("fence")
        return []

    def op_membar(self, ins):
        return []

    def op_griddepcontrol(self, ins):
        return []

    def op_elect(self, ins):
        _, elected = ins.operands[0].value
        return self.write(elected, "(m.lane == 0)", "pred", ins)

    def op_shfl(self, ins):
        mode = ins.parts[2]
        target, value, by, clamp = ins.operands[:4]
        flag = None
        if target.kind == "vector":
            target, flag = target.value
        read = [f"m.full({self.read(x, 'b32')})" for x in (value, by, clamp)]
        lines = [f"t, p = m.shuffle({mode!r}, {', '.join(read)})", *self.write(target, "t", "b32", ins)]
        return lines if flag is None else lines + self.write(flag, "p", "pred", ins)

    # Matrices

    def op_ldmatrix(self, ins):
        trans, count = self._matrices(ins)
        target, source = ins.operands
        lines = [f"t = m.load_matrix({self.constant(ins)}, {self._address(source, 'b32')}, {count}, {trans})"]
        for i, each in enumerate(target.value):
            lines += self.write(each, f"t[{i}]", "b32", ins)
        return lines

    def op_stmatrix(self, ins):
        trans, count = self._matrices(ins)
        target, source = ins.operands
        values = ", ".join(f"m.full({self.read(x, 'b32')})" for x in source.value)
        return [f"m.store_matrix({self.constant(ins)}, {self._address(target, 'b32')}, [{values}], {trans})"]

    def _matrices(self, ins):
        if "m8n8" not in ins.parts or ins.parts[-1] != "b16" or ins.predicate:
            raise Unsupported("matrices")
        return "trans" in ins.parts, next(int(p[1:]) for p in ins.parts if re.fullmatch(r"x[124]", p))

    def op_mma(self, ins):
        shape, to, *inputs, from_ = (p for p in ins.parts[3:] if p not in ("row", "col"))
        if ins.parts[:3] != ["mma", "sync", "aligned"] or (to, from_) != ("f32", "f32") or inputs[0] != inputs[1]:
            raise Unsupported("mma")
        if inputs[0] not in ("f16", "bf16", "tf32") or not shape.startswith("m16n8"):
            raise Unsupported("mma")
        a, b, c = ("[" + ", ".join(f"m.full({self.read(x, 'b32')})" for x in o.value) + "]" for o in ins.operands[1:])
        lines = [f"t = mma({inputs[0]!r}, {a}, {b}, {c})"]
        for i, each in enumerate(ins.operands[0].value):
            lines += self.write(each, f"t[{i}]", "b32", ins)
        return lines

    def op_wgmma(self, ins):
        if "fence" in ins.parts:
            return []
        if "commit_group" in ins.parts:
            return ["m.commit_wgmma()"]
        if "wait_group" in ins.parts:
            return [f"m.wait_wgmma({ins.operands[0].value})"]
        shape, to, type_a, type_b = ins.parts[4:8]
        m_, n, k = map(int, re.fullmatch(r"m(\d+)n(\d+)k(\d+)", shape).groups())
        if to != "f32" or type_a != type_b or type_a not in ("f16", "bf16", "tf32") or ins.predicate:
            raise Unsupported("wgmma")
        d, a, b, keep, *immediates = ins.operands
        flags = [x.value for x in immediates]
        if flags[:2] != [1, 1]:
            raise Unsupported("a negated wgmma operand")
        if a.kind == "vector":
            left = "[" + ", ".join(self.read(x, "b32") for x in a.value) + "]"
            trans_a, trans_b = 0, (flags[2] if len(flags) > 2 else 0)
        else:
            left = f"m.full({self.read(a, 'b64')})"
            trans_a, trans_b = flags[2:4] if len(flags) > 2 else (0, 0)
        old = "[" + ", ".join(self.read(x, "b32") for x in d.value) + "]"
        keep = f"np.bool_({keep.value})" if keep.kind == "number" else self.read(keep, "pred")
        right = f"m.full({self.read(b, 'b64')})"
        call = (
            f"m.wgmma({self.constant(ins)}, {type_a!r}, {n}, {k}, {old}, {left}, {right}, {keep}, {trans_a}, {trans_b})"
        )
        lines = [f"t = {call}"]
        for i, each in enumerate(d.value):
            lines += self.write(each, f"t[{i}]", "b32", ins)
        return lines
