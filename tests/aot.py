"""Compiles every kernel for GPUs that need not be present, and prints what the compiler made of it as JSON.

    python tests/aot.py [--arch 80 90 100] [--only NAME]

One record per kernel, configuration and architecture: registers a thread, bytes of local memory a thread (spills),
bytes of shared memory a program, how many programs that lets a multiprocessor hold, which tensor-core instructions
there are, and whether the compiler gave up and left a trap. Run without TRITON_INTERPRET, in a process of its own:
Triton reads that at import. Other modules' kernels join by adding a `Case` to CASES.
"""

import argparse
import functools
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sleep_ops.kernels import gated_norm, short_conv, single_chunk, single_chunk_replay, step
from sleep_ops.kernels.arguments import Cotangents, Gates, Gradients, Packing, Prepared, Tokens, make_dims
from sleep_ops.kernels.chunk_grad import chunk_grad_kernel
from sleep_ops.kernels.chunk_grad_long import Values, chunk_grad_long_kernel
from sleep_ops.kernels.chunk_prepare import (
    BLOCK,
    NORM_ROWS,
    GateDims,
    chunk_prepare_kernel,
    gate_backward_kernel,
    normalise_kernel,
)
from sleep_ops.kernels.chunk_scan import chunk_reverse_kernel, chunk_scan_kernel
from sleep_ops.kernels.configs import block_size, chunk_config, single_chunk_config, sweep_launch

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # bytes of a multiprocessor
TENSOR_CORE = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")  # Blackwell's, Hopper's, everyone's instructions
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Case(NamedTuple):
    """A kernel with its arguments: a Triton type for a run-time one ("*bf16", "i32"), a value for a constant.

    Or a named tuple of them.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    warps: int
    stages: int
    archs: tuple[int, ...] = (80, 90, 100)


def _chunk_arguments(kernel: Any, dtype: str, absent: tuple[str, ...]) -> dict[str, Any]:
    """Of a chunk kernel, and others, but for dims. The `absent` ones are None."""

    def p(name: str, type_: str = dtype) -> str | None:
        return None if name in absent else f"*{type_}"

    G = "fp64" if dtype == "fp32" else "fp32"
    return {
        "tokens": Tokens(p("q"), p("k"), p("v"), *2 * [None if "cu_seqlens" in absent else "i32"], "i32"),
        "gates": Gates(*(p(name, "fp32") for name in ("g", "beta", "A_log", "dt_bias"))),
        "prepared": Prepared(p("G", G), p("beta", "fp32"), p("A"), p("QK"), p("rq", "fp32"), p("rk", "fp32")),
        "packing": Packing(p("cu_seqlens", "i32"), p("chunk_offsets", "i64")),
        "cotangents": Cotangents(p("d_output"), p("d_state", "fp32" if kernel is chunk_reverse_kernel else dtype)),
        "gradients": Gradients(p("dq"), p("dk"), p("dv"), p("dG", G), p("dbeta", "fp32")),
        "values": Values(*map(p, ("U_decayed", "dY", "ds", "dKK")), p("dG", G)),
        **{name: p(name) for name in ("states", "d_states", "output")},
        **{name: p(name, "fp32") for name in ("initial_state", "final_state", "d_initial_state")},
        **{name: p(name, "fp32") for name in ("active", "d_active", "dg", "dbeta", "partial")},
        "dG": p("dG", G),
        **{"scale": "fp32", "T": "i32", "num_seqs": "i32", "BETA_SCALE": 1.0},
    }


def chunk_cases(
    K: int,
    V: int,
    dtype: str,
    *,
    packed: bool = False,
    l2norm: bool = True,
    groups: int = 2,
    chunk: int | None = None,
    archs=(80, 90, 100),
):
    """The chunk kernels of a training step, in the configuration the operator would choose but for a `chunk` given."""
    arch = f"sm{archs[0]}"
    config = chunk_config(K, V, 1 << 15, DTYPES[dtype], arch if chunk else None)
    config = config._replace(chunk=chunk or config.chunk)
    many = () if packed else ("cu_seqlens", "chunk_offsets")  # absent in the first place
    none = (*many, "QK")
    widened = (*none, "q", "rq", "output", "initial_state", "d_output", "dq", "ds")
    light_scan, light_reverse = (
        sweep_launch(launch, 1, V, torch.device("cpu"), light=True) for launch in (config.scan, config.reverse)
    )
    label = f"{dtype}-K{K}-V{V}" + ("-packed" if packed else "") + (f"-C{chunk}" if chunk else "")
    name, kernel = "chunk_grad", chunk_grad_kernel
    if config.chunk == 64:
        name, kernel = "chunk_grad_long", chunk_grad_long_kernel
    gradient = [(name, kernel, config.grad, none, V), (f"{name}_widened", kernel, config.grad, widened, V)]
    few = []
    if config.scan.block_v > 32:  # what sweep_launch makes of them for few programs
        scan, reverse = (launch._replace(block_v=32, stages=3) for launch in (config.scan, config.reverse))
        few = [
            ("chunk_prepare_few", chunk_prepare_kernel, config.prepare, many, V),
            ("chunk_scan_few", chunk_scan_kernel, scan, (*many, "states"), V),
            ("chunk_reverse_few", chunk_reverse_kernel, reverse, many, V),
        ]
    for name, kernel, launch, absent, columns in (
        ("chunk_prepare", chunk_prepare_kernel, config.prepare, none, V),
        ("chunk_scan", chunk_scan_kernel, config.scan, (*none, "states"), V),
        ("chunk_states", chunk_scan_kernel, config.scan, (*none, "output", "final_state"), V),
        ("chunk_scan_widened", chunk_scan_kernel, light_scan, (*widened, "states"), V),
        ("chunk_states_widened", chunk_scan_kernel, config.scan, (*widened, "final_state"), V),
        ("chunk_reverse", chunk_reverse_kernel, config.reverse, none, V),
        ("chunk_reverse_widened", chunk_reverse_kernel, light_reverse, (*widened, "d_initial_state"), K + V),
        *gradient,
        *few,
        ("gate_backward", gate_backward_kernel, config.prepare, none, V),
    ):
        if not l2norm:
            absent = (*absent, "rq", "rk")
        wide = "d_output" in absent and columns == V
        dims = make_dims(4, 4 * groups, K, columns, config.chunk, launch.block_v, wide)
        block_dims = make_dims(4, 4 * groups, K, columns, BLOCK.value, launch.block_v)
        if kernel is gate_backward_kernel:
            dims = GateDims(4 * groups, config.chunk, 4 * groups, 1.0)
        arguments = _chunk_arguments(kernel, dtype, absent) | {"dims": dims, "block_dims": block_dims}
        arguments["HEADS"] = groups
        yield Case(f"{name}-{label}", kernel, arguments, launch.warps, launch.stages, archs)


def normalise_cases(dtype: str, K: int):
    """q or k with rows of unit norm."""
    arguments = {"x": f"*{dtype}", "y": f"*{dtype}", "r": "*fp32", "num_rows": "i32", "stride": "i32", "H": 4, "K": K}
    arguments |= {"BK": block_size(K), "BR": NORM_ROWS}
    yield Case(f"normalise-{dtype}-K{K}", normalise_kernel, arguments, 4, 3)


def single_chunk_cases(
    K: int,
    V: int,
    T: int,
    dtype: str,
    *,
    initial_state: bool = True,
    groups: int = 1,
    row: str | None = None,
    archs=(80, 90, 100),
):
    """The kernels of sequences of T tokens that fit one chunk, with gate, sigmoid and normalisation.

    row: the architecture whose row of the table they are launched by, None for that of any.
    """
    config = single_chunk_config(K, V, T, DTYPES[dtype], row)
    x, state = f"*{dtype}", "*fp32" if initial_state else None
    arguments = {
        "tokens": Tokens(x, x, x, None, None, "i32"),
        "gates": Gates("*fp32", "*fp32", "*fp32", "*fp32", "i32", "i32"),
        "cotangents": Cotangents(x, "*fp32"),
        "gradients": Gradients(x, x, x, "*fp32", "*fp32"),
        "states": single_chunk_replay.States(state, "*fp32", state),
        **{"passes": "i32", "doublings": "i32"},
        **{"initial_state": state, "d_initial_state": state, "final_state": "*fp32", "output": x, "partial": "*fp32"},
        **{"scale": "fp32", "T": "i32", "IS_DELTA": True, "BETA_SCALE": 1.0},
    }
    label = f"{dtype}-K{K}-V{V}-T{T}" + ("" if initial_state else "-fresh") + (f"-{row}" if row else "")
    replay = single_chunk_replay.replay_launches(K, V, DTYPES[dtype])
    for kernel, launch in (
        (single_chunk.single_chunk_forward_kernel, config.forward),
        (single_chunk.single_chunk_backward_kernel, config.backward),
        (single_chunk_replay.replay_forward_kernel, replay[0]),
        (single_chunk_replay.replay_backward_kernel, replay[1]),
    ):
        if row and kernel.__name__.startswith("replay"):
            continue  # its launches are no rows of the table
        dims = make_dims(4, 4 * groups, K, V, config.chunk, launch.block_v, l2norm=True)
        given = arguments | {"dims": dims}
        name = kernel.__name__.removesuffix("_kernel")
        yield Case(f"{name}-{label}", kernel, given, launch.warps, launch.stages, archs)


def short_conv_cases(dtype: str, *, packed: bool = False):
    """The short convolution over four taps, its weights and sums in float32."""
    arguments: dict[str, Any] = {name: f"*{dtype}" for name in ("y", "dy", "dx", "dconv_state")}
    arguments |= {"inputs": short_conv.Inputs(f"*{dtype}", "*fp32", f"*{dtype}", f"*{dtype}")}
    arguments |= {"borders": short_conv.Borders(*(("*i64", "*i32", None) if packed else (None, None, "*i64")))}
    arguments |= {name: "*fp32" for name in ("weight", "dz", "partial")}
    arguments |= {name: "i32" for name in ("num_rows", "blocks", "T", "D")}
    for name, block in (
        ("forward", short_conv.BLOCK_T),
        ("z_backward", short_conv.SUM_BLOCK_T),
        ("x_backward", short_conv.BLOCK_T),
        ("state_backward", 4),
    ):
        kernel = getattr(short_conv, f"short_conv_{name}_kernel")
        label = f"short_conv_{name}-{dtype}" + ("-packed" if packed else "")
        sizes = {"sizes": short_conv.Sizes(4, block, short_conv.BLOCK_D, 8, True)}
        yield Case(label, kernel, arguments | sizes, short_conv.NUM_WARPS, 3)


def gated_norm_cases(dtype: str, V: int):
    """The gated norm of rows of V elements."""
    tile = gated_norm.tile_of(V)
    arguments: dict[str, Any] = {name: f"*{dtype}" for name in ("x", "gate", "y", "dy", "dx", "dgate")}
    arguments |= {"weight": "*fp32", "partial": "*fp32", "num_rows": "i32", "blocks": "i32", "eps": "fp32", "V": "i32"}
    arguments |= {"tile": tile}
    for name in ("forward", "backward"):
        kernel = getattr(gated_norm, f"gated_norm_{name}_kernel")
        yield Case(f"gated_norm_{name}-{dtype}-V{V}", kernel, arguments, tile.warps, 3)


def step_cases(dtype: str, K: int, V: int, *, archs=(80, 90, 100)):
    """The one-token step with gate, sigmoid and normalisation, two value heads to a key head."""
    x, number = f"*{dtype}", "*fp32"
    arguments = {"tokens": Tokens(x, x, x), "gates": Gates(*4 * [number]), "state": number, "output": x}
    arguments |= {"new_state": number, "scale": "fp32", "IS_DELTA": True, "BETA_SCALE": 1.0}
    arguments |= {"dims": make_dims(4, 8, K, V, 1, step.BLOCK_V, l2norm=True)}
    yield Case(f"step-{dtype}-K{K}-V{V}", step.step_kernel, arguments, step.NUM_WARPS, 3, archs)


CASES = [
    *step_cases("bf16", 128, 128),
    *step_cases("fp32", 256, 100, archs=(90,)),
    *chunk_cases(64, 64, "bf16", packed=True),
    *chunk_cases(128, 128, "bf16"),
    *chunk_cases(128, 128, "bf16", chunk=64, archs=(90,)),
    *chunk_cases(128, 128, "bf16", chunk=64, archs=(80, 100)),
    *chunk_cases(256, 256, "bf16"),
    *chunk_cases(96, 192, "fp16", archs=(90,)),
    *chunk_cases(64, 64, "fp32", archs=(80,)),
    *normalise_cases("bf16", 128),
    *single_chunk_cases(64, 64, 24, "bf16"),
    *single_chunk_cases(64, 64, 24, "bf16", row="sm90", archs=(90,)),
    *single_chunk_cases(64, 64, 24, "bf16", initial_state=False, archs=(90,)),
    *single_chunk_cases(128, 128, 32, "bf16", groups=2),
    *single_chunk_cases(96, 192, 32, "fp16", groups=2, archs=(90,)),
    *single_chunk_cases(256, 256, 16, "bf16", archs=(90,)),
    *single_chunk_cases(64, 64, 16, "fp32", archs=(80,)),
    *short_conv_cases("bf16"),
    *short_conv_cases("fp32", packed=True),
    *gated_norm_cases("bf16", 128),
    *gated_norm_cases("fp32", 100),
    *gated_norm_cases("bf16", 2304),
]


def programs_at_once(registers: int, shared: int, warps: int, arch: int) -> int:
    """Programs that fit on one multiprocessor together: by registers, shared memory (1 KiB of it taken) and warps."""
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = SHARED_MEMORY[arch] // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32)


@functools.cache
def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread, from the compiled binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), max(int(usage["STACK"]), int(usage["LOCAL"]))


def _signature(value: Any, name: str, path: tuple[int, ...], constants: dict, aligned: dict) -> Any:
    """Of an argument, by its Triton types; its constants and aligned values are entered by their paths."""
    if isinstance(value, tuple):
        fields = zip(value._fields, value, strict=True)
        return type(value)(*(_signature(x, n, (*path, i), constants, aligned) for i, (n, x) in enumerate(fields)))
    if not isinstance(value, str):
        constants[path] = value
        return "constexpr"
    if value.startswith("*") or name.startswith("stride"):
        aligned[path] = [["tt.divisibility", 16]]
    return value


def compile_case(case: Case, arch: int) -> dict[str, Any]:
    signature, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(case.kernel.params):
        value = case.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[i,] = "constexpr", value
        else:
            signature[parameter.name] = _signature(value, parameter.name, (i,), constants, aligned)
    begin = time.perf_counter()
    compiled = triton.compile(
        ASTSource(case.kernel, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    registers, spills = _resources(compiled.asm["cubin"])
    return {
        "kernel": case.name,
        "arch": arch,
        "registers": registers,
        "spill_bytes": spills,
        "shared_bytes": compiled.metadata.shared,
        "programs": programs_at_once(registers, compiled.metadata.shared, case.warps, arch),
        "tensor_core": [name for name in TENSOR_CORE if name in compiled.asm["ptx"]],
        "traps": "trap;" in compiled.asm["ptx"],
        "seconds": round(time.perf_counter() - begin, 2),
    }


def _compile_numbered(number: int, arch: int) -> dict[str, Any]:
    return compile_case(CASES[number], arch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--only", default="", help="compile the cases whose name contains this")
    options = parser.parse_args()
    jobs = [(case, arch) for case in CASES for arch in case.archs if options.only in case.name and arch in options.arch]
    with multiprocessing.get_context("fork").Pool(min(2, os.cpu_count() or 1)) as pool:
        records = pool.starmap(_compile_numbered, [(CASES.index(case), arch) for case, arch in jobs], chunksize=1)
    print(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
