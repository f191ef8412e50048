"""What each of a run's processes reads of a batch: rows of its own, or its part of every text."""

import torch
from torch import Tensor, nn

from sleep_ops.checks import expect
from sleep_ops.model.config import SleepSettings
from sleep_ops.model.sleeping import find_sleeping
from sleep_ops.tasks import Batch, Task
from sleep_ops.tasks.common import score_batch
from sleep_ops.training.config import TrainConfig
from sleep_ops.training.parallel import World


class Division:
    """Of the batches of a run.

    rows: of a micro-batch.
    scored_rows: that a process evaluates at a time, whole texts: about as many tokens as it trains on.
    by_columns: whether texts are cut, instead of dealt out.
    """

    def __init__(self, config: TrainConfig, world: World):
        self.world, self.rows = world, config.micro_batch or config.batch_size
        self.batch_size = config.batch_size
        self.by_columns = config.split == "sequence" and world.size > 1
        shared = self.rows if self.by_columns else config.batch_size
        self.scored_rows = min(self.rows, -(-shared // world.size))

    def check_rows(self) -> None:
        """Raises ValueError where there is not a row of a batch for each process."""
        least = 1 if self.by_columns else self.world.size
        expect(self.batch_size >= least, "batch_size", f"at least {least}, one per process", self.batch_size)

    def check(self, model: nn.Module, task: Task) -> None:
        """Raises ValueError where each process is to read its part of a text and can't."""
        if not self.by_columns:
            return
        found = find_sleeping(model)
        settings = None if found is None else found.settings
        able = settings is not None and settings.windows_at_once and settings.window
        able = able and (settings.sleep_kind == "replay" or settings.passes == 1)
        if not able:
            expected = "'batch', or a model that reads windows_at_once, with one pass or by replay"
            raise ValueError(f"split: expected {expected}, got 'sequence'")
        whole = self.world.size * settings.window
        if task.seq_len % whole:
            expected = f"texts of a multiple of {whole} tokens, whole windows for each process"
            raise ValueError(f"split: expected {expected}, got {task.seq_len}")

    def part(self, batch: Batch, rank: int) -> Batch:
        """What the process of this rank reads."""
        size = self.world.size
        if self.by_columns:
            each = batch.input_ids.shape[1] // size
            return batch.columns(slice(rank * each, (rank + 1) * each))
        return batch.rows(slice(rank, None, size))

    def alike(self, batch: Batch, settings: SleepSettings) -> bool:
        """Whether all processes will call the same blocks in the same order, if all windows take part."""
        if self.by_columns:
            return True
        if batch.attention_mask is not None or settings.sleep_on != "every":
            return False
        parts = [self.part(batch, rank).split(self.rows) for rank in range(self.world.size)]
        return len({len(p) for p in parts}) == 1 and all(bool(x.loss_mask.any()) for p in parts for x in p)


class Scoring(nn.Module):
    """A model whose evaluation the processes share: each scores rows of its own, a few at a time."""

    def __init__(self, model: nn.Module, division: Division):
        super().__init__()
        self.model, self.division = model, division

    def forward(self, *args, **kwargs):
        """For tasks that score by themselves: every process then does all of it."""
        return self.model(*args, **kwargs)

    def score_batch(
        self, batch: Batch, *, passes: int | float | None, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        """As `tasks.common.score_batch`, in every process: for each row the same, whoever scored it."""
        world = self.division.world
        own = batch.rows(slice(world.rank, None, world.size))
        parts = [score_batch(self.model, x, passes=passes, device=device) for x in own.split(self.division.scored_rows)]
        right, nats = torch.zeros_like(batch.loss_mask), torch.zeros(batch.loss_mask.shape, dtype=torch.float64)
        for rank, found in enumerate(world.all_gather([torch.cat(x) for x in zip(*parts, strict=True)])):
            if found:  # a batch may have fewer rows than there are processes
                right[rank :: world.size], nats[rank :: world.size] = found
        return right, nats
