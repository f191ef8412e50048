"""Checkpoints that are either whole or not there.

A checkpoint is a folder `step-00000600` with model.safetensors, state.pt (optimisers, random
generators, position in the data) and manifest.json (sizes and SHA-256 of the other two). It is
written under a temporary name, flushed to disk and then renamed, so a folder with the final name is
complete; the manifest catches what happens to it afterwards.
"""

import hashlib
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sleep_ops.files import remove, whole_folder

MODEL_FILE, STATE_FILE, MANIFEST_FILE = "model.safetensors", "state.pt", "manifest.json"
_VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete or damaged."""


@dataclass(frozen=True)
class Checkpoint:
    step: int
    model: dict[str, torch.Tensor]
    state: dict


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def save_checkpoint(
    folder: Path, step: int, model: dict[str, torch.Tensor], state: dict, *, keep: int | None = None
) -> Path:
    """Write `folder`/step-XXXXXXXX and delete all but the newest `keep`.

    model: a state dict.
    state: nested dicts, lists, numbers, strings and tensors only (it is read with weights_only).
    """
    final = checkpoint_path(folder, step)
    with whole_folder(final) as temporary:
        # Cloned one by one: safetensors refuses tensors that share memory, as tied weights do.
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in model.items()}
        save_file(tensors, temporary / MODEL_FILE, metadata={"format": "pt", "step": str(step)})
        torch.save(state, temporary / STATE_FILE)
        files = {name: _fingerprint(temporary / name) for name in (MODEL_FILE, STATE_FILE)}
        manifest = {"version": _VERSION, "step": step, "files": files}
        (temporary / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if keep is not None:
        for old in list_checkpoints(folder)[:-keep]:
            remove(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """What has a checkpoint's name under `folder`, whole or not, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder, on the CPU.

    Raises CheckpointError unless every byte is as it was written.
    """
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        if manifest["version"] != _VERSION:
            raise CheckpointError(f"{path}: expected checkpoint version {_VERSION}, got {manifest['version']!r}")
        for name in (MODEL_FILE, STATE_FILE):
            if _fingerprint(path / name) != manifest["files"][name]:
                raise CheckpointError(f"{path / name}: damaged (it is not what the manifest describes)")
        model = load_file(path / MODEL_FILE)
        state = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
        return Checkpoint(int(manifest["step"]), model, state)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: incomplete or damaged ({error})") from error


def load_newest(folder: Path, warn) -> Checkpoint | None:
    """The newest checkpoint of `folder` that is whole, or None where there is none at all.

    `warn(text)` is told of each damaged one passed over; CheckpointError where all are damaged.
    """
    found = list_checkpoints(folder)
    for path in reversed(found):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            warn(f"passed over {error}")
    if found:
        raise CheckpointError(f"{folder}: none of its {len(found)} checkpoints is whole")
    return None


def _fingerprint(path: Path) -> dict:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
