"""Attention mixer with rotary positions and an explicit cache of keys and values."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sleep_ops import ragged
from sleep_ops.layers.basic import Linear, project
from sleep_ops.ops.attention import causal_attention, visible_keys
from sleep_ops.ragged import Lengths


class AttentionState(NamedTuple):
    """Cached keys (rotated to absolute positions) and values, `[B, S, HKV, D]`, oldest first."""

    keys: Tensor
    values: Tensor


class SpanContext:
    """Where the tokens of a span stand: what blocks need to know beyond the hidden states.

    lengths: tokens of each row (right-padded).
    cache_lengths: keys each row's caches hold before them.
    position: each row's absolute position of its first token here.
    window: L, or None for no limit.
    windows: how many windows of a text stand in a row's place, as rows one after another, of which
        each is read as if it were alone but for fast weights, which go on from one to the next.
    sleep: arguments of mixers: passes over each of those before the next one begins, their length,
        and the group of processes that have others.
    """

    def __init__(
        self,
        lengths: Lengths,
        cache_lengths: Lengths,
        position: Lengths,
        window: int | None,
        device: torch.device,
        *,
        windows: int = 1,
        sleep: dict | None = None,
    ):
        self.lengths, self.cache_lengths, self.position = lengths, cache_lengths, position
        self.window, self.device, self.windows, self.sleep = window, device, windows, sleep or {}
        self.width = max(lengths)
        ragged_rows = not ragged.uniform(lengths)
        self.length_tensor = ragged.tensor(lengths, device) if ragged_rows else None
        self.aligned = not ragged_rows and ragged.uniform(cache_lengths)
        self.shared: dict[str, object] = {}  # what the blocks of another model work out once for all of them
        self._masks: dict[int | None, Tensor] = {}
        self._rotary: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}

    def joined(self, x: Tensor) -> Tensor:
        """Rows that are windows, `[B * windows, L, ...]`, as those of texts, `[B, windows * L, ...]`."""
        return x if self.windows == 1 else x.unflatten(0, (-1, self.windows)).flatten(1, 2)

    def parted(self, x: Tensor) -> Tensor:
        """The inverse of `joined`."""
        return x if self.windows == 1 else x.unflatten(1, (self.windows, -1)).flatten(0, 1)

    def mask(self, window: int | None) -> Tensor | None:
        """Which keys the queries see where each sees at most `window`: see `visible_keys`.

        None where one offset serves all rows: then attention masks by itself.
        """
        if self.aligned:
            return None
        if window not in self._masks:
            keys = max(ragged.add(self.cache_lengths, self.lengths))
            offset, real = ragged.tensor(self.cache_lengths, self.device), ragged.tensor(self.lengths, self.device)
            self._masks[window] = visible_keys(self.width, keys, offset, real, window)
        return self._masks[window]

    def positions(self) -> Tensor:
        """Absolute positions of the tokens, int64 `[B or 1, T]`."""
        if ragged.uniform(self.position):  # no copy from the host: it would end a CUDA graph capture
            return torch.arange(self.position[0], self.position[0] + self.width, device=self.device)[None]
        return ragged.tensor(self.position, self.device)[:, None] + torch.arange(self.width, device=self.device)

    def rotary(self, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """cos and sin of the absolute positions (RoFormer, eq. 15).

        Each float32 `[B or 1, T, 1, head_dim / 2]`.
        """
        if (head_dim, theta) not in self._rotary:
            positions = self.positions().double()
            frequency = theta ** (-torch.arange(0, head_dim, 2, device=self.device).double() / head_dim)
            angle = (positions[..., None] * frequency)[:, :, None]
            self._rotary[head_dim, theta] = angle.cos().float(), angle.sin().float()
        return self._rotary[head_dim, theta]


def narrower(a: int | None, b: int | None) -> int | None:
    """The smaller of two windows, None being no limit."""
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x `[B, T, H, D]` over the halves of D, same dtype back."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # Over halves autograd would fill up and add four more tensors.
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    if x.device.type == "cpu":  # which would go over heads in steps of their size
        cos, sin = (y.expand(*y.shape[:-2], *wide.shape[-2:]).contiguous() for y in (cos, sin))
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Attention(nn.Module):
    """Multi-head or grouped-query causal attention; its cache is passed in and returned.

    hidden_size: width.
    num_heads, num_kv_heads: query and key/value heads.
    head_dim: even.
    rope_theta: rotary base.
    sliding_window: the most keys a query sees, where that is fewer than the model's window allows.
    qkv_bias: whether the projections into queries, keys and values have one.
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
        sliding_window: int | None = None,
        qkv_bias: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or hidden_size // num_heads
        self.rope_theta, self.sliding_window, self.backend = rope_theta, sliding_window, backend
        self.q_proj = Linear(hidden_size, self.num_heads * self.head_dim, bias=qkv_bias)
        self.k_proj = Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.o_proj = Linear(self.num_heads * self.head_dim, hidden_size, bias=False)

    def init_state(self, batch_size: int) -> AttentionState:
        """An empty cache."""
        weight = self.k_proj.weight
        empty = torch.empty(batch_size, 0, self.num_kv_heads, self.head_dim, device=weight.device, dtype=weight.dtype)
        return AttentionState(empty, empty)

    def forward(
        self, x: Tensor, state: AttentionState, context: SpanContext, *, output: bool = True
    ) -> tuple[Tensor | None, AttentionState]:
        """x `[B, T, hidden]` of a span -> (same shape, cache with its keys and values appended).

        Without `output` nothing attends, and the first is None.
        """
        rotary = context.rotary(self.head_dim, self.rope_theta)
        queries = [self.q_proj] if output else []
        projected = [self._heads(y) for y in project(x, *queries, self.k_proj, self.v_proj)]
        k, v = rotate(projected[-2], *rotary), projected[-1]
        if state.keys.dtype != k.dtype:  # an empty cache made before autocast chose the dtype
            state = AttentionState(state.keys.to(k.dtype), state.values.to(v.dtype))
        state = AttentionState(
            ragged.append(state.keys, context.cache_lengths, k, context.lengths),
            ragged.append(state.values, context.cache_lengths, v, context.lengths),
        )
        if not output:
            return None, state
        q = rotate(projected[0], *rotary)
        window = narrower(context.window, self.sliding_window)
        mask = context.mask(window)
        y = causal_attention(q, state.keys, state.values, window=window, mask=mask, backend=self.backend)
        return self.o_proj(y.flatten(2)), state

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))
