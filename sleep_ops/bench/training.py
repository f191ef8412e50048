"""`sleep-ops bench train`: tokens per second and memory of a training step, against passes N and window L.

A step is forward, loss, backward, clipping and both optimisers as in the trainer (without PyTorch's deterministic
algorithms, which that asks for), on the same random tokens again and again: ours with and without activation
checkpointing, eager and as a recorded CUDA graph, and the same hybrid written with fla's layers. The parts for CUDA
have not run on a GPU yet.
"""

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sleep_ops import HybridConfig, SleepHybridModel
from sleep_ops.bench.fla_hybrid import load_fla_hybrid
from sleep_ops.bench.harness import MACHINE, MIB, TIMES, Run, Stopwatch, environment, first_line, measure
from sleep_ops.bench.settings import TrainSettings, check_choices, check_counts, check_series
from sleep_ops.checks import check_seed
from sleep_ops.tasks import Batch
from sleep_ops.training.config import TrainConfig, resolve_device
from sleep_ops.training.graph import StepGraphs
from sleep_ops.training.optim import build_optimizers
from sleep_ops.training.run import autocast

PROVIDERS = TrainSettings.providers
CHECKPOINTING = {"off": False, "on": True}
EAGER, GRAPH = "eager", "cuda-graph"
COLUMNS = [
    *(*MACHINE, "preset", "provider", "mode", "checkpointing", "precision", "passes", "window", "batch", "tokens"),
    *("layers", "width", "parameters", "repeats", *TIMES, "tokens_per_second", "peak_mib"),
]


@dataclass(frozen=True)
class Preset:
    """Sequences whose last `answer` tokens have loss, values of L, and the settings of a `HybridConfig`."""

    batch: int
    tokens: int
    answer: int
    windows: tuple[int, ...]
    model: dict = field(default_factory=dict)


PRESETS = {
    "rule110": Preset(512, 100, 4, (24,), {"vocab_size": 3, "hidden_size": 256, "layers": ("attn", "gdn") * 2}),
    "depo": Preset(128, 360, 60, (75,), {"vocab_size": 128, "hidden_size": 512, "layers": ("attn", "gdn") * 5}),
    "1.4b": Preset(
        *(1, 12000, 200, (512, 1024, 2048, 4096)),
        {"vocab_size": 49152, "hidden_size": 2048, "layers": ("attn", "gdn") * 12, "num_heads": 16}
        | {"intermediate_size": 5632, "tie_embeddings": True},
    ),
    "demo": Preset(128, 26, 2, (12,), {"vocab_size": 3, "hidden_size": 64, "layers": ("attn", "gdn") * 2}),
    "tiny": Preset(8, 40, 4, (12,), {"vocab_size": 3, "hidden_size": 32, "layers": ("attn", "gdn")}),
}
DEFAULTS = {"cuda": ("rule110", "depo", "1.4b"), "cpu": ("tiny",)}


class Point(NamedTuple):
    """What one row is about."""

    passes: int
    window: int
    mode: str
    checkpointing: str


@dataclass(frozen=True)
class TrainBenchmark(TrainSettings):
    """The benchmark of these settings.

    Raises ValueError for one that is unknown or out of range, and for cuda_graph without CUDA.
    """

    def __post_init__(self):
        device = resolve_device(self.device)
        if self.presets is None:
            object.__setattr__(self, "presets", DEFAULTS[device.type])
        check_choices(self, presets=PRESETS, checkpointing=CHECKPOINTING, providers=PROVIDERS)
        check_series(self, "passes", "windows")
        check_counts(self, "batch", "repeats")
        check_seed(self.seed)
        TrainConfig(precision=self.precision)
        if self.cuda_graph and device.type != "cuda":
            raise ValueError(f"cuda_graph: expected False without CUDA, got True on {device}")

    def points(self, name: str, provider: str) -> list[Point]:
        """The rows of a preset and provider."""
        preset = PRESETS[name]
        windows = [window for window in self.windows or preset.windows if window < preset.tokens]
        modes = (EAGER, GRAPH) if self.cuda_graph and provider == "ours" else (EAGER,)
        checkpointing = self.checkpointing if provider == "ours" else ("off",)
        return [
            Point(passes, window, mode, way)
            for window in windows
            for mode in modes
            for way in checkpointing
            for passes in sorted(self.passes)
        ]

    @property
    def steps(self) -> int:
        """How often `run` yields at the most."""
        return sum(len(self.points(name, provider)) for name in self.presets for provider in self.providers)

    def run(
        self, tell: Callable[[str], None], show: Callable[[str], None] = lambda label: None
    ) -> Iterator[list[dict]]:
        """Yield the row, if there is one, of every point. tell: of what is not measured; show: of what comes next."""
        device = resolve_device(self.device)
        common = environment(device) | {"repeats": self.repeats or (5 if device.type == "cuda" else 3)}
        precision = "bf16" if self.precision == "auto" and device.type == "cuda" else self.precision
        common["precision"] = "float32" if precision == "auto" else precision
        for name in self.presets:
            preset = PRESETS[name] if self.batch is None else replace(PRESETS[name], batch=self.batch)
            batch = make_batch(preset, self.seed, device)
            for provider in self.providers:
                show(f"{name}: {provider}")
                try:
                    model = build(provider, preset, self.seed, device)
                except (ImportError, ValueError) as error:
                    tell(f"{name}: {provider} is not timed: {first_line(error)}")
                    continue
                trained = Trained(model, partial(autocast, self.precision, device))
                sizes = {"preset": name, "provider": provider, "batch": preset.batch, "tokens": preset.tokens}
                sizes |= {"layers": len(preset.model["layers"]), "width": preset.model["hidden_size"]}
                sizes["parameters"] = sum(p.numel() for p in model.parameters())
                for point in self.points(name, provider):
                    label = "{}: {} {mode}, N = {passes}, L = {window}, checkpointing {checkpointing}"
                    label = label.format(name, provider, **point._asdict())
                    show(label)
                    row = common | sizes | point._asdict()
                    try:
                        row |= trained.measure(batch, point, common["repeats"], device)
                    except NotMeasured as error:
                        tell(f"{label}: {error}")
                        yield []
                        continue
                    yield [{column: row[column] for column in COLUMNS}]
                del model, trained
                _free(device)


class NotMeasured(RuntimeError):
    """Why a step has no row."""


class Trained:
    """A model in training with its optimisers; calling it takes one step and returns the loss.

    context: makes the context (autocast) of the forward.
    """

    def __init__(self, model: nn.Module, context: Callable):
        self.model, self.context, self.graphs = model.train(), context, None
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.recipe = TrainConfig()
        rates = {name: getattr(self.recipe, name) for name in ("lr_muon", "lr_adamw", "weight_decay", "momentum")}
        self.optimizers = build_optimizers(model, **rates).values()

    def __call__(self, batch: Batch) -> Tensor:
        loss = self._loss_and_gradients(batch)
        nn.utils.clip_grad_norm_(self.parameters, self.recipe.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    def _loss_and_gradients(self, batch: Batch) -> Tensor:
        if self.graphs is not None:
            loss = self.graphs(batch)
            if loss is None:
                raise NotMeasured("no graph serves it")
            return loss
        with self.context():
            ids, labels, mask = batch[:3]
            loss = self.model(ids, labels=labels, loss_mask=mask, return_logits=False, return_state=False).loss
        loss.backward()
        return loss.detach()

    def measure(self, batch: Batch, point: Point, repeats: int, device: torch.device) -> dict:
        """Times, tokens per second and peak memory, the parameters' and the optimisers' included, of steps at `point`.

        Raises NotMeasured where memory runs out, a step cannot be recorded, or its loss is not finite.
        """
        settings = {"passes": point.passes, "window": point.window}
        checkpointing = CHECKPOINTING[point.checkpointing]
        self.model.config = replace(self.model.config, activation_checkpointing=checkpointing, **settings)
        self.graphs = StepGraphs(self.model, self.context) if point.mode == GRAPH else None  # type: ignore[assignment]
        losses, reasons = [], []

        def sample() -> tuple[float, float]:
            watch = Stopwatch(device)
            with watch:
                losses.append(self(batch))
            return watch.ms, watch.peak / MIB

        try:
            found = measure({"step": Run(sample)}, repeats, device, lambda _, why: reasons.append(why))
        except RuntimeError as error:
            if point.mode != GRAPH or isinstance(error, NotMeasured):
                raise
            raise NotMeasured(f"no row: {first_line(error)}") from error
        finally:
            self.graphs = None
            self.model.zero_grad(set_to_none=True)
            _free(device)
        if not found:
            raise NotMeasured(reasons[0])
        loss = losses[-1].item()
        if not math.isfinite(loss):
            raise NotMeasured(f"WRONG, no row: the loss is {loss}")
        figures = {name: found["step"][name] for name in TIMES}
        tokens = batch.input_ids.numel()
        figures["tokens_per_second"] = 1e3 * tokens / figures["ms_median"]
        return figures | {"peak_mib": found["step"]["peak_extra_mib"]}


def build(provider: str, preset: Preset, seed: int, device: torch.device) -> nn.Module:
    """The preset's model, initialised on `device`. ImportError or ValueError where the provider cannot serve."""
    config = HybridConfig(**preset.model, window=preset.windows[0])
    torch.manual_seed(seed)
    if provider == "fla":
        return load_fla_hybrid(config, device)
    with device:
        return SleepHybridModel(config)


def make_batch(preset: Preset, seed: int, device: torch.device) -> Batch:
    """Random tokens, and loss on the last `answer` of every sequence."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(preset.model["vocab_size"], (preset.batch, preset.tokens), generator=generator)
    mask = (torch.arange(preset.tokens) >= preset.tokens - preset.answer).expand_as(ids)
    return Batch(ids, ids.masked_fill(~mask, -100), mask).to(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
