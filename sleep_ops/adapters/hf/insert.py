"""Fast-weight blocks between the layers of a model that has none (or too few)."""

import inspect
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from sleep_ops.adapters.hf.blocks import compute_dtype
from sleep_ops.adapters.hf.families import check_family
from sleep_ops.checks import expect
from sleep_ops.layers.block import Block
from sleep_ops.layers.gdn import SleepGDNLayer


def check_layers(name: str, layers: Sequence[int], model: PreTrainedModel) -> None:
    """ValueError, naming the argument, unless these are distinct numbers of a supported model's layers."""
    check_family(model)
    count = len(model.model.layers)
    listed = isinstance(layers, Sequence) and all(type(i) is int and 0 <= i < count for i in layers)
    inside = listed and len(set(layers)) == len(layers) > 0
    expect(inside, name, f"distinct layer numbers from 0 to {count - 1}", layers)


def insert_fast_weights(
    model: PreTrainedModel,
    layers: Sequence[int],
    *,
    num_heads: int | None = None,
    head_dim: int | None = None,
    num_v_heads: int | None = None,
    head_v_dim: int | None = None,
    conv_size: int = 4,
    allow_neg_eigval: bool = False,
) -> PreTrainedModel:
    """Puts a Gated DeltaNet block (norm, mixer, residual; no MLP) after each of the given layers.

    layers: distinct layer numbers.
    num_heads, head_dim: default the attention's query heads and their size; the rest as in
        `SleepGDNLayer`.

    Returns the model, changed. Output projections are zero, so at the start it computes what it did
    before. Only the sleeping forward pass of `sleepify` runs these blocks. Their parameters are
    `model.fast_weights.N...`; all other names stay. The configuration remembers them as
    `fast_weights`, for `from_pretrained` of this package.

    Raises ValueError for a model of an unsupported family, for layers it does not have, and where
    blocks are there already.
    """
    check_family(model)
    config, backbone = model.config, model.model
    expect(not hasattr(backbone, "fast_weights"), "model", "one without inserted blocks", "one that has them")
    check_layers("layers", layers, model)
    own = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes: dict = dict(
        num_heads=config.num_attention_heads if num_heads is None else num_heads,
        head_dim=own if head_dim is None else head_dim,
        num_v_heads=num_v_heads,
        head_v_dim=head_v_dim,
        conv_size=conv_size,
        allow_neg_eigval=allow_neg_eigval,
    )
    blocks = nn.ModuleDict()
    for i in sorted(layers):
        mixer = SleepGDNLayer(config.hidden_size, norm_eps=config.rms_norm_eps, **sizes)
        nn.init.zeros_(mixer.o_proj.weight)
        device = next(backbone.layers[i].parameters()).device
        blocks[str(i)] = Block(mixer, config.hidden_size, None, config.rms_norm_eps).to(device, compute_dtype(model))
    backbone.fast_weights = blocks
    config.fast_weights = {"layers": sorted(layers), **sizes}
    return model


def insert_remembered(model: PreTrainedModel) -> bool:
    """Puts in the blocks that the model's configuration remembers; returns whether it remembers any.

    Raises ValueError for something else than `insert_fast_weights` left there.
    """
    saved = getattr(model.config, "fast_weights", None)
    if saved is None:
        return False
    names = list(inspect.signature(insert_fast_weights).parameters)[1:]
    fits = isinstance(saved, dict) and "layers" in saved and saved.keys() <= set(names)
    expected = f"in the configuration a dictionary with layers, and optionally {', '.join(names[1:])}"
    expect(fits, "fast_weights", expected, saved)
    insert_fast_weights(model, **saved)
    return True
