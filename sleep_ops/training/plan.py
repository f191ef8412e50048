"""What training a model will need and how fast it may go, before there is a machine for it.

A step is rehearsed (`rehearsal`) on short texts, from which a long one's follows: memory and work
grow by as much with every window, and with every further pass of one. What comes out is a
prediction.

Settings are here, of which the command's options are made, so nothing imports PyTorch at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from sleep_ops.checks import check_count, check_positive, expect
from sleep_ops.model.config import SleepSettings
from sleep_ops.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from sleep_ops.training.rehearsal import Step

# Settings tried in turn, with those before them, until a step fits: what costs the least time first. What is stored
# for a window's recomputation is little, what is computed at a time much: the last two are better off with blocks.
_REMEDIES: tuple[dict[str, Any], ...] = (
    {"micro_batch": 1},
    {"param_dtype": "bf16"},
    {"parallel": "fsdp"},
    {"activation_checkpointing": True},
    {"recompute": "block"},
    {"recompute": "window"},
    {"reshard": "call", "recompute": "block"},
    {"offload": True, "recompute": "block"},
)
_WORK = ("flops", "sent", "moved")
_PASSES = 24  # over windows, that are rehearsed one by one; what more there are follow from fewer


@dataclass(frozen=True)
class Machine:
    """What there is to train on, and what is assumed of it.

    gpus            how many, a process each.
    memory          of each, in GB of 10^9 bytes.
    spare           fraction of it for what is not counted: CUDA and NCCL, the allocator, what kernels work with.
    peak            of each, in TFLOP/s; by default that of an H100 for dense bfloat16.
    mfu             fraction of this peak that is reached: assumed, not measured.
    bandwidth       GB/s at which a GPU receives from others: assumed, not measured.
    host_bandwidth  GB/s between a GPU and the host's memory, one way at a time: assumed, not measured.
    """

    gpus: int = 1
    memory: float = 80.0
    spare: float = 0.1
    peak: float = 989.0
    mfu: float = 0.4
    bandwidth: float = 200.0
    host_bandwidth: float = 50.0

    def __post_init__(self):
        check_count("gpus", self.gpus)
        check_positive(self, "memory", "peak", "bandwidth", "host_bandwidth")
        expect(0 <= self.spare < 1, "spare", "a number in [0, 1)", self.spare)
        expect(0 < self.mfu <= 1, "mfu", "a number in (0, 1]", self.mfu)

    @property
    def usable(self) -> float:
        """Bytes of a GPU for what is counted."""
        return self.memory * 1e9 * (1 - self.spare)


class Prediction(NamedTuple):
    """What is predicted of a run.

    recipe, sleep: its settings; sleep as `load_model` takes them.
    added: those of them that were added so that it fits, by name.
    last: those of these that the prediction before did not have.
    step: one of its steps, in one process.
    fits: whether its peak is within what is usable.
    tokens_per_second: of all processes together.
    """

    recipe: TrainConfig
    sleep: dict
    added: dict
    last: dict
    step: "Step"
    fits: bool
    tokens_per_second: float


def predictions(
    build: Callable[..., "nn.Module"],
    recipe: TrainConfig,
    sleep: dict,
    machine: Machine,
    *,
    tokens: int,
    given: frozenset[str] = frozenset(),
) -> Iterator[Prediction]:
    """Of the recipe, and as long as it does not fit, with more settings that save memory.

    build: build(param_dtype, **settings of sleep) is the model, on the meta device, which is the default one then.
    tokens: of a text, all with loss.
    given: names of settings that are to stay as they are.

    Raises ValueError for settings that can't be, before a model is built.
    """
    check_count("tokens", tokens)
    expect("window" in sleep, "window", "tokens per window", "none")
    expected = f"at least {machine.gpus}, one per process"
    enough = recipe.split == "sequence" or recipe.batch_size >= machine.gpus
    expect(enough, "batch_size", expected, recipe.batch_size)
    SleepSettings(**sleep)
    sleep = {"passes": 1} | sleep
    if recipe.parallel == "fsdp" and machine.gpus % recipe.replicas:
        raise ValueError(f"replicas: expected a divisor of the {machine.gpus} processes, got {recipe.replicas}")
    if recipe.precision == "auto":
        recipe = replace(recipe, precision="bf16")
    added: dict = {}
    last: dict = {}
    remedies = iter(_REMEDIES)
    while True:
        step = _step(build, recipe, sleep, tokens, machine.gpus)
        fits, speed = step.peak <= machine.usable, recipe.batch_size * tokens / _seconds(step, recipe, machine)
        yield Prediction(recipe, sleep, dict(added), last, step, fits, speed)
        useful = (changes for remedy in remedies if (changes := _useful(remedy, given, recipe, sleep, machine)))
        last = {} if fits else next(useful, {})
        if not last:
            return
        added |= last
        sleep = sleep | {name: value for name, value in last.items() if name in SleepSettings.__dataclass_fields__}
        recipe = replace(recipe, **{name: value for name, value in last.items() if name not in sleep})


def _useful(remedy: dict, given: frozenset[str], recipe: TrainConfig, sleep: dict, machine: Machine) -> dict:
    """What of a remedy may be set and makes a difference; nothing if its first setting doesn't."""
    found = {
        name: value
        for name, value in remedy.items()
        if name not in given and _changes(name, value, recipe, sleep, machine)
    }
    return found if next(iter(remedy)) in found else {}


def _changes(name: str, value: object, recipe: TrainConfig, sleep: dict, machine: Machine) -> bool:
    """Whether a setting is another then, and makes a difference."""
    shared = recipe.parallel == "fsdp" and machine.gpus > 1
    able = {
        "micro_batch": recipe.batch_size > (1 if recipe.split == "sequence" else machine.gpus),
        "parallel": machine.gpus > 1,
        "recompute": sleep.get("activation_checkpointing", False)
        and (value != "window" or not (sleep.get("windows_at_once") or (shared and recipe.reshard == "call"))),
        "reshard": shared,
    }
    return able.get(name, True) and value != (sleep[name] if name in sleep else getattr(recipe, name, None))


def _seconds(step: "Step", recipe: TrainConfig, machine: Machine) -> float:
    computing = step.flops / (machine.mfu * machine.peak * 1e12)
    sending = step.sent / (machine.bandwidth * 1e9)
    moving = step.moved / (machine.host_bandwidth * 1e9)  # in the GPU's own order, so beside nothing
    # Around calls it goes on beside the computation, once a step it is waited for.
    beside = recipe.parallel == "fsdp" and recipe.reshard == "call"
    return (max(computing, sending) if beside else computing + sending) + moving


def _step(build: Callable, recipe: TrainConfig, sleep: dict, tokens: int, processes: int) -> "Step":
    """A step of the process with the most rows, from one of at most two whole micro-batches and what they leave."""
    among = 1 if recipe.split == "sequence" else processes  # that rows are dealt out to
    rows = -(-recipe.batch_size // among)
    micro = recipe.micro_batch or rows
    more = max(rows // micro - 2, 0)

    def without(batches: int) -> "Step":
        """All processes' rows are fewer by so many micro-batches, so that they differ as they did."""
        fewer = replace(recipe, batch_size=recipe.batch_size - batches * micro * among)
        return _short_step(build, fewer, sleep, tokens, processes)

    step = without(more)
    if not more:
        return step
    one = without(more + 1)
    # Further micro-batches cost work alone.
    work = {name: getattr(step, name) + more * (getattr(step, name) - getattr(one, name)) for name in _WORK}
    return step._replace(**work)


def _short_step(build: Callable, recipe: TrainConfig, sleep: dict, tokens: int, processes: int) -> "Step":
    """A step of the recipe, from steps with fewer windows and passes if they are many."""
    from sleep_ops.training.rehearsal import rehearse

    cut = recipe.split == "sequence"  # every process reads as many windows of each text as the others
    window, passes = (sleep["window"] or tokens) * (processes if cut else 1), sleep["passes"]
    windows = -(-tokens // window)
    last = tokens - (windows - 1) * window

    def rehearsed(windows: int, passes: int | float) -> "Step":
        def model():
            chosen = sleep | {"passes": passes, "impl": "triton", "attention_backend": "torch"}
            return build(recipe.param_dtype, **chosen)

        return rehearse(model, recipe, tokens=(windows - 1) * window + last, processes=processes)

    # Every window but the last sleeps. Replays cost the same however many.
    refining = sleep.get("sleep_kind", "refine") == "refine" and passes > 1
    few = windows + (windows - 1) * (passes - 1 if refining else 0) <= _PASSES or windows < 5
    # Where a window or a block is recomputed at a time, the peak is not linear in windows and passes.
    by_pass = not sleep.get("activation_checkpointing") or sleep.get("recompute", "pass") == "pass"
    at_once = sleep.get("windows_at_once") and not refining
    if few or at_once or not by_pass or sleep.get("backprop_passes") is not None:
        return rehearsed(windows, passes)
    if not refining or passes == 2:
        return _combined((rehearsed(3, passes), 4 - windows), (rehearsed(4, passes), windows - 3))
    more = (windows - 1) * (passes - 2)  # passes than if N were 2
    return _combined(
        (rehearsed(3, 2), 4 - windows - more / 2), (rehearsed(4, 2), windows - 3), (rehearsed(3, 3), more / 2)
    )


def _combined(*parts: tuple["Step", float]) -> "Step":
    """The sum of steps, each so many times."""
    first = parts[0][0]

    def total(number: Callable[["Step"], Any]) -> float:
        return sum(times * number(step) for step, times in parts)

    phases = {}
    for phase in first.phases:
        kinds = dict.fromkeys(kind for step, _ in parts for kind in step.phases[phase])
        phases[phase] = {kind: total(lambda step: step.phases[phase].get(kind, 0)) for kind in kinds}  # noqa: B023
    return type(first)(phases, *(total(lambda step: step[i]) for i in range(1, len(first))))  # noqa: B023
