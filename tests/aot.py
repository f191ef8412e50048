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
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sleep_ops.kernels import gated_norm, short_conv, step, window
from sleep_ops.kernels.chunk_grad import chunk_grad_kernel
from sleep_ops.kernels.chunk_grad_split import (
    chunk_grad_keys_kernel,
    chunk_grad_queries_kernel,
    chunk_grad_values_kernel,
)
from sleep_ops.kernels.chunk_prepare import (
    NORM_ROWS,
    chunk_prepare_kernel,
    gate_backward_kernel,
    inverse_norm_kernel,
)
from sleep_ops.kernels.chunk_scan import chunk_reverse_kernel, chunk_scan_kernel
from sleep_ops.kernels.configs import block_size, chunk_config, scales_rows, window_config

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # bytes of a multiprocessor
TENSOR_CORE = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")  # Blackwell's, Hopper's, everyone's instructions
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Case(NamedTuple):
    """A kernel with its arguments: a Triton type for a run-time one ("*bf16", "i32"), a value for a constant."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    warps: int
    stages: int
    archs: tuple[int, ...] = (80, 90, 100)


def _chunk_arguments(dtype: str, packed: bool) -> dict[str, Any]:
    data = ("q", "k", "v", "A", "output", "states", "d_states", "d_output", "dq", "dk", "dv", "U_end", "dY", "ds", "dl")
    wide = ("beta_out", "initial_state", "final_state", "d_final_state", "d_initial_state", "dbeta_out")
    arguments: dict[str, Any] = {name: f"*{dtype}" for name in data}
    wide += ("g", "beta", "dg", "dbeta", "A_log", "dt_bias", "partial", "rq", "rk")
    wide += ("dbeta_part", "dbeta_values")
    arguments |= {name: "*fp32" for name in wide}
    decays = ("G", "dG", "dG_part", "dG_values", "dG_queries")
    arguments |= {name: "*fp64" if dtype == "fp32" else "*fp32" for name in decays}
    arguments |= {name: "i32" for name in ("T", "num_seqs", "stride_q", "stride_k", "stride_v")}
    arguments |= {"scale": "fp32"}
    arguments |= {"cu_seqlens": "*i32" if packed else None, "chunk_offsets": "*i64" if packed else None}
    return arguments


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
    config = chunk_config(K, V, 1 << 15, DTYPES[dtype])
    config = config._replace(chunk=chunk or config.chunk)
    scaled = l2norm and scales_rows(config, DTYPES[dtype], f"sm{archs[0]}")
    shape = {"H": 4, "HV": 4 * groups, "K": K, "V": V, "C": config.chunk, "BK": block_size(K)}
    gates = {"BETA_SCALE": 1.0, "USE_L2NORM": l2norm, "PRECISION": "ieee" if dtype == "fp32" else "tf32x3"}
    gates |= {"WIDENED": False, "BH": 4 * groups}
    absent = ("q", "rq", "output", "initial_state", "d_output", "dq", "ds", "dG_queries")
    widened = dict.fromkeys(absent) | {"WIDENED": True}
    common = _chunk_arguments(dtype, packed) | shape | gates
    sweep = {"USE_L2NORM": False} if scaled else {"rq": None, "rk": None}
    label = f"{dtype}-K{K}-V{V}" + ("-packed" if packed else "") + (f"-C{chunk}" if chunk else "")
    gradient = [
        ("chunk_grad", chunk_grad_kernel, config.grad, {}),
        ("chunk_grad_widened", chunk_grad_kernel, config.grad, widened),
    ]
    if config.chunk == 64:
        gradient = [
            ("chunk_grad_values", chunk_grad_values_kernel, config.grad, {}),
            ("chunk_grad_values_widened", chunk_grad_values_kernel, config.grad, widened),
            ("chunk_grad_queries", chunk_grad_queries_kernel, config.grad, {}),
            ("chunk_grad_keys", chunk_grad_keys_kernel, config.grad, {}),
            ("chunk_grad_keys_widened", chunk_grad_keys_kernel, config.grad, widened | {"V": K + V}),
        ]
    for name, kernel, launch, changed in (
        ("chunk_prepare", chunk_prepare_kernel, config.prepare, {}),
        ("chunk_scan", chunk_scan_kernel, config.scan, sweep | {"states": None}),
        ("chunk_states", chunk_scan_kernel, config.scan, sweep | dict.fromkeys(("q", "rq", "output", "final_state"))),
        ("chunk_scan_widened", chunk_scan_kernel, config.scan, sweep | widened | {"states": None}),
        ("chunk_states_widened", chunk_scan_kernel, config.scan, sweep | widened | {"final_state": None}),
        ("chunk_reverse", chunk_reverse_kernel, config.reverse, sweep),
        (
            "chunk_reverse_widened",
            chunk_reverse_kernel,
            config.reverse,
            sweep | widened | {"d_initial_state": None, "V": K + V},
        ),
        *gradient,
        ("gate_backward", gate_backward_kernel, config.prepare, {}),
    ):
        arguments = common | changed | {"BV": launch.block_v}
        yield Case(f"{name}-{label}", kernel, arguments, launch.warps, launch.stages, archs)


def inverse_norm_cases(dtype: str, K: int):
    """The norms of q or k for sweeps that scale rows."""
    arguments = {"x": f"*{dtype}", "r": "*fp32", "num_rows": "i32", "stride": "i32", "H": 4, "K": K}
    arguments |= {"BK": block_size(K), "BR": NORM_ROWS}
    yield Case(f"inverse_norm-{dtype}-K{K}", inverse_norm_kernel, arguments, 4, 3)


def window_cases(
    K: int, V: int, T: int, dtype: str, *, initial_state: bool = True, groups: int = 1, archs=(80, 90, 100)
):
    """The kernels of windows of T tokens, with gate, sigmoid and normalisation."""
    config = window_config(K, V, T, DTYPES[dtype])
    data = ("q", "k", "v", "output", "d_output", "dq", "dk", "dv")
    wide = ("g", "beta", "A_log", "dt_bias", "final_state", "d_final_state", "dg", "dbeta", "partial")
    arguments: dict[str, Any] = {name: f"*{dtype}" for name in data} | {name: "*fp32" for name in wide}
    arguments |= {name: "*fp32" if initial_state else None for name in ("initial_state", "d_initial_state")}
    arguments |= {name: "i32" for name in ("T", *(f"stride_{x}" for x in ("q", "k", "v", "g", "beta")))}
    arguments |= {"scale": "fp32", "H": 4, "HV": 4 * groups, "K": K, "V": V, "C": config.chunk, "BK": block_size(K)}
    arguments |= {"BV": config.launch.block_v, "BETA_SCALE": 1.0, "IS_DELTA": True, "USE_L2NORM": True}
    arguments |= {"PRECISION": "ieee" if dtype == "fp32" else "tf32x3"}
    arguments |= {"G_DTYPE": tl.float64 if dtype == "fp32" else tl.float32}
    label = f"{dtype}-K{K}-V{V}-T{T}" + ("" if initial_state else "-fresh")
    for name in ("forward", "backward"):
        kernel = getattr(window, f"window_{name}_kernel")
        yield Case(f"window_{name}-{label}", kernel, arguments, config.launch.warps, config.launch.stages, archs)


def short_conv_cases(dtype: str, *, packed: bool = False):
    """The short convolution over four taps, its weights and sums in float32."""
    arguments: dict[str, Any] = {name: f"*{dtype}" for name in ("x", "bias", "tail", "y", "dy", "dx", "dtail")}
    arguments |= {name: "*fp32" for name in ("weight", "dz", "partial")}
    arguments |= {name: "i32" for name in ("num_rows", "blocks", "T", "D")}
    arguments |= {"seq_ids": "*i64" if packed else None, "cu_seqlens": "*i32" if packed else None}
    arguments |= {"lengths": None if packed else "*i64", "W": 4, "BW": 8, "BD": short_conv.BLOCK_D, "SILU": True}
    for name, block in (
        ("forward", short_conv.BLOCK_T),
        ("z_backward", short_conv.SUM_BLOCK_T),
        ("x_backward", short_conv.BLOCK_T),
        ("tail_backward", 4),
    ):
        kernel = getattr(short_conv, f"short_conv_{name}_kernel")
        label = f"short_conv_{name}-{dtype}" + ("-packed" if packed else "")
        yield Case(label, kernel, arguments | {"BT": block}, short_conv.NUM_WARPS, 3)


def gated_norm_cases(dtype: str, V: int):
    """The gated norm of rows of V elements."""
    rows, padded, warps = gated_norm.tile(V)
    arguments: dict[str, Any] = {name: f"*{dtype}" for name in ("x", "gate", "y", "dy", "dx", "dgate")}
    arguments |= {"weight": "*fp32", "partial": "*fp32", "num_rows": "i32", "blocks": "i32", "eps": "fp32", "V": "i32"}
    arguments |= {"BR": rows, "BV": padded}
    for name in ("forward", "backward"):
        kernel = getattr(gated_norm, f"gated_norm_{name}_kernel")
        yield Case(f"gated_norm_{name}-{dtype}-V{V}", kernel, arguments, warps, 3)


def step_cases(dtype: str, K: int, V: int, *, archs=(80, 90, 100)):
    """The one-token step with gate, sigmoid and normalisation, two value heads to a key head."""
    arguments: dict[str, Any] = {name: f"*{dtype}" for name in ("q", "k", "v", "output")}
    arguments |= {name: "*fp32" for name in ("g", "beta", "state", "A_log", "dt_bias", "new_state")}
    arguments |= {"scale": "fp32", "H": 4, "HV": 8, "K": K, "V": V, "BK": block_size(K), "BV": step.BLOCK_V}
    arguments |= {"BETA_SCALE": 1.0, "IS_DELTA": True, "USE_L2NORM": True}
    yield Case(f"step-{dtype}-K{K}-V{V}", step.step_kernel, arguments, step.NUM_WARPS, 3, archs)


CASES = [
    *step_cases("bf16", 128, 128),
    *step_cases("fp32", 256, 100, archs=(90,)),
    *chunk_cases(64, 64, "bf16", packed=True),
    *chunk_cases(128, 128, "bf16"),
    *chunk_cases(128, 128, "bf16", chunk=64, archs=(80,)),
    *chunk_cases(128, 128, "bf16", chunk=64, archs=(90, 100)),
    *chunk_cases(256, 256, "bf16"),
    *chunk_cases(96, 192, "fp16", archs=(90,)),
    *chunk_cases(64, 64, "fp32", archs=(80,)),
    *inverse_norm_cases("bf16", 128),
    *window_cases(64, 64, 24, "bf16"),
    *window_cases(64, 64, 24, "bf16", initial_state=False, archs=(90,)),
    *window_cases(128, 128, 32, "bf16", groups=2),
    *window_cases(96, 192, 32, "fp16", groups=2, archs=(90,)),
    *window_cases(256, 256, 16, "bf16", archs=(90,)),
    *window_cases(64, 64, 16, "fp32", archs=(80,)),
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


def compile_case(case: Case, arch: int) -> dict[str, Any]:
    signature, constants, aligned = {}, {}, {}
    for i, name in enumerate(case.kernel.arg_names):
        value = case.arguments[name]
        if isinstance(value, str) and name != "PRECISION":
            signature[name] = value
            if value.startswith("*") or name.startswith("stride"):
                aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[name] = value
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
