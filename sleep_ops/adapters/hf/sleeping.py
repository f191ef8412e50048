"""What `SleepingModel` asks of a model, answered for a transformers causal language model."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sleep_ops.adapters.hf.blocks import LayerBlock, compute_dtype
from sleep_ops.adapters.hf.cache import ATTENTION
from sleep_ops.checks import expect
from sleep_ops.layers.attention import SpanContext
from sleep_ops.layers.sharded import gathered
from sleep_ops.model.config import SleepSettings
from sleep_ops.model.sleeping import SleepingModel


class HFSleepingModel(SleepingModel):
    """Reads texts with the parts of `model`: its embedding, layers, final norm and head.

    The blocks are the model's layers, each followed by the fast-weight block inserted after it, if
    there is one. They are looked up at every call, so layers may be wrapped, compiled or sharded at
    any time.

    chosen: the settings, with `loop` in layers of the model.
    """

    def __init__(self, model: PreTrainedModel, chosen: SleepSettings):
        self.model, self.chosen = model, chosen

    @property
    def settings(self) -> SleepSettings:
        """`chosen`, with `loop` in blocks."""
        inserted = sorted(map(int, self._inserted()))
        if self.chosen.loop in (None, "all") or not inserted:
            return self.chosen
        first, last = self.chosen.loop  # type: ignore[str-unpack]
        first, last = first + sum(i < first for i in inserted), last + sum(i <= last for i in inserted)  # type: ignore[operator]
        return replace(self.chosen, loop=(first, last))

    @property
    def sleep_blocks(self) -> Sequence:
        used = self.model.config._attn_implementation
        expect(used == ATTENTION, "attn_implementation", f"{ATTENTION!r}, as sleepify set it", used)
        inserted, blocks, dtype = self._inserted(), [], compute_dtype(self.model)
        for i, layer in enumerate(self.model.model.layers):
            blocks.append(LayerBlock(layer, self._arguments, self.model.config, dtype))
            if str(i) in inserted:
                block = inserted[str(i)]
                gathered(block, "replay")
                blocks.append(block)
        return blocks

    @property
    def random(self) -> bool:
        dropouts = (m for m in self.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
        return self.training and any(m.p > 0 for m in dropouts)

    @property
    def vocab_size(self) -> int:
        return self.embedding_weight.shape[0]

    @property
    def embedding_weight(self) -> Tensor:
        return self.model.get_input_embeddings().weight

    @property
    def training(self) -> bool:
        return self.model.training

    def embed(self, ids: Tensor) -> Tensor:
        if isinstance(self.embedding_weight, DTensor):
            raise ValueError(
                "model: expected gathered parameters, got sharded ones; call the model itself, or first "
                "register_fsdp_forward_method(model, 'generate')"
            )
        return self.model.get_input_embeddings()(ids)

    def predict(self, h: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(h))

    def identity(self) -> dict:
        config = self.model.config
        sizes = {
            name: getattr(config, name) for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
        }
        return super().identity() | sizes | {"fast_weights": getattr(config, "fast_weights", None)}

    def _inserted(self) -> nn.ModuleDict | dict:
        return getattr(self.model.model, "fast_weights", {})

    def _arguments(self, h: Tensor, context: SpanContext) -> dict:
        """What the layers are called with beside hidden states and cache."""
        if "rotary" not in context.shared:
            rotary, positions = getattr(self.model.model, "rotary_emb", None), context.positions()
            if hasattr(rotary, "mrope_section"):  # places in time, height and width, the same for text
                positions = positions.expand(3, -1, -1)
            with torch.no_grad():
                context.shared["rotary"] = None if rotary is None else rotary(h, position_ids=positions)
        return {
            "position_embeddings": context.shared["rotary"],
            "position_ids": context.positions(),
            "sleep_backend": self.chosen.attention_backend,
        }
