"""How Triton kernels run, decided here before anything imports Triton: on the GPU, else in Triton's interpreter.

The tests of tests/ptx run what Triton compiles in an emulator instead, in a process of their own: pytest tests/ptx.
With --emulated others do too, in bfloat16 as well: pytest --emulated 90 tests/test_chunk_kernels.py -k bfloat16.
"""

import os
import pathlib
import sys

import pytest
import torch

TESTS = pathlib.Path(__file__).parent
EMULATED = TESTS / "ptx"
sys.path.insert(0, str(TESTS))


def _only_compiled(config) -> bool:
    """Whether all tests asked for are those of tests/ptx; usage error where only some are."""
    places = [pathlib.Path(config.invocation_params.dir, arg.partition("::")[0]) for arg in config.args]
    inside = [place.resolve().is_relative_to(EMULATED) for place in places]
    if any(inside) and not all(inside):
        raise pytest.UsageError("tests/ptx: expected no other tests beside it; kernels are compiled there")
    return any(inside)


def pytest_addoption(parser) -> None:
    parser.addoption("--emulated", type=int, choices=(80, 90), help="kernels as compiled for sm_80 or sm_90, emulated")


def pytest_configure(config) -> None:
    if config.getoption("emulated") and _only_compiled(config):
        raise pytest.UsageError("--emulated: expected other tests than those of tests/ptx, which choose for themselves")
    if not (torch.cuda.is_available() or _only_compiled(config) or config.getoption("emulated")):
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_ignore_collect(collection_path, config) -> bool | None:
    return True if collection_path == EMULATED and not _only_compiled(config) else None


@pytest.fixture
def device(request) -> str:
    """Where kernels are tested: the GPU if there is one, else CPU tensors through the interpreter or the emulator."""
    return "cuda" if torch.cuda.is_available() and not request.config.getoption("emulated") else "cpu"


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request) -> torch.dtype:
    """Every dtype of the kernels; the interpreter's bfloat16 products are wrong, so that one needs a GPU."""
    if request.param == "bfloat16" and not (torch.cuda.is_available() or request.config.getoption("emulated")):
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    return getattr(torch, request.param)


@pytest.fixture(autouse=True)
def emulated_gpu(request):
    """With --emulated impl="triton" runs kernels as compiled for a GPU, and nothing may be reported of them."""
    arch = request.config.getoption("emulated")
    if not arch:
        yield
        return
    from ptx.emulation import check_silent, on_gpu

    with on_gpu(arch) as emulator:
        yield
    check_silent(emulator)


@pytest.fixture
def poisoned(monkeypatch):
    """Called, makes the buffers that launchers of kernels allocate start out full of NaN."""

    def poison() -> None:
        allocate = {name: getattr(torch, name) for name in ("empty", "empty_like")}
        poisoned_torch = type("PoisonedTorch", (), dict(vars(torch)))
        for name, function in allocate.items():
            filled = staticmethod(lambda *args, function=function, **kwargs: function(*args, **kwargs).fill_(torch.nan))
            setattr(poisoned_torch, name, filled)
        for name, module in list(sys.modules.items()):
            if name.startswith("sleep_ops.kernels.") and hasattr(module, "torch"):
                monkeypatch.setattr(module, "torch", poisoned_torch)

    return poison


@pytest.fixture
def chunks_of_64(monkeypatch) -> None:
    """As if the table asked for them, as `bench tune` may find it should."""
    from sleep_ops.kernels.launches import LAUNCHES

    for width in ("float32", "16-bit"):
        monkeypatch.setitem(LAUNCHES, (width, None, None, None), (64, (16, 1, 1), (32, 4, 2), (32, 4, 2), (32, 4, 1)))


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    """torch.compile gives a function a few recompilations in a process; tests in any order must not share them."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
