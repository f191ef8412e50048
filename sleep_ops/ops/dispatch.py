"""Which implementation suits the tensors, and one pass of the gated delta rule by it, arguments already checked."""

import contextlib
import importlib.util
import os

import torch
from torch import Tensor

from sleep_ops.ops.chunk_torch import chunk_gated_delta_rule_torch
from sleep_ops.reference import gated_delta_rule_reference

MAX_TRITON_KEY_DIM = 256
HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose_impl(impl: str, x: Tensor) -> str:
    """Name of the implementation "auto" stands for: Triton for CUDA tensors, PyTorch for others and for float64.

    Raises ValueError where Triton can't run on tensors like x, ImportError where it isn't installed.
    """
    if impl == "auto":
        impl = "triton" if x.is_cuda and x.dtype != torch.float64 else "torch"
    if impl == "triton":
        if x.dtype == torch.float64:
            raise ValueError("impl: expected another than 'triton' for float64 inputs, such as 'torch', got 'triton'")
        if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"impl: expected CUDA tensors for 'triton' (or TRITON_INTERPRET=1 in the environment), got {x.device}"
            )
        if not HAS_TRITON:
            raise ImportError("impl: Triton is not installed (pip install triton); impl='torch' needs none")
    return impl


def choose_rule_impl(impl: str, k: Tensor) -> str:
    """`choose_impl` for the gated delta rule over keys k [..., K], whose kernels hold a whole key."""
    impl = choose_impl(impl, k)
    if impl == "triton" and k.shape[-1] > MAX_TRITON_KEY_DIM:
        raise ValueError(
            f"k: expected K <= {MAX_TRITON_KEY_DIM} for Triton, got K = {k.shape[-1]}; impl='torch' has no limit"
        )
    return impl


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes x's GPU the current one, on which Triton launches; nothing for CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def run_pass(
    q: Tensor | None, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, impl: str, **options: object
) -> tuple[Tensor | None, Tensor]:
    """Output [B, T, HV, V] in v's dtype (None without q) and final state [N, HV, K, V], autocast switched off.

    `options` are the keywords of `chunk_gated_delta_rule_torch`.
    """
    impl = choose_rule_impl(impl, k)
    with torch.autocast(device_type=k.device.type, enabled=False):
        if impl == "torch":
            return chunk_gated_delta_rule_torch(q, k, v, g, beta, **options)
        if impl == "reference":
            o, state = gated_delta_rule_reference(k if q is None else q, k, v, g, beta, **options)
            return None if q is None else o.to(v.dtype), state
        # Imported where it is used: everything else works without Triton.
        from sleep_ops.ops.chunk_triton import chunk_gated_delta_rule_triton

        return chunk_gated_delta_rule_triton(q, k, v, g, beta, **options)
