"""Launch settings of the chunk kernels, read from the small tables of launches.py; no autotuning at run time.

float32 products use no tensor cores, so their tiles live in registers: the smallest ones. In 16 bits, chunks of 32
tokens keep every kernel but chunk_grad nearly free of register spills up to K = V = 128. Chunks of 64, with
chunk_grad_long in the place of that one, have wgmma for all products but those of the inverse on sm_90: predicted to be
faster there, and not measured. tests/test_aot.py states the bounds on spills that hold. Four warps: eight have raced on
Blackwell. One for the inverse, whose tiles are small.
"""

import functools
from typing import NamedTuple

import torch
import triton

from sleep_ops.kernels.launches import LAUNCHES, SINGLE_CHUNK_LAUNCHES


class Launch(NamedTuple):
    """block_v: columns of the value tile; warps and software-pipeline stages of a program."""

    block_v: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """As Triton takes them."""
        return {"num_warps": self.warps, "num_stages": self.stages}


class ChunkConfig(NamedTuple):
    """Chunk length in tokens (shared by all kernels of a call) and each kernel's launch."""

    chunk: int
    prepare: Launch
    scan: Launch
    reverse: Launch
    grad: Launch


def few_programs(launch: Launch, states: int, columns: int, device: torch.device) -> bool:
    """Whether a sweep over so many states of so many columns each leaves multiprocessors without a program.

    Its tiles are to be wide: narrow ones are of GPUs and dtypes for which that has not been looked at.
    """
    return launch.block_v > 32 and states * triton.cdiv(columns, launch.block_v) < multiprocessors(device)


def sweep_launch(launch: Launch, states: int, columns: int, device: torch.device, *, light: bool = False) -> Launch:
    """The launch of a sweep over so many states of so many columns each; a `light` one needs little shared memory.

    Where wide tiles leave multiprocessors without a program it has tiles of half the width and one more stage: a chunk
    then takes a program less time, and that is all the time there is. A light one with wide tiles has one more stage.
    """
    if launch.block_v <= 32:
        return launch
    if few_programs(launch, states, columns, device):
        return Launch(launch.block_v // 2, launch.warps, launch.stages + 1)
    return launch._replace(stages=launch.stages + light)


def heads_together(programs: int, heads: int, device: torch.device) -> int:
    """How many of the `heads` value heads that share keys a program of chunk_prepare takes: all of them, or one.

    All where that leaves `programs` enough to fill the GPU, of which 8 with one warp fit on a multiprocessor.
    """
    return heads if programs >= 8 * multiprocessors(device) else 1


class SingleChunkConfig(NamedTuple):
    """Chunk length in tokens, which holds the whole sequence, and the launches of the kernels of single_chunk.py."""

    chunk: int
    forward: Launch
    backward: Launch


def block_size(dim: int) -> int:
    """Tile size of a head dimension: the next power of two, at least 16 (the smallest tl.dot takes)."""
    return max(16, 1 << (dim - 1).bit_length())


def architecture(device: torch.device) -> str | None:
    """The GPU's name in the tables, such as "sm90" or "gfx942"; None for other devices. No wait for the device."""
    if device.type != "cuda":
        return None
    # A compiler traces through the cache anyway, and says so.
    return (_architecture if torch.compiler.is_compiling() else _known_architecture)(device)


def _architecture(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm{properties.major}{properties.minor}"


_known_architecture = functools.cache(_architecture)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 0 for other devices."""
    if device.type != "cuda":
        return 0
    return (_multiprocessors if torch.compiler.is_compiling() else _known_multiprocessors)(device)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_known_multiprocessors = functools.cache(_multiprocessors)


def launch_key(K: int, V: int, dtype: torch.dtype, arch: str | None) -> tuple[str, int, int, str | None]:
    """The most particular row of a table for these head dims, q/k/v of `dtype` and this GPU; it need not be there."""
    return "float32" if dtype == torch.float32 else "16-bit", block_size(K), block_size(V), arch


def launch_row(K: int, V: int, dtype: torch.dtype, arch: str | None, table: dict = LAUNCHES) -> tuple:
    """The row of a table that holds for them."""
    width, BK, BV, arch = launch_key(K, V, dtype, arch)
    keys = [(width, *tiles, where) for tiles in ((BK, BV), (BK, None), (None, None)) for where in (arch, None)]
    return next(table[key] for key in keys if key in table)


def chunk_config(K: int, V: int, T: int, dtype: torch.dtype, arch: str | None = None) -> ChunkConfig:
    """Settings for head dims K and V, T tokens (of the longest sequence, or all of them) and q/k/v of `dtype`.

    arch: the GPU as `architecture` names it, None for the rows of any. Tiles wider than V are narrowed to it, chunks
    more than twice as long as the sequence are shortened.
    """
    chunk, *launches = launch_row(K, V, dtype, arch)
    BV = block_size(V)
    while chunk > 16 and chunk >= 2 * T:
        chunk //= 2
    return ChunkConfig(chunk, *[Launch(min(block_v, BV), warps, stages) for block_v, warps, stages in launches])


def single_chunk_config(
    K: int, V: int, T: int, dtype: torch.dtype, arch: str | None = None
) -> SingleChunkConfig | None:
    """Settings of the one-launch kernels for sequences of T tokens; None for those too long for them.

    Up to 32 tokens, in float32 or with K > 128 up to 16. One chunk of 64 spills up to 3 kilobytes a thread, and on
    sm_100 compiles to a trap at K = V = 128; one of 32 in float32 spills 1.6. Where a tile of 64 columns is the whole
    state (K = V = 64) next to nothing spills on sm_90 and sm_100; elsewhere it spills more than one of 32. Two warps,
    the row for sm_90, spill half a kilobyte and are predicted to be faster all the same.
    """
    longest, *launches = launch_row(K, V, dtype, arch, SINGLE_CHUNK_LAUNCHES)
    if T > longest:
        return None
    BV = block_size(V)
    chunk = 16
    while chunk < T:
        chunk *= 2
    return SingleChunkConfig(chunk, *[Launch(min(block_v, BV), warps, stages) for block_v, warps, stages in launches])


def num_segments(
    heads: int, K: int, V: int, T: int, dtype: torch.dtype, multiprocessors: int, arch: str | None = None
) -> int:
    """Into how many segments a pass over `heads` (N * HV) sequences of T tokens is cut to fill the GPU; 1 for none.

    Cutting sweeps K + 2V columns instead of V, so it must more than treble the programs at work: it is done where a
    sweep has less than one program for every four multiprocessors, into as many segments as give the sweep over
    K + V columns about four programs on each, and none shorter than 512 tokens.
    """
    block_v = min(chunk_config(K, V, T, dtype, arch).scan.block_v, 32)  # see sweep_launch
    programs = heads * triton.cdiv(V, block_v)
    if 4 * programs > multiprocessors:
        return 1
    widened = heads * triton.cdiv(K + V, block_v)
    segments = min(T // 512, 4 * multiprocessors // widened)
    return segments if segments >= 4 else 1
