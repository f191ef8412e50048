"""What the operators are measured on: sizes, inputs, and the least arithmetic and memory traffic that each size needs.

A case's cost counts, per token, with chunks of C = min(64, tokens) and 16-bit products at two operations each,

                         a value head                          a key head            a state column more
    forward              V (6 K + 4 C) + 2/3 C^2               4 C K                 4 K + 2 C
    backward             V (18 K + 12 C)                      10 C K                14 K + 8 C

    forward    key products <k, k>, <q, k>; inverse; K S, A Y, Q S, P U, K^T U
    backward   states again (K S, A Y, K^T U); dS (Q^T dO, <q, k>, P^T dO, K dS, A^T dU, K^T dY); gradients (K S, A Y,
               dO U^T, dX U^T, dO S^T, dP K, dP^T Q, U dS^T, dY S^T, W K, <k, k>)

where N > 1 passes need min((N - 1) V, K + V) state columns more, without output: passes in turn, or the pass as an
affine map and its powers, which are left out. Bytes are every input read and every result written once, of a forward
q, k, v, g, beta, the output and the final state; of a backward the same inputs and cotangents, and five gradients.
At K = V = 128 and one key head to a value head: 167k and 475k operations, 1032 and 1808 bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What an H100 was measured to reach: copying memory, and 16-bit matrix products.
H100_BYTES_PER_MS, H100_FLOPS_PER_MS = 3.0e9, 750e9
FLOOR_CHUNK = 64
CHECKED_TOKENS, CHECKED_WINDOW = 128, 64


@dataclass(frozen=True)
class Case:
    """q, k [batch, tokens, heads, key_dim], v [batch, tokens, value_heads, value_dim]; `passes` over each window.

    window: tokens of one (None: all).
    """

    batch: int
    tokens: int
    heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    passes: int = 1
    dtype: str = "bfloat16"

    def shortened(self) -> "Case":
        """The same with few enough tokens for the recurrence, two windows of them where there were several."""
        tokens = min(self.tokens, CHECKED_TOKENS)
        return replace(self, tokens=tokens, window=self.window and min(self.window, CHECKED_WINDOW))

    def flops(self, mode: str) -> int:
        """Operations of "forward", "backward" or "forward+backward"; see the module."""
        K, V, C = self.key_dim, self.value_dim, min(FLOOR_CHUNK, self.tokens)
        further = min((self.passes - 1) * V, K + V)
        forward = self.value_heads * (V * (6 * K + 4 * C) + further * (4 * K + 2 * C) + 2 * C * C // 3)
        forward += self.heads * 4 * C * K
        backward = self.value_heads * (V * (18 * K + 12 * C) + further * (14 * K + 8 * C)) + self.heads * 10 * C * K
        return self.batch * self.tokens * _of_mode(mode, forward, backward)

    def bytes(self, mode: str) -> int:
        """Bytes that have to cross the memory bus in `mode`; see the module."""
        size = DTYPES[self.dtype].itemsize
        keys, values = 2 * self.heads * self.key_dim * size, self.value_heads * self.value_dim * size
        gates = 2 * self.value_heads * 4
        states = self.batch * self.value_heads * self.key_dim * self.value_dim * 4
        tokens = _of_mode(mode, keys + 2 * values + gates, 2 * keys + 3 * values + 2 * gates)
        return self.batch * self.tokens * tokens + _of_mode(mode, states, states)

    def floor_ms(self, mode: str) -> float | None:
        """Milliseconds below which an H100 cannot be, None in float32: the longer of the bytes' and the products'."""
        if self.dtype == "float32":
            return None
        return sum(
            max(self.bytes(part) / H100_BYTES_PER_MS, self.flops(part) / H100_FLOPS_PER_MS) for part in mode.split("+")
        )


def _of_mode(mode: str, forward: int, backward: int) -> int:
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[mode]


# Of `bench kernels`, by device: sizes from models, and what stands for them on a CPU.
KERNEL_CASES = {
    "cuda": {
        "long": Case(1, 32768, 16, 32, 128, 128),
        "batch": Case(8, 8192, 16, 32, 128, 128),
        "mid": Case(8, 2048, 16, 16, 128, 128),
        "mid-replay": Case(8, 2048, 16, 16, 128, 128, passes=8),
        "one-window": Case(1, 2048, 16, 16, 128, 128, passes=16),
        "jet": Case(4, 2000, 12, 12, 96, 256),
        "depo": Case(128, 75, 4, 4, 128, 128),
        "rule110": Case(512, 24, 4, 4, 64, 64),
    },
    "cpu": {
        "long": Case(1, 2048, 2, 4, 64, 64, dtype="float32"),
        "batch": Case(4, 512, 2, 4, 64, 64, dtype="float32"),
        "mid": Case(2, 256, 4, 4, 64, 64, dtype="float32"),
        "mid-replay": Case(2, 256, 4, 4, 64, 64, passes=8, dtype="float32"),
        "one-window": Case(1, 256, 4, 4, 64, 64, passes=16, dtype="float32"),
        "jet": Case(2, 250, 3, 3, 48, 128, dtype="float32"),
        "depo": Case(8, 75, 4, 4, 64, 64, dtype="float32"),
        "rule110": Case(64, 24, 4, 4, 32, 32, dtype="float32"),
    },
}

# Of `bench passes`.
PASSES_CASES = {
    "cuda": {
        "mid": Case(8, 2048, 16, 16, 128, 128),
        "windows": Case(1, 32768, 16, 16, 128, 128, window=2048),
    },
    "cpu": {
        "mid": Case(1, 512, 4, 4, 64, 64, dtype="float32"),
        "windows": Case(1, 1024, 4, 4, 64, 64, window=256, dtype="float32"),
    },
}


def make_inputs(case: Case, seed: int, device: torch.device) -> list[Tensor]:
    """q, k, v with unit q and k, float32 g and beta [B, T, HV], and cotangents of output and final state.

    The heads' decay rates go from 1e-4 to 0.1 per token, so that passes matter in some and not in others.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int, of: Callable = torch.randn) -> Tensor:
        return of(*shape, generator=generator, device=device)

    shape, dtype = (case.batch, case.tokens), DTYPES[case.dtype]
    q, k = (F.normalize(random(*shape, case.heads, case.key_dim), dim=-1) for _ in range(2))
    v, d_output = (random(*shape, case.value_heads, case.value_dim) for _ in range(2))
    rates = torch.logspace(-4, -1, case.value_heads, device=device)
    g = -rates * 2 * random(*shape, case.value_heads, of=torch.rand)
    beta = random(*shape, case.value_heads, of=torch.rand)
    d_state = random(case.batch, case.value_heads, case.key_dim, case.value_dim)
    return [*(x.to(dtype) for x in (q, k, v)), g, beta, d_output.to(dtype), d_state]
