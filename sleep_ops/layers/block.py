"""One block of the hybrid: pre-norm mixer and pre-norm SwiGLU, both residual."""

from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from sleep_ops.layers.attention import Attention, AttentionState, SpanContext
from sleep_ops.layers.basic import Linear, RMSNorm
from sleep_ops.layers.mixer import GDNMixer, GDNState, ReplayInputs
from sleep_ops.layers.sharded import joined

BlockState: TypeAlias = AttentionState | GDNState


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x)), Shazeer 2020. x `[..., hidden_size]` -> same shape."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """h + mixer(norm(h)), then h + mlp(norm(h)); the mixer's state is passed in and returned.

    intermediate_size: the MLP's; None for a block without one, which can be put between the blocks
        of another model.
    fast_weights: whether the state is a fast-weight memory (GDN) or a cache of keys and values
        (attention); `replay` is for the former.
    """

    def __init__(self, mixer: Attention | GDNMixer, hidden_size: int, intermediate_size: int | None, norm_eps: float):
        super().__init__()
        self.mixer_norm = RMSNorm(hidden_size, norm_eps)
        self.mixer: nn.Module = mixer
        self.mlp = None
        if intermediate_size is not None:
            self.mlp_norm = RMSNorm(hidden_size, norm_eps)
            self.mlp = SwiGLU(hidden_size, intermediate_size)
        self.fast_weights = isinstance(mixer, GDNMixer)

    def forward(
        self, h: Tensor, state: BlockState, context: SpanContext, *, output: bool = True
    ) -> tuple[Tensor | None, BlockState, ReplayInputs | None]:
        """h `[B, T, hidden]` of a span -> (h, the state after it, what fast weights were written).

        output: False gives None for h, and computes no more than the rest needs.
        """
        x = self.mixer_norm(h)
        if self.fast_weights:
            given = dict(state=state, lengths=context.length_tensor, output=output, return_writes=True)
            y, state, writes = self.mixer(context.joined(x), **given, **context.sleep)
            y = context.parted(y) if output else y
        else:
            (y, state), writes = self.mixer(x, state, context, output=output), None
        if not output:
            return joined(self, None, state, writes)
        h = h + y
        if self.mlp is not None:
            h = h + self.mlp(self.mlp_norm(h))
        return joined(self, h, state, writes)

    def replay(
        self, writes: ReplayInputs, fast_weights: Tensor, passes: int | float, lengths: Tensor | None = None
    ) -> Tensor:
        """`fast_weights` after `passes` further passes over `writes`; see `GDNMixer.replay`."""
        return self.mixer.replay(writes, fast_weights, passes=passes, lengths=lengths)

    def init_state(self, batch_size: int) -> BlockState:
        """Zero fast weights, or an empty cache."""
        return self.mixer.init_state(batch_size)
