"""A thin hybrid language model that sleeps: embedding, blocks, final norm, head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sleep_ops.layers.attention import Attention
from sleep_ops.layers.basic import Linear, RMSNorm
from sleep_ops.layers.block import Block
from sleep_ops.layers.gdn import SleepGDNLayer
from sleep_ops.layers.jet import DynamicConvolution, JetBlock
from sleep_ops.model.config import HybridConfig
from sleep_ops.model.sleeping import SleepingModel
from sleep_ops.model.sleeping import SleepOutput as SleepOutput


class SleepHybridModel(SleepingModel, nn.Module):
    """Attention and fast-weight blocks; a window sleeps before its eviction (arXiv 2605.26099)."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config = config
        self.embed: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(_mixer(config, kind), *_widths(config)) for kind in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.loop_gate:
            self.loop_gate = nn.Parameter(torch.zeros(config.hidden_size))
        self._initialise()
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def _initialise(self) -> None:
        """Normal weights; those into the residual stream scaled by 1/sqrt(2 D), as in GPT-2."""
        std = self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=std / (2 * len(self.blocks)) ** 0.5 if residual else std)
        for module in self.modules():
            if isinstance(module, DynamicConvolution):
                module.start_static(std)

    @property
    def settings(self) -> HybridConfig:
        return self.config

    @property
    def sleep_blocks(self) -> Sequence[Block]:
        return [*self.blocks] * self.config.tied_repeats

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def embedding_weight(self) -> Tensor:
        return self.embed.weight

    @property
    def feed_from_input(self) -> bool:
        return self.config.loop_gate or self.config.reinject

    def feed(self, h: Tensor, loop_input: Tensor | None) -> Tensor:
        """What a refining pass is fed with; see `HybridConfig.loop_gate` and `reinject`."""
        if self.config.loop_gate:
            h = loop_input + self.loop_gate.to(h.dtype) * (h - loop_input)
        return h + loop_input if self.config.reinject else h

    def predict(self, h: Tensor) -> Tensor:
        """Logits of block outputs. h `[..., hidden_size]` -> `[..., vocab_size]`."""
        return self.lm_head(self.norm(h))


def _mixer(c: HybridConfig, kind: str) -> nn.Module:
    if kind in ("attn", "swa"):
        return Attention(
            c.hidden_size,
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            rope_theta=c.rope_theta,
            sliding_window=c.sliding_window if kind == "swa" else None,
            backend=c.attention_backend,
        )
    sizes: dict = dict(
        num_heads=c.gdn_num_heads or c.num_heads,
        head_dim=c.gdn_head_dim or c.head_dim or c.hidden_size // c.num_heads,
        num_v_heads=c.gdn_num_v_heads,
        head_v_dim=c.gdn_head_v_dim,
        conv_size=c.conv_size,
        norm_eps=c.norm_eps,
        rule=c.rule,
        impl=c.impl,
    )
    if kind == "jet":
        return JetBlock(c.hidden_size, kernel_hidden=c.jet_kernel_hidden, **sizes)
    return SleepGDNLayer(c.hidden_size, allow_neg_eigval=c.allow_neg_eigval, **sizes)


def _widths(c: HybridConfig) -> tuple[int, int, float]:
    return c.hidden_size, c.intermediate_size or -(-8 * c.hidden_size // 48) * 16, c.norm_eps
