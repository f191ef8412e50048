"""The hybrid that sleeps, as one writes it with flash-linear-attention's layers: what a training step is compared with.

PyTorch's attention, fla's GatedDeltaNet, and Algorithm 1 as a loop over windows and passes; no work is saved. It has
not run with fla itself yet, only with a stand-in for its layer.
"""

import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sleep_ops import HybridConfig
from sleep_ops.bench.providers import prepare_fla
from sleep_ops.layers.attention import Attention, SpanContext
from sleep_ops.layers.block import SwiGLU
from sleep_ops.model.hybrid import SleepOutput


def load_fla_hybrid(config: HybridConfig, device: torch.device) -> "FlaHybrid":
    """The model on `device`. ImportError where fla is not installed, ValueError where it cannot run."""
    if importlib.util.find_spec("fla") is None:
        raise ImportError("fla is not installed")
    if device.type != "cuda":
        raise ValueError("it needs CUDA")
    prepare_fla(device)
    with device:
        return FlaHybrid(config)


class LayerStates:
    """What fla's layers ask of a cache: per layer a recurrent state and convolution states."""

    def __init__(self):
        self._states: dict[int, dict] = {}

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, layer_idx: int) -> dict:
        return self._states[layer_idx]

    def update(self, *, layer_idx: int, recurrent_state: Tensor, conv_state: tuple, **_: object) -> None:
        self._states[layer_idx] = {"recurrent_state": recurrent_state, "conv_state": conv_state}

    def conv_states(self) -> dict[int, tuple]:
        return {i: state["conv_state"] for i, state in self._states.items()}

    def rewind(self, conv_states: dict[int, tuple]) -> None:
        """Go on from the recurrent states as they are and these others; a layer without one has read nothing yet."""
        for i, state in self._states.items():
            state["conv_state"] = conv_states.get(i, (None, None, None))


class FlaHybrid(nn.Module):
    """Blocks of `config`; hard eviction, refining passes over all blocks, every window sleeps but the last."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config = config
        width, heads = config.hidden_size, config.num_heads
        gated_delta_net = importlib.import_module("fla.layers").GatedDeltaNet
        self.embed = nn.Embedding(config.vocab_size, width)
        self.mixers, self.mlps = nn.ModuleList(), nn.ModuleList()
        for i, kind in enumerate(config.layers):
            if kind == "attn":
                self.mixers.append(Attention(width, num_heads=heads, backend="torch"))
            else:
                layer_idx = config.layers[:i].count("gdn")
                sizes = {"hidden_size": width, "head_dim": width // heads, "num_heads": heads, "expand_v": 1}
                self.mixers.append(gated_delta_net(**sizes, layer_idx=layer_idx))
            self.mlps.append(SwiGLU(width, config.intermediate_size or -(-8 * width // 48) * 16))
        self.mixer_norms, self.mlp_norms = (
            nn.ModuleList(nn.RMSNorm(width, eps=config.norm_eps) for _ in config.layers) for _ in range(2)
        )
        self.norm = nn.RMSNorm(width, eps=config.norm_eps)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        return_logits: bool = False,
        return_state: bool = False,
    ) -> SleepOutput:
        """The mean loss alone; arguments as `SleepHybridModel` takes them, with loss_mask on the CPU."""
        length, states, losses = input_ids.shape[1], LayerStates(), []
        window = self.config.window or length
        for start in range(0, length, window):
            here = slice(start, min(start + window, length))
            h, conv_states = self.embed(input_ids[:, here]), states.conv_states()
            for n in range(self.config.passes if here.stop < length else 1):  # type: ignore[arg-type]
                if n:
                    states.rewind(conv_states)
                h = self._blocks(h, states, start)
                if n == 0 and loss_mask[:, here].any():
                    logits = self.lm_head(self.norm(h)).float()
                    losses.append(F.cross_entropy(logits.flatten(0, 1), labels[:, here].flatten(), reduction="sum"))
        return SleepOutput(None, sum(losses) / loss_mask.sum().item(), None, None)  # type: ignore[arg-type]

    def _blocks(self, h: Tensor, states: LayerStates, start: int) -> Tensor:
        batch, tokens = h.shape[:2]
        context = SpanContext((tokens,) * batch, (0,) * batch, (start,) * batch, None, h.device)
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = self.mixer_norms[i](h)
            if isinstance(mixer, Attention):
                y, _ = mixer(x, mixer.init_state(batch), context)
            else:
                y, *_ = mixer(x, past_key_values=states, use_cache=True)
            h = h + y
            h = h + mlp(self.mlp_norms[i](h))
        return h
