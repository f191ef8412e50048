"""How many bytes of tensors are alive while something runs, by kind, and how many were at most.

Counted are storages, each once however many tensors look at it, from the operation that makes it to
when the last of them is gone. What an operation holds only while it runs is not seen, nor what an
allocator keeps. Tensors may be fake: then nothing is computed, and the count is the same.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

_STORAGE: Any = torch.UntypedStorage
_WEIGHTS = ("parameters", "gathered")


class LiveBytes(TorchDispatchMode):
    """Within it, bytes of tensors that are alive.

    kind: of what is made from now on.
    now: bytes by kind.
    most: by phase, bytes by kind when all together were the most.

    What stands under another kind than it was made as, `mark` says. Copies of weights in another
    dtype are "gathered".
    """

    fakes: FakeTensorMode | None = None  # whose tensors are counted as if they were real

    def __init__(self, kind: str = "activations"):
        super().__init__()
        self.kind, self.now, self.most = kind, Counter(), {}
        self._known: dict[int, list] = {}  # by storage: bytes, kind
        self._total = self._peak = 0
        self.begin("")

    def mark(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """These are of `kind`, from now on for as long as they live."""
        for x in tensors:
            if x is not None:
                self._see(x.to_local() if isinstance(x, DTensor) else x, kind, again=True)

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """What is made within it is of `kind`."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def begin(self, phase: str) -> None:
        """From now on it is that phase, which begins with what is alive."""
        self.phase, self._peak = phase, -1
        self._add(self.kind, 0)

    def __enter__(self) -> "LiveBytes":
        self._resize = _STORAGE.resize_
        resize, resized = self._resize, self._resized

        def counted(storage, size):
            found = resize(storage, size)
            resized(storage)
            return found

        # Not an operation, and how FSDP2 frees what it has gathered.
        _STORAGE.resize_ = counted
        return super().__enter__()

    def __exit__(self, *error) -> None:
        _STORAGE.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # its parts' operations come by
        out = self.compute(func, args, kwargs or {})
        kind = self.kind
        if func is torch.ops.aten._to_copy.default and self.is_weight(args[0]):
            kind = "gathered"
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and self._is_there(x):
                self._see(x, kind)
        return out

    def compute(self, func, args, kwargs):
        """What an operation gives."""
        return func(*args, **kwargs)

    def _is_there(self, x: Tensor) -> bool:
        return x.fake_mode is self.fakes if isinstance(x, FakeTensor) else not x.is_meta

    def is_weight(self, x: Tensor) -> bool:
        """Whether it is a parameter, gathered or not, or looks at one."""
        found = self._known.get(x.untyped_storage()._cdata)
        return found is not None and found[1] in _WEIGHTS

    def _see(self, x: Tensor, kind: str, again: bool = False) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        found = self._known.get(key)
        if found is None:
            self._known[key] = [0, kind]
            weakref.finalize(storage, self._gone, key)
            self._resized(storage)
        elif again and found[1] != kind:
            self._add(found[1], -found[0])
            found[1] = kind
            self._add(kind, found[0])

    def _resized(self, storage) -> None:
        found = self._known.get(storage._cdata)
        if found is not None:
            self._add(found[1], storage.nbytes() - found[0])
            found[0] = storage.nbytes()

    def _gone(self, key: int) -> None:
        size, kind = self._known.pop(key)
        self._add(kind, -size)

    def _add(self, kind: str, size: int) -> None:
        self.now[kind] += size
        self._total += size
        if self._total > self._peak:
            self._peak, self.most[self.phase] = self._total, dict(self.now)
