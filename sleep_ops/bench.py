"""Time of N replay passes, of the operator and of the layer, as a long-format CSV."""

import platform
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sleep_ops import SleepGDNLayer, sleep_gated_delta_rule
from sleep_ops.training.config import resolve_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = [
    *("revision", "device", "python", "torch", "triton", "threads", "case", "provider", "mode", "dtype"),
    *("batch", "tokens", "heads", "head_dim", "window", "passes", "repeats"),
    *("ms_median", "ms_p20", "ms_p80", "peak_mib"),
]


@dataclass(frozen=True)
class PassesBenchmark:
    """batch x tokens, heads of head_dim, replayed in windows `passes` times, for each of `passes`."""

    passes: tuple[int, ...] = (1, 2, 4, 8)
    batch: int = 4
    tokens: int = 512
    heads: int = 4
    head_dim: int = 64
    window: int = 128
    dtype: str = "float32"
    repeats: int = 10
    seed: int = 0
    device: str = "auto"

    def __post_init__(self):
        for name in ("batch", "tokens", "heads", "head_dim", "window", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)!r}")
        if not self.passes or min(self.passes) < 1:
            raise ValueError(f"passes: expected integers >= 1, got {self.passes!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {tuple(DTYPES)}, got {self.dtype!r}")
        resolve_device(self.device)

    def run(self, told=None) -> list[dict]:
        """One row per (provider, mode, passes). `told(row)` is called as each is measured."""
        device, rows = resolve_device(self.device), []
        common = {
            **environment(device),
            "case": "replay",
            "repeats": self.repeats,
            **{k: getattr(self, k) for k in ("dtype", "batch", "tokens", "heads", "head_dim", "window")},
        }
        for provider in ("operator", "layer"):
            for passes in self.passes:
                forward = getattr(self, f"_{provider}")(passes, device)
                for mode in ("forward", "forward+backward"):
                    figures = self._time(forward, mode != "forward", device)
                    row = {**common, "provider": provider, "mode": mode, "passes": passes, **figures}
                    rows.append({column: row[column] for column in COLUMNS})
                    if told:
                        told(rows[-1])
        return rows

    def _operator(self, passes, device):
        torch.manual_seed(self.seed)
        dtype, shape = DTYPES[self.dtype], (self.batch, self.tokens, self.heads)
        q, k, v = (torch.randn(*shape, self.head_dim, device=device, dtype=dtype) for _ in range(3))
        g = torch.nn.functional.logsigmoid(torch.randn(shape, device=device)).to(dtype)
        beta = torch.rand(shape, device=device).to(dtype)
        inputs = [x.requires_grad_() for x in (q, k, v, g, beta)]
        window = min(self.window, self.tokens)

        def forward():
            output = sleep_gated_delta_rule(*inputs, passes=passes, window=window, use_qk_l2norm=True).output
            return output, inputs

        return forward

    def _layer(self, passes, device):
        torch.manual_seed(self.seed)
        width = self.heads * self.head_dim
        layer = SleepGDNLayer(
            width,
            num_heads=self.heads,
            head_dim=self.head_dim,
            passes=passes,
            window=min(self.window, self.tokens),
        ).to(device, DTYPES[self.dtype])
        x = torch.randn(self.batch, self.tokens, width, device=device, dtype=DTYPES[self.dtype], requires_grad=True)
        return lambda: (layer(x), [x, *layer.parameters()])

    def _time(self, forward, backward: bool, device) -> dict:
        cuda = device.type == "cuda"

        def once():
            if not backward:
                with torch.no_grad():
                    forward()
                return
            output, inputs = forward()
            # With the causal outputs of a layer, the last window's replays reach no output.
            torch.autograd.grad(output.float().square().sum(), inputs, allow_unused=True)

        for _ in range(3 if cuda else 1):
            once()
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        times = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            once()
            if cuda:
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - start) * 1e3)
        low, *_, high = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 2
        peak = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else float("nan")
        return {"ms_median": statistics.median(times), "ms_p20": low, "ms_p80": high, "peak_mib": peak}


def environment(device: torch.device) -> dict:
    """What a timing depends on besides the code under test."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    return {
        "revision": revision,
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "threads": torch.get_num_threads(),
    }


def plot(rows: list[dict], path: Path) -> None:
    """Time against N, one line per provider and mode, with the 20th to 80th percentile as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for provider, mode in dict.fromkeys((r["provider"], r["mode"]) for r in rows):
        line = [r for r in rows if (r["provider"], r["mode"]) == (provider, mode)]
        median = [r["ms_median"] for r in line]
        spread = [[abs(r[key] - r["ms_median"]) for r in line] for key in ("ms_p20", "ms_p80")]
        passes = [r["passes"] for r in line]
        axes.errorbar(passes, median, spread, marker="o", markersize=3, capsize=2, label=f"{provider}, {mode}")
    first = rows[0]
    title = f"{first['batch']} x {first['tokens']} tokens, windows of {first['window']}, {first['dtype']}"
    axes.set(xlabel="passes N", ylabel="milliseconds", title=f"{title}\n{first['device']}")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
