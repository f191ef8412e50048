"""Choosing the next token from logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from sleep_ops.checks import check_count, expect, is_count, is_finite

_LEAST = torch.finfo(torch.float32).tiny  # a number below may be 0 where logits are float32


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
    logits = logits.float() - logits.float().amax(-1, keepdim=True)  # so that no quotient is +inf
    logits = logits / max(temperature, _LEAST)
    if top_k is not None and top_k < logits.shape[-1]:
        values, places = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, places, values)
    if top_p is not None:
        ranked, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        drop = ranked.cumsum(-1) - ranked >= max(top_p, _LEAST)  # the token that crosses top_p stays
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def check_sampling(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_token_id: int | None,
    pad_token_id: int | None,
    generator: torch.Generator | None,
    on_token: Callable[[Tensor], None] | None,
    vocab: int,
) -> None:
    """Raises ValueError naming the argument that can't be."""
    check_count("max_new_tokens", max_new_tokens)
    expect(is_finite(temperature) and temperature >= 0, "temperature", "a finite number >= 0", temperature)
    if top_k is not None:
        check_count("top_k", top_k)
    expect(top_p is None or (is_finite(top_p) and 0 < top_p <= 1), "top_p", "a number in (0, 1]", top_p)
    for name, token, low, high in (
        ("eos_token_id", eos_token_id, 0, vocab),
        ("pad_token_id", pad_token_id, -(2**63), 2**63),  # it is never read
    ):
        inside = is_count(token, low) and token < high
        expect(token is None or inside, name, f"an integer from {low} to {high - 1}", token)
    drawn = generator is None or isinstance(generator, torch.Generator)
    expect(drawn, "generator", "a torch.Generator", generator)
    expect(on_token is None or callable(on_token), "on_token", "a function", on_token)
