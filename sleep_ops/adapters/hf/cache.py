"""One layer's explicit state in the shape of a transformers cache, for the time of one call.

transformers changes its caches in place, which autograd can't follow through a second pass. A
`LayerCache` holds the state a layer starts from, and after the call the new tensors it left.
"""

import math

import transformers
from packaging.version import Version
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sleep_ops import ragged
from sleep_ops.checks import expect
from sleep_ops.layers.attention import AttentionState, SpanContext, narrower
from sleep_ops.layers.block import BlockState
from sleep_ops.layers.mixer import GDNMixer, ReplayInputs
from sleep_ops.ops.attention import causal_attention

ATTENTION = "sleep_ops"  # this project's attention among those of transformers
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"  # as layers call it


class LayerCache:
    """The state of a layer before a span; once the layer was called, also the one after it.

    after: None until then.
    writes: what a fast-weight layer wrote.

    A layer called once more with the same cache (to compute it again in the backward pass) finds
    it as it was.
    """

    def __init__(self, state: BlockState, context: SpanContext):
        self.before, self.context = state, context
        self.after: BlockState | None = None
        self.writes: ReplayInputs | None = None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """What transformers' attention calls: keys and values `[B, HKV, T, D]` -> all so far."""
        cache_lengths, lengths = self.context.cache_lengths, self.context.lengths
        new = (x.transpose(1, 2) for x in (keys, values))
        pairs = zip(self.before, new, strict=True)
        self.after = AttentionState(*(ragged.append(old.to(x.dtype), cache_lengths, x, lengths) for old, x in pairs))
        return self.after.keys.transpose(1, 2), self.after.values.transpose(1, 2)

    def mix(self, mixer: GDNMixer, x: Tensor) -> Tensor:
        """What this project's mixers call: x `[B, T, hidden_size]` -> the same shape."""
        context = self.context
        given = dict(state=self.before, lengths=context.length_tensor, return_writes=True)
        y, self.after, self.writes = mixer.read(context.joined(x), **given, **context.sleep)
        return context.parted(y)


def attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options):
    """transformers' attention interface -> (`[B, T, H, D]`, None).

    query: `[B, H, T, D]`.
    key, value: `[B, HKV, S, D]`.

    Inside a window, which the layer is told of as `sleep_context`: causal attention to the keys of
    the span's cache, by flash-attn where that is installed; attention_mask is the span's. Raises
    ValueError for a layer that is called past the sleeping forward passes, as by the unbound one of
    its class.
    """
    context, backend = options.get("sleep_context"), options.get("sleep_backend", "auto")
    past = "a call from elsewhere; a model that is not to sleep takes set_attn_implementation('sdpa')"
    expect(context is not None, "forward", "model(...) or model.model(...) of a model after sleepify", past)
    scaling = options.get("scaling")
    if scaling is not None and not math.isclose(scaling, query.shape[-1] ** -0.5):
        query = query * (scaling * query.shape[-1] ** 0.5)
    window = narrower(context.window, options.get("sliding_window"))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return causal_attention(q, k, v, window=window, mask=attention_mask, backend=backend), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
