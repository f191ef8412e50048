"""Cross-entropy of hidden states through a head, without the logits of all of them.

The logits of 12000 tokens over 152k words are 7 GB in float32, and their gradient as much again. A
token's loss needs its own alone. So head and loss are taken of some tokens at a time, a chunk, and
in the backward once more, chunk by chunk: with the head, four products instead of three. The head
is called as it is, with its hooks and adapters, whatever its weights are.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Of the logits of a chunk. Each adds a gradient of the head's weight to the others', which takes longer than the
# products if it has few tokens. Those of a small vocabulary all fit, and nothing is computed again.
CHUNK_BYTES = 2**28


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of logits `[tokens, vocab_size]` and targets int64 `[tokens]`, -100 for no loss.

    Returns a number, at least float32.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(exact, targets, reduction="sum")


def chunked_cross_entropy(
    head: Callable[[Tensor], Tensor], h: Tensor, targets: Tensor, *, vocab_size: int, random: bool = False
) -> Tensor:
    """`summed_cross_entropy(head(h), targets)`, of CHUNK_BYTES of float32 logits at a time.

    head: hidden states -> logits, token by token; how often it is called depends on their number.
    h: `[tokens, hidden_size]`, at least one token.
    targets: int64 `[tokens]`.
    vocab_size: how many logits a token has.
    random: whether the head draws random numbers, as dropout does.

    Differentiable any number of times, with respect to h and all that the head computes with.
    """
    each = _chunk(h, vocab_size)

    def loss(h: Tensor, targets: Tensor) -> Tensor:
        return summed_cross_entropy(head(h), targets)

    again = partial(checkpoint, loss, use_reentrant=False, preserve_rng_state=random)
    *others, last = zip(h.split(each), targets.split(each), strict=True)
    # The backward begins with the last one, whose logits are kept for it.
    return sum([again(*chunk) for chunk in others] + [loss(*last)])


@torch.no_grad()
def scored(head: Callable[[Tensor], Tensor], h: Tensor, targets: Tensor, *, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Whether the largest logit is the target's, bool `[tokens]`, and the loss in nats, float32 `[tokens]`.

    Of CHUNK_BYTES of float32 logits at a time; arguments as of `chunked_cross_entropy`.
    """
    each, right, nats = _chunk(h, vocab_size), [], []
    for x, target in zip(h.split(each), targets.split(each), strict=True):
        logits = head(x)
        right.append(logits.argmax(-1) == target)
        nats.append(F.cross_entropy(logits.float(), target, reduction="none"))
    return torch.cat(right), torch.cat(nats)


def _chunk(h: Tensor, vocab_size: int) -> int:
    """Tokens of a chunk, of hidden states `[tokens, hidden_size]`: about as many in each."""
    size = torch.promote_types(h.dtype, torch.float32).itemsize
    chunks = -(-len(h) // max(1, CHUNK_BYTES // (vocab_size * size)))
    return -(-len(h) // chunks)
