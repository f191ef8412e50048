"""Launch settings of the chunk kernels: one small table, read top to bottom; no autotuning at run time.

float32 products use no tensor cores, so their tiles live in registers: the smallest ones. In 16 bits, chunks of 32
tokens keep every kernel but chunk_grad nearly free of register spills up to K = V = 128. With 64, chunk_grad spills
kilobytes a thread on sm_80, and on sm_100 compiles to a trap. tests/test_aot.py states the bounds that hold. Four
warps: eight have raced on Blackwell.
"""

from typing import NamedTuple

import torch
import triton


class Launch(NamedTuple):
    """block_v: columns of the value tile; warps and software-pipeline stages of a program."""

    block_v: int
    warps: int
    stages: int


class ChunkConfig(NamedTuple):
    """Chunk length in tokens (shared by all kernels of a call) and each kernel's launch."""

    chunk: int
    prepare: Launch
    scan: Launch
    reverse: Launch
    grad: Launch


def block_size(dim: int) -> int:
    """Tile size of a head dimension: the next power of two, at least 16 (the smallest tl.dot takes)."""
    return max(16, triton.next_power_of_2(dim))


def chunk_config(K: int, V: int, T: int, dtype: torch.dtype) -> ChunkConfig:
    """Settings for head dims K and V, T tokens (of the longest sequence, or all of them) and q/k/v of `dtype`."""
    large = dtype == torch.float32 or block_size(K) > 128
    chunk = 16 if large else 32
    block_v = 16 if large else 32
    stages = 1 if dtype == torch.float32 else 2
    if T <= 16:
        chunk = 16
    launch = Launch(min(block_v, block_size(V)), 4, stages)
    return ChunkConfig(chunk, launch._replace(stages=1), launch, launch, launch._replace(stages=1))


def num_segments(heads: int, K: int, V: int, T: int, dtype: torch.dtype, multiprocessors: int) -> int:
    """Into how many segments a pass over `heads` (N * HV) sequences of T tokens is cut to fill the GPU; 1 for none.

    Cutting sweeps K + 2V columns instead of V, so it must more than treble the programs at work: it is done where a
    sweep has less than one program for every four multiprocessors, into as many segments as give the sweep over
    K + V columns about four programs on each, and none shorter than 512 tokens.
    """
    block_v = chunk_config(K, V, T, dtype).scan.block_v
    programs = heads * triton.cdiv(V, block_v)
    if 4 * programs > multiprocessors:
        return 1
    widened = heads * triton.cdiv(K + V, block_v)
    segments = min(T // 512, 4 * multiprocessors // widened)
    return segments if segments >= 4 else 1
