"""Without a GPU, Triton kernels run in its interpreter: decided here, before anything imports Triton."""

import os
import pathlib
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(0, str(pathlib.Path(__file__).parent))


@pytest.fixture
def device() -> str:
    """Where kernels are tested: the GPU if there is one, else CPU tensors through the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request) -> torch.dtype:
    """Every dtype of the kernels; the interpreter's bfloat16 products are wrong, so that one needs a GPU."""
    if request.param == "bfloat16" and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    return getattr(torch, request.param)


@pytest.fixture
def poisoned(monkeypatch):
    """Called with kernel modules, makes the buffers their launchers allocate start out full of NaN."""

    def poison(*modules) -> None:
        allocate = {name: getattr(torch, name) for name in ("empty", "empty_like")}
        poisoned_torch = type("PoisonedTorch", (), dict(vars(torch)))
        for name, function in allocate.items():
            filled = staticmethod(lambda *args, function=function, **kwargs: function(*args, **kwargs).fill_(torch.nan))
            setattr(poisoned_torch, name, filled)
        for module in modules:
            monkeypatch.setattr(module, "torch", poisoned_torch)

    return poison


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    """torch.compile gives a function a few recompilations in a process; tests in any order must not share them."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
