"""Published checkpoints: folders with config.json and safetensors files, read and written.

    model.safetensors                                                      small models
    model-00001-of-00003.safetensors, ..., model.safetensors.index.json    sharded, with an index

Tensors are read one at a time into a module that may have been built on the meta device, so loading
needs the memory of the model and of its largest tensor, not of two models.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
_PATTERN = "model{suffix}.safetensors"
_LISTED = 20
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FORMER = re.compile(r"\b([qkv])_conv\.weight$")  # `SleepGDNLayer`'s filters before they had fla's names


def read_config(folder: str | os.PathLike) -> dict:
    """The fields of a folder's config.json.

    FileNotFoundError where there is none, ValueError where it is damaged.
    """
    return _read_json(_in_folder(folder, CONFIG_FILE))


def load_weights(
    module: nn.Module,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    missing_ok: Sequence[str] = (),
    rename: Callable[[str], str | None] | None = None,
    variant: str | None = None,
) -> list[str]:
    """Fill a module's parameters and persistent buffers from a folder.

    module: on any device, the meta device included (`with torch.device("meta"): module = ...`).
        Parameters are replaced by new ones with the same attributes; tied ones stay tied, and need
        only one of their names.
    folder: with model.safetensors, or model.safetensors.index.json and its shards.
    dtype: of the floating point tensors; None leaves each as it is stored.
    device: where the tensors go.
    missing_ok: prefixes of names that the checkpoint need not have, as of newly inserted layers.
        These must hold values already (not be on the meta device), keep them, and are moved to
        dtype and device like the rest.
    rename: maps a tensor's name in the checkpoint to its name in the module, or to None to leave it
        out.
    variant: of the files, as in `model.fp16.safetensors`.

    Returns the names of `missing_ok` that were not in the checkpoint. Raises FileNotFoundError
    where the folder has no weights; ValueError listing every missing, unexpected and wrongly shaped
    name, for a missing or damaged file, and for a name under missing_ok without values. The module
    is then as it was.
    """
    places = _places(module)
    first = {id(tensor): name for name, (tensor, _) in reversed(places.items())}
    canonical = {name: first[id(tensor)] for name, (tensor, _) in places.items()}
    files = _locate(Path(folder), variant)
    shapes, sources = _shapes(files), {}
    for stored in shapes:
        name = stored if rename is None else rename(stored)
        if name is not None:
            name = name if name in places else _FORMER.sub(r"\1_conv1d.weight", name)
            if name in sources:
                raise ValueError(f"rename: expected one tensor for {name!r}, got {sources[name]!r} and {stored!r}")
            sources[name] = stored

    unexpected = [name for name in sources if name not in places]
    misshapen = [
        f"{name} {shapes[stored]} instead of {list(places[name][0].shape)}"
        for name, stored in sources.items()
        if name in places and shapes[stored] != list(places[name][0].shape)
    ]
    have = {canonical[name] for name in sources if name in places}
    absent = [name for name, tied_to in canonical.items() if name == tied_to and name not in have]
    kept = [name for name in absent if name.startswith(tuple(missing_ok))]
    missing = [name for name in absent if name not in kept]
    if missing or unexpected or misshapen:
        groups = (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", misshapen))
        got = "; ".join(f"{what}: {listed(names)}" for what, names in groups if names)
        raise ValueError(f"folder: expected the weights of this {type(module).__name__} in {folder}, got {got}")
    empty = [name for name in kept if places[name][0].is_meta]
    if empty:
        raise ValueError(f"missing_ok: expected tensors that hold values, got some on the meta device: {listed(empty)}")

    wanted: dict[str, str] = {}
    for name, stored in sources.items():
        first_stored = wanted.setdefault(canonical[name], stored)
        if stored != first_stored:
            pair = dict(_tensors(files, (first_stored, stored)))
            if not torch.equal(*pair.values()):
                raise ValueError(
                    f"folder: expected {stored} to equal {first_stored}, to which it is tied, got other values"
                )

    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    for name, (_, owner) in places.items():
        owners.setdefault(canonical[name], []).append(owner)

    def to(tensor: Tensor, copy: bool) -> Tensor:
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None, copy=copy)

    targets = {stored: name for name, stored in wanted.items()}
    for stored, tensor in _tensors(files, targets):
        _put(owners[targets[stored]], to(tensor, True))  # a copy: the file may be replaced while the module lives
    for name in kept:
        _put(owners[name], to(places[name][0].detach(), False))
    return kept


def stored_dtypes(folder: str | os.PathLike) -> dict[str, torch.dtype]:
    """The dtype of every floating point tensor of a folder's weights; errors as of `load_weights`."""
    dtypes = {}
    for file, names in _locate(Path(folder), None).items():
        with _opened(file) as shard:
            for name in shard.keys() if names is None else names:
                dtype = _FLOATS.get(shard.get_slice(name).get_dtype())
                if dtype is not None:
                    dtypes[name] = dtype
    return dtypes


def save_weights(
    module: nn.Module, folder: str | os.PathLike, config: dict, *, max_shard_bytes: int | None = None
) -> None:
    """Write a module and its config.json as `load_weights` and `read_config` read them.

    config: JSON values.
    max_shard_bytes: files get at most this many bytes of tensors each (but at least one tensor);
        None for a single file, ValueError for less than 1.

    Tied parameters are written once, under their first name. The folder is made where there is
    none; weights in it are replaced once all of the new ones are written.
    """
    if max_shard_bytes is not None and (type(max_shard_bytes) is not int or max_shard_bytes < 1):
        raise ValueError(f"max_shard_bytes: expected an integer >= 1 or None, got {max_shard_bytes!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    seen = set()
    for name, (tensor, _) in _places(module).items():
        if id(tensor) not in seen:
            tensors[name] = tensor.detach()
            seen.add(id(tensor))
    limit = sys.maxsize if max_shard_bytes is None else max_shard_bytes
    plan = split_torch_state_dict_into_shards(tensors, filename_pattern=_PATTERN, max_shard_size=limit)
    written = {}
    try:
        for name, keys in plan.filename_to_tensors.items():
            written[name] = folder / f"{name}.partial"
            shard = {key: tensors[key].cpu().contiguous() for key in keys}
            save_file(shard, written[name], metadata={"format": "pt"})
        texts = {CONFIG_FILE: config}
        if plan.is_sharded:
            texts[INDEX_FILE] = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        for name, values in texts.items():
            written[name] = folder / f"{name}.partial"
            written[name].write_text(json.dumps(values, indent=2) + "\n")
        for old in (folder / INDEX_FILE, folder / WEIGHTS_FILE, *folder.glob("model-*-of-*.safetensors")):
            old.unlink(missing_ok=True)
        for name, partial in written.items():
            os.replace(partial, folder / name)
    finally:
        for partial in written.values():
            partial.unlink(missing_ok=True)


def _places(module: nn.Module) -> dict[str, tuple[Tensor, tuple[nn.Module, str]]]:
    """Every parameter and persistent buffer by (each) name, and whose attribute it is."""
    places = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        tensors = [*owner._parameters.items(), *owner._buffers.items()]
        for attribute, tensor in tensors:
            if tensor is not None and attribute not in owner._non_persistent_buffers_set:
                places[f"{path}.{attribute}" if path else attribute] = tensor, (owner, attribute)
    return places


def _put(owners: list[tuple[nn.Module, str]], tensor: Tensor) -> Tensor:
    """Makes `tensor` the parameter or buffer of its owners, with the old one's attributes."""
    for i, (owner, attribute) in enumerate(owners):
        old = getattr(owner, attribute)
        if i == 0 and isinstance(old, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
            tensor.__dict__.update(old.__dict__)  # such as marks for the optimiser
        setattr(owner, attribute, tensor)
    return tensor


def _locate(folder: Path, variant: str | None) -> dict[Path, list[str] | None]:
    """The files with weights, and which of their tensors count: None for all."""
    whole, index = WEIGHTS_FILE, INDEX_FILE
    if variant is not None:
        whole, index = (".".join((*name.split(".")[:-1], variant, name.split(".")[-1])) for name in (whole, index))
    index = folder / index
    if not index.exists():
        return {_in_folder(folder, whole): None}
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"folder: expected a weight_map in {index}, got {where!r}")
    files: dict[Path, list[str] | None] = {}
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"folder: expected {index} to name files of its folder, got {file!r}")
        files.setdefault(folder / file, []).append(name)
    lost = [file.name for file in files if not file.is_file()]
    if lost:
        raise ValueError(f"folder: expected every shard that {index} names, got none of the name {listed(lost)}")
    return files


def _shapes(files: dict[Path, list[str] | None]) -> dict[str, list[int]]:
    """Name and shape of every tensor, from the files' headers."""
    shapes = {}
    for file, names in files.items():
        with _opened(file) as shard:
            inside = list(shard.keys())
            lost = sorted(set(names or ()) - set(inside))
            if lost:
                raise ValueError(
                    f"folder: expected {file} to hold what its index says, got a file without {listed(lost)}"
                )
            shapes |= {name: shard.get_slice(name).get_shape() for name in (inside if names is None else names)}
    return shapes


def _tensors(files: dict[Path, list[str] | None], wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Every wanted tensor by its name, one at a time."""
    for file, names in files.items():
        with _opened(file) as shard:
            for name in shard.keys() if names is None else names:
                if name in wanted:
                    yield name, shard.get_tensor(name)


def _opened(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"folder: expected a safetensors file, got {file}, which can't be read: {error}") from error


def _in_folder(folder: str | os.PathLike, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"folder: expected {name} in {folder}, found none")
    return path


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"folder: expected JSON in {path}, got {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"folder: expected a JSON object in {path}, got {type(values).__name__}")
    return values


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first of very many."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
