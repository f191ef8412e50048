"""Cross-entropy of a head's logits, and of hidden states, without the logits of all of them.

The logits of T tokens are T times the vocabulary: 7 GB in float32 for 12000 tokens and 152k words,
as much again for their gradient. Each token's loss needs its own alone, so head and loss are taken
for some tokens at a time, and again in the backward. It costs one more product with the head, of
four; that the head is called as it is, hooks, adapters and quantised weights work.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 2**28  # of the logits made at a time; fewer tokens than that many are not worth a launch


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits `[tokens, vocab_size]`, targets int64 `[tokens]`, -100 for no loss -> at least float32, `[]`."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(exact, targets, reduction="sum")


def chunked_cross_entropy(
    head: Callable[[Tensor], Tensor], h: Tensor, targets: Tensor, *, vocab_size: int, random: bool = False
) -> Tensor:
    """`summed_cross_entropy(head(h), targets)`, with no more than CHUNK_BYTES of logits at a time.

    head: hidden states to logits, token by token.
    h: `[tokens, hidden_size]`, at least one token.
    targets: int64 `[tokens]`.
    vocab_size: how many logits a token has.
    random: whether the head draws random numbers, as dropout does.

    Differentiable any number of times, with respect to whatever the head is made of.
    """
    size = torch.promote_types(h.dtype, torch.float32).itemsize
    most = max(1, CHUNK_BYTES // (vocab_size * size))
    chunks = -(-len(targets) // most)
    each = -(-len(targets) // chunks)

    def loss(h: Tensor, targets: Tensor) -> Tensor:
        return summed_cross_entropy(head(h), targets)

    again = partial(checkpoint, loss, use_reentrant=False, preserve_rng_state=random)
    *others, last = zip(h.split(each), targets.split(each), strict=True)
    # The backward begins with the last one, so its logits are kept: there is nothing to compute again if all fit.
    return sum([again(*chunk) for chunk in others] + [loss(*last)])
