"""What the ports share: a published layout of embedding, layers, final norm and head."""

import os
from typing import Any

from torch import Tensor, nn

from sleep_ops.adapters.checkpoint import save_weights
from sleep_ops.model.config import SleepSettings
from sleep_ops.model.sleeping import SleepingModel


class Port(SleepingModel):
    """A model with config (`SleepSettings`), model.embed_tokens, model.norm and lm_head."""

    config: Any
    model: nn.Module
    lm_head: nn.Module

    @property
    def settings(self) -> SleepSettings:
        return self.config

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def embedding_weight(self) -> Tensor:
        return self.model.embed_tokens.weight

    def embed(self, ids: Tensor) -> Tensor:
        """int64 `[B, T]` -> `[B, T, hidden_size]`."""
        return self.model.embed_tokens(ids)

    def predict(self, h: Tensor) -> Tensor:
        """Logits of block outputs. h `[..., hidden_size]` -> `[..., vocab_size]`."""
        return self.lm_head(self.model.norm(h))

    def save_pretrained(self, folder: str | os.PathLike, *, max_shard_bytes: int | None = None) -> None:
        """Writes config.json, settings of sleep included, and weights; see `save_weights`."""
        save_weights(self, folder, self.config.to_checkpoint(), max_shard_bytes=max_shard_bytes)
