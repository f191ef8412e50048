"""Time and memory of N replay passes against N: ours, passes chained by hand, the layer, and other libraries.

A chained provider calls a one-pass operator N times on each window in turn, handing on the state. Every provider is
compared with the float64 recurrence before it is timed. Operators get keys and queries already normalised.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import statistics
import subprocess
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops import SleepGDNLayer, gated_delta_rule, sleep_gated_delta_rule
from sleep_ops.reference import sleep_gated_delta_rule_reference
from sleep_ops.training.config import resolve_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("forward", "backward", "forward+backward")
COLUMNS = [
    *("revision", "device", "python", "torch", "triton", "fla", "flash_qla", "threads", "case", "provider", "mode"),
    *("dtype", "batch", "tokens", "heads", "head_dim", "window", "passes", "repeats", "ms_median", "ms_p20", "ms_p80"),
    *("peak_extra_mib", "saved_mib", "error_output", "error_state", "error_gradient", "error_bound"),
]
# The largest relative error (norm over norm, of the output, the final state and each gradient) that counts as right.
ERROR_BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
CHECKED_PASSES = (1, 2, 3, 4)
CHECKED_TOKENS, CHECKED_WINDOW = 128, 64
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """batch x tokens in windows (None: one), and heads of head_dim keys and as many values."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    window: int | None
    dtype: str

    def shortened(self) -> "Case":
        """The same with few enough tokens for the recurrence, two windows of them where there were several."""
        tokens = min(self.tokens, CHECKED_TOKENS)
        return replace(self, tokens=tokens, window=self.window and min(self.window, CHECKED_WINDOW))


CASES = {
    "cuda": {
        "mid": Case(8, 2048, 16, 128, None, "bfloat16"),
        "windows": Case(1, 32768, 16, 128, 2048, "bfloat16"),
    },
    "cpu": {
        "mid": Case(1, 512, 4, 64, None, "float32"),
        "windows": Case(1, 1024, 4, 64, 256, "float32"),
    },
}


class Problem(NamedTuple):
    """run(N) -> (output, final state), differentiated in `leaves` from the cotangents of both."""

    run: Callable[[int], tuple[Tensor, Tensor]]
    leaves: list[Tensor]
    cotangents: list[Tensor]


def replayed(q, k, v, g, beta, *, passes, window):
    """The sleep operator: the provider `ours`."""
    return sleep_gated_delta_rule(q, k, v, g, beta, passes=passes, window=window)


def chained(one_pass: Callable) -> Callable:
    """The replay that makes `passes` calls one_pass(q, k, v, g, beta, state) -> (output, state) on each window."""

    def replay(q, k, v, g, beta, *, passes, window):
        state, outputs = None, []
        for tokens in zip(*(x.split(window or v.shape[1], 1) for x in (q, k, v, g, beta)), strict=True):
            for _ in range(passes):
                output, state = one_pass(*tokens, state)
            outputs.append(output)
        return torch.cat(outputs, 1) if len(outputs) > 1 else output, state

    return replay


def our_pass(q, k, v, g, beta, state):
    return gated_delta_rule(q, k, v, g, beta, initial_state=state)


def their_pass(operator, q, k, v, g, beta, state):
    """One pass by an operator with the keywords that fla and FlashQLA share."""
    scale = k.shape[-1] ** -0.5
    return operator(q=q, k=k, v=v, g=g, beta=beta, scale=scale, initial_state=state, output_final_state=True)


def load_fla(case: Case, device: torch.device) -> Callable:
    """flash-linear-attention's operator on its own Triton kernels. Raises ValueError for a case it cannot run."""
    if device.type != "cuda" or case.dtype == "float32":
        raise ValueError("it needs CUDA, and float16 or bfloat16")
    os.environ.update(FLA_TILELANG="0", FLA_FLASH_QLA="0")  # read at import: no other library's kernels in its place
    operator = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    if torch.cuda.get_device_capability(device)[0] == 9:
        # On Hopper it refuses Triton before 3.7.1, which miscompiles some of its shapes: whether these, is checked.
        importlib.import_module("fla.ops.common.chunk_o").TRITON_ABOVE_3_7_1 = True
    return functools.partial(their_pass, operator)


def load_flash_qla(case: Case, device: torch.device) -> Callable:
    """FlashQLA's operator, with the keywords its source documents; not run yet. ValueError for a case it cannot run."""
    if device.type != "cuda" or case.dtype != "bfloat16" or case.head_dim != 128:
        raise ValueError("it needs CUDA, bfloat16 and head_dim = 128")
    return functools.partial(their_pass, importlib.import_module("flash_qla").chunk_gated_delta_rule)


# Optional libraries: provider -> (module, what makes its one-pass operator).
LIBRARIES = {"fla": ("fla", load_fla), "flash-qla": ("flash_qla", load_flash_qla)}
CHAINED = ("ours-chained", *LIBRARIES)
PROVIDERS = ("ours", "ours-chained", "layer", *LIBRARIES)


def replay_of(provider: str, case: Case, device: torch.device) -> Callable:
    """replay(q, k, v, g, beta, *, passes, window) -> (output, final state) of an operator's provider.

    Raises ImportError for a library that is not installed, ValueError for a case it cannot run.
    """
    if provider not in LIBRARIES:
        return {"ours": replayed, "ours-chained": chained(our_pass)}[provider]
    module, load = LIBRARIES[provider]
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{module} is not installed")
    return chained(load(case, device))


def make_inputs(case: Case, seed: int, device: torch.device) -> list[Tensor]:
    """q, k, v [B, T, H, K] with unit q and k, float32 g and beta [B, T, H], and cotangents of output and final state.

    The heads' decay rates go from 1e-4 to 0.1 per token, so that passes matter in some and not in others.
    """
    generator = torch.Generator().manual_seed(seed)
    shape, dtype = (case.batch, case.tokens, case.heads), DTYPES[case.dtype]
    q, k, v, d_output = (torch.randn(*shape, case.head_dim, generator=generator) for _ in range(4))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    g = -torch.logspace(-4, -1, case.heads) * 2 * torch.rand(shape, generator=generator)
    beta = torch.rand(shape, generator=generator)
    d_state = torch.randn(case.batch, case.heads, case.head_dim, case.head_dim, generator=generator)
    q, k, v, d_output = (x.to(device, dtype) for x in (q, k, v, d_output))
    return [q, k, v, g.to(device), beta.to(device), d_output, d_state.to(device)]


def operator_problem(replay: Callable, case: Case, inputs: list[Tensor]) -> Problem:
    leaves = [x.detach().requires_grad_() for x in inputs[:5]]
    return Problem(lambda n: replay(*leaves, passes=n, window=case.window), leaves, inputs[5:])


def layer_problem(case: Case, seed: int, device: torch.device, **exact) -> Problem:
    """The layer of width heads * head_dim; `exact` (impl, dtype) computes on the same quantised numbers otherwise."""
    dtype, width = exact.pop("dtype", DTYPES[case.dtype]), case.heads * case.head_dim
    torch.manual_seed(seed)
    layer = SleepGDNLayer(width, num_heads=case.heads, head_dim=case.head_dim, window=case.window, **exact)
    layer.to(DTYPES[case.dtype]).to(device, dtype)
    x, d_output = torch.randn(2, case.batch, case.tokens, width).to(DTYPES[case.dtype]).to(device, dtype)
    d_state = torch.randn(case.batch, case.heads, case.head_dim, case.head_dim).to(device)
    x.requires_grad_()

    def run(passes):
        layer.passes = passes
        output, state = layer(x, return_state=True)
        return output, state.fast_weights

    return Problem(run, [x, *layer.parameters()], [d_output, d_state])


def gradients(problem: Problem, roots: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    cotangents = [c.to(root.dtype) for c, root in zip(problem.cotangents, roots, strict=True)]
    return torch.autograd.grad(roots, problem.leaves, cotangents)


def operator_check(replay: Callable, case: Case, seed: int, device: torch.device) -> dict[str, float]:
    """Errors on few tokens: of the last row and the outermost heads, against the recurrence on just those."""
    case, heads = case.shortened(), torch.tensor(sorted({0, case.heads - 1}))
    inputs = make_inputs(case, seed, device)

    def part(x: Tensor, head_axis: int) -> Tensor:
        return x[-1:].index_select(head_axis, heads.to(x.device)).detach().cpu().double()

    exact = [part(x, 2) for x in inputs[:-1]] + [part(inputs[-1], 1)]
    truth = operator_problem(sleep_gated_delta_rule_reference, case, exact)
    return relative_errors(operator_problem(replay, case, inputs), truth, part)


def layer_check(case: Case, seed: int, device: torch.device) -> dict[str, float]:
    """Errors of a layer of at most two heads on few tokens, against the same in float64 by the recurrence."""
    case = replace(case.shortened(), batch=1, heads=min(case.heads, 2))
    truth = layer_problem(case, seed, torch.device("cpu"), impl="reference", dtype=torch.float64)
    return relative_errors(layer_problem(case, seed, device), truth, lambda x, _: x.detach().cpu().double())


def relative_errors(problem: Problem, truth: Problem, part: Callable) -> dict[str, float]:
    """The worst over CHECKED_PASSES; of the gradients also over the leaves. `part` picks what `truth` computes."""
    worst = {"error_output": 0.0, "error_state": 0.0, "error_gradient": 0.0}
    for passes in CHECKED_PASSES:
        results = []
        for x in (problem, truth):
            roots = x.run(passes)
            results.append([*roots, *gradients(x, roots)])
        for i, (found, exact) in enumerate(zip(*results, strict=True)):
            name, head_axis = list(worst)[min(i, 2)], 1 if i == 1 else 2
            error = (part(found, head_axis) - exact.detach()).norm() / exact.detach().norm().clamp(min=1e-30)
            worst[name] = max(worst[name], error.nan_to_num(nan=math.inf).item())
    return worst


class Stopwatch:
    """A block's `ms`, by CUDA events or the host's clock, and its `peak` of allocated bytes (0 on the CPU)."""

    def __init__(self, device: torch.device):
        self.device = device if device.type == "cuda" else None

    def __enter__(self):
        if self.device:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record(torch.cuda.current_stream(self.device))
        else:
            self._start = time.perf_counter()
        return self

    def __exit__(self, *_):
        if self.device:
            self._events[1].record(torch.cuda.current_stream(self.device))
            torch.cuda.synchronize(self.device)
            self.ms = self._events[0].elapsed_time(self._events[1])
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self.ms, self.peak = (time.perf_counter() - self._start) * 1e3, 0


def run_once(problem: Problem, passes: int, mode: str, device: torch.device) -> tuple[float, float]:
    """(milliseconds, peak MiB above what was held before). The forward alone records no graph."""
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    watch = Stopwatch(device)
    if mode == "forward":
        with torch.no_grad(), watch:
            problem.run(passes)
    elif mode == "backward":
        roots = problem.run(passes)
        with watch:
            gradients(problem, roots)
    else:
        with watch:
            gradients(problem, problem.run(passes))
    return watch.ms, (watch.peak - held) / MIB


class _Saved:
    """A tensor that lives as long as the graph node that saved it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def saved_mib(problem: Problem, passes: int) -> float:
    """MiB that autograd keeps for the backward: each storage counted once, those of the leaves not."""
    alive = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        box = _Saved(tensor)
        alive.add(box)
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        roots = problem.run(passes)
    storages = [box.tensor.untyped_storage() for box in alive]
    kept = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for leaf in problem.leaves:
        kept.pop(leaf.untyped_storage().data_ptr(), None)
    del roots
    return sum(kept.values()) / MIB


@dataclass(frozen=True)
class PassesBenchmark:
    """The named cases with this device's sizes and dtype, unless some are given here.

    passes        values of N; chained providers stop at max_chained.
    cases         "mid" is one window, "windows" a long sequence in several.
    providers     those of PROVIDERS to measure; one that is missing, unsuited or wrong is left out with a note.
    batch, tokens, heads, head_dim, window, dtype    replace the cases' own.
    repeats       timed runs for every figure: by default 20 on CUDA, 5 on the CPU.

    Raises ValueError for a setting that is unknown or out of range.
    """

    passes: tuple[int, ...] = (1, 2, 3, 4, 8, 16, 64, 256)
    cases: tuple[str, ...] = ("mid", "windows")
    providers: tuple[str, ...] = PROVIDERS
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

    def __post_init__(self):
        for name in (*("batch", "tokens", "heads", "head_dim", "window", "repeats"), "max_chained", "seed"):
            value, low = getattr(self, name), 0 if name == "seed" else 1
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
        if not self.passes or min(self.passes) < 1 or len(set(self.passes)) < len(self.passes):
            raise ValueError(f"passes: expected distinct integers >= 1, got {self.passes!r}")
        for name, known in (("cases", CASES["cpu"]), ("providers", PROVIDERS)):
            chosen = getattr(self, name)
            if not chosen or not set(chosen) <= set(known) or len(set(chosen)) < len(chosen):
                raise ValueError(f"{name}: expected distinct ones of {', '.join(known)}, got {', '.join(chosen)!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {tuple(DTYPES)}, got {self.dtype!r}")
        resolve_device(self.device)

    @property
    def steps(self) -> int:
        """How often `run` yields."""
        return len(self.cases) * len(self.passes) * len(MODES)

    def run(
        self, tell: Callable[[str], None], show: Callable[[str], None] = lambda label: None
    ) -> Iterator[list[dict]]:
        """Yield the rows of each (case, N, mode). tell: of what is not measured, and why; show: of what comes next."""
        device = resolve_device(self.device)
        common = environment(device) | {"repeats": self.repeats or (20 if device.type == "cuda" else 5)}
        for name in self.cases:
            case = self._case(name, device)
            show(f"{name}: checking")

            def note(text: str, name: str = name) -> None:
                tell(f"{name}: {text}")

            checked = self._check(case, device, note)
            inputs = make_inputs(case, self.seed, device)
            problems = {
                provider: layer_problem(case, self.seed, device)
                if provider == "layer"
                else operator_problem(replay_of(provider, case, device), case, inputs)
                for provider in checked
            }
            sizes = {n: getattr(case, n) for n in ("dtype", "batch", "tokens", "heads", "head_dim")}
            sizes |= {"case": name, "window": case.window or case.tokens, "error_bound": ERROR_BOUNDS[case.dtype]}
            for passes in sorted(self.passes):
                chosen = {p: x for p, x in problems.items() if passes <= self.max_chained or p not in CHAINED}
                for mode in MODES:
                    show(f"{name}: N = {passes}, {mode}")
                    rows = []
                    for provider, figures in measure(chosen, passes, mode, common["repeats"], device, note).items():
                        row = common | sizes | checked[provider] | figures
                        row |= {"provider": provider, "mode": mode, "passes": passes}
                        rows.append({column: row[column] for column in COLUMNS})
                    yield rows

    def _case(self, name: str, device: torch.device) -> Case:
        given = {n: getattr(self, n) for n in ("batch", "tokens", "heads", "head_dim", "window", "dtype")}
        case = replace(CASES[device.type][name], **{n: value for n, value in given.items() if value is not None})
        return case if case.window is None or case.window < case.tokens else replace(case, window=None)

    def _check(self, case: Case, device: torch.device, tell: Callable) -> dict[str, dict[str, float]]:
        """The errors of the providers that are right."""
        right = {}
        for provider in self.providers:
            try:
                if provider == "layer":
                    errors = layer_check(case, self.seed, device)
                else:
                    errors = operator_check(replay_of(provider, case, device), case, self.seed, device)
            except Exception as error:
                if provider not in LIBRARIES:
                    raise
                tell(f"{provider} is not timed: {str(error).partition(chr(10))[0] or type(error).__name__}")
                continue
            bound = ERROR_BOUNDS[case.dtype]
            wrong = ", ".join(f"{what} = {error:.2g}" for what, error in errors.items() if not error <= bound)
            if wrong:
                tell(f"{provider} is WRONG and not timed: {wrong}, at most {bound:g} expected")
                continue
            right[provider] = errors
            if provider in CHAINED and max(self.passes) > self.max_chained:
                tell(f"{provider} is timed up to N = {self.max_chained}, more with --max-chained")
        return right


def measure(
    problems: dict[str, Problem], passes: int, mode: str, repeats: int, device: torch.device, tell: Callable
) -> dict[str, dict]:
    """Time, quantiles and memory by provider, which take turns. One that runs out of memory is told of and left out."""
    samples, kept = {provider: [] for provider in problems}, {}
    for repeat in range(-2 if device.type == "cuda" else -1, repeats):
        for provider in list(samples):
            try:
                sample = run_once(problems[provider], passes, mode, device)
                if repeat == -1 and mode != "forward":
                    kept[provider] = saved_mib(problems[provider], passes)
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                    raise
                tell(f"{provider}, N = {passes}, {mode}: out of memory, no row")
                del samples[provider]
                continue
            if repeat >= 0:
                samples[provider].append(sample)
    figures = {}
    for provider, pairs in samples.items():
        times, peaks = zip(*pairs, strict=True)
        low, *_, high = statistics.quantiles(times, n=5, method="inclusive") if repeats > 1 else times * 2
        figures[provider] = {"ms_median": statistics.median(times), "ms_p20": low, "ms_p80": high}
        figures[provider]["peak_extra_mib"] = max(peaks) if device.type == "cuda" else ""
        figures[provider]["saved_mib"] = kept.get(provider, "")
    return figures


def environment(device: torch.device) -> dict:
    """What a timing depends on besides the code under test."""
    versions = {"triton": "triton", "fla": "fla-core", "flash_qla": "flash-qla"}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    return {
        "revision": _revision(),
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{column: _version(distribution) for column, distribution in versions.items()},
        "threads": torch.get_num_threads(),
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _revision() -> str:
    """The checkout's commit, with -dirty where files differ from it; empty outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def plot(rows: list[dict], path: Path) -> None:
    """Time of each mode, and memory, against N on logarithmic axes: a row per case, a line per provider.

    Bands are the 20th to 80th percentile. Memory is the peak of a forward and backward on CUDA, elsewhere what is kept
    for the backward.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row["case"] for row in rows))
    memory = ("peak_extra_mib", "peak MiB above the inputs")
    if rows[0]["peak_extra_mib"] == "":
        memory = ("saved_mib", "MiB kept for the backward")
    panels = [(mode, "ms_median", f"{mode} (ms)") for mode in MODES] + [(MODES[-1], *memory)]
    colours = dict(zip(PROVIDERS, plt.get_cmap("tab10").colors, strict=False))

    figure = plt.figure(figsize=(15, 4 * len(cases)), layout="constrained")
    for case, part in zip(cases, figure.subfigures(len(cases), squeeze=False)[:, 0], strict=True):
        lines = [row for row in rows if row["case"] == case]
        sizes = "{batch} x {tokens} tokens, windows of {window}, {heads} heads of {head_dim}, {dtype}, {device}"
        part.suptitle(f"{case}: {sizes}".format(**lines[0]))
        for (mode, figure_of, title), axes in zip(panels, part.subplots(1, len(panels)), strict=True):
            for provider in dict.fromkeys(row["provider"] for row in lines):
                line = [row for row in lines if (row["provider"], row["mode"]) == (provider, mode)]
                passes, colour = [row["passes"] for row in line], colours[provider]
                axes.plot(passes, [row[figure_of] for row in line], "o-", markersize=3, color=colour, label=provider)
                if figure_of == "ms_median":
                    low, high = ([row[key] for row in line] for key in ("ms_p20", "ms_p80"))
                    axes.fill_between(passes, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.set(xlabel="passes N", title=title, yscale="log")
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3, which="both")
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
