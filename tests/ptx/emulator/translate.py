"""A block of instructions as a Python function of a machine and its registers; control, moves and arithmetic."""

from typing import Any

import numpy as np
from ptx.emulator import arithmetic
from ptx.emulator.arithmetic import RAW, TYPES
from ptx.emulator.parse import Instruction, Operand, Program, Unsupported
from ptx.emulator.shared_memory import SHARED_BASE
from ptx.emulator.tensor_cores import mma
from ptx.emulator.translate_memory import MemoryInstructions

COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
UNARY = {
    "neg": "-{a}",
    "abs": "np.abs({a})",
    "not": "~{a}",
    "ex2": "np.exp2({a})",
    "lg2": "np.log2({a})",
    "rsqrt": "F4(1) / np.sqrt({a})",
    "rcp": "F4(1) / {a}",
    "sqrt": "np.sqrt({a})",
    "sin": "np.sin({a})",
    "cos": "np.cos({a})",
    "tanh": "np.tanh({a})",
}
SIGNS = {"bf16": 0x8000, "bf16x2": 0x80008000, "f16x2": 0x80008000}  # bits that make a number negative
UNDEFINED = 0x5AA5C33C5AA5C33C  # of a register that nothing writes: LLVM's undefined bits, which must not count
BINARY = {"add": "{a} + {b}", "sub": "{a} - {b}", "and": "{a} & {b}", "or": "{a} | {b}", "xor": "{a} ^ {b}"}


class Translator(MemoryInstructions):
    """Writes the Python of a program's blocks: functions of a machine and its registers, R, to the next block."""

    def __init__(self, program: Program):
        self.program = program
        self.constants: list[Any] = []
        self.numbers: dict[tuple[str, Any], int] = {}
        self.labels = {b.label: b.index for b in program.blocks if b.label}
        self.written = {register for b in program.blocks for ins in b.instructions for register in ins.results()}
        for block in program.blocks:
            lines = ["def block(m, R):"]
            end = block.index + 1 if block.index + 1 < len(program.blocks) else -1
            for ins in block.instructions:
                try:
                    lines += [f"    {line}" for line in self.instruction(ins, end)]
                except Unsupported as error:
                    raise Unsupported(f"{ins.text} ({ins.where}): {error}") from None
            lines.append(f"    return {end}")
            namespace = {**vars(arithmetic), "mma": mma, "C": self.constants}
            exec(compile("\n".join(lines), f"<{program.name} block {block.index}>", "exec"), namespace)
            block.code = namespace["block"]

    def constant(self, value: Any) -> str:
        self.constants.append(value)
        return f"C[{len(self.constants) - 1}]"

    def number(self, value: Any, type_: str) -> str:
        key = (type_, int(value))
        if key not in self.numbers:
            dtype = np.dtype(TYPES[type_])
            if type_ == "pred":
                self.numbers[key] = self.constant(np.bool_(value))
            else:
                bits = int(value) & ((1 << 8 * dtype.itemsize) - 1)
                self.numbers[key] = self.constant(np.array(bits, RAW[dtype.itemsize]).view(dtype)[()])
        return self.numbers[key]

    def read(self, operand: Operand, type_: str) -> str:
        """An operand as an array (or, for a number, a scalar) of that type."""
        if operand.kind == "number":
            return self.number(operand.value, type_)
        if operand.kind == "symbol":
            if operand.value != "global_smem":
                raise Unsupported(f"symbol {operand.value}")
            return self.number(SHARED_BASE, type_)
        if operand.kind == "special":
            return f"m.special({operand.value!r})"
        if operand.kind != "register":
            raise Unsupported(f"operand {operand}")
        if operand.value not in self.written:
            return self.number(UNDEFINED, type_)
        width, dtype = self.program.widths[operand.value], np.dtype(TYPES[type_])
        name = f"R[{operand.value}]"
        if (type_ == "pred") != (width == 0):
            raise Unsupported("a predicate read as a number, or the reverse")
        if type_ == "pred":
            return name
        if dtype.itemsize != width:
            if dtype.itemsize > width:
                raise Unsupported(f"a register of {width} bytes read as {type_}")
            name = f"{name}.astype({RAW[dtype.itemsize].__name__.replace('uint', 'np.uint')})"
        return name if dtype.kind == "u" else f"{name}.view({self._dtype(dtype)})"

    @staticmethod
    def _dtype(dtype: np.dtype) -> str:
        return f"np.{np.dtype(dtype).name}"

    def write(self, operand: Operand, value: str, type_: str, ins: Instruction) -> list[str]:
        """Stores an array of that type in a register, where the predicate holds."""
        if operand.kind == "sink":
            return [value]
        width, dtype = self.program.widths[operand.value], np.dtype(TYPES[type_])
        if type_ != "pred":
            if dtype.itemsize < width:
                wide = self._dtype(np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{width}"))
                value = f"({value}).astype({wide})"
                dtype = np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{width}")
            elif dtype.itemsize > width:
                raise Unsupported(f"{type_} written to a register of {width} bytes")
            if dtype.kind != "u":
                value = f"({value}).view({self._dtype(RAW[width])})"
        target = f"R[{operand.value}]"
        if ins.predicate:
            return [f"{target} = m.choose({self.predicate(ins)}, {value}, {target})"]
        return [f"{target} = {value}"]

    def predicate(self, ins: Instruction) -> str:
        if ins.predicate is None:
            return "None"
        register, negated = ins.predicate
        return f"~R[{register}]" if negated else f"R[{register}]"

    def instruction(self, ins: Instruction, following: int) -> list[str]:
        root = ins.parts[0]
        handler = getattr(self, f"op_{root}", None)
        if handler is not None:
            return handler(ins, following) if ins.kind == "control" else handler(ins)
        type_ = ins.parts[-1]
        if root == "neg" and type_ in SIGNS:
            a = self.read(ins.operands[1], type_)
            return self.write(ins.operands[0], f"{a} ^ {self.number(SIGNS[type_], type_)}", type_, ins)
        if root in UNARY:
            value = UNARY[root].format(a=self.read(ins.operands[1], type_))
        elif root in ("add", "sub") and ins.parts[1:] == ["bf16"]:
            a, b = (f"from_bf16({self.read(x, type_)})" for x in ins.operands[1:3])
            return self.write(ins.operands[0], f"to_bf16(m.full({BINARY[root].format(a=a, b=b)}))", type_, ins)
        elif root == "add" and ins.parts[1:] in (["bf16x2"], ["f16x2"]):
            a, b = (f"unpacked(m.full({self.read(x, type_)}), {type_!r})" for x in ins.operands[1:3])
            return self.write(ins.operands[0], f"packed({a} + {b}, {type_!r})", type_, ins)
        elif root in BINARY:
            a, b = (self.read(x, type_) for x in ins.operands[1:3])
            value = BINARY[root].format(a=a, b=b)
        else:
            raise Unsupported("opcode")
        if type_ in ("bf16", "bf16x2", "f16x2") and root not in ("and", "or", "xor", "not"):
            raise Unsupported("arithmetic in this type")
        if "sat" in ins.parts or "cc" in ins.parts:
            raise Unsupported("saturation or carry")
        if "ftz" in ins.parts:
            value = f"flush({value})"
        return self.write(ins.operands[0], value, type_, ins)

    # Control

    def op_bra(self, ins, following):
        target = self.labels[ins.operands[0].value]
        if ins.predicate is None:
            return [f"return {target}"]
        return [f"return m.branch({self.predicate(ins)}, {target}, {following}, {self.constant(ins)})"]

    def op_ret(self, ins, following):
        if ins.predicate is None:
            return ["return -1"]
        return [f"return m.branch({self.predicate(ins)}, -1, {following}, {self.constant(ins)})"]

    op_exit = op_ret

    # Moves and conversions

    def op_mov(self, ins):
        type_ = ins.parts[1]
        target, source = ins.operands
        if target.kind == "vector":  # unpack, lowest part first
            part = TYPES[type_](0).itemsize // len(target.value)
            value = self.read(source, type_)
            lines = [
                f"t = np.ascontiguousarray({value}).view({self._dtype(RAW[part])}).reshape(-1, {len(target.value)})"
            ]
            for i, each in enumerate(target.value):
                if each.kind != "sink":
                    lines += self.write(each, f"t[:, {i}].copy()", f"b{8 * part}", ins)
            return lines
        if source.kind == "vector":
            part = TYPES[type_](0).itemsize // len(source.value)
            parts = ", ".join(f"m.full({self.read(x, f'b{8 * part}')})" for x in source.value)
            value = f"np.stack([{parts}], -1).view({self._dtype(TYPES[type_])}).reshape(-1)"
            return self.write(target, value, type_, ins)
        value = self.read(source, type_)
        if source.kind != "register":
            value = f"m.full({value})"
        return self.write(target, value, type_, ins)

    def op_cvt(self, ins):
        modes, (to, source_type) = ins.parts[1:-2], ins.parts[-2:]
        target, *sources = ins.operands
        if to in ("bf16x2", "f16x2") and source_type == "f32" and modes == ["rn"]:
            high, low = (f"m.full({self.read(x, 'f32')})" for x in sources)
            narrow = "to_bf16" if to == "bf16x2" else "to_f16"
            value = f"({narrow}({high}).astype(B4) << B4(16)) | {narrow}({low})"
            return self.write(target, value, "b32", ins)
        (source,) = sources
        value = self.read(source, source_type)
        if to == "tf32" and modes == ["rna"]:
            return self.write(target, f"to_tf32({value})", "f32", ins)
        if source_type == "bf16":
            value, source_type = f"from_bf16({value})", "f32"
            if to == "f32":
                return self.write(target, value, "f32", ins)
        if source_type == "f32" and to in ("bf16", "f16") and modes == ["rn"]:
            return self.write(target, f"to_{to}({value})", "b16", ins)
        kinds = np.dtype(TYPES[source_type]).kind, np.dtype(TYPES[to]).kind
        if "bf16" in (to, source_type) or "sat" in modes or "satfinite" in modes:
            raise Unsupported("conversion")
        dtype = self._dtype(TYPES[to])
        if kinds[0] == "f" and kinds[1] in "iu":
            rounded = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}[modes[0]]
            return self.write(target, f"to_integer({rounded}({value}), {dtype})", to, ins)
        if kinds[0] == "f" and modes and modes[0] in ("rzi", "rni", "rmi", "rpi"):
            rounded = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}[modes[0]]
            value = f"{rounded}({value})"
        elif set(modes) - {"rn", "ftz"}:
            raise Unsupported("rounding")
        return self.write(target, f"({value}).astype({dtype})", to, ins)

    def op_setp(self, ins):
        comparison, type_ = ins.parts[1], ins.parts[-1]
        if len(ins.parts) != 3 and ins.parts[2:-1] != ["ftz"]:
            raise Unsupported("comparison")
        if ins.operands[0].kind != "register":
            raise Unsupported("two results")
        a, b = (self.read(x, type_) for x in ins.operands[1:3])
        is_float = np.dtype(TYPES[type_]).kind == "f"
        if type_ == "bf16":
            a, b, is_float = f"from_bf16({a})", f"from_bf16({b})", True
        if comparison in ("num", "nan"):
            value = f"(np.isnan({a}) | np.isnan({b}))"
            value = f"~{value}" if comparison == "num" else value
        elif comparison in COMPARE:
            value = f"({a} {COMPARE[comparison]} {b})"
            if is_float and comparison == "ne":
                value = f"({value} & ~np.isnan({a}) & ~np.isnan({b}))"
        elif is_float and comparison.endswith("u") and comparison[:-1] in COMPARE:
            value = f"(({a} {COMPARE[comparison[:-1]]} {b}) | np.isnan({a}) | np.isnan({b}))"
        else:
            raise Unsupported("comparison")
        return self.write(ins.operands[0], value, "pred", ins)

    def op_selp(self, ins):
        type_ = ins.parts[-1]
        a, b = (self.read(x, type_) for x in ins.operands[1:3])
        return self.write(ins.operands[0], f"np.where({self.read(ins.operands[3], 'pred')}, {a}, {b})", type_, ins)

    def op_prmt(self, ins):
        if ins.parts[1:] != ["b32"]:
            raise Unsupported("mode")
        a, b, c = (self.read(x, "b32") for x in ins.operands[1:])
        return self.write(ins.operands[0], f"permute_bytes(m.full({a}), m.full({b}), m.full({c}))", "b32", ins)

    # Arithmetic

    def op_mul(self, ins):
        return self._multiply(ins, None)

    def op_mad(self, ins):
        return self._multiply(ins, ins.operands[3])

    def _multiply(self, ins, addend):
        type_ = ins.parts[-1]
        if type_ in ("bf16", "bf16x2", "f16x2"):
            raise Unsupported("arithmetic in this type")
        a, b = (self.read(x, type_) for x in ins.operands[1:3])
        result = type_
        if np.dtype(TYPES[type_]).kind == "f":
            value = f"{a} * {b}"
        elif "lo" in ins.parts:
            value = f"{a} * {b}"
        elif "wide" in ins.parts:
            result = f"{type_[0]}{2 * int(type_[1:])}"
            wide = self._dtype(TYPES[result])
            value = f"({a}).astype({wide}) * ({b}).astype({wide})"
        elif "hi" in ins.parts and type_[1:] in ("16", "32"):
            wide = self._dtype(TYPES[f"{type_[0]}{2 * int(type_[1:])}"])
            value = f"((({a}).astype({wide}) * {b}) >> {type_[1:]}).astype({self._dtype(TYPES[type_])})"
        elif "hi" in ins.parts and type_ == "u64":
            value = f"multiply_high({a}, {b})"
        else:
            raise Unsupported("product")
        if addend is not None:
            value = f"{value} + {self.read(addend, result)}"
        if "ftz" in ins.parts:
            value = f"flush({value})"
        return self.write(ins.operands[0], value, result, ins)

    def op_fma(self, ins):
        """Rounded once: computed in more bits than the result has."""
        type_ = ins.parts[-1]
        if ins.parts[1:] == ["rn", "bf16"]:
            a, b, c = (f"from_bf16({self.read(x, type_)}).astype(F8)" for x in ins.operands[1:])
            return self.write(ins.operands[0], f"to_bf16(m.full({a} * {b} + {c}).astype(F4))", type_, ins)
        if ins.parts[1:] in (["rn", "bf16x2"], ["rn", "f16x2"]):
            a, b, c = (f"unpacked(m.full({self.read(x, type_)}), {type_!r})" for x in ins.operands[1:])
            return self.write(ins.operands[0], f"packed({a} * {b} + {c}, {type_!r})", type_, ins)
        if type_ not in ("f32", "f64"):
            raise Unsupported("arithmetic in this type")
        wide, narrow = ("F8", "F4") if type_ == "f32" else ("np.longdouble", "F8")
        a, b, c = (self.read(x, type_) for x in ins.operands[1:])
        value = f"({wide}(1) * {a} * {b} + {c}).astype({narrow})"
        return self.write(ins.operands[0], f"flush({value})" if "ftz" in ins.parts else value, type_, ins)

    def op_min(self, ins):
        type_ = ins.parts[-1]
        if type_ in ("bf16", "bf16x2", "f16x2"):
            raise Unsupported("arithmetic in this type")
        a, b = (self.read(x, type_) for x in ins.operands[1:])
        if np.dtype(TYPES[type_]).kind == "f" and "NaN" not in ins.parts:
            function = f"np.f{ins.parts[0]}"
        else:
            function = f"np.{ins.parts[0]}imum"
        return self.write(ins.operands[0], f"{function}({a}, {b})", type_, ins)

    op_max = op_min

    def op_div(self, ins):
        type_ = ins.parts[-1]
        a, b = (self.read(x, type_) for x in ins.operands[1:])
        if np.dtype(TYPES[type_]).kind == "f":
            return self.write(ins.operands[0], f"{a} / {b}", type_, ins)
        return self.write(ins.operands[0], f"divide(m.full({a}), {b})[{int(ins.parts[0] == 'rem')}]", type_, ins)

    op_rem = op_div

    def op_shl(self, ins):
        type_ = ins.parts[-1]
        bits = int(type_[1:])
        value, amount = self.read(ins.operands[1], type_), ins.operands[2]
        arrow = "<<" if ins.parts[0] == "shl" else ">>"
        dtype = self._dtype(TYPES[type_])
        if amount.kind == "number" and 0 <= amount.value < bits:
            return self.write(ins.operands[0], f"{value} {arrow} {dtype}({amount.value})", type_, ins)
        by = self.read(amount, "u32")
        shifted = f"({value} {arrow} np.minimum({by}, B4({bits - 1})).astype({dtype}))"
        if type_[0] != "s":  # a signed one shifted too far is its sign, which bits - 1 gives
            shifted = f"np.where({by} < B4({bits}), {shifted}, {dtype}(0))"
        return self.write(ins.operands[0], shifted, type_, ins)

    op_shr = op_shl

    def op_bfe(self, ins):
        type_ = ins.parts[-1]
        position, length = (x.value for x in ins.operands[2:4])
        if any(x.kind != "number" for x in ins.operands[2:4]) or length == 0:
            raise Unsupported("field")
        bits, dtype = int(type_[1:]), self._dtype(TYPES[type_])
        length = min(length, bits - position)
        value = self.read(ins.operands[1], type_)
        value = f"({value} << {dtype}({bits - length - position})) >> {dtype}({bits - length})"
        return self.write(ins.operands[0], value, type_, ins)

    def op_lop3(self, ins):
        a, b, c = (self.read(x, "b32") for x in ins.operands[1:4])
        table = ins.operands[4].value
        terms = []
        for i in range(8):
            if table >> i & 1:
                signs = ("" if i & 4 else "~", "" if i & 2 else "~", "" if i & 1 else "~")
                terms.append("(" + " & ".join(s + x for s, x in zip(signs, (a, b, c), strict=True)) + ")")
        return self.write(ins.operands[0], f"m.full({' | '.join(terms) or 'B4(0)'})", "b32", ins)
