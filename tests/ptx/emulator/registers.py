"""Registers that a wgmma still reads or writes: a walk over a block's instructions, without values."""

from ptx.emulator.parse import Instruction

NOTHING = (frozenset(), frozenset())


def touched_too_early(before: tuple, instructions: list[Instruction]) -> tuple[tuple, list]:
    """What is in flight after a block, and its instructions that come too early, each with why.

    In flight: (result, input) registers of the committed groups, and of the open one. Inputs may be read.
    """
    (*committed,), open_ = before
    found, fresh = [], set()  # fresh: registers written since the last wgmma.fence
    for ins in instructions:
        if "mma_async" in ins.parts:
            results, inputs = ({x.value for x in o.value} if o.kind == "vector" else set() for o in ins.operands[:2])
            if fresh & (results | inputs):
                found.append((ins, "operands were written since the last wgmma.fence"))
            open_ = open_[0] | results, open_[1] | inputs
        elif ins.parts[:2] == ["wgmma", "fence"]:
            fresh.clear()
        elif ins.parts[:2] == ["wgmma", "commit_group"]:
            committed.append(open_)
            open_ = NOTHING
        elif ins.parts[:2] == ["wgmma", "wait_group"]:
            committed = committed[len(committed) - ins.operands[0].value :] if ins.operands[0].value else []
        else:
            writes = ins.results()
            results = open_[0].union(*(group[0] for group in committed))
            inputs = open_[1].union(*(group[1] for group in committed))
            if (results and results & ins.registers()) or (inputs and inputs & writes):
                found.append((ins, "touches a register of a wgmma not waited for"))
            if ins.parts[0] != "mov":  # ptxas sees to copies
                fresh |= writes
    return (tuple(committed), open_), found
