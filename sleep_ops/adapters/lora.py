"""LoRA: low-rank adapters beside frozen weights, by peft (Hu et al., arXiv 2106.09685).

    W x  becomes  W x + alpha / rank * B A x,    A `[rank, in]` random, B `[out, rank]` zero at first

What learns then is the adapters, and inserted fast-weight blocks as a whole: those are new, and have
nothing to be adapted. Everything else is the base, which stays as the checkpoint has it.
"""

import os
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from sleep_ops.adapters.loading import underlying
from sleep_ops.checks import expect
from sleep_ops.layers.block import Block

ADAPTER_WEIGHTS = "adapter_model.safetensors"  # peft's name for it
_PREFIX = "base_model.model."  # of names in that file
_NAME = "default"


def add_lora(
    module: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    start: str | os.PathLike | None = None,
) -> nn.Module:
    """Freezes what `load_model` made, and gives it adapters; returns it, changed.

    targets: the last parts of names of linear modules in the model's layers, as "q_proj"; None for
        all of them. Those of MLPs are left out in families that have experts.
    alpha: adapters are scaled by alpha / rank; None for 2 rank.
    start: a folder of `save_adapter`, to begin with its values.

    Adapters and inserted blocks become float32, whatever the base is. Raises ValueError for targets
    that the model doesn't have, ImportError naming the extra without peft.
    """
    peft, model = _peft(), underlying(module)
    linear = _linear(model)
    known = {name.rpartition(".")[2] for name in linear}
    unknown = sorted(set(targets or ()) - known)
    expect(not unknown, "lora_targets", f"some of {', '.join(sorted(known))}", unknown)
    chosen = [name for name in linear if targets is None or name.rpartition(".")[2] in targets]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=chosen)
    peft.inject_adapter_in_model(config, model, _NAME)
    for block in inserted_blocks(model):
        block.requires_grad_(True)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
        p._is_base = not p.requires_grad
    if start is not None:
        _fill(model, start)
    return module


def is_base(parameter: nn.Parameter) -> bool:
    """Whether it is of the base under adapters: what training never changes, and a checkpoint folder has."""
    return getattr(parameter, "_is_base", False)


def inserted_blocks(model: nn.Module) -> Iterator[Block]:
    """The fast-weight blocks put between a model's layers, which have no MLP."""
    return (m for m in model.modules() if isinstance(m, Block) and m.mlp is None)


def save_adapter(module: nn.Module, folder: str | os.PathLike, source: str | os.PathLike) -> None:
    """Writes adapters and inserted blocks alone, in peft's layout, float32; `source` is the base's folder.

    `PeftModel.from_pretrained(model, folder)` puts them into the transformers model of `source`, after
    `insert_fast_weights` with the same layers, if there were any, and `sleepify`.
    """
    peft, model = _peft(), underlying(module)
    weights = peft.get_peft_model_state_dict(model, adapter_name=_NAME) | _inserted(model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + name: x.detach().cpu().contiguous() for name, x in weights.items()}
    save_file(tensors, Path(folder) / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy(model.peft_config[_NAME])
    config.base_model_name_or_path, config.inference_mode = str(source), True
    config.modules_to_save = ["mixer", "mixer_norm"] if _inserted(model) else None
    config.save_pretrained(folder)


def merge_lora(module: nn.Module) -> nn.Module:
    """Adds the adapters to the weights beside them, in the weights' dtype; returns the model, plain again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = underlying(module)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    return module


def _linear(model: nn.Module) -> list[str]:
    """The linear modules of layers that can have adapters, by name.

    peft takes those of MLPs for adapters of all experts, where a family has some.
    """
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("model.layers.")]
    return [name for name in names if not (hasattr(model.config, "num_experts") and ".mlp." in name)]


def _inserted(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of inserted blocks, by their names in the model."""
    own = {p for block in inserted_blocks(model) for p in block.parameters()}
    return {name: p for name, p in model.named_parameters() if p in own}


def _fill(model: nn.Module, folder: str | os.PathLike) -> None:
    """Values of a folder of `save_adapter`."""
    weights = {name.removeprefix(_PREFIX): x for name, x in load_file(Path(folder) / ADAPTER_WEIGHTS).items()}
    for name, p in _inserted(model).items():
        p.data.copy_(weights.pop(name))
    _peft().set_peft_model_state_dict(model, weights, adapter_name=_NAME)


def _peft():
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora: expected peft (pip install 'sleep-ops[lora]'), found none") from error
    return peft
