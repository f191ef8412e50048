"""What a training step asks of a machine, and how much of it: model FLOPs, a device's peak, memory."""

import math
import sys

try:
    import resource
except ImportError:  # Windows
    resource = None

import torch
from torch import Tensor, nn

from sleep_ops.layers.mixer import GDNMixer
from sleep_ops.model.sleeping import find_sleeping
from sleep_ops.model.spans import spans

# FLOP/s of dense bfloat16 products, as the makers' data sheets have them; what is longer is looked for first.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device) -> float:
    """FLOP/s that a device can do in bfloat16, sparsity aside; NaN for one that is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for kind, peak in PEAKS.items() if kind in name), math.nan)


def peak_memory(device: torch.device) -> float:
    """Bytes: on CUDA the most that tensors have taken, elsewhere the most that this process has."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class ModelFlops:
    """FLOPs that forward and backward of a model need by its mathematics, whatever is computed besides.

    A token costs in every pass over a block

        2 P    forward, for P parameters; of a layer of experts those that a token meets
        2 P    backward, for the gradients of inputs
        2 P'   backward, for the gradients of the P' parameters that learn
        12 D c       attention with D channels to c keys, forward and backward
        18 HV K V    the delta rule of HV heads: reading, writing and answering

    which is 6 P where all learn and little is attended to. Passes are the first one over every window
    that is read, and N - 1 further ones of looped blocks over every window that sleeps and is
    followed by one with loss; those that no gradient goes through (backprop_passes) cost 2 P. Blocks
    behind the loop count once.
    Activations that are computed again don't count, nor do replays, nor embeddings; logits count
    where a window has loss. Padding counts as tokens, every row as if it had the loss tokens of all,
    and attention to fewer keys than the window holds as attention to all.

    The model flops utilisation (MFU) of Chowdhery et al., arXiv 2204.02311, is this over seconds and
    the devices' peak.
    """

    def __init__(self, model: nn.Module):
        self.model = find_sleeping(model)
        if self.model is not None:
            self.blocks = [_Block(block, _experts(self.model)) for block in self.model.sleep_blocks]
            embedding = self.model.embedding_weight
            self.head = embedding.numel() * (6 if embedding.requires_grad else 4)
            self.loop = self.model.settings.resolve_loop(len(self.blocks))

    def __call__(self, loss_mask: Tensor, passes: int | float | None = None) -> float:
        """Of a step on a batch with the loss mask `[B, T]`, on the CPU; NaN for a model that doesn't sleep.

        passes: N, instead of the model's.
        """
        if self.model is None:
            return math.nan
        settings, (rows, tokens) = self.model.settings, loss_mask.shape
        passes = settings.resolve_passes(passes)
        again = int(passes) - 1 if settings.sleep_kind == "refine" else 0
        learnt = again if settings.backprop_passes is None else min(again, settings.backprop_passes)
        looped = self.blocks[self.loop[0] : self.loop[1] + 1]
        wanted = [[0, *loss_mask.any(0).cumsum(0).tolist()]]
        loss = wanted if settings.sleep_on == "unlabelled" else None
        total = 0.0
        cut = spans((tokens,), settings.window, filled=(0,), labelled=(False,), wanted=wanted, loss=loss, close=False)
        for span in cut:
            (start,), (n,) = span.starts, span.lengths
            kept = min(start, settings.window - 1) if settings.eviction == "sliding" and settings.window else 0
            keys = kept + (n + 1) / 2
            total += n * sum(block.forward(keys) + block.backward(keys) for block in self.blocks)
            total += n * self.head * span.wanted
            if span.asleep[0]:
                total += n * again * sum(block.forward(keys) for block in looped)
                total += n * learnt * sum(block.backward(keys) for block in looped)
        return rows * total


class _Block:
    """Costs of a token in a pass over a block. active: the share of the experts that it meets."""

    def __init__(self, block, active: float):
        module = getattr(block, "layer", block)  # a transformers layer, or a block of our own
        self.parameters = self.learning = 0.0
        for name, p in module.named_parameters():
            size = p.numel() * (active if ".experts." in name else 1)
            self.parameters += size
            self.learning += size * p.requires_grad
        modules = dict(module.named_modules())
        self.memory = self.channels = 0
        if block.fast_weights:
            mixer = next(m for m in modules.values() if isinstance(m, GDNMixer))
            self.memory = mixer.num_v_heads * mixer.head_dim * mixer.head_v_dim
        else:
            self.channels = next(m for name, m in modules.items() if name.endswith("o_proj")).in_features

    def forward(self, keys: float) -> float:
        return 2 * self.parameters + self._state(keys)

    def backward(self, keys: float) -> float:
        return 2 * self.parameters + 2 * self.learning + 2 * self._state(keys)

    def _state(self, keys: float) -> float:
        return 4 * self.channels * keys + 6 * self.memory


def _experts(model: object) -> float:
    """The share of a model's experts that a token meets."""
    config = getattr(getattr(model, "model", None), "config", None)
    count = getattr(config, "num_experts", None) or 1
    return (getattr(config, "num_experts_per_tok", None) or count) / count if count > 1 else 1.0
