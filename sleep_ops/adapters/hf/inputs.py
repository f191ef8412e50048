"""The arguments of a transformers forward pass, put as this project's models take them."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig

from sleep_ops.checks import expect
from sleep_ops.model.state import SleepState

_CACHES = ("past_key_values", "cache")  # the latter from transformers 5.24 on
_IGNORED = ("use_cache", "return_dict", "cu_seq_lens_k", "max_length_q", "max_length_k")
# What forward passes of transformers, and Liger's in their place, hand on to a backbone that has no use for it.
FOR_LOSS = (
    "num_items_in_batch",
    "logits_to_keep",
    "vocab_size",
    "ignore_index",
    "label_smoothing",
    "lse_square_scale",
    "accum_dtype",
    "use_token_scaling",
    "return_token_accuracy",
    "return_predicted_tokens",
    "return_z_loss",
)
_UNKNOWN = "a model that sleeps does not know it"
_INSTEAD = {
    "cache_position": "positions run on by themselves from what is passed as state=",
    "return_loss": "the loss is returned where labels are given",
    "output_attentions": "attention is computed inside windows and not kept",
    "output_hidden_states": "those between layers are not kept; model.model(input_ids) gives the last ones",
    "output_router_logits": "the routers' loss is not computed over windows; set it to False, in the configuration too",
}


def check_cache(options: dict, inputs_embeds, instead: str) -> None:
    """Raises ValueError where a cache is among the options, or inputs_embeds are given.

    instead: what is done in place of a cache.
    """
    for name in _CACHES:
        cache = options.get(name)
        expect(cache is None, name, f"None: {instead}", type(cache).__name__)
    cut = "None: windows are cut from input_ids"
    expect(inputs_embeds is None, "inputs_embeds", cut, type(inputs_embeds).__name__)


def check_unused(config: PreTrainedConfig, options: dict, past_key_values, inputs_embeds) -> None:
    """Raises ValueError for what can't be had, asked for in the call or the configuration."""
    options = options | {"past_key_values": past_key_values}
    instead = "a model that sleeps keeps its own state (see return_state)"
    if any(isinstance(options.get(name), SleepState) for name in _CACHES):
        instead = "a SleepState is passed as state="
    check_cache(options, inputs_embeds, instead)
    wished = {name: getattr(config, name, None) for name in _INSTEAD if name.startswith("output_")}
    for name, value in (wished | options).items():
        unset = name in _IGNORED or value is None or value is False
        expect(unset, name, f"nothing: {_INSTEAD.get(name, _UNKNOWN)}", type(value).__name__)


def shifted(labels: Tensor | None, shift_labels: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """labels[b, t + 1] at [b, t], as transformers means them; shift_labels as they are."""
    if shift_labels is not None or labels is None:
        return shift_labels
    got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
    expect(got == tuple(input_ids.shape), "labels", f"a tensor of input_ids' shape {tuple(input_ids.shape)}", got)
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def sequence_borders(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    state: SleepState | None,
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(cu_seqlens of packed sequences, the mask beside them) as one of the arguments tells them.

    The first of cu_seqlens, seq_idx and position_ids that is given counts; None for rows of one
    sequence each. A mask of ones says nothing and is left out beside borders.

    Raises ValueError for input_ids or a mask that are not `[B, T]`, for positions that are neither
    those of packed sequences nor those of plain rows, and for a seq_idx of several rows of more
    than one sequence.
    """
    _check_ids(input_ids, attention_mask)
    if cu_seqlens is None and seq_idx is not None:
        cu_seqlens = _numbered(seq_idx, input_ids)
    packed = input_ids.shape[0] == 1 and (cu_seqlens is not None or position_ids is not None)
    full = attention_mask is None or (packed and bool(attention_mask.all()))
    if cu_seqlens is None and position_ids is not None:
        cu_seqlens = _counted(position_ids, None if full else attention_mask, input_ids, state)
    return cu_seqlens, None if full and cu_seqlens is not None else attention_mask


def check_plain(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
    """Raises ValueError for positions of a prompt that are not 0, 1, 2, ... over the real tokens of each row."""
    borders, _ = sequence_borders(input_ids, attention_mask, position_ids, None, None, None)
    expect(borders is None, "position_ids", "those of one sequence in each row", "several")


def _check_ids(input_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Raises ValueError unless both are `[B, T]`, or the mask is None."""
    got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
    expect(isinstance(input_ids, Tensor) and input_ids.dim() == 2, "input_ids", "a tensor [B, T]", got)
    if attention_mask is not None:
        known = isinstance(attention_mask, Tensor)
        got = tuple(attention_mask.shape) if known else type(attention_mask).__name__
        shape = tuple(input_ids.shape)
        expected = (
            f"shape {shape}, 1 = real token (a token sees those before it in its window; the borders of packed "
            "sequences are told by position_ids, seq_idx or cu_seqlens)"
        )
        expect(known and tuple(attention_mask.shape) == shape, "attention_mask", expected, got)


def _numbered(seq_idx: Tensor, input_ids: Tensor) -> Tensor | None:
    """Borders where the sequence's number changes."""
    shape = tuple(input_ids.shape)
    got = tuple(seq_idx.shape) if isinstance(seq_idx, Tensor) else type(seq_idx).__name__
    expect(got == shape, "seq_idx", f"a tensor of input_ids' shape {shape}", got)
    change = (seq_idx[:, 1:] != seq_idx[:, :-1]).any(0).nonzero()[:, 0] + 1
    if len(change) == 0:
        return None
    expect(shape[0] == 1, "seq_idx", "one sequence in each row, or one row (B = 1) of several", f"B = {shape[0]}")
    return torch.cat([change.new_zeros(1), change, change.new_tensor([shape[1]])])


def _counted(
    position_ids: Tensor, attention_mask: Tensor | None, input_ids: Tensor, state: SleepState | None
) -> Tensor | None:
    """Borders where positions begin again; None for plain rows."""
    batch, width = input_ids.shape
    expect(state is None, "position_ids", "None with state (positions run on)", "both")
    known = isinstance(position_ids, Tensor)
    shape = tuple(position_ids.shape) if known else type(position_ids).__name__
    fits = known and position_ids.dim() == 2 and shape[0] in (1, batch) and shape[1] == width
    expect(fits, "position_ids", f"None or a tensor of shape {(batch, width)}", shape)
    counted = torch.arange(width, device=position_ids.device)
    if batch == 1 and attention_mask is None:
        starts = (position_ids[0] == 0).nonzero()[:, 0]
        if len(starts) > 1 and starts[0] == 0:
            since = torch.repeat_interleave(starts, torch.diff(starts, append=starts.new_tensor([width])))
            plain = bool((position_ids[0] == counted - since).all())
            expect(plain, "position_ids", "each sequence counted from 0 without a gap", position_ids[0].tolist())
            return torch.cat([starts, starts.new_tensor([width])])
    expected, real = counted.expand_as(position_ids), torch.ones_like(position_ids, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask.bool()
        expected = (real.cumsum(1) - 1).expand(batch, width)
    plain = bool(((position_ids == expected) | ~real).all())
    expected = "None, or 0, 1, 2, ... over the real tokens (packed sequences: in one row, B = 1, without padding)"
    expect(plain, "position_ids", expected, position_ids.tolist())
    return None
