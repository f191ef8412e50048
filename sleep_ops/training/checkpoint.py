"""Checkpoints that are either whole or not there.

A checkpoint is a folder `step-00000600` with model.safetensors, state.pt (optimisers, random generators, position in
the data) and manifest.json (sizes and SHA-256 of the other two). It is written under a temporary name, flushed to disk
and then renamed, so a folder with the final name is complete; the manifest catches what happens to it afterwards.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

MODEL_FILE, STATE_FILE, MANIFEST_FILE = "model.safetensors", "state.pt", "manifest.json"
_VERSION = 1
_PARTIAL = ".partial-"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete or damaged."""


def kind(path: Path) -> str:
    """What there is at `path`, in words; "" where there is nothing."""
    if not os.path.lexists(path):
        return ""
    return "a folder" if path.is_dir() else "a file" if path.exists() else "a link to nothing"


def check_folder(name: str, folder: Path) -> None:
    """ValueError, naming the setting `name`, unless files can be written in `folder`, which need not be there yet."""
    folder = Path(folder)
    expected, place = f"{name}: expected a folder that can be written", folder
    try:
        while not _there(place):
            place = place.parent
        if not place.is_dir():
            below = "" if place == folder else f"{folder}, below "
            raise ValueError(f"{expected}, got {below}{kind(place)}: {place}")
        os.rmdir(tempfile.mkdtemp(dir=place, prefix=_PARTIAL))
    except OSError as error:
        raise ValueError(f"{expected}, got {folder} ({error.strerror})") from error


def check_file(name: str, path: Path, form: str) -> None:
    """ValueError, naming the setting `name`, unless a file of this form can be written at `path`."""
    if kind(path) == "a folder":
        raise ValueError(f"{name}: expected a {form} file, got the folder {path}")
    check_folder(name, path.parent)


def remove(path: Path) -> None:
    """Delete a folder, a file or a link (not what it leads to), if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Checkpoint:
    step: int
    model: dict[str, torch.Tensor]
    state: dict


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a reader sees the old file or the new one, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder to write into, which then becomes `final`: a folder of that name is complete.

    A folder already there is replaced. What a process that was killed while it wrote left beside it is deleted.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=_PARTIAL))
    try:
        yield temporary
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            _flush_to_disk(path)
        os.chmod(temporary, 0o755)
        remove(final)
        os.replace(temporary, final)
        _flush_to_disk(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for left in final.parent.glob(f"{_PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def save_checkpoint(
    folder: Path, step: int, model: dict[str, torch.Tensor], state: dict, *, keep: int | None = None
) -> Path:
    """Write `folder`/step-XXXXXXXX and delete all but the newest `keep`.

    model  a state dict. state  nested dicts, lists, numbers, strings and tensors only (it is read with weights_only).
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
    """Read one checkpoint folder, on the CPU. Raises CheckpointError unless every byte is as it was written."""
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


def _there(path: Path) -> bool:
    """Whether there is anything at `path`, which is not followed; OSError where that can't be known."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        if path == path.parent:
            raise
        return False
    return True


def _fingerprint(path: Path) -> dict:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
