"""The arguments of a transformers forward pass, put as this project's models take them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops.config import expect
from sleep_ops.sleep import SleepState

_IGNORED = ("use_cache", "return_dict", "cu_seq_lens_k", "max_length_q", "max_length_k")


def check_unused(options: dict, **refused: tuple[object, str]) -> None:
    """Raises ValueError for what can't be had: refused[name] = (value, why); unknown options with any value set."""
    for name, (value, why) in refused.items():
        if isinstance(value, SleepState):
            why = "None; a SleepState is passed as state="
        expect(value is None, name, why, type(value).__name__)
    for name, value in options.items():
        unset = name in _IGNORED or value is None or value is False
        expect(unset, name, "nothing: a model that sleeps does not know it", type(value).__name__)


def shifted(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | None:
    """labels[b, t + 1] at [b, t], as transformers means them; shift_labels are taken as they are."""
    if shift_labels is not None or labels is None:
        return shift_labels
    expect(isinstance(labels, Tensor) and labels.dim() == 2, "labels", "a tensor [B, T]", type(labels).__name__)
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def sequence_borders(
    position_ids: Tensor | None, attention_mask: Tensor | None, input_ids: Tensor, state: SleepState | None
) -> Tensor | None:
    """cu_seqlens of packed sequences that position_ids tell of; None where they say nothing new.

    Raises ValueError for positions that are neither those of packed sequences nor those of plain rows.
    """
    if position_ids is None:
        return None
    batch, width = input_ids.shape
    expect(state is None, "position_ids", "None with state (positions run on)", "both")
    shape = tuple(position_ids.shape)
    expect(position_ids.dim() == 2 and shape[1] == width, "position_ids", f"None or shape {(batch, width)}", shape)
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
    expect(plain, "position_ids", "None, or 0, 1, 2, ... over the real tokens", position_ids.tolist())
    return None
