"""Who computes it: the sleep operator, passes chained by hand, and other libraries where they are installed.

A replay is called as replay(q, k, v, g, beta, passes=N, window=L) and returns (output, final state); a chained one
calls a one-pass operator N times on each window in turn, handing on the state. Operators get keys and queries already
normalised.
"""

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable

import torch
from torch import Tensor

from sleep_ops import gated_delta_rule, sleep_gated_delta_rule
from sleep_ops.bench.cases import Case
from sleep_ops.bench.harness import Problem


def replayed(q, k, v, g, beta, *, passes, window, impl="auto"):
    """The sleep operator: the provider `ours`, and with impl="torch" `torch`."""
    return sleep_gated_delta_rule(q, k, v, g, beta, passes=passes, window=window, impl=impl)


def chained(one_pass: Callable) -> Callable:
    """The replay that makes `passes` calls one_pass(q, k, v, g, beta, state) -> (output, state) on each window."""

    def replay(q, k, v, g, beta, *, passes, window):
        state, outputs = None, []
        for tokens in zip(*(x.split(window or v.shape[1], 1) for x in (q, k, v, g, beta)), strict=True):
            for _ in range(passes):
                output, state = one_pass(*tokens, state)
            outputs.append(output)
        return torch.cat(outputs, 1) if len(outputs) > 1 else output, state

    return replay


def our_pass(q, k, v, g, beta, state):
    return gated_delta_rule(q, k, v, g, beta, initial_state=state)


def their_pass(operator, q, k, v, g, beta, state):
    """One pass by an operator with the keywords that fla and FlashQLA share."""
    scale = k.shape[-1] ** -0.5
    return operator(q=q, k=k, v=v, g=g, beta=beta, scale=scale, initial_state=state, output_final_state=True)


def load_fla(case: Case, device: torch.device) -> Callable:
    """flash-linear-attention's operator on its own Triton kernels. Raises ValueError for a case it cannot run."""
    if device.type != "cuda" or case.dtype == "float32":
        raise ValueError("it needs CUDA, and float16 or bfloat16")
    prepare_fla(device)
    return functools.partial(their_pass, importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule)


def prepare_fla(device: torch.device) -> None:
    """Make flash-linear-attention use its own Triton kernels, before anything else imports it."""
    os.environ.update(FLA_TILELANG="0", FLA_FLASH_QLA="0")  # read at import: no other library's kernels in its place
    if torch.cuda.get_device_capability(device)[0] == 9:
        # On Hopper it refuses Triton before 3.7.1, which miscompiles some of its shapes: whether these, is checked.
        importlib.import_module("fla.ops.common.chunk_o").TRITON_ABOVE_3_7_1 = True  # type: ignore[attr-defined]


def load_flash_qla(case: Case, device: torch.device) -> Callable:
    """FlashQLA's operator, with the keywords its source documents; not run yet. ValueError for a case it cannot run."""
    if device.type != "cuda" or case.dtype != "bfloat16" or (case.key_dim, case.value_dim) != (128, 128):
        raise ValueError("it needs CUDA, bfloat16 and head dims of 128")
    return functools.partial(their_pass, importlib.import_module("flash_qla").chunk_gated_delta_rule)


def load_transformers(case: Case, device: torch.device) -> Callable:
    """The PyTorch form that transformers' own models run where no kernels are."""
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    operator = inspect.unwrap(module.torch_chunk_gated_delta_rule)
    groups = case.value_heads // case.heads

    def one_pass(q, k, *rest):
        q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))  # not all versions do it themselves
        return operator(q, k, *rest[:-1], initial_state=rest[-1], output_final_state=True)

    return one_pass


OURS: dict[str, Callable] = {
    "ours": lambda: replayed,
    "ours-chained": lambda: chained(our_pass),
    "torch": lambda: functools.partial(replayed, impl="torch"),
}
# Optional libraries: provider -> (module, what makes its one-pass operator).
LIBRARIES = {
    "fla": ("fla", load_fla),
    "flash-qla": ("flash_qla", load_flash_qla),
    "transformers": ("transformers", load_transformers),
}
CHAINED = ("ours-chained", *LIBRARIES)


def replay_of(provider: str, case: Case, device: torch.device) -> Callable:
    """The provider's replay. ImportError for a library that is not installed, ValueError for a case it cannot run."""
    if provider in OURS:
        return OURS[provider]()
    module, load = LIBRARIES[provider]
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{module} is not installed")
    return chained(load(case, device))


def operator_problem(replay: Callable, case: Case, inputs: list[Tensor]) -> Problem:
    leaves = [x.detach().requires_grad_() for x in inputs[:5]]
    return Problem(lambda n: replay(*leaves, passes=n, window=case.window), leaves, inputs[5:])
