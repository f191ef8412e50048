"""Muon for the weight matrices, AdamW for everything else."""

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from sleep_ops.training.muon import StackedMuon

_HEAD_NAMES = ("lm_head", "head", "output_head", "unembed")
_ADAPTER_NAMES = ("lora_A", "lora_B")


def split_parameters(model: nn.Module) -> tuple[dict, dict]:
    """Name -> parameter of (Muon's, AdamW's) share of the trainable parameters.

    Muon gets the weights of nn.Linear modules, except an output head (a module called lm_head,
    head, output_head or unembed, or one that shares its weight with an embedding) and the factors
    of adapters. Embeddings, heads, adapters, norms, convolutions, biases and free parameters
    (A_log, dt_bias) are AdamW's.
    """
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] not in _HEAD_NAMES
        and not any(part in _ADAPTER_NAMES for part in name.split("."))
    } - embedded
    muon: dict[str, nn.Parameter] = {}
    adamw: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (muon if id(parameter) in matrices else adamw)[name] = parameter
    return muon, adamw


def build_optimizers(
    model: nn.Module,
    *,
    lr_muon: float,
    lr_adamw: float,
    weight_decay: float = 1e-4,
    momentum: float = 0.95,
    matrix_optimizer: type[Muon] = StackedMuon,
) -> dict[str, Optimizer]:
    """{"muon": ..., "adamw": ...}, each only where it has parameters.

    Weight decay applies to the weights of nn.Linear and nn.Embedding modules, unless they are
    marked `_no_weight_decay = True`, and to nothing else.

    matrix_optimizer: Muon, in this process or for matrices kept in other ways.
    """
    weights = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)}

    def groups(parameters: dict) -> list[dict]:
        decay: dict[float, list] = {}
        for p in parameters.values():
            decayed = id(p) in weights and not getattr(p, "_no_weight_decay", False)
            decay.setdefault(weight_decay if decayed else 0.0, []).append(p)
        return [{"params": part, "weight_decay": value} for value, part in decay.items()]

    muon, adamw = split_parameters(model)
    optimizers: dict[str, Optimizer] = {}
    if muon:
        optimizers["muon"] = matrix_optimizer(
            groups(muon), lr=lr_muon, momentum=momentum, nesterov=True, ns_steps=5, adjust_lr_fn=None
        )
    if adamw:
        fused = all(p.is_cuda for p in adamw.values())
        optimizers["adamw"] = AdamW(groups(adamw), lr=lr_adamw, betas=(0.9, 0.95), fused=fused)
    return optimizers


def set_learning_rates(optimizers: dict[str, Optimizer], rates: dict[str, float]) -> None:
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = rates[name]
