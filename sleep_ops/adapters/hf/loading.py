"""Checkpoint folders of transformers models that sleep, inserted fast-weight blocks included."""

import os
from dataclasses import fields
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from sleep_ops.adapters.checkpoint import CONFIG_FILE, listed, load_weights, read_config
from sleep_ops.adapters.hf.insert import insert_remembered
from sleep_ops.adapters.hf.sleepify import sleepify
from sleep_ops.checks import expect
from sleep_ops.model.config import SleepSettings

_PORTS = {
    "jet_nemotron": "sleep_ops.adapters.jet_nemotron.JetNemotron",
    "ouro": "sleep_ops.adapters.ouro.Ouro",
}
_PREFIX = "model.fast_weights."


def load_complete(folder: str | os.PathLike, **options) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, which by itself makes up weights that don't fit.

    ValueError, naming them, where some are missing or of other shapes.
    """
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)
    model, found = AutoModelForCausalLM.from_pretrained(folder, **options)
    misshapen = {name: f"{name} {list(got)} instead of {list(size)}" for name, got, size in found["mismatched_keys"]}
    missing = [name for name in sorted(found["missing_keys"]) if name not in misshapen]
    groups = (("missing", missing), ("wrongly shaped", sorted(misshapen.values())))
    got = "; ".join(f"{what}: {listed(names)}" for what, names in groups if names)
    if got:
        raise ValueError(f"folder: expected the weights that {folder} describes, got {got}")
    return model


def from_pretrained(folder: str | os.PathLike, **options) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, inserted fast weights loaded, and then `sleepify`.

    options: fields of `SleepSettings` (window, passes, ...), where they differ from what the
        folder's configuration remembers; the others go to transformers (dtype, device_map,
        subfolder, variant, ...).

    Raises ValueError as `sleepify` does, and for a folder that lacks weights, those of inserted
    blocks included, or has them in other shapes.
    """
    inside = Path(folder) / options.get("subfolder", "")
    if (inside / CONFIG_FILE).is_file():
        kind = read_config(inside).get("model_type")
        for port, name in _PORTS.items():
            expect(kind != port, "folder", f"a model of transformers ({name}.from_pretrained reads this one)", kind)
    names = {f.name for f in fields(SleepSettings)}
    settings = {name: value for name, value in options.items() if name in names}
    model = load_complete(folder, **{k: v for k, v in options.items() if k not in names})
    if insert_remembered(model):
        expect(inside.is_dir(), "folder", "a local folder, for a model with inserted blocks", str(inside))
        blocks = model.model.fast_weights
        weight = next(blocks.parameters())
        places = dict(dtype=weight.dtype, device=weight.device, variant=options.get("variant"))
        load_weights(blocks, inside, rename=_inside, **places)
    return sleepify(model, **settings)


def _inside(name: str) -> str | None:
    """The name within the inserted blocks, or None for every other tensor."""
    return name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else None
