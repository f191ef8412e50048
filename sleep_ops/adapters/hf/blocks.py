"""A decoder layer of transformers as a block of `SleepStack`: explicit state in and out."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from sleep_ops.adapters.hf.cache import CACHE, LayerCache
from sleep_ops.checks import expect
from sleep_ops.layers.attention import AttentionState, SpanContext, narrower
from sleep_ops.layers.block import BlockState
from sleep_ops.layers.mixer import GDNMixer, ReplayInputs
from sleep_ops.layers.sharded import gathered, joined
from sleep_ops.validation import FLOAT_DTYPES


class LayerBlock:
    """One layer of a transformers model, with the methods of `layers.block.Block`.

    The layer is called as its own model calls it, whole, so that hooks, adapters, FSDP and compiled
    layers work: without `output` too, which then saves nothing.

    arguments: arguments(h, context) is what else the layer is called with, rotary positions first
        of all.
    dtype: the hidden states', and so that of the states.
    """

    def __init__(
        self,
        layer: nn.Module,
        arguments: Callable[[Tensor, SpanContext], dict],
        config: PreTrainedConfig,
        dtype: torch.dtype,
    ):
        self.layer, self._arguments, self._config, self._dtype = layer, arguments, config, dtype
        self._mixer: GDNMixer | None = getattr(layer, "linear_attn", None)
        self.fast_weights = self._mixer is not None

    def __call__(
        self, h: Tensor, state: BlockState, context: SpanContext, *, output: bool = True
    ) -> tuple[Tensor | None, BlockState, ReplayInputs | None]:
        """h `[B, T, hidden]` of a span -> (h, the state after it, what fast weights were written)."""
        cache = LayerCache(state, context)
        h = self.layer(
            h,
            attention_mask=None
            if self.fast_weights
            else context.mask(narrower(context.window, self._sliding_window())),
            use_cache=True,
            sleep_context=context,
            **{CACHE: cache},
            **self._arguments(h, context),
        )
        dropped = "a layer that left no state: transformers' own checkpointing drops it"
        expect(cache.after is not None, "gradient checkpointing", "that of the sleeping model as a whole", dropped)
        return joined(self.layer, h, cache.after, cache.writes)

    def replay(
        self, writes: ReplayInputs, fast_weights: Tensor, passes: int | float, lengths: Tensor | None = None
    ) -> Tensor:
        """See `GDNMixer.replay`."""
        replay = gathered(self.layer, "replay", self._mixer.replay)
        return replay(writes, fast_weights, passes=passes, lengths=lengths)

    def _sliding_window(self) -> int | None:
        return getattr(self.layer.self_attn, "sliding_window", getattr(self._config, "sliding_window", None))

    def init_state(self, batch_size: int) -> BlockState:
        """Zero fast weights, or an empty cache."""
        if self.fast_weights:
            return self._mixer.init_state(batch_size, dtype=self._dtype)
        device, heads = next(self.layer.parameters()).device, self._config.num_key_value_heads
        empty = torch.empty(batch_size, 0, heads, self.layer.self_attn.head_dim, device=device, dtype=self._dtype)
        return AttentionState(empty, empty)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """In which the model computes; its weights may be stored in another, quantised."""
    return next((p.dtype for p in model.parameters() if p.dtype in FLOAT_DTYPES), torch.float32)
