"""What is wrong with a row of kernels/launches.py, by its kernels as compiled; `bench tune` asks before it writes one.

    python tests/ptx/rows.py '["SINGLE_CHUNK_LAUNCHES", ["16-bit", 64, 64, "sm90"], [32, [64, 4, 1], [64, 4, 1]]]'

Prints one fault a line, none for a row that is right. Forward, backward and, of the chunk kernels, three passes, whose
kernels are others, over more than four chunks, so that loops are pipelined: by the 2x rule and all checks of the
emulator. A row of an architecture that is not emulated is run as sm_80 and as sm_90. Not with TRITON_INTERPRET.
"""

import json
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from cases import Case, check_two_times
from ptx.emulation import launch_table, on_gpu

from sleep_ops import gated_delta_rule, sleep_gated_delta_rule
from sleep_ops.reference import sleep_gated_delta_rule_reference

OPTIONS = {"use_qk_l2norm": True, "use_beta_sigmoid": True, "allow_neg_eigval": True}
DEFAULT_TILES = (128, 64)  # of K and V, in rows for any


def architectures(key: tuple) -> list[int]:
    """Those to emulate for the row of that key."""
    own = {"sm80": 80, "sm86": 80, "sm89": 80, "sm90": 90}
    return [own[key[3]]] if key[3] in own else [90, 80]


def faults(table: str, key: tuple, row: tuple, arch: int, **options) -> list[str]:
    """In words; `options` are those of the Emulator."""
    dims = tuple(tile or default for tile, default in zip(key[1:3], DEFAULT_TILES, strict=True))
    dtype = torch.float32 if key[0] == "float32" else torch.bfloat16
    T = 4 * row[0] + 5 if table == "LAUNCHES" else row[0]
    case = Case("row", T=T, dims=dims, heads=(1, 4), options=OPTIONS)
    found = []
    with launch_table(table, {key: row}), on_gpu(arch, **options) as emulator:
        try:
            check_two_times(partial(gated_delta_rule, impl="triton"), case, dtype, "cpu")
            if table == "LAUNCHES":
                specification = partial(sleep_gated_delta_rule_reference, passes=3)
                replayed, plain = (partial(sleep_gated_delta_rule, passes=3, impl=impl) for impl in ("triton", "torch"))
                check_two_times(replayed, case, dtype, "cpu", specification=specification, plain=plain)
        except Exception as error:  # whatever the compiler raises, or a wrong result
            found.append(f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
    return [f"sm_{arch}: {fault}".replace("\n", " ") for fault in (*found, *emulator.reports)]


def main(text: str) -> None:
    table, key, row = json.loads(text)
    key, row = tuple(key), tuple(tuple(x) if isinstance(x, list) else x for x in row)
    for arch in architectures(key):
        print(*faults(table, key, row, arch), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
