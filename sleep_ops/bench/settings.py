"""The benchmarks' settings, of which their commands' options are made, so that nothing here imports PyTorch at once.

And their checks: ValueError naming the setting, what was expected and what was got.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sleep_ops.checks import check_count, check_distinct_counts


@dataclass(frozen=True)
class PassesSettings:
    """Of `bench passes`. Sizes and dtype are the cases' own on this device, unless some are given here.

    passes       values of N.
    cases        "mid" is one window, "windows" a long sequence in several.
    providers    what to measure; one that is missing, unsuited or wrong is left out with a note.
    batch        sequences.
    tokens       per sequence.
    heads        of keys and values.
    head_dim     key and value dim of a head.
    window       tokens per window.
    dtype        "float32", "bfloat16" or "float16"; by default bfloat16 on CUDA, float32 on the CPU.
    max_chained  largest N of the providers that call a one-pass operator N times.
    repeats      timed runs for every figure; by default 20 on CUDA, 5 on the CPU.
    """

    passes: tuple[int, ...] = (1, 2, 3, 4, 8, 16, 64, 256)
    cases: tuple[str, ...] = ("mid", "windows")
    providers: tuple[str, ...] = ("ours", "ours-chained", "layer", "fla", "flash-qla")
    batch: int | None = None
    tokens: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    dtype: str | None = None
    max_chained: int = 16
    repeats: int | None = None
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class KernelsSettings:
    """Of `bench kernels`.

    cases       sizes, by the model or shape they are of; small stand-ins on the CPU.
    providers   what to measure; fla and flash-qla where installed, and if asked for, transformers' PyTorch form.
    sweep       vary each case's "tokens", or its "window" (with at least four passes over each, for without replay
                windows make no difference; only those shorter than the case).
    first_call  also time the first forward and backward of `ours` in a new process, with everything to compile.
    passes      replay passes; the case's own by default.
    dtype       "float32", "bfloat16" or "float16"; by default bfloat16 on CUDA, float32 on the CPU.
    repeats     timed runs for every figure; by default 20 on CUDA, 5 on the CPU.
    """

    cases: tuple[str, ...] = ("long", "batch", "mid", "mid-replay", "one-window", "jet", "depo", "rule110")
    providers: tuple[str, ...] = ("ours", "torch", "fla", "flash-qla")
    sweep: str | None = None
    first_call: bool = False
    passes: int | None = None
    dtype: str | None = None
    repeats: int | None = None
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class TrainSettings:
    """Of `bench train`.

    presets        "rule110", "depo", "1.4b", "demo" (a CPU's), "tiny"; the first three on CUDA, tiny on the CPU by
                   default.
    passes         values of N.
    windows        values of L for all presets, each preset's own by default; those no shorter than its text are left
                   out.
    checkpointing  activation checkpointing: "off", "on" or both; of ours alone.
    providers      what to measure; fla where installed.
    cuda_graph     also ours with forward and backward as one recorded CUDA graph.
    batch          sequences; the presets' own by default.
    precision      "auto" (bf16 on CUDA), "bf16" or "float32".
    repeats        timed steps for every figure; by default 5 on CUDA, 3 on the CPU.
    """

    presets: tuple[str, ...] | None = None
    passes: tuple[int, ...] = (1, 2, 4, 8)
    windows: tuple[int, ...] | None = None
    checkpointing: tuple[str, ...] = ("off", "on")
    providers: tuple[str, ...] = ("ours", "fla")
    cuda_graph: bool = False
    batch: int | None = None
    precision: str = "auto"
    repeats: int | None = None
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class TuneSettings:
    """Of `bench tune`.

    cases    cases of `bench kernels`, each of which stands for its head dims.
    chunks   lengths of a chunk to try, where the case has it; the rest is as in the row that holds now.
    kernels  kernels to vary: of long sequences the first four, of the shortest the others.
    dtype    "float32", "bfloat16" or "float16"; the cases' own by default, bfloat16.
    repeats  timed runs of every candidate, of ten replays of its graph each.
    """

    cases: tuple[str, ...] = ("long", "jet", "rule110")
    chunks: tuple[int, ...] = (16, 32, 64)
    kernels: tuple[str, ...] = (
        *("prepare", "scan", "reverse", "grad"),
        *("single_chunk_forward", "single_chunk_backward"),
    )
    dtype: str | None = None
    repeats: int = 20
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class LaunchesSettings:
    """Of `bench launches`.

    cases    cases of `bench kernels`.
    passes   replay passes; the case's own by default.
    dtype    "float32", "bfloat16" or "float16"; the cases' own by default, bfloat16.
    repeats  timed runs of every launch and of the call.
    """

    cases: tuple[str, ...] = KernelsSettings.cases
    passes: int | None = None
    dtype: str | None = None
    repeats: int = 20
    seed: int = 0
    device: str = "auto"


def check_counts(settings: object, *names: str) -> None:
    """Integers >= 1, or None."""
    for name in names:
        if (value := getattr(settings, name)) is not None:
            check_count(name, value)


def check_series(settings: object, *names: str) -> None:
    """Tuples of distinct integers >= 1, or None."""
    for name in names:
        if (values := getattr(settings, name)) is not None:
            check_distinct_counts(name, values)


def check_choices(settings: object, **known: Iterable[str]) -> None:
    """Tuples of distinct known names, at least one."""
    for name, names in known.items():
        chosen = getattr(settings, name)
        if not chosen or not set(chosen) <= set(names) or len(set(chosen)) < len(chosen):
            raise ValueError(f"{name}: expected distinct ones of {', '.join(names)}, got {', '.join(chosen)!r}")


def check_dtype(settings: object) -> None:
    """A name in DTYPES, or None."""
    from sleep_ops.bench.cases import DTYPES

    dtype = settings.dtype  # type: ignore[attr-defined]
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {tuple(DTYPES)}, got {dtype!r}")
