"""Presets: what a task's run is, in three sizes, as readable files; and the baselines a sceptic asks for.

presets/TASK.toml has a table for each of "paper", "small" and "tiny", with the settings of the task, the model (fields
of `HybridConfig`) and the recipe (fields of `TrainConfig`). What a table leaves out is as in the one before it, and at
last the default of the field.
"""

import math
from dataclasses import fields
from importlib.resources import files

from sleep_ops.checks import check_choice, expect
from sleep_ops.model.config import HybridConfig
from sleep_ops.tasks import TASKS
from sleep_ops.training.config import RunConfig, TrainConfig

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

SIZES = ("paper", "small", "tiny")
PARTS = ("task", "model", "train")
BASELINES = ("depth", "loop", "repeat", "state", "full")


def read_toml(*path: str) -> dict:
    """A file of this package. ValueError, with those there are, where it does not exist."""
    *folders, name = path
    place = files("sleep_ops.experiments").joinpath(*folders)
    file = place.joinpath(f"{name}.toml")
    found = sorted(f.name.removesuffix(".toml") for f in place.iterdir() if f.name.endswith(".toml"))
    if name not in found:
        raise ValueError(f"{folders[-1].removesuffix('s')}: expected one of {tuple(found)}, got {name!r}")
    return tomllib.loads(file.read_text(encoding="utf-8"))


def preset(task: str, size: str) -> dict[str, dict]:
    """{"task": ..., "model": ..., "train": ...} of a preset, each its own settings over those of the larger sizes."""
    check_choice("preset", size, SIZES)
    tables = read_toml("presets", task)
    settings: dict[str, dict] = {part: {} for part in PARTS}
    for table in (tables.get(name, {}) for name in SIZES[: SIZES.index(size) + 1]):
        for part in PARTS:
            settings[part] |= table.get(part, {})
    return settings


def set_value(settings: dict[str, dict], name: str, value: object) -> None:
    """settings["model"]["passes"] = value for the name "model.passes". ValueError for a name that is none."""
    part, dot, key = name.partition(".")
    known = {"model": HybridConfig, "train": TrainConfig, "task": TASKS.get(settings["task"].get("name"))}
    owner = known.get(part)
    expect(bool(dot) and owner is not None, "name", "task.FIELD, model.FIELD or train.FIELD", name)
    names = sorted(f.name for f in fields(owner))
    expect(key in names, name, f"one of {', '.join(names)}", key)
    settings[part][key] = value


def run_config(task: str, settings: dict[str, dict], baseline: str | None = None) -> RunConfig:
    """The run that settings describe, or a baseline in its place. ValueError for settings that can't be.

    model.layers may be written "attn-gdn-attn-gdn"; vocabulary and window are the task's where they are not given, and
    initializer_range (3 hidden_size) ** -0.5.
    """
    expect(task in TASKS, "task", f"one of {tuple(TASKS)}", task)
    chosen = TASKS[task](**{k: v for k, v in settings["task"].items() if k != "name"})
    model = dict(settings["model"])
    if isinstance(model.get("layers"), str):
        model["layers"] = tuple(model["layers"].split("-"))
    if model.get("passes") == "inf":
        model["passes"] = math.inf
    model = {"vocab_size": chosen.vocab_size, "window": chosen.window} | model
    width = model.get("hidden_size", 1)
    if isinstance(width, int) and width > 0:
        model.setdefault("initializer_range", (3 * width) ** -0.5)
    train = TrainConfig(**settings["train"])
    config = HybridConfig.from_dict(model)
    if baseline is not None:
        chosen, config = _baseline(chosen, config, baseline)
    return RunConfig(chosen.to_dict(), config.to_dict(), train)


def _baseline(task, config: HybridConfig, name: str):
    """The task and the model of a baseline that costs as much as N passes do.

    depth    N = 1, and N times the blocks one after another.
    loop     N = 1, and the blocks N times over, sharing their weights: the loop is at prediction time too.
    repeat   N = 1, and the context read N times.
    state    N = 1, and value heads N times as wide: a larger memory (at least the same FLOPs in it).
    full     no eviction at all, N = 1: the ceiling.
    """
    check_choice("baseline", name, BASELINES)
    n, values = config.passes, config.to_dict()
    expect(n != math.inf, "passes", f"a finite number for the baseline {name!r}", n)
    values |= {"passes": 1, "loop": None}
    if name == "depth":
        values["layers"] = config.layers * n  # type: ignore[operator]
    elif name == "loop":
        values["tied_repeats"] = n
    elif name == "repeat":
        known = {f.name for f in fields(task)}
        expect("repeats" in known, "baseline", f"one that {task.name} has (its context can't be repeated)", name)
        settings = {k: v for k, v in task.to_dict().items() if k != "name"}
        task = type(task)(**settings | {"repeats": n})
    elif name == "state":
        key = config.gdn_head_dim or config.head_dim or config.hidden_size // config.num_heads
        values["gdn_head_v_dim"] = n * (config.gdn_head_v_dim or key)
    else:
        values["window"] = None
    return task, HybridConfig.from_dict(values)
