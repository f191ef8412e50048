"""Choosing the next token from logits."""

import torch
from torch import Tensor

from sleep_ops.checks import check_count


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row from logits `[B, vocab_size]`: int64 `[B]`. Greedy at temperature 0.

    top_k keeps the likeliest tokens; top_p the smallest set whose probability reaches it (nucleus
    sampling, Holtzman et al. 2019), after top_k.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits.float() - logits.float().amax(-1, keepdim=True)) / temperature  # so that no quotient is +inf
    if top_k is not None and top_k < logits.shape[-1]:
        values, places = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, places, values)
    if top_p is not None:
        ranked, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        drop = ranked.cumsum(-1) - ranked >= top_p  # the token that crosses top_p stays
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def check_sampling(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_token_id: int | None,
    vocab: int,
) -> None:
    """Raises ValueError naming the argument that can't be."""

    def number(x: object) -> bool:
        return isinstance(x, int | float) and not isinstance(x, bool)

    if not number(max_new_tokens) or max_new_tokens != int(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected an integer >= 1, got {max_new_tokens!r}")
    if not number(temperature) or not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature!r}")
    if top_k is not None:
        check_count("top_k", top_k)
    if top_p is not None and (not number(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    if eos_token_id is not None and (not isinstance(eos_token_id, int) or not 0 <= eos_token_id < vocab):
        raise ValueError(f"eos_token_id: expected an integer from 0 to {vocab - 1}, got {eos_token_id!r}")
