"""The training loop: for every task and any number of processes, stopped and resumed exactly."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from sleep_ops.files import check_folder
from sleep_ops.parameters import exchange
from sleep_ops.tasks import Batch, Task, build_task
from sleep_ops.training.checkpoint import (
    MODEL,
    RNG,
    Checkpoint,
    Saving,
    load_optimizers,
    model_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from sleep_ops.training.config import RunConfig, resolve_device
from sleep_ops.training.division import Division, Scoring
from sleep_ops.training.logs import ProgressBar, RunLog
from sleep_ops.training.parallel import Replicated, World, local_device
from sleep_ops.training.profiling import Trace
from sleep_ops.training.run import (
    BOARD,
    CHECKPOINTS,
    EVAL_FILE,
    METRICS_FILE,
    PROFILE,
    autocast,
    build_model,
    clear_run,
    deterministic,
    locked,
    newest_checkpoint,
)
from sleep_ops.training.signals import noted
from sleep_ops.training.stages import Stages
from sleep_ops.training.steps import Steps, check_run, shared_out
from sleep_ops.training.usage import ModelFlops, peak_flops, peak_memory

_COLUMNS = [
    *("step", "tokens", "loss", "grad_norm", "lr_muon", "lr_adamw", "passes", "stage", "skipped"),
    *("tokens_per_second", "mfu", "peak_memory"),
]
_EVAL_SEED = 0


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


@dataclass(frozen=True)
class TrainResult:
    """What a session of training came to.

    step: the one reached.
    finished: whether the run is over, by its last step or an early stop.
    signal: the one that stopped it, if one did.
    evaluation: the last one.
    seconds: of training, over all sessions.
    skipped: steps without a finite loss and gradient.
    """

    step: int
    finished: bool
    signal: int | None
    evaluation: dict[str, float] | None
    seconds: float
    skipped: int


class Trainer(Steps):
    """Trains `config` in the folder `out`.

    resume: take up the newest whole checkpoint of `out`, if there is one; otherwise the run begins
        anew, and a run already there is deleted. ValueError where the folder holds another run.
    extend: take up a run that has taken all its steps with more of them too; their learning rates
        are those that so many steps have there.
    label: of the progress bar.
    model: the module to train, where it is not the one that `config.model` describes.
    task: likewise, for `config.task`.

    Under `torchrun` every process makes a trainer with the same arguments and calls the same
    methods. All see the same results and errors; the first one writes and prints. How
    many there are may change between sessions.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        *,
        resume: bool = True,
        extend: bool = False,
        label: str = "train",
        model: nn.Module | None = None,
        task: Task | None = None,
        console: Console | None = None,
    ):
        self.config, self.out, self.label = config, Path(out), label
        t = config.train
        self.device = resolve_device(local_device(t.device))
        self.world = World.join(self.device)
        self.console = (console or Console(markup=False)) if self.world.main else Console(quiet=True)
        self.task = task or build_task(config.task)
        self.world.on_main(partial(check_folder, "out", self.out))
        checkpoint = self._newest(extend) if resume else None
        # Where the processes share out the model, one alone has to have it as a whole.
        place = "meta" if shared_out(t, self.world) and not self.world.main else "cpu"
        model = model or build_model(config, weights=checkpoint is None, device=place)
        division, stages = Division(t, self.world), Stages(self.task, t.stage_loss, t.stage_warmup)
        check_run(model, self.task, t, division, self.device)
        super().__init__(model, t, division=division, stages=stages, device=self.device, console=self.console)
        self.flops, self.peak, self.seconds = ModelFlops(self.model), peak_flops(self.device), 0.0
        self._saving: Saving | None = None
        self.best: float | None = None  # of the evaluations, and how many since were no better
        self.stale = 0
        if self.world.rank:
            torch.manual_seed(t.seed + self.world.rank)  # dropout differs from process to process
        if checkpoint is not None:
            self._restore(checkpoint)
        self.world.on_main(partial(self._begin, resumed=checkpoint is not None))
        self._noted: int | None = None  # a signal to this process
        self._signal: int | None = None  # one to any process, known to all

    @property
    def finished(self) -> bool:
        """Whether the last step has been taken, or evaluations say to stop before it."""
        t = self.recipe
        judged = t.stop_at is not None and self.best is not None
        reached = judged and self._merit(self.best) >= self._merit(t.stop_at)
        return self.step >= t.steps or reached or (t.patience is not None and self.stale >= t.patience)

    def fit(self, until: int | None = None) -> TrainResult:
        """Train up to step `until` (default: the last), with evaluations, logs and checkpoints.

        SIGTERM and the first Ctrl-C, to any process, end the step in hand, save and return; a
        second Ctrl-C raises KeyboardInterrupt. Raises TrainingDiverged after `max_skipped` steps in
        a row without a finite gradient.
        """
        t = self.recipe
        last = t.steps if until is None else min(until, t.steps)
        evaluation = None
        # Nothing to do must not cost an evaluation, nor a thread, and changes no file.
        if self.step < last and not self.finished:
            self._noted = self._signal = None
            with noted(self._note), ExitStack() as stack:
                evaluation = self._train(last, self._opened(stack))
        return TrainResult(self.step, self.finished, self._signal, evaluation, self.seconds, self.skipped)

    def _opened(self, stack: ExitStack) -> RunLog:
        """The run's log, as long as `stack` is; in the first process, which holds the folder against others."""
        files = [self.out / name for name in (METRICS_FILE, EVAL_FILE, BOARD)]

        def open_log(active: bool) -> RunLog:
            return RunLog(*files, _COLUMNS, self.step, active)  # type: ignore[call-arg, arg-type]

        log = open_log(False)

        def begin() -> None:
            nonlocal log
            stack.enter_context(locked(self.out))
            log = stack.enter_context(open_log(True))
            self.config.save(self.out)

        self.world.on_main(begin)
        return log

    def _train(self, last: int, log: RunLog) -> dict[str, float] | None:
        """Steps up to `last`, and a checkpoint of where they end; returns the last evaluation."""
        t, evaluation, saved = self.recipe, None, self.step
        self.model.train()
        with (
            deterministic(self.device),
            ProgressBar(self.console, self.label, self.step, t.steps) as bar,
            Trace(self.out / PROFILE, t.profile, self.device, self.world.rank) as trace,
            ThreadPoolExecutor(1, thread_name_prefix="data") as pool,
        ):
            coming = pool.submit(self._make_batch, self.step)
            mark, mark_step = time.perf_counter(), self.step
            while not self._stopped() and self.step < last and not self.finished:
                batch = coming.result()
                coming = pool.submit(self._make_batch, self.step + 1)
                flops = self.flops(batch.loss_mask, self._scheduled_passes())
                with trace.step(self.step + 1):
                    row = self.take(batch.to(self.device))
                now = time.perf_counter()
                self.seconds += now - mark
                row["tokens"] = self._tokens(self.step)
                row["tokens_per_second"] = self._tokens(self.step - mark_step) / (now - mark)
                trained_at = self.stages.arguments
                if self.stages.risen(self.step, row["loss"]):
                    coming.cancel()
                    coming = pool.submit(self._make_batch, self.step)
                row["mfu"] = flops / (now - mark) / (self.world.size * self.peak)
                row["peak_memory"] = peak_memory(self.device)
                mark, mark_step = now, self.step
                log.train(row)
                note = f"  {self.skipped} skipped" if self.skipped else ""
                bar.update(row, note)
                if self.skipped_in_row >= t.max_skipped:
                    raise TrainingDiverged(
                        f"{self.label}: {self.skipped_in_row} steps in a row up to step {self.step} had a loss or "
                        f"gradient that is not finite (last loss {row['loss']}); try a lower learning rate"
                    )
                if self.step == t.steps or (t.eval_every and self.step % t.eval_every == 0):
                    evaluation = self.evaluate() | trained_at
                    self._judge(evaluation[self.task.metric])
                    log.evaluation(self.step, self._tokens(self.step), evaluation)
                    name = self.task.metric
                    bar.print(f"{self.label}  step {self.step}: {name} {evaluation[name]:.4f}")
                    if self.finished and self.step < t.steps:
                        bar.print(f"{self.label}  stopped early: best {name} {self.best}")
                    mark = time.perf_counter()
                if self.step == t.steps or (t.checkpoint_every and self.step % t.checkpoint_every == 0):
                    log.flush()
                    self.save(wait=not t.async_checkpoints)
                    saved, mark = self.step, time.perf_counter()
            coming.cancel()
            if saved < self.step:
                log.flush()
                self.save()
            self._saved()
            self._stopped()  # for a signal that came while the last things were done
        return evaluation

    def evaluate(self, samples: int | None = None) -> dict[str, float]:
        """The task's evaluation of the model as it stands, in the run's precision; the same in every process."""
        t = self.recipe
        with self.layout.gathered(), autocast(t.precision, self.device):
            return self.task.evaluate(
                Scoring(self.model, self.division),
                samples=samples or t.eval_samples,
                batch_size=t.batch_size,
                seed=_EVAL_SEED,
                device=self.device,
            )

    def save(self, *, wait: bool = True) -> None:
        """Write a checkpoint of all the next step needs, or begin to; any number of processes can go on from it."""
        self._saved()
        tensors = model_tensors(self.model) | optimizer_tensors(self.model, self.optimizers.values())
        tensors |= self._generators()
        state = {
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "seconds": self.seconds,
            "best": self.best,
            "stale": self.stale,
        } | self.stages.state()
        keep = self.recipe.keep_checkpoints
        folder = self.out / CHECKPOINTS
        self._saving = save_checkpoint(folder, self.step, tensors, state, keep=keep, world=self.world)
        if wait:
            self._saved()

    def _saved(self) -> None:
        """Wait for the checkpoint that is being written, if one is."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.wait()

    def _generators(self) -> dict[str, Tensor]:
        """The states of this process's random generators, under their names in a checkpoint."""
        found = {f"{RNG}{self.world.rank}.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            found[f"{RNG}{self.world.rank}.cuda"] = torch.cuda.get_rng_state(self.device)
        return found

    def whole_model(self, dtype: Callable[[str], torch.dtype] | None = None) -> nn.Module | None:
        """The model with all its parameters, in the first process; on the CPU if they were shared out.

        dtype: the name of a parameter -> what it may become as it is put together; None keeps float32.

        Of a LoRA run too, whose base is then float32. Every process has to call it.
        """
        lora = "lora" in self.config.model
        if type(self.layout) is Replicated and not lora:
            return self.model if self.world.main else None
        own, weights = dict(self.model.named_parameters()), {}
        for name, x in self.layout.assembled(model_tensors(self.model)):
            name = name.removeprefix(MODEL)
            if name in own:
                weights[name] = x if dtype is None else x.to(dtype(name))
        if not self.world.main:
            return None
        model = build_model(self.config, weights=False, dtype=torch.float32, device="cpu" if lora else "meta")
        exchange(model, lambda name, p: nn.Parameter(weights.get(name, p), p.requires_grad))
        for path, module in model.named_modules():
            for name in module._buffers:
                setattr(module, name, self.model.get_submodule(path).get_buffer(name).cpu())
        return model

    def _judge(self, value: float) -> None:
        better = self.best is None or self._merit(value) > self._merit(self.best)
        if better and not math.isnan(value):
            self.best, self.stale = value, 0
        else:
            self.stale += 1

    def _merit(self, value: float) -> float:
        """A value of the task's metric, the larger the better."""
        return -value if self.task.metric == "loss" else value

    def _make_batch(self, step: int) -> Batch:
        t = self.recipe
        batch = self.task.batch(t.seed, step, t.batch_size, **self.stages.arguments)
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def _tokens(self, steps: int) -> int:
        return steps * self.recipe.batch_size * self.task.seq_len

    def _newest(self, extend: bool) -> Checkpoint | None:
        """The checkpoint to go on from."""

        def warn(text: str) -> None:
            self.console.print(text, style="yellow", markup=False)

        return newest_checkpoint(self.config, self.out, warn, extend=extend, world=self.world)

    def _begin(self, resumed: bool) -> None:
        """Make the run's folder, or check that it is free to go on in, which changes nothing there."""
        if resumed:
            with locked(self.out):  # refused here rather than by `fit`
                return
        if self.out.exists():
            clear_run(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.config.save(self.out)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state, world = checkpoint.state, self.world
        # Fewer processes than these, or some without a GPU, may have written it.
        known = {name: x for name, x in self._generators().items() if name in checkpoint.tensors}
        checkpoint.fill(model_tensors(self.model) | known, world)
        load_optimizers(checkpoint, self.model, self.optimizers.values(), world)
        for name, x in known.items():
            torch.set_rng_state(x) if name.endswith("cpu") else torch.cuda.set_rng_state(x, self.device)
        self.step, self.seconds = checkpoint.step, state["seconds"]
        self.skipped, self.skipped_in_row = state["skipped"], state["skipped_in_row"]
        self.best, self.stale = state["best"], state["stale"]
        self.stages.restore(state)

    def _stopped(self) -> bool:
        """Whether any process has been sent a signal."""
        (number,) = self.world.max([self._noted or 0])
        self._signal = number or None
        return self._signal is not None

    def _note(self, number: int) -> None:
        """A signal, which the loop looks at between steps."""
        self._noted = number
