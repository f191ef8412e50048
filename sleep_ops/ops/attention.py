"""Causal attention over a window: the one place that chooses between flash-attn and PyTorch's fused attention.

Query `i` of row `b` stands at key index `offset_b + i` and sees the `window` most recent keys, itself included:

    visible(i, j)  <=>  offset_b + i - window < j <= offset_b + i

With one offset for all rows (`S - T`: the queries are the newest keys) both libraries are exact. Rows of different
lengths always take PyTorch's attention with an explicit mask.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops.checks import BACKENDS

SHORT = 256  # keys up to which a CPU attends to 16 bits in float32: PyTorch's own backward for them is slow there

# Preferred first: flash-attn 3 (Hopper alone), 4 (Hopper and later), 2. With the compute capabilities and the largest
# head dim each is asked for.
_FLASH_MODULES = (
    ("flash_attn_interface", (9, 9), 256),
    ("flash_attn.cute", (9, 10), 128),
    ("flash_attn", (8, 12), 256),
)


@cache
def flash_function(capability_major: int, head_dim: int) -> Callable | None:
    """`flash_attn_func` of the preferred installed flash-attn that serves this chip and head dim, or None."""
    for module, (lowest, highest), widest in _FLASH_MODULES:
        if lowest <= capability_major <= highest and head_dim <= widest:
            try:
                return import_module(module).flash_attn_func
            except (ImportError, AttributeError):
                continue
    return None


def visible_keys(num_queries: int, num_keys: int, offset: Tensor, lengths: Tensor, window: int | None) -> Tensor:
    """Mask `[B, 1, T, S]` (bool, True = may be seen) for rows of `lengths` real queries from key index `offset`.

    offset and lengths are int64 `[B]`. Filler queries see what the row's last real one sees, and never nothing: a
    softmax over no key is NaN.
    """
    device = offset.device
    query = torch.arange(num_queries, device=device).minimum((lengths - 1).clamp(min=0)[:, None]) + offset[:, None]
    key = torch.arange(num_keys, device=device)
    mask = key <= query[..., None]
    if window is not None:
        mask &= key > query[..., None] - window
    return mask[:, None]


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Softmax attention of the newest T positions over S >= T keys, causal, at most `window` keys each.

    q `[B, T, H, D]`; k, v `[B, S, HKV, D]` with `H % HKV == 0`; returns `[B, T, H, D]` in q's dtype. `mask` (bool
    `[B, 1, T, S]`, from `visible_keys`) replaces the common offset `S - T` where rows differ. backend: "auto" takes
    flash-attn for float16 and bfloat16 CUDA tensors where it is installed, else PyTorch; "flash" insists; "torch".

    Raises ValueError for an unknown backend, and where "flash" is asked for and can't be had.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    flash = _flash_for(q, backend) if backend != "torch" else None
    if flash is not None and mask is None:
        # deterministic: the same seed gives the same bits in the backward pass too
        limit = {} if window is None else {"window_size": (window - 1, 0)}
        out = flash(q, k, v, causal=True, deterministic=True, **limit)
        return out[0] if isinstance(out, tuple) else out
    return _torch_attention(q, k, v, window, mask)


def _flash_for(q: Tensor, backend: str) -> Callable | None:
    fits = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    if backend == "flash" and not fits:
        raise ValueError(f"backend: 'flash' expects float16 or bfloat16 CUDA tensors, got {q.dtype} on {q.device}")
    flash = flash_function(torch.cuda.get_device_capability(q.device)[0], q.shape[-1]) if fits else None
    if backend == "flash" and flash is None:
        got = f"found none for head dim {q.shape[-1]}"
        raise ValueError(f"backend: 'flash' expects flash-attn to be installed (extra: sleep-ops[flash]), {got}")
    return flash


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, mask: Tensor | None) -> Tensor:
    num_queries, num_keys, dtype = q.shape[1], k.shape[1], q.dtype
    if q.device.type == "cpu" and num_keys <= SHORT and dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    inside = window is None or num_keys <= window
    causal = False
    if mask is None and not (num_queries == 1 and inside):
        if inside and num_queries == num_keys:
            causal = True
        else:
            offset = torch.full((1,), num_keys - num_queries, device=q.device)
            mask = visible_keys(num_queries, num_keys, offset, torch.full_like(offset, num_queries), window)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2).to(dtype)
