"""Muon for the weight matrices, AdamW for everything else."""

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

_HEAD_NAMES = ("lm_head", "head", "output_head", "unembed")


def split_parameters(model: nn.Module) -> tuple[dict, dict]:
    """Name -> parameter of (Muon's, AdamW's) share of the trainable parameters.

    Muon gets the weights of nn.Linear modules, except an output head (a module called lm_head, head, output_head or
    unembed, or one that shares its weight with an embedding). Embeddings, heads, norms, convolutions, biases and free
    parameters (A_log, dt_bias) are AdamW's.
    """
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in _HEAD_NAMES
    } - embedded
    muon, adamw = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (muon if id(parameter) in matrices else adamw)[name] = parameter
    return muon, adamw


def build_optimizers(
    model: nn.Module, *, lr_muon: float, lr_adamw: float, weight_decay: float = 1e-4, momentum: float = 0.95
) -> dict[str, Optimizer]:
    """{"muon": ..., "adamw": ...}, each only where it has parameters.

    Weight decay applies to matrices; never to parameters of fewer than two dimensions, to convolutions' [channels, 1,
    width] weights, or to those marked `_no_weight_decay = True`.
    """
    muon, adamw = split_parameters(model)
    optimizers: dict[str, Optimizer] = {}
    if muon:
        groups = [
            {"params": part, "weight_decay": decay}
            for part, decay in zip(_by_decay(muon), (weight_decay, 0.0), strict=True)
            if part
        ]
        optimizers["muon"] = Muon(groups, lr=lr_muon, momentum=momentum, nesterov=True, ns_steps=5, adjust_lr_fn=None)
    if adamw:
        groups = [
            {"params": part, "weight_decay": decay}
            for part, decay in zip(_by_decay(adamw), (weight_decay, 0.0), strict=True)
            if part
        ]
        optimizers["adamw"] = AdamW(groups, lr=lr_adamw, betas=(0.9, 0.95))
    return optimizers


def _by_decay(parameters: dict) -> tuple[list, list]:
    decayed = [p for p in parameters.values() if p.ndim == 2 and not getattr(p, "_no_weight_decay", False)]
    chosen = {id(p) for p in decayed}
    return decayed, [p for p in parameters.values() if id(p) not in chosen]


def set_learning_rates(optimizers: dict[str, Optimizer], rates: dict[str, float]) -> None:
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = rates[name]
