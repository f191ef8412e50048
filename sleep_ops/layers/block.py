"""One block of the hybrid: pre-norm mixer and pre-norm SwiGLU, both residual."""

from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from sleep_ops.layers.attention import Attention, AttentionState, Segment
from sleep_ops.layers.gdn import GDNState, SleepGDNLayer

BlockState: TypeAlias = AttentionState | GDNState


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x)), Shazeer 2020. x `[..., hidden_size]` -> same shape."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """h + mixer(norm(h)), then h + mlp(norm(h)); the mixer's state is passed in and returned.

    `fast_weights` says whether the state is a fast-weight memory (GDN) or a cache of keys and values (attention).
    """

    def __init__(self, mixer: Attention | SleepGDNLayer, hidden_size: int, intermediate_size: int, norm_eps: float):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.mixer = mixer
        self.mlp_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.mlp = SwiGLU(hidden_size, intermediate_size)
        self.fast_weights = isinstance(mixer, SleepGDNLayer)

    def forward(self, h: Tensor, state: BlockState, segment: Segment) -> tuple[Tensor, BlockState]:
        """h `[B, T, hidden]` at `segment` -> (h, the state after it)."""
        x = self.mixer_norm(h)
        if self.fast_weights:
            y, state = self.mixer(x, state=state, lengths=segment.length_tensor, return_state=True)
        else:
            y, state = self.mixer(x, state, segment)
        h = h + y
        return h + self.mlp(self.mlp_norm(h)), state

    def update_state(self, h: Tensor, state: BlockState, segment: Segment) -> BlockState:
        """The state `forward` would return, and nothing else: no output, gate, output projection or MLP."""
        x = self.mixer_norm(h)
        if self.fast_weights:
            return self.mixer.update_state(x, state, lengths=segment.length_tensor)
        return self.mixer.update_state(x, state, segment)

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> BlockState:
        """Zero fast weights, or an empty cache."""
        return self.mixer.init_state(batch_size, device=device, dtype=dtype)
