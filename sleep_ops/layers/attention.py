"""Attention mixer with rotary positions and an explicit cache of keys and values."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sleep_ops import ragged
from sleep_ops.ops.attention import causal_attention, visible_keys
from sleep_ops.ragged import Lengths


class AttentionState(NamedTuple):
    """Cached keys (rotated to their absolute positions) and values, each `[B, S, HKV, D]`, oldest first."""

    keys: Tensor
    values: Tensor


class Segment:
    """Where a run of tokens stands: what every block needs to know of it beyond the hidden states.

    lengths: tokens of each row (right-padded); held: keys each row's caches hold before them; seen: each row's
    absolute position of its first token here; window: L, or None for no limit.
    """

    def __init__(self, lengths: Lengths, held: Lengths, seen: Lengths, window: int | None, device: torch.device):
        self.lengths, self.held, self.seen, self.window, self.device = lengths, held, seen, window, device
        self.width = max(lengths)
        ragged_rows = not ragged.uniform(lengths)
        self.length_tensor = ragged.tensor(lengths, device) if ragged_rows else None
        self.mask = None
        if ragged_rows or not ragged.uniform(held):  # otherwise one offset serves all, and attention masks by itself
            keys = max(ragged.add(held, lengths))
            offset, real = ragged.tensor(held, device), ragged.tensor(lengths, device)
            self.mask = visible_keys(self.width, keys, offset, real, window)
        self._rotary: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}

    def rotary(self, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 `[B or 1, T, 1, head_dim / 2]`, at the absolute positions (RoFormer, eq. 15)."""
        if (head_dim, theta) not in self._rotary:
            if ragged.uniform(self.seen):  # no copy from the host: it would end a CUDA graph capture
                positions = torch.arange(self.seen[0], self.seen[0] + self.width, device=self.device)[None].double()
            else:
                first = ragged.tensor(self.seen, self.device)[:, None]
                positions = (first + torch.arange(self.width, device=self.device)).double()
            frequency = theta ** (-torch.arange(0, head_dim, 2, device=self.device).double() / head_dim)
            angle = (positions[..., None] * frequency)[:, :, None]
            self._rotary[head_dim, theta] = angle.cos().float(), angle.sin().float()
        return self._rotary[head_dim, theta]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding over the two halves of the last axis. x `[B, T, H, D]`, same dtype back."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head (or grouped-query) causal attention whose cache is passed in and returned, never kept inside.

    hidden_size: width; num_heads, num_kv_heads: query and key/value heads; head_dim: even; rope_theta: rotary base;
    backend: see `causal_attention`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float = 10000.0,
        backend: str = "auto",
    ):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or hidden_size // num_heads
        self.rope_theta, self.backend = rope_theta, backend
        self.q_proj = nn.Linear(hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden_size, bias=False)

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> AttentionState:
        """An empty cache."""
        weight = self.k_proj.weight
        empty = torch.empty(
            batch_size, 0, self.num_kv_heads, self.head_dim, device=device or weight.device, dtype=dtype or weight.dtype
        )
        return AttentionState(empty, empty)

    def forward(self, x: Tensor, state: AttentionState, segment: Segment) -> tuple[Tensor, AttentionState]:
        """x `[B, T, hidden]` at `segment` -> (same shape, cache with this segment's keys and values appended)."""
        q = rotate(self._heads(self.q_proj(x)), *segment.rotary(self.head_dim, self.rope_theta))
        state = self.update_state(x, state, segment)
        y = causal_attention(
            q, state.keys, state.values, window=segment.window, mask=segment.mask, backend=self.backend
        )
        return self.o_proj(y.flatten(2)), state

    def update_state(self, x: Tensor, state: AttentionState, segment: Segment) -> AttentionState:
        """The cache `forward` would return, without attending."""
        k = rotate(self._heads(self.k_proj(x)), *segment.rotary(self.head_dim, self.rope_theta))
        v = self._heads(self.v_proj(x))
        if state.keys.dtype != k.dtype:  # an empty cache made before autocast chose the dtype
            state = AttentionState(state.keys.to(k.dtype), state.values.to(v.dtype))
        return AttentionState(
            ragged.append(state.keys, segment.held, k, segment.lengths),
            ragged.append(state.values, segment.held, v, segment.lengths),
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))
