"""Settings of which a command's options are made, so that nothing here imports PyTorch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RecallSettings:
    """Of `RecallExperiment`.

    loads      pairs per key dim, n/K, rising: n = round(load * key_dim).
    passes     values of N, rising; infinity is added.
    key_dim    key dim of the memory, K.
    value_dim  value dim of the memory, V.
    codewords  what a value can be: one of so many random vectors, M.
    memories   averaged over; all share the codebook, a heavier load only adds pairs.
    beta       write strength of every token, in (0, 2).
    decay      of the state at each token, as minus its log, in [0, 1].
    seed       of keys, codebook and values.
    device     "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:i"; float64 on each.
    """

    loads: tuple[float, ...] = (0.5, 0.75, 0.9, 1.0, 1.25)
    passes: tuple[int, ...] = tuple(2**i for i in range(11))
    key_dim: int = 64
    value_dim: int = 32
    codewords: int = 1024
    memories: int = 32
    beta: float = 1.0
    decay: float = 0.0
    seed: int = 0
    device: str = "auto"
