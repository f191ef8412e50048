"""What each of a run's processes reads of a batch: rows of its own, or its part of every text."""

from torch import nn

from sleep_ops.model.config import SleepSettings
from sleep_ops.model.sleeping import find_sleeping
from sleep_ops.tasks import Batch, Task
from sleep_ops.training.config import TrainConfig
from sleep_ops.training.parallel import World


class Division:
    """Of the batches of a run.

    rows: of a micro-batch.
    by_columns: whether texts are cut, instead of dealt out.
    """

    def __init__(self, config: TrainConfig, world: World):
        self.world, self.rows = world, config.micro_batch or config.batch_size
        self.by_columns = config.split == "sequence" and world.size > 1

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
