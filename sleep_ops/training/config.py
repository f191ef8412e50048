"""What a run is: the task, the model and the recipe, as plain data that a run folder keeps.

The options of commands are made of these dataclasses, so that nothing here imports PyTorch at once.
"""

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sleep_ops import streams
from sleep_ops.checks import (
    check_choice,
    check_count,
    check_counts,
    check_flags,
    check_positive,
    check_seed,
    expect,
    is_finite,
    is_number,
)
from sleep_ops.files import write_atomically
from sleep_ops.model.config import HybridConfig, SleepSettings

if TYPE_CHECKING:
    import torch

PRECISIONS = ("auto", "bf16", "float32")
TRAINABLE = ("all", "fast_weights")
PASSES_SCHEDULES = ("fixed", "random", "curriculum")
PARALLEL = ("ddp", "fsdp")
SPLIT = ("batch", "sequence")
PARAM_DTYPES = ("float32", "bf16")
RESHARD = ("step", "call")
CONFIG_FILE = "config.json"
MODEL_FOLDER, ADAPTER_FOLDER = "model", "adapter"
_VERSION = 1
# What may change when a run is taken up again: none of it enters the mathematics of a step.
_FREE_ON_RESUME = {
    *("device", "checkpoint_every", "keep_checkpoints", "activation_checkpointing", "cuda_graph"),
    *("stop_at", "patience", "cache", "parallel", "split", "reshard", "replicas", "async_checkpoints"),
    *("recompute", "offload", "profile"),
}
_WARM_SEED = 1 << 32  # added to the seed: the two phases of fine-tuning go through the data in orders of their own


@dataclass(frozen=True)
class TrainConfig:
    """The recipe. Defaults are those of the paper's Rule 110 runs, except warm-up and decay, which it leaves open.

    steps                 optimiser steps.
    batch_size            sequences per step.
    seed                  of the initialisation and of the data order; the data order depends on nothing else.
    lr_muon               peak learning rate of the weight matrices.
    lr_adamw              peak learning rate of everything else.
    weight_decay          decoupled, of both optimisers, on matrices only.
    momentum              of Muon (Nesterov).
    grad_clip             largest global gradient norm; inf switches clipping off.
    warmup                fraction of the steps spent warming up from 0.
    decay                 fraction of the steps spent decaying to the last learning rate.
    final_lr              last learning rate, as a fraction of the peak.
    precision             "bf16" (autocast; parameters and fast weights stay float32), "float32", or "auto": bf16 on
                          CUDA, float32 elsewhere.
    max_skipped           a step whose loss or gradient is not finite is skipped and counted; the run stops after this
                          many in a row.
    eval_every            steps between evaluations (0: only at the end).
    eval_samples          sequences per evaluation.
    checkpoint_every      steps between checkpoints (0: only at the end).
    keep_checkpoints      newest checkpoints kept.
    device                "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:i".
    micro_batch           sequences in one forward and backward, so many of which make up a batch; None: all at once.
    trainable             "all", or "fast_weights": the gated-delta-rule mixers, and inserted blocks as a whole; then
                          the rest stays as it is.
    passes_schedule       N of each training step: "fixed" is the model's; "random" is drawn from 1..N, each as likely;
                          "curriculum" rises from 1 to N. It depends on seed and step alone. Evaluation has the model's
                          N always.
    curriculum            fraction of the steps over which a curriculum's N rises.
    stage_loss            of a task with stages of difficulty: the mean loss of 20 steps, nats per label, with which the
                          next one begins. Evaluation is at the last one always.
    stage_warmup          steps over which the learning rate rises again at the beginning of each further stage.
    stop_at               end the run early, once an evaluation reaches this value of the task's metric; None: don't.
    patience              end it early, after this many evaluations in a row that were no better than the best; None:
                          don't.
    parallel              how several processes share the work: "ddp", each has the whole model; "fsdp", each keeps its
                          part of the parameters and of the optimisers' state between steps. batch_size is that of all
                          together, micro_batch that of one.
    split                 what several processes divide: the "batch", by rows, or the "sequence", of which each reads as
                          many whole windows; for models that read windows_at_once, with one pass or by replay.
    param_dtype           "float32", or "bf16": forward and backward compute with parameters, and gather and sum
                          gradients, of half the size; the optimisers keep and change float32 ones.
    reshard               with fsdp: parameters are gathered once a "step", all of them, or around each "call" of a
                          block, for each window and pass, which needs memory for one block alone.
    replicas              with fsdp: groups of processes that each have the whole model, shared out within the group;
                          one a node keeps the gathering inside nodes.
    offload               keep what the backward needs in the host's memory; little, with activation checkpointing.
    profile               first and last step of which torch.profiler leaves a trace in the run's folder profile, for
                          TensorBoard or Perfetto; None: of none.
    async_checkpoints     go on training while a checkpoint is written, from a copy in the host's memory.
    cuda_graph            launch a step's forward and backward as one recorded graph, on CUDA alone; the losses are the
                          same. Batches of more than a few different loss masks go without, and so do endless passes.
    """

    steps: int = 800
    batch_size: int = 512
    seed: int = 0
    lr_muon: float = 2e-3
    lr_adamw: float = 5e-5
    weight_decay: float = 1e-4
    momentum: float = 0.95
    grad_clip: float = 1.0
    warmup: float = 0.05
    decay: float = 0.2
    final_lr: float = 1e-3
    precision: str = "auto"
    max_skipped: int = 10
    eval_every: int = 100
    eval_samples: int = 2048
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    device: str = "auto"
    cuda_graph: bool = False
    micro_batch: int | None = None
    trainable: str = "all"
    passes_schedule: str = "fixed"
    curriculum: float = 0.5
    stage_loss: float = 0.1
    stage_warmup: int = 80
    stop_at: float | None = None
    patience: int | None = None
    parallel: str = "ddp"
    split: str = "batch"
    param_dtype: str = "float32"
    reshard: str = "step"
    replicas: int = 1
    offload: bool = False
    async_checkpoints: bool = False
    profile: tuple[int, int] | None = None

    def __post_init__(self):
        if isinstance(self.profile, list):
            object.__setattr__(self, "profile", tuple(self.profile))
        check_counts(self, steps=1, batch_size=1, max_skipped=1, eval_every=0, eval_samples=1)
        check_counts(self, checkpoint_every=0, keep_checkpoints=1, stage_warmup=0)
        check_seed(self.seed)
        check_positive(self, "lr_muon", "lr_adamw", "stage_loss")
        self._check_number("grad_clip", "a number > 0", lambda x: x == math.inf or (is_finite(x) and x > 0))
        self._check_number("weight_decay", "a number >= 0", lambda x: is_finite(x) and x >= 0)
        for name in ("momentum", "warmup", "decay", "final_lr"):
            self._check_number(name, "a number in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_number("curriculum", "a number in (0, 1]", lambda x: 0 < x <= 1)
        if self.stop_at is not None:
            self._check_number("stop_at", "a finite number or None", is_finite)
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup + decay: expected at most 1, got {self.warmup} + {self.decay}")
        check_flags(cuda_graph=self.cuda_graph, offload=self.offload, async_checkpoints=self.async_checkpoints)
        check_choice("trainable", self.trainable, TRAINABLE)
        check_choice("parallel", self.parallel, PARALLEL)
        check_choice("split", self.split, SPLIT)
        check_choice("param_dtype", self.param_dtype, PARAM_DTYPES)
        check_choice("reshard", self.reshard, RESHARD)
        check_counts(self, replicas=1)
        for name, default in (("reshard", "step"), ("replicas", 1)):
            if self.parallel != "fsdp" and getattr(self, name) != default:
                raise ValueError(f"{name}: expected {default!r} but with parallel 'fsdp', got {getattr(self, name)!r}")
        for name, needed in (("parallel", "ddp"), ("split", "batch"), ("param_dtype", "float32"), ("offload", False)):
            if self.cuda_graph and getattr(self, name) != needed:
                raise ValueError(f"{name}: expected {needed!r} with cuda_graph, got {getattr(self, name)!r}")
        check_choice("passes_schedule", self.passes_schedule, PASSES_SCHEDULES)
        if self.patience is not None:
            check_count("patience", self.patience)
        if self.profile is not None:
            pair = isinstance(self.profile, tuple) and [type(x) for x in self.profile] == [int, int]
            ordered = pair and 1 <= self.profile[0] <= self.profile[1]
            expect(ordered, "profile", "(first, last) steps with 1 <= first <= last", self.profile)
        if self.micro_batch is not None:
            check_count("micro_batch", self.micro_batch)
            if self.cuda_graph:
                raise ValueError(f"micro_batch: expected None with cuda_graph, got {self.micro_batch}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {PRECISIONS}, got {self.precision!r}")

    def _check_number(self, name: str, expected: str, fits: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        expect(is_number(value) and fits(value), name, expected, value)

    def learning_rate_factor(self, step: int) -> float:
        """The factor on both peak learning rates at `step` (0-based): linear warm-up, constant, linear decay."""
        warm, fall = round(self.warmup * self.steps), round(self.decay * self.steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        left = self.steps - 1 - step  # steps still to come
        if left < fall:
            return self.final_lr + (1.0 - self.final_lr) * left / fall
        return 1.0

    def passes_at(self, step: int, most: int) -> int:
        """N of the training step after `step` others, for a model whose own is `most`."""
        if self.passes_schedule == "random":
            return 1 + int(streams.source(self.seed, streams.PASSES | step).random_raw() % most)
        if self.passes_schedule == "curriculum":
            rising = max(round(self.curriculum * self.steps), 1)
            return most if step >= rising else 1 + step * (most - 1) // rising
        return most


def resolve_device(device: str) -> "torch.device":
    """ "auto" is CUDA where there is one, else the CPU. Raises ValueError for a device this machine does not have."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:i, got {device!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:i, got {device!r}")
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device: {device} is not there ({torch.cuda.device_count()} CUDA devices found)")
    return found


@dataclass(frozen=True)
class RunConfig:
    """task and model as their `to_dict()` gives them, and the recipe.

    model  of a `SleepHybridModel` to train from scratch; or {"folder": ..., ...}, the arguments of `load_model`, for a
           checkpoint to go on from, with those of `add_lora` under "lora" for one that stays as it is beside adapters.
    """

    task: dict
    model: dict
    train: TrainConfig

    def save(self, folder: Path) -> None:
        data = {"version": _VERSION, "task": self.task, "model": self.model, "train": asdict(self.train)}
        write_atomically(folder / CONFIG_FILE, json.dumps(data, indent=2).encode() + b"\n")

    @classmethod
    def load(cls, folder: Path) -> "RunConfig":
        """Read `folder`/config.json. Raises ValueError where it is missing, damaged or of another version."""
        path = folder / CONFIG_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["version"] != _VERSION:
                raise ValueError(f"{path}: expected version {_VERSION}, got {data['version']!r}")
            for part in ("task", "model"):
                expect(isinstance(data[part], dict), f"{path}: {part}", "an object", data[part])
            name = data["task"].get("name")
            expect(isinstance(name, str), f"{path}: task.name", "a string", name)
            return cls(data["task"], data["model"], TrainConfig(**data["train"]))
        except NotADirectoryError as error:
            raise ValueError(f"{folder}: expected a run folder, got a file") from error
        except FileNotFoundError as error:
            raise ValueError(f"{folder}: expected a run folder, but it has no {CONFIG_FILE}") from error
        except IsADirectoryError as error:
            raise ValueError(f"{path}: expected a file in a run folder, got a folder") from error
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged run configuration ({error})") from error

    def differences(self, other: "RunConfig") -> list[str]:
        """Settings in which `other` is a different run, as "part.key: mine -> theirs".

        A setting that is missing, because there was none when the run was written, has its default value.
        """
        # Through JSON, so that a tuple equals the list it was saved as.
        mine, theirs = (json.loads(json.dumps(c._complete())) for c in (self, other))
        found = []
        for part in (f.name for f in fields(self)):
            a, b = mine[part], theirs[part]
            for key in sorted(a.keys() | b.keys()):
                if key not in _FREE_ON_RESUME and a.get(key) != b.get(key):
                    found.append(f"{part}.{key}: {a.get(key)!r} -> {b.get(key)!r}")
        return found

    def check_resumable(self, folder: Path) -> None:
        """Raises ValueError where `folder` holds a run with other settings."""
        if different := RunConfig.load(folder).differences(self):
            raise ValueError(
                f"{folder}: holds a run with other settings and cannot be resumed with these: "
                + "; ".join(different)
                + ". Choose another folder, or begin anew (resume=False, --fresh)."
            )

    def _complete(self) -> dict:
        from sleep_ops.tasks import TASKS

        task = _defaults(TASKS.get(self.task.get("name"))) | self.task
        model = self.model if "folder" in self.model else _defaults(HybridConfig) | self.model
        return {"task": task, "model": model, "train": asdict(self.train)}


def _defaults(owner: type | None) -> dict:
    """The default values of a dataclass's fields; none of anything else."""
    return {f.name: f.default for f in fields(owner) if f.default is not MISSING} if is_dataclass(owner) else {}


RECIPE = TrainConfig(steps=1000, batch_size=256, lr_muon=1e-3)  # the paper's of fine-tuning, but for the steps


@dataclass(frozen=True)
class Phase:
    """One run.

    out       its folder.
    run       its configuration.
    model     where the model goes in the end; None for a LoRA run's first phase, which leaves an adapter alone.
    adapter   where a LoRA run's adapter goes; None for other runs.
    """

    name: str
    out: Path
    run: RunConfig
    model: Path | None = None
    adapter: Path | None = None

    @property
    def exports(self) -> list[Path]:
        """The folders that are written once the run is finished, in this order."""
        return [path for path in (self.adapter, self.model) if path is not None]

    @property
    def done(self) -> bool:
        return self.exports[-1].exists()


@dataclass(frozen=True)
class FinetuneConfig:
    """What to fine-tune, on what, and how.

    folder        the checkpoint.
    task          as a task's `to_dict()` gives it.
    settings      of sleep, as `load_model` takes them, and `insert`; eviction is that of the second phase.
    train         the recipe of the second phase, and of the first but for its steps.
    warm_steps    steps of the first phase, in which only the fast weights learn, with hard eviction; 0 leaves it out.
    lora          rank of low-rank adapters; they and inserted blocks learn then, with AdamW's and Muon's rates, and all
                  else stays as it is, held in the dtype of param_dtype alone. None: everything learns.
    lora_alpha    adapters are scaled by this over their rank; None: 2 rank.
    lora_targets  the linear modules of layers that get adapters, by the last parts of their names, as q_proj,v_proj;
                  None: all of them.
    """

    folder: str
    task: dict
    settings: dict
    train: TrainConfig = RECIPE
    warm_steps: int = 0
    lora: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None

    def __post_init__(self):
        check_counts(self, warm_steps=0)
        self._check_lora()
        if self.train.trainable != "all":
            raise ValueError(f"trainable: expected 'all' (see warm_steps), got {self.train.trainable!r}")
        # Checked now: those of the second phase would otherwise be found wanting after the first.
        SleepSettings.from_dict({"window": 1} | {k: v for k, v in self._given().items() if k != "insert"})

    def _check_lora(self) -> None:
        if self.lora is not None:
            check_count("lora", self.lora)
        for name in ("lora_alpha", "lora_targets"):
            value = getattr(self, name)
            expect(value is None or self.lora is not None, name, "None without lora", value)
        if self.lora_alpha is not None:
            check_positive(self, "lora_alpha")
        named = self.lora_targets is None or (len(self.lora_targets) > 0 and all(self.lora_targets))
        expect(named, "lora_targets", "names of modules, as ('q_proj', 'v_proj')", self.lora_targets)

    def _lora(self) -> dict:
        """What a run's model is given for LoRA, beside the settings of sleep."""
        if self.lora is None:
            return {}
        given = {"rank": self.lora, "alpha": self.lora_alpha, "targets": self.lora_targets}
        return {"lora": {name: value for name, value in given.items() if value is not None}}

    def _given(self) -> dict:
        given = {name: value for name, value in self.settings.items() if value is not None}
        return given | {"passes": "inf"} if given.get("passes") == math.inf else given

    def phases(self, out: Path) -> list[Phase]:
        """The runs in their order. Folders in them are absolute, so that a run means the same from everywhere."""
        from sleep_ops.adapters.loading import remembered

        source, out = str(Path(self.folder).resolve()), Path(out)
        settings, lora, found = self._given(), self._lora(), []
        if self.warm_steps:
            seed, kept = self.train.seed + _WARM_SEED, remembered(self.folder)
            train = replace(self.train, steps=self.warm_steps, trainable="fast_weights", seed=seed)
            run = RunConfig(self.task, {"folder": source, **settings, "eviction": "hard"} | lora, train)
            end = {"adapter": out / "warm" / ADAPTER_FOLDER} if lora else {"model": out / "warm" / MODEL_FOLDER}
            found.append(Phase("warm", out / "warm", run, **end))
            (left,) = (str(path.resolve()) for path in found[0].exports)
            if lora:
                lora = {"lora": lora["lora"] | {"start": left}}
            else:
                source = left
                settings.pop("insert", None)  # they are there now
                # That folder remembers the first phase's eviction.
                settings.setdefault("eviction", kept.get("eviction") or "hard")
            # Checked as __post_init__ does, with what the folder remembers.
            known = {name: x for name, x in (kept | settings).items() if name in SleepSettings.__dataclass_fields__}
            SleepSettings.from_dict({"window": 1} | known)
        run = RunConfig(self.task, {"folder": source, **settings} | lora, self.train)
        return [*found, Phase("full", out / "full", run, out / MODEL_FOLDER, out / ADAPTER_FOLDER if lora else None)]
