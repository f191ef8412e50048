"""Runs the PTX that Triton compiles for NVIDIA GPUs on the CPU, and reports what a GPU keeps silent about.

    with emulated(arch=90) as emulator:
        kernel[grid](*cpu_tensors, num_warps=4)
    assert not emulator.reports, emulator.summary()

A lockstep emulator of the subset of PTX that Triton emits. A virtual register is a numpy array with one element per
thread, of several programs (CTAs) at once; a basic block is translated to Python once, one numpy expression or so an
instruction. Programs that take different ways at a branch go on apart. Pointers are the tensors' own host addresses.

Reports (`Emulator.reports`), besides results:

    bounds      access outside the tensors passed, or outside the kernel's shared memory; also misaligned ones
    race        two warps touch the same shared bytes, one writing, with no bar.sync between; cp.async or wgmma still
                at work on bytes that are touched; a tensor's element written by one program and touched by another, or
                written and touched by two warps of one program with no bar.sync between
    warp-order  a thread reads shared bytes that another one of its warp wrote, with no bar.warp.sync between
    proxy       wgmma reads shared bytes that st.shared or stmatrix wrote since the last fence.proxy.async (after
                cp.async Triton has no such fence, nor has CUTLASS)
    wgmma       registers of a wgmma touched before its wgmma.wait_group, or fed to it without wgmma.fence
    uninit      shared bytes read that nothing has written (they hold NaN)

Not modelled: what ptxas makes of the PTX, memory order finer than barriers, threads of a program that part at a branch,
clusters, TMA, mbarriers, atomics, tcgen05. Whatever is unknown raises Unsupported with the instruction's text.

    parse               a module's text as blocks of instructions
    arithmetic          types, and arithmetic numpy has no operator for
    translate           a block as a Python function; its instructions on memory and matrices in translate_memory
    tensor_cores        fragments and layouts of mma and wgmma
    global_memory shared_memory matrices      what programs do to tensors, to shared memory, with wgmma; the checks
    machine             some programs of a launch, in lockstep
    registers           which registers a wgmma still holds
    run                 launches, reports, and Triton launching here
"""

from ptx.emulator.parse import Unsupported
from ptx.emulator.run import Emulator, Report, emulated

__all__ = ["Emulator", "Report", "Unsupported", "emulated"]
