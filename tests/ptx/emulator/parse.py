"""The text of a module with one kernel, as blocks of instructions."""

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ptx.emulator.arithmetic import B4, B8, TYPES


class Unsupported(NotImplementedError):
    """An instruction, or a form of it, that is not emulated."""


@dataclass(frozen=True)
class Operand:
    """kind: register, number, vector, memory, special, symbol, label or sink (an unused result)."""

    kind: str
    value: Any = None  # register number, numeric value, tuple of operands, name; for memory its address operand
    offset: int = 0  # of memory


@dataclass(eq=False)
class Instruction:
    index: int
    text: str
    where: str  # "file:line" of the source
    parts: list[str]  # opcode split at the dots
    operands: list[Operand]
    predicate: tuple[int, bool] | None  # register and whether it is negated
    kind: str = ""

    def __post_init__(self):
        self.kind = classify(self.parts)

    def registers(self) -> set[int]:
        """All registers it reads or writes."""
        operands, found = list(self.operands), {self.predicate[0]} if self.predicate else set()
        while operands:
            operand = operands.pop()
            if operand.kind == "register":
                found.add(operand.value)
            elif operand.kind in ("vector", "memory"):
                operands += operand.value if operand.kind == "vector" else [operand.value]
        return found

    def results(self) -> set[int]:
        """Registers it writes."""
        if (
            not self.operands
            or self.kind in ("control", "barrier", "copy async")
            or self.parts[0] in ("st", "stmatrix")
        ):
            return set()
        first = self.operands[0]
        return {x.value for x in (first.value if first.kind == "vector" else (first,)) if x.kind == "register"}


@dataclass(eq=False)
class Block:
    index: int
    label: str | None
    instructions: list[Instruction] = field(default_factory=list)
    code: Any = None
    in_flight: dict = field(default_factory=dict)  # what its wgmmas leave behind, by what was in flight before


@dataclass(eq=False)
class Program:
    name: str
    params: dict[str, tuple[str, int]]  # type and position
    widths: list[int]  # bytes of each register, 0 for predicates
    blocks: list[Block]
    granule: int  # bytes of shared memory that are watched together: the narrowest access


KINDS = {
    "tensor": ("mma", "wgmma"),
    "matrix copy": ("ldmatrix", "stmatrix"),
    "copy async": ("cp",),
    "barrier": ("bar", "barrier", "fence", "membar"),
    "shuffle": ("shfl", "elect", "redux", "vote"),
    "special": ("ex2", "lg2", "rsqrt", "rcp", "sqrt", "div", "sin", "cos", "tanh"),
    "control": ("bra", "ret", "exit"),
    "move": ("mov", "selp", "setp", "cvt", "prmt"),
}


def classify(parts: list[str]) -> str:
    root = parts[0]
    if root in ("ld", "st"):
        return f"{root} {parts[1]}"
    for kind, roots in KINDS.items():
        if root in roots:
            return kind
    return "float" if any(p in TYPES and "f" in p for p in parts) else "integer"


def split_operands(text: str) -> list[str]:
    """Splits at the commas outside braces and brackets."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and not depth:
            found.append(text[start:i])
            start = i + 1
    return [x.strip() for x in (*found, text[start:]) if x.strip()]


class Parser:
    """Reads a module with one kernel."""

    def __init__(self, ptx: str):
        self.numbers: dict[str, int] = {}
        self.widths: list[int] = []
        self.ranges: dict[str, int] = {}  # bytes of registers declared by prefix
        header, body = re.search(r"\.visible \.entry (.*?)\n\{\n(.*)\n\s*// -- End function", ptx, re.S).groups()
        self.files = dict(re.findall(r'\.file\s+(\d+) "([^"]*)"', ptx))
        self.name = header.split("(")[0].strip()
        declared = re.findall(r"\.param (\.\w+)[^,\n]*?(\w+)[,\n]", header + "\n")
        self.params = {name: (type_[1:], i) for i, (type_, name) in enumerate(declared)}
        if re.search(r"\.(shared|local)\b(?!.*global_smem)(?!.*\[ ?%)(?!::).*\.b8", ptx):
            raise Unsupported("static shared or local memory")
        self.blocks = [Block(0, None)]
        self.count = 0
        self._parse(body)

    def program(self) -> Program:
        narrowest = 4
        for ins in (i for b in self.blocks for i in b.instructions):
            if ins.parts[0] in ("ld", "st") and ins.parts[1].startswith("shared"):
                narrowest = min(narrowest, int(re.sub(r"\D", "", ins.parts[-1])) // 8)
        return Program(self.name, self.params, self.widths, self.blocks, narrowest)

    def _parse(self, body: str) -> None:
        where, pending = "?", ""
        for line in body.split("\n"):
            line = line.split("//")[0].strip()
            if not line:
                continue
            if line.startswith(".loc"):
                _, file, number, *_ = line.split()
                where = f"{self.files.get(file, file).rsplit('/', 1)[-1]}:{number}"
                continue
            if re.fullmatch(r"\$?\w+:", line):
                self._start_block(line[:-1])
                continue
            pending += " " + line
            while ";" in pending:
                statement, pending = pending.split(";", 1)
                self._statement(re.sub(r"^\s*[{}](?=\s*(\.reg|@|[a-z]|$))", "", statement).strip(), where)
            if pending.strip() in ("{", "}"):
                pending = ""

    def _start_block(self, label: str | None) -> None:
        if self.blocks[-1].instructions or self.blocks[-1].label:
            self.blocks.append(Block(len(self.blocks), label))
        else:
            self.blocks[-1].label = label

    def _statement(self, text: str, where: str) -> None:
        if not text or text.startswith((".pragma", ".file")):
            return
        if text.startswith(".reg"):
            _, type_, names = text.split(None, 2)
            width = 0 if type_ == ".pred" else int(re.sub(r"\D", "", type_)) // 8
            for name in names.split(","):
                if "<" in name:
                    self.ranges[re.match(r"%?[a-z]+", name.strip())[0]] = width
                else:
                    self._register(name.strip(), width)
            return
        match = re.fullmatch(r"(?:@(!?)\s*(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.S)
        if not match:
            raise Unsupported(f"{text} ({where})")
        negated, guard, opcode, rest = match.groups()
        predicate = None if guard is None else (self._register(guard), bool(negated))
        operands = [self._operand(x) for x in split_operands(rest)]
        instruction = Instruction(self.count, text, where, opcode.split("."), operands, predicate)
        self.count += 1
        self.blocks[-1].instructions.append(instruction)
        if instruction.kind == "control":
            self._start_block(None)

    def _register(self, name: str, width: int | None = None) -> int:
        if name not in self.numbers:
            if width is None:
                width = self.ranges[re.match(r"%[a-z]+", name)[0]]
            self.numbers[name] = len(self.widths)
            self.widths.append(width)
        return self.numbers[name]

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return Operand("vector", tuple(self._operand(x) for x in split_operands(text[1:-1])))
        if text.startswith("["):
            base, _, offset = text[1:-1].partition("+")
            return Operand("memory", self._operand(base), int(offset, 0) if offset.strip() else 0)
        if text == "_":
            return Operand("sink")
        if "|" in text:
            return Operand("vector", tuple(self._operand(x) for x in text.split("|")))
        if text.startswith("%") and ("." in text or text in ("%laneid", "%warpid")):
            return Operand("special", text)
        if text in self.numbers or text.startswith("%"):
            return Operand("register", self._register(text))
        if match := re.fullmatch(r"0([fFdD])([0-9A-Fa-f]+)", text):
            return Operand("number", np.array(int(match[2], 16), B4 if match[1] in "fF" else B8)[()])
        if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text):
            return Operand("number", int(text.rstrip("U"), 0))
        return Operand("label" if text.startswith("$") else "symbol", text)
