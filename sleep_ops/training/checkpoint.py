"""Checkpoints that are either whole or not there, for any number of processes.

A checkpoint is a folder `step-00000600`:

    shard-00001-*.safetensors, ...   what each process kept, by torch.distributed.checkpoint:
                                     model.NAME            parameters and buffers, but for a base's under LoRA
                                     optimizer.NAME.KEY    states of the optimisers
                                     rng.RANK.DEVICE       random generators
    state.json                       plain values: the position in the data, counts
    manifest.json                    sizes and SHA-256 of the others

It is written under a temporary name, flushed to disk and then renamed, so a folder with the final
name is complete; the manifest catches what happens to it afterwards. Nothing in it is a pickle.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from sleep_ops.adapters.lora import is_base
from sleep_ops.files import remove, whole_folder
from sleep_ops.training.parallel import World

STATE_FILE, MANIFEST_FILE = "state.json", "manifest.json"
MODEL, OPTIMIZER, RNG = "model.", "optimizer.", "rng."  # what names of tensors begin with
_VERSION = 2
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint is missing, incomplete or damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole one. tensors: the shape and dtype of each, by name."""

    path: Path
    step: int
    state: dict
    tensors: dict[str, tuple[torch.Size, torch.dtype]]

    def fill(self, tensors: dict[str, Tensor], world: World | None = None) -> None:
        """Read what is called so into the given tensors, each process its own parts of sharded ones.

        Raises CheckpointError for a name or shape that is not in the checkpoint, and for a file
        that can't be read.
        """
        for name, tensor in tensors.items():
            found = self.tensors.get(name, (None,))[0]
            if found != tensor.shape:
                got = "none" if found is None else list(found)
                raise CheckpointError(f"{self.path}: expected {name} of shape {list(tensor.shape)}, got {got}")
        import torch.distributed.checkpoint as dcp

        alone = world is None or world.size == 1
        try:
            reader = dcp.HuggingFaceStorageReader(str(self.path))
            dcp.load(tensors, storage_reader=reader, process_group=None if alone else world.hosts, no_dist=alone)
        except (OSError, SafetensorError, dcp.CheckpointException) as error:
            raise CheckpointError(f"{self.path}: incomplete or damaged ({error})") from error

    def read(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors whose names begin so, without it, whole and on the CPU."""
        found = {
            n: torch.empty(shape, dtype=dtype) for n, (shape, dtype) in self.tensors.items() if n.startswith(prefix)
        }
        self.fill(found)
        return {name.removeprefix(prefix): x for name, x in found.items()}


class Saving:
    """A checkpoint that is being written."""

    def __init__(self, world: World, written: Future):
        self.world, self._written = world, written

    def wait(self) -> Path:
        """Its folder, once it is whole; every process has to ask. CheckpointError where it could not be written."""
        wait([self._written])  # the writers' group is free then
        return self.world.on_main(self._written.result)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict,
    *,
    keep: int | None = None,
    world: World | None = None,
) -> Saving:
    """Begin to write `folder`/step-XXXXXXXX; once it is there, all but the newest `keep` are deleted.

    tensors: by names as above; they are copied before this returns, and may change then.
    state: values for JSON.
    world: every process calls this, with tensors of its own and with its parts of sharded ones.
    """
    import torch.distributed.checkpoint as dcp

    world, final, stack = world or World(), checkpoint_path(folder, step), ExitStack()
    temporary = world.on_main(lambda: stack.enter_context(whole_folder(final)))
    with stack:
        writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        written: Future = dcp.async_save(tensors, storage_writer=writer, process_group=world.writers)  # type: ignore[assignment]
        unfinished = stack.pop_all()

    def own_files() -> dict[str, dict]:
        try:
            written.result()
        except dcp.CheckpointException as error:
            (first, _), *_ = error.failures.values()
            raise CheckpointError(f"{final}: not written ({first})") from error
        return {path.name: _fingerprint(path) for path in temporary.glob(f"shard-{world.rank + 1:05}-*")}

    def finish() -> Path:
        with unfinished:
            own = world.together(own_files, world.writers)
            files = {name: x for of in world.all_gather(own, world.writers) for name, x in of.items()}
            if not world.main:
                return final
            (temporary / STATE_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")
            files[STATE_FILE] = _fingerprint(temporary / STATE_FILE)
            manifest = {"version": _VERSION, "step": step, "files": files}
            (temporary / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if keep is not None:  # what was just written stays, whatever stands behind it in number
            others = [path for path in list_checkpoints(folder) if path != final]
            for old in others[: max(len(others) - keep + 1, 0)]:
                remove(old)
        return final

    pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    finished = pool.submit(finish)
    pool.shutdown(wait=False)
    return Saving(world, finished)


def list_checkpoints(folder: Path) -> list[Path]:
    """What has a checkpoint's name under `folder`, whole or not, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def load_checkpoint(path: Path, world: World | None = None) -> Checkpoint:
    """What one checkpoint folder holds; its tensors are read when they are asked for.

    world: every process calls this, and looks at files of its own.

    Raises CheckpointError unless every byte is as it was written, in all processes the same.
    """
    world = world or World()
    return world.together(lambda: _look(path, world))


def _look(path: Path, world: World) -> Checkpoint:
    """What the folder holds; of its files this process reads through every one that is its turn."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        if manifest["version"] != _VERSION:
            raise CheckpointError(f"{path}: expected checkpoint version {_VERSION}, got {manifest['version']!r}")
        step, files = int(manifest["step"]), manifest["files"]
        if checkpoint_path(path.parent, step).name != path.name:
            raise CheckpointError(f"{path}: damaged (its manifest is of step {step})")
        if STATE_FILE not in files or not any(name.endswith(".safetensors") for name in files):
            raise CheckpointError(f"{path}: damaged (its manifest lists no state or no tensors)")
        for i, (name, expected) in enumerate(files.items()):
            size, mine = (path / name).stat().st_size, i % world.size == world.rank
            if size != expected["bytes"] or (mine and _fingerprint(path / name) != expected):
                raise CheckpointError(f"{path / name}: damaged (it is not what the manifest describes)")
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        import torch.distributed.checkpoint as dcp

        found = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        tensors = {name: (x.size, x.properties.dtype) for name, x in found.items()}  # type: ignore[union-attr]
        return Checkpoint(path, step, state, tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: incomplete or damaged ({error})") from error


def load_newest(folder: Path, warn: Callable[[str], object], world: World | None = None) -> Checkpoint | None:
    """The newest checkpoint of `folder` that is whole, or None where there is none at all.

    `warn(text)` is told of each damaged one passed over; CheckpointError where all are damaged.
    world: every process calls this, and all find the same.
    """
    world = world or World()
    found = world.on_main(lambda: list_checkpoints(folder))
    for path in reversed(found):
        try:
            return load_checkpoint(path, world)
        except CheckpointError as error:
            warn(f"passed over {error}")
    if found:
        raise CheckpointError(f"{folder}: none of its {len(found)} checkpoints is whole")
    return None


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers under their names in a checkpoint, tied ones once, a LoRA run's base not."""
    names = dict(model.named_parameters(remove_duplicate=False))
    kept = {name for name, p in model.named_parameters() if not is_base(p)}
    return {MODEL + name: x for name, x in model.state_dict().items() if name in kept or name not in names}


def optimizer_tensors(model: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """The states of a model's optimisers, likewise."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{OPTIMIZER}{names[p]}.{key}": value
        for optimizer in optimizers
        for p, values in optimizer.state.items()
        for key, value in values.items()
    }


def load_optimizers(
    checkpoint: Checkpoint, model: nn.Module, optimizers: Iterable[Optimizer], world: World | None = None
) -> None:
    """Give a model's optimisers the states of a checkpoint, laid out like its parameters."""
    parameters, states = dict(model.named_parameters()), {}
    for name, (shape, dtype) in checkpoint.tensors.items():
        if name.startswith(OPTIMIZER):
            p = parameters[name.removeprefix(OPTIMIZER).rpartition(".")[0]]
            like = p.detach() if shape == p.shape else torch.empty(shape)
            states[name] = torch.zeros_like(like, dtype=dtype)
    checkpoint.fill(states, world)
    of: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, value in states.items():
        stem, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
        of.setdefault(parameters[stem], {})[key] = value
    for optimizer in optimizers:
        order = [p for group in optimizer.param_groups for p in group["params"]]
        known = {i: of[p] for i, p in enumerate(order) if p in of}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": known})


def _fingerprint(path: Path) -> dict:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


# Of one process, which needs no process group.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
