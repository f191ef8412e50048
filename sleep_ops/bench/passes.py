"""`sleep-ops bench passes`: time and memory of N replay passes against N.

Ours, passes chained by hand, the layer, and other libraries; every provider is compared with the float64 recurrence
before it is timed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from sleep_ops import SleepGDNLayer
from sleep_ops.bench.cases import DTYPES, PASSES_CASES, Case, make_inputs
from sleep_ops.bench.checks import ERRORS, operator_check, relative_errors, right_ones
from sleep_ops.bench.harness import MACHINE, MODES, TIMES, Problem, default_repeats, environment, measure, run_of
from sleep_ops.bench.providers import CHAINED, operator_problem, replay_of
from sleep_ops.bench.settings import PassesSettings, check_choices, check_counts, check_dtype, check_series
from sleep_ops.checks import check_seed
from sleep_ops.training.config import resolve_device

PROVIDERS = PassesSettings.providers
COLUMNS = [
    *(*MACHINE, "case", "provider", "mode", "dtype", "batch", "tokens", "heads", "head_dim", "window", "passes"),
    *("repeats", *TIMES, "peak_extra_mib", "saved_mib", *ERRORS),
]


def layer_problem(case: Case, seed: int, device: torch.device, **exact) -> Problem:
    """The layer of width heads * key_dim; `exact` (impl, dtype) computes on the same quantised numbers otherwise."""
    dtype, width = exact.pop("dtype", DTYPES[case.dtype]), case.heads * case.key_dim
    torch.manual_seed(seed)
    layer = SleepGDNLayer(width, num_heads=case.heads, head_dim=case.key_dim, window=case.window, **exact)
    layer.to(DTYPES[case.dtype]).to(device, dtype)
    x, d_output = torch.randn(2, case.batch, case.tokens, width).to(DTYPES[case.dtype]).to(device, dtype)
    d_state = torch.randn(case.batch, case.heads, case.key_dim, case.key_dim).to(device)
    x.requires_grad_()

    def run(passes):
        layer.passes = passes
        output, state = layer(x, return_state=True)
        return output, state.fast_weights

    return Problem(run, [x, *layer.parameters()], [d_output, d_state])


def layer_check(case: Case, seed: int, device: torch.device) -> dict[str, float]:
    """Errors of a layer of at most two heads on few tokens, against the same in float64 by the recurrence."""
    heads = min(case.heads, 2)
    case = replace(case.shortened(), batch=1, heads=heads, value_heads=heads)
    truth = layer_problem(case, seed, torch.device("cpu"), impl="reference", dtype=torch.float64)
    return relative_errors(layer_problem(case, seed, device), truth, lambda x, _: x.detach().cpu().double())


@dataclass(frozen=True)
class PassesBenchmark(PassesSettings):
    """The benchmark of these settings. Raises ValueError for one that is unknown or out of range."""

    def __post_init__(self):
        check_counts(self, "batch", "tokens", "heads", "head_dim", "window", "repeats", "max_chained")
        check_seed(self.seed)
        check_series(self, "passes")
        check_choices(self, cases=PASSES_CASES["cpu"], providers=PROVIDERS)
        check_dtype(self)
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
        common = environment(device) | {"repeats": self.repeats or default_repeats(device)}
        for name in self.cases:
            case = self._case(name, device)
            show(f"{name}: checking")
            checked = self._check(name, case, device, tell)
            inputs = make_inputs(case, self.seed, device)
            problems = {
                provider: layer_problem(case, self.seed, device)
                if provider == "layer"
                else operator_problem(replay_of(provider, case, device), case, inputs)
                for provider in checked
            }
            sizes = {n: getattr(case, n) for n in ("dtype", "batch", "tokens", "heads")}
            sizes |= {"case": name, "head_dim": case.key_dim, "window": case.window or case.tokens}
            for passes in sorted(self.passes):
                chosen = {p: x for p, x in problems.items() if passes <= self.max_chained or p not in CHAINED}
                for mode in MODES:
                    show(f"{name}: N = {passes}, {mode}")
                    label = f"N = {passes}, {mode}"
                    runs = {provider: run_of(x, passes, mode, device) for provider, x in chosen.items()}

                    def note(provider: str, why: str, name: str = name, label: str = label) -> None:
                        tell(f"{name}: {provider}, {label}: {why}")

                    rows = []
                    for provider, figures in measure(runs, common["repeats"], device, note).items():
                        row = common | sizes | checked[provider] | figures
                        row |= {"provider": provider, "mode": mode, "passes": passes}
                        rows.append({column: row[column] for column in COLUMNS})
                    yield rows

    def _case(self, name: str, device: torch.device) -> Case:
        given = {n: getattr(self, n) for n in ("batch", "tokens", "window", "dtype")}
        given |= {"heads": self.heads, "value_heads": self.heads, "key_dim": self.head_dim, "value_dim": self.head_dim}
        case = replace(PASSES_CASES[device.type][name], **{n: x for n, x in given.items() if x is not None})
        return case if case.window is None or case.window < case.tokens else replace(case, window=None)

    def _check(self, name: str, case: Case, device: torch.device, tell: Callable) -> dict[str, dict[str, float]]:
        """The errors of the providers that are right."""

        def check(provider: str) -> dict[str, float]:
            if provider == "layer":
                return layer_check(case, self.seed, device)
            return operator_check(replay_of(provider, case, device), case, self.seed, device)

        checks: dict = {provider: lambda provider=provider: check(provider) for provider in self.providers}
        right = right_ones(checks, case.dtype, lambda provider, why: tell(f"{name}: {provider} {why}"))
        for provider in right:
            if provider in CHAINED and max(self.passes) > self.max_chained:
                tell(f"{name}: {provider} is timed up to N = {self.max_chained}, more with --max-chained")
        return right
