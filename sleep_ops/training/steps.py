"""The optimiser steps of a run: each takes a batch, changes the weights, and gives a row of what it came to."""

import math
from contextlib import nullcontext
from functools import partial

import torch
from rich.console import Console
from torch import Tensor, nn

from sleep_ops.model.hybrid import SleepHybridModel
from sleep_ops.model.sleeping import find_sleeping, sleeping
from sleep_ops.tasks import Batch, Task
from sleep_ops.training.config import TrainConfig
from sleep_ops.training.division import Division
from sleep_ops.training.graph import StepGraphs
from sleep_ops.training.offload import Offloaded
from sleep_ops.training.optim import build_optimizers, set_learning_rates
from sleep_ops.training.parallel import Replicated, World
from sleep_ops.training.run import autocast, check_vocabulary, chosen_parameters, select_parameters
from sleep_ops.training.stages import Stages


def shared_out(recipe: TrainConfig, world: World) -> bool:
    """Whether the processes share out the model's parameters."""
    return recipe.parallel == "fsdp" and world.size > 1


def check_run(model: nn.Module, task: Task, recipe: TrainConfig, division: Division, device: torch.device) -> None:
    """Raises ValueError where `model` can't be trained on `task` by this recipe and division; changes nothing."""
    check_vocabulary(model, task)
    division.check_rows()
    division.check(model, task)
    check_recipe(model, recipe, device)


def check_recipe(model: nn.Module, recipe: TrainConfig, device: torch.device) -> None:
    """Raises ValueError where this recipe can't train `model` on this device; changes nothing."""
    if recipe.cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph: expected False without CUDA, got True on {device}")
    if recipe.cuda_graph and not isinstance(model, SleepHybridModel):
        got = f"True with a {type(model).__name__}"
        raise ValueError(f"cuda_graph: expected False, or a SleepHybridModel to train, got {got}")
    schedule, passes = recipe.passes_schedule, _passes(model)
    if schedule != "fixed" and passes in (None, math.inf):
        raise ValueError(f"passes_schedule: expected 'fixed' for a model with passes {passes}, got {schedule!r}")
    chosen_parameters(model, recipe.trainable)


def _passes(model: nn.Module) -> int | float | None:
    """The model's own N; None for one that doesn't sleep."""
    found = find_sleeping(model)
    return None if found is None else found.settings.passes


class Steps:
    """Optimiser steps of `model`; `self.model` is that as it is laid out over the processes.

    division: what each process reads of a batch, and which processes there are.
    console: where it is told, once, that something of the recipe can't be had.

    ValueError where the recipe does not go with the model.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: TrainConfig,
        *,
        division: Division,
        stages: Stages,
        device: torch.device,
        console: Console,
    ):
        self.recipe, self.division, self.stages, self.console = recipe, division, stages, console
        self.device, self.world = device, division.world
        check_recipe(model, recipe, device)
        self.passes = _passes(model)
        select_parameters(model, recipe.trainable)
        self.layout = self._lay_out(model)
        self.model = self.layout.model
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = build_optimizers(
            self.model,
            lr_muon=recipe.lr_muon,
            lr_adamw=recipe.lr_adamw,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            matrix_optimizer=self.layout.matrix_optimizer,
        )
        self.graphs: StepGraphs | None = None
        if recipe.cuda_graph:
            self.graphs = StepGraphs(self.model, partial(autocast, recipe.precision, device))
        self.step, self.skipped, self.skipped_in_row = 0, 0, 0
        self._told: set[str] = set()

    def take(self, batch: Batch) -> dict:
        """One optimiser step; its loss, gradient norm, learning rates, N, stage and steps skipped so far.

        Skipped, but counted, where the loss or the gradient norm is not finite.
        """
        t = self.recipe
        factor = t.learning_rate_factor(self.step) * self.stages.learning_rate_factor(self.step)
        rates = {"muon": t.lr_muon * factor, "adamw": t.lr_adamw * factor}
        passes = self._scheduled_passes()
        loss = self._loss_and_gradients(batch)
        norm = self.layout.clip(self.parameters, t.grad_clip)
        # The only wait for the device in a step: whether to take it must be known before the weights change.
        loss, norm = torch.stack([loss.float(), norm.float()]).tolist()
        finite = math.isfinite(loss) and math.isfinite(norm)
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
            "loss": loss,
            "grad_norm": norm,
            "lr_muon": rates["muon"],
            "lr_adamw": rates["adamw"],
            "passes": passes or self.passes or math.nan,
            "stage": self.stages.stage,
            "skipped": self.skipped,
        }

    def _loss_and_gradients(self, batch: Batch) -> Tensor:
        """The mean loss of the whole batch; its gradients, summed, are left in the parameters."""
        total, alike = int(batch.loss_mask.sum()), self._alike(batch)
        with self.layout.gradients(alike):
            loss = self._own_loss(self.division.part(batch, self.world.rank), total, alike)
        return self.world.sum(loss)

    def _alike(self, batch: Batch) -> bool:
        """Whether blocks are gathered for each call: where all processes make the same ones."""
        if self.recipe.reshard != "call" or self.world.size == 1:
            return False
        settings = sleeping(self.model).settings
        same = self.division.alike(batch, settings)
        if not same:
            self._tell("reshard: rows differ between processes, so such a step gathers parameters all at once")
        elif settings.activation_checkpointing and settings.recompute != "block":
            recomputed = f"a {settings.recompute} is recomputed at a time, which gathers parameters all at once"
            self._tell(f"reshard: {recomputed}; with recompute 'block' it is those of a block")
        return same

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.console.print(text)

    def _own_loss(self, batch: Batch, total: int, alike: bool) -> Tensor:
        """What these rows add to the mean loss over `total` tokens, with its gradients."""
        t, passes = self.recipe, self._scheduled_passes()
        whole = torch.zeros((), device=self.device)
        if self.graphs is not None and batch.loss_mask.any():
            loss = self.graphs(batch, passes)
            if loss is not None:
                share = int(batch.loss_mask.sum()) / total
                for p in self.parameters:
                    if p.grad is not None and share != 1:
                        p.grad.mul_(share)
                return loss * share
        given: dict = {} if passes is None else {"passes": passes}
        if self.division.by_columns:
            given["group"] = torch.distributed.group.WORLD
        elif alike:
            given["all_logits"] = True
        parts: list[Batch | None] = [
            part for part in batch.split(self.division.rows) if self.division.by_columns or part.loss_mask.any()
        ]
        rounded = t.param_dtype != "float32"
        if rounded:  # gradients are summed between parts, by all processes together
            parts += [None] * (self.world.max([len(parts)])[0] - len(parts))
        for i, part in enumerate(parts):
            if i and rounded:
                self.layout.add_up()
            if part is None:
                continue
            share = int(part.loss_mask.sum()) / total
            offload = Offloaded(self.layout.computing) if t.offload else nullcontext()
            with autocast(t.precision, self.device), offload:
                out = self.model(part.input_ids, **part.arguments(), return_logits=False, return_state=False, **given)
            loss = out.loss * share
            loss.backward()
            whole = whole + loss.detach()
        return whole

    def _scheduled_passes(self) -> int | None:
        """N of the step in hand; None for the model's own."""
        t = self.recipe
        return None if t.passes_schedule == "fixed" else t.passes_at(self.step, self.passes)  # type: ignore[arg-type]

    def _lay_out(self, model: nn.Module) -> Replicated:
        t = self.recipe
        dtype = None if t.param_dtype == "float32" else torch.bfloat16
        if not shared_out(t, self.world):
            return Replicated(model, self.world, self.device, dtype)
        from sleep_ops.training.sharded import Sharded  # half a second to import

        if self.world.size % t.replicas:
            expected = f"a divisor of the {self.world.size} processes"
            raise ValueError(f"replicas: expected {expected}, got {t.replicas}")
        return Sharded(model, self.world, self.device, dtype, reshard=t.reshard, replicas=t.replicas)
