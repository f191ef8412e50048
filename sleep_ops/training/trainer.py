"""The training loop: one recipe for every task, stopped and taken up again without a trace."""

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

import torch
from rich.console import Console
from torch import Tensor, nn

from sleep_ops.adapters.loading import load_model
from sleep_ops.layers.block import Block
from sleep_ops.layers.mixer import GDNMixer
from sleep_ops.model import HybridConfig, SleepHybridModel
from sleep_ops.tasks import Batch, Task, build_task
from sleep_ops.training.checkpoint import load_newest, save_checkpoint
from sleep_ops.training.config import CONFIG_FILE, RunConfig, resolve_device
from sleep_ops.training.graph import StepGraphs
from sleep_ops.training.logs import CsvLog, ProgressBar, tensorboard_writer
from sleep_ops.training.optim import build_optimizers, set_learning_rates

METRICS_FILE, EVAL_FILE, CHECKPOINTS = "metrics.csv", "eval.csv", "checkpoints"
_OWN = (CHECKPOINTS, "tensorboard", METRICS_FILE, EVAL_FILE)  # what a run writes beside its configuration
_EVAL_SEED = 0


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


@dataclass(frozen=True)
class TrainResult:
    """step reached; whether that is the last; the signal that stopped it, if one did; the last evaluation; seconds of
    training over all sessions; steps skipped."""

    step: int
    finished: bool
    signal: int | None
    evaluation: dict[str, float] | None
    seconds: float
    skipped: int


def build_model(config: RunConfig, *, weights: bool = True) -> nn.Module:
    """The model a run begins with, on the CPU; new weights are drawn from the run's seed (the same on every device).

    weights: False leaves those of a checkpoint folder unread, for a model whose own are about to be loaded.
    """
    torch.manual_seed(config.train.seed)
    if "folder" in config.model:
        return load_model(**config.model, weights=weights)
    return SleepHybridModel(HybridConfig.from_dict(config.model))


def select_parameters(model: nn.Module, trainable: str) -> list[nn.Parameter]:
    """The parameters to train; the others stop requiring gradients. See `TrainConfig.trainable`.

    Raises ValueError for a model without fast weights where only those are wanted.
    """
    if trainable == "fast_weights":
        owners = [m for m in model.modules() if isinstance(m, GDNMixer) or (isinstance(m, Block) and m.mlp is None)]
        if not owners:
            raise ValueError(f"trainable: expected 'all' for a model without fast weights, got {trainable!r}")
        model.requires_grad_(False)
        for owner in owners:
            owner.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def check_vocabulary(model: nn.Module, task: Task) -> None:
    """Raises ValueError where the task has tokens that the model does not know."""
    known = getattr(model, "vocab_size", task.vocab_size)
    if known < task.vocab_size:
        needed = f"a vocabulary of at least {task.vocab_size} tokens for {task.name}"
        raise ValueError(f"model: expected {needed}, got {known}")


def load_run(folder: Path, *, device: str = "auto", warn=print) -> tuple[RunConfig, Task, nn.Module, int]:
    """The configuration, task, trained model and step of a run folder. ValueError where it holds no checkpoint."""
    config = RunConfig.load(folder)
    checkpoint = load_newest(folder / CHECKPOINTS, warn)
    if checkpoint is None:
        raise ValueError(f"{folder}: expected a trained run, but it has no checkpoint yet")
    model = build_model(config, weights=False)
    model.load_state_dict(checkpoint.model)
    return config, build_task(config.task), model.to(resolve_device(device)).eval(), checkpoint.step


@contextmanager
def alone(folder: Path):
    """Hold a run folder against a second trainer, which would overwrite this one's records."""
    if fcntl is None:
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{folder}: expected a folder of its own, got one another process trains in") from error
        yield


def clear_run(folder: Path) -> None:
    """Delete a run's own files in `folder`, and nothing else."""
    with alone(folder):
        for path in (folder / name for name in (CONFIG_FILE, *_OWN)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def autocast(precision: str, device: torch.device):
    """The autocast context of a precision on a device; see TrainConfig.precision."""
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def deterministic(device: torch.device):
    """The same seed gives the same bits: PyTorch's deterministic algorithms while a CUDA run trains.

    Where an operation has none, PyTorch warns. The CPU needs nothing.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for; read when it is first used
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Trainer:
    """Trains `config` in the folder `out`.

    resume  take up the newest whole checkpoint of `out`, if there is one; otherwise the run begins anew, and a run
            already there is deleted. ValueError where the folder holds a different run.
    model   the module to train, where it is not the one that `config.model` describes.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        *,
        resume: bool = True,
        label: str = "train",
        model: nn.Module | None = None,
        task: Task | None = None,
        console: Console | None = None,
    ):
        self.config, self.out, self.label = config, Path(out), label
        self.console = console or Console()
        self.device = resolve_device(config.train.device)
        self.task = task or build_task(config.task)
        checkpoint = self._take_up() if resume else None
        self.model = (model or build_model(config, weights=checkpoint is None)).to(self.device)
        t = config.train
        check_vocabulary(self.model, self.task)
        self.parameters = select_parameters(self.model, t.trainable)
        self.optimizers = build_optimizers(
            self.model, lr_muon=t.lr_muon, lr_adamw=t.lr_adamw, weight_decay=t.weight_decay, momentum=t.momentum
        )
        self.graphs: StepGraphs | None = None
        if t.cuda_graph and self.device.type == "cuda":
            if not isinstance(self.model, SleepHybridModel):
                got = f"True with a {type(self.model).__name__}"
                raise ValueError(f"cuda_graph: expected False, or a SleepHybridModel to train, got {got}")
            self.graphs = StepGraphs(self.model, partial(autocast, t.precision, self.device))
        self.step, self.skipped, self.skipped_in_row, self.seconds = 0, 0, 0, 0.0
        if checkpoint is not None:
            self._restore(checkpoint)
        if self.out.exists():
            if checkpoint is None:
                clear_run(self.out)
            else:
                with alone(self.out):  # refused here rather than by `fit`
                    pass
        self.out.mkdir(parents=True, exist_ok=True)
        config.save(self.out)
        self._signal: int | None = None

    def fit(self, until: int | None = None) -> TrainResult:
        """Train up to step `until` (default: the last), evaluating, logging and checkpointing on the way.

        SIGTERM and the first Ctrl-C end the step in hand, save and return; a second Ctrl-C raises KeyboardInterrupt.
        Raises TrainingDiverged after `max_skipped` steps in a row without a finite gradient.
        """
        t = self.config.train
        last = t.steps if until is None else min(until, t.steps)
        evaluation = None
        columns = ["step", "tokens", "loss", "grad_norm", "lr_muon", "lr_adamw", "skipped", "tokens_per_second"]
        metrics = CsvLog(self.out / METRICS_FILE, columns, self.step)
        # Nothing to do must not cost an evaluation, nor a thread.
        if self.step >= last:
            metrics.close()
            return TrainResult(self.step, self.step >= t.steps, None, None, self.seconds, self.skipped)
        board = tensorboard_writer(self.out / "tensorboard", self.step)
        evals: CsvLog | None = None
        saved = self.step
        self.model.train()
        with (
            alone(self.out),
            self._signals(),
            deterministic(self.device),
            ProgressBar(self.console, self.label, self.step, t.steps) as bar,
            ThreadPoolExecutor(1, thread_name_prefix="data") as pool,
        ):
            coming = pool.submit(self._make_batch, self.step)
            mark, mark_step = time.perf_counter(), self.step
            while self.step < last and self._signal is None:
                batch = coming.result()
                coming = pool.submit(self._make_batch, self.step + 1)
                row = self._train_step(batch.to(self.device))
                now = time.perf_counter()
                self.seconds += now - mark
                row["tokens_per_second"] = self._tokens(self.step - mark_step) / (now - mark)
                mark, mark_step = now, self.step
                metrics.write(row)
                if board:
                    for key in ("loss", "grad_norm", "lr_muon"):
                        board.add_scalar(f"train/{key}", row[key], self.step)
                note = f"  {self.skipped} skipped" if self.skipped else ""
                bar.update(self.step, row["loss"], row["tokens_per_second"], note)
                if self.skipped_in_row >= t.max_skipped:
                    metrics.close()
                    raise TrainingDiverged(
                        f"{self.label}: {self.skipped_in_row} steps in a row up to step {self.step} had a loss or "
                        f"gradient that is not finite (last loss {row['loss']}); try a lower learning rate"
                    )
                if self.step == t.steps or (t.eval_every and self.step % t.eval_every == 0):
                    evaluation = self.evaluate()
                    evals = evals or CsvLog(self.out / EVAL_FILE, ["step", "tokens", *evaluation], self.step - 1)
                    evals.write({"step": self.step, "tokens": self._tokens(self.step), **evaluation})
                    evals.flush()
                    if board:
                        for key, value in evaluation.items():
                            board.add_scalar(f"eval/{key}", value, self.step)
                    name = self.task.metric
                    bar.print(f"{self.label}  step {self.step}: {name} {evaluation[name]:.4f}")
                    mark = time.perf_counter()
                if self.step == t.steps or (t.checkpoint_every and self.step % t.checkpoint_every == 0):
                    metrics.flush()
                    self.save()
                    saved, mark = self.step, time.perf_counter()
            coming.cancel()
        metrics.close()
        if evals:
            evals.close()
        if board:
            board.close()
        if saved < self.step:
            self.save()
        return TrainResult(self.step, self.step >= t.steps, self._signal, evaluation, self.seconds, self.skipped)

    def evaluate(self, samples: int | None = None) -> dict[str, float]:
        """The task's evaluation of the model as it stands, in the run's precision."""
        t = self.config.train
        with autocast(t.precision, self.device):
            return self.task.evaluate(
                self.model,
                samples=samples or t.eval_samples,
                batch_size=t.micro_batch or t.batch_size,
                seed=_EVAL_SEED,
                device=self.device,
            )

    def save(self) -> Path:
        """Write a checkpoint of everything the next step depends on."""
        state = {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "rng": {"cpu": torch.get_rng_state()},
            "data_step": self.step,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "seconds": self.seconds,
        }
        if self.device.type == "cuda":
            state["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)
        return save_checkpoint(
            self.out / CHECKPOINTS, self.step, self.model.state_dict(), state, keep=self.config.train.keep_checkpoints
        )

    def _train_step(self, batch) -> dict:
        """One optimiser step. Skipped, but counted, where the loss or the gradient norm is not finite."""
        t = self.config.train
        factor = t.learning_rate_factor(self.step)
        rates = {"muon": t.lr_muon * factor, "adamw": t.lr_adamw * factor}
        loss = self._loss_and_gradients(batch)
        norm = nn.utils.clip_grad_norm_(self.parameters, t.grad_clip)
        # The only wait for the device in a step: whether to take it must be known before the weights change.
        loss, norm = torch.stack([loss.float(), norm.float()]).tolist()
        finite = abs(loss) < float("inf") and abs(norm) < float("inf")  # false for NaN too
        if finite:
            set_learning_rates(self.optimizers, rates)
            for optimizer in self.optimizers.values():
                optimizer.step()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.skipped += not finite
        self.skipped_in_row = 0 if finite else self.skipped_in_row + 1
        return {
            "step": self.step,
            "tokens": self._tokens(self.step),
            "loss": loss,
            "grad_norm": norm,
            "lr_muon": rates["muon"],
            "lr_adamw": rates["adamw"],
            "skipped": self.skipped,
        }

    def _loss_and_gradients(self, batch: Batch) -> Tensor:
        loss = None if self.graphs is None else self.graphs(batch)
        if loss is not None:
            return loss
        t, total, whole = self.config.train, int(batch.loss_mask.sum()), 0.0
        for part in batch.split(t.micro_batch or t.batch_size):
            share = int(part.loss_mask.sum()) / total
            if share == 0:
                continue
            with autocast(t.precision, self.device):
                out = self.model(part.input_ids, **part.arguments(), return_state=False)
            loss = out.loss * share
            loss.backward()
            whole = whole + loss.detach()
        return whole

    def _make_batch(self, step: int):
        batch = self.task.batch(self.config.train.seed, step, self.config.train.batch_size)
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def _tokens(self, steps: int) -> int:
        return steps * self.config.train.batch_size * self.task.seq_len

    def _take_up(self):
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out}: expected a folder, got a file")
        if not (self.out / CONFIG_FILE).exists():
            found = [name for name in _OWN if (self.out / name).exists()]
            if found:
                raise ValueError(
                    f"{self.out}: expected a run or a folder without {' or '.join(found)}, got no {CONFIG_FILE}; it "
                    "cannot be resumed. Choose another folder, or let them be deleted (resume=False, --fresh)."
                )
            return None
        self.config.check_resumable(self.out)
        return load_newest(self.out / CHECKPOINTS, lambda text: self.console.print(f"[yellow]{text}[/yellow]"))

    def _restore(self, checkpoint) -> None:
        self.model.load_state_dict(checkpoint.model)
        state = checkpoint.state
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        self.step, self.seconds = state["data_step"], state["seconds"]
        self.skipped, self.skipped_in_row = state["skipped"], state["skipped_in_row"]

    @contextmanager
    def _signals(self):
        """Turn SIGTERM and the first SIGINT into a flag that the loop looks at between steps."""
        self._signal = None

        def note(number, _frame):
            if self._signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = number

        before = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, note)
        except ValueError:  # not the main thread: signals are someone else's business
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
