"""Checkpoint folders of any family that can sleep: one way in, one way out.

`config.json` says what is inside: "jet_nemotron" and "ouro" are this project's ports, everything
else is a causal language model of transformers (extra: hf).
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sleep_ops.adapters.checkpoint import CONFIG_FILE, read_config, stored_dtypes
from sleep_ops.adapters.jet_nemotron import JetNemotron, JetNemotronConfig
from sleep_ops.adapters.ouro import Ouro, OuroConfig
from sleep_ops.checks import expect
from sleep_ops.model.config import SleepSettings
from sleep_ops.model.sleeping import Call, SleepingModel, SleepOutput
from sleep_ops.parameters import replaced
from sleep_ops.tokenizer import TOKENIZER_FILES

SHARD_BYTES = 5 * 10**9
PORTS: dict[str, tuple] = {"jet_nemotron": (JetNemotron, JetNemotronConfig), "ouro": (Ouro, OuroConfig)}


class SleepingTransformer(nn.Module):
    """A model of transformers, after `sleepify`, called like `SleepHybridModel`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def sleep(self) -> SleepingModel:
        return self.model.sleep

    @property
    def vocab_size(self) -> int:
        return self.sleep.vocab_size

    forward = SleepingModel.forward

    def answer(self, call: Call) -> SleepOutput:
        """What `forward` returns. The model itself is called, so hooks and wrappers work."""
        given = call._asdict()
        ids, labels = given.pop("input_ids"), given.pop("labels")
        if call.all_logits is None:
            given["all_logits"] = labels is None and call.loss_mask is None
        out = self.model(ids, shift_labels=labels, **given)
        positions = torch.arange(ids.shape[1], device=ids.device) if given["all_logits"] else out.positions
        return SleepOutput(out.logits, out.loss, out.state, positions)


def load_model(
    folder: str | os.PathLike,
    *,
    weights: bool = True,
    dtype: torch.dtype = torch.float32,
    insert: Sequence[int] | None = None,
    **settings: object,
) -> nn.Module:
    """The model of a checkpoint folder, on the CPU, called like `SleepHybridModel`.

    weights: False for random weights, to be filled from elsewhere.
    dtype: of all parameters.
    insert: layers after which a fast-weight block is inserted, for a folder that has none yet: an
        attention-only transformers model, which needs it, or Ouro, whose default it replaces. New
        blocks are drawn from PyTorch's random numbers and change nothing at first.
    settings: fields of `SleepSettings`, where they differ from what the folder remembers.

    Raises ValueError for a folder without a model that can sleep and for settings that can't be,
    FileNotFoundError or ValueError where its weights are missing or are not those of such a model,
    ImportError naming the extra where transformers is needed and missing.
    """
    given: dict = {name: value for name, value in settings.items() if value is not None}
    known = SleepSettings.__dataclass_fields__
    unknown = sorted(given.keys() - known.keys())
    expect(not unknown, "settings", f"some of {', '.join(known)}", unknown)
    if isinstance(given.get("loop"), list):
        given["loop"] = tuple(given["loop"])
    insert = None if insert is None else tuple(insert)
    kind = model_type(folder)
    if kind not in PORTS:
        return _transformer(folder, weights, dtype, insert, given)
    model_class, config_class = PORTS[kind]
    if insert is not None:
        expect(kind == "ouro", "insert", f"None for {kind}, which has fast weights", insert)
        given["jet_layers"] = insert
    if weights:
        return model_class.from_pretrained(folder, dtype=dtype, **given)
    return model_class(config_class.from_checkpoint(read_config(folder), **given)).to(dtype)


def underlying(module: nn.Module) -> nn.Module:
    """The model itself, whose parameters have the checkpoint's names."""
    return module.model if isinstance(module, SleepingTransformer) else module


def save_model(module: nn.Module, folder: str | os.PathLike, source: str | os.PathLike | None = None) -> None:
    """Writes what `load_model` made, in the family's own layout.

    `load_model` and `from_pretrained` read it. The names of weights are the checkpoint's, in files
    of at most SHARD_BYTES, and config.json remembers the settings of sleep.

    source: the folder that the model is from. Its tokenizer files are copied along, if it has any,
        and parameters are written in the dtypes that they have there, new ones in the commonest.
    """
    folder, model = Path(folder), underlying(module)
    folder.mkdir(parents=True, exist_ok=True)
    limit = "max_shard_bytes" if isinstance(model, tuple(port for port, _ in PORTS.values())) else "max_shard_size"
    save = partial(model.save_pretrained, folder, **{limit: SHARD_BYTES})
    if source is None:
        save()
        return
    for pattern in TOKENIZER_FILES:
        for path in Path(source).glob(pattern):
            shutil.copyfile(path, folder / path.name)
    dtype = dtypes_like(source, model)
    with replaced(model, lambda name, p: nn.Parameter(p.detach().to(dtype(name)), p.requires_grad)):
        save()


def dtypes_like(source: str | os.PathLike, module: nn.Module) -> Callable[[str], torch.dtype]:
    """Name of a parameter of `module` -> its dtype in the checkpoint folder `source`; of a new one the commonest.

    In the folder of a model of several kinds, such as text and images, the name has more before it.
    """
    dtypes, prefix = stored_dtypes(source), "" if underlying(module) is module else "model."
    ((commonest, _),) = Counter(dtypes.values()).most_common(1)

    def like(name: str) -> torch.dtype:
        name = name.removeprefix(prefix)
        if name in dtypes:
            return dtypes[name]
        ending = "." + name.removeprefix("model.")
        found = {dtype for stored, dtype in dtypes.items() if stored.endswith(ending)}
        return found.pop() if len(found) == 1 else commonest

    return like


def left_out(folder: str | os.PathLike) -> list[str]:
    """What a folder's model has beside its language model, such as ["vision"]: it is neither read nor written."""
    config, known = read_config(folder), ("text", "quantization", "generation")
    parts = [name.removesuffix("_config") for name in config if name.endswith("_config")]
    return [part for part in parts if part not in known] if "text_config" in config else []


def remembered(folder: str | os.PathLike) -> dict:
    """The settings of sleep that a checkpoint folder keeps from an earlier run."""
    config = read_config(folder)
    return config.get("sleep") or config.get("sleep_ops") or {}


def model_type(folder: str | os.PathLike) -> str:
    """The family of a checkpoint folder. ValueError where there is none."""
    expected = f"a checkpoint folder, with a {CONFIG_FILE} that has a model_type"
    expect((Path(folder) / CONFIG_FILE).is_file(), "folder", expected, str(folder))
    kind = read_config(folder).get("model_type")
    expect(isinstance(kind, str), "folder", expected, f"{folder} with the model_type {kind}")
    return kind


def _transformer(
    folder: str | os.PathLike, weights: bool, dtype: torch.dtype, insert: tuple[int, ...] | None, settings: dict
) -> SleepingTransformer:
    from sleep_ops.adapters import hf  # first: it says which extra is missing

    options = dict(dtype=dtype, local_files_only=True)
    from transformers import AutoConfig, AutoModelForCausalLM

    if weights:
        if insert is None:
            return SleepingTransformer(hf.from_pretrained(folder, **options, **settings))
        model = hf.loading.load_complete(folder, **options)
    else:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    remembered = hf.insert.insert_remembered(model)
    expect(insert is None or not remembered, "insert", "None for a folder with inserted blocks", insert)
    if insert is not None:
        hf.insert.check_layers("insert", insert, model)
        hf.insert_fast_weights(model, insert)
    return SleepingTransformer(hf.sleepify(model, **settings))
