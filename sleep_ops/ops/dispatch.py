"""Which implementation suits the tensors, and passes of the gated delta rule by it, arguments already checked."""

import contextlib
import importlib.util
import os

import torch
from torch import Tensor

from sleep_ops.ops.chunk_torch import TorchPass
from sleep_ops.reference import gated_delta_rule_reference, state_dtype

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


def full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """Switches autocast off on x's device, where there is one."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def no_tokens(
    q: Tensor | None, k: Tensor, v: Tensor, gates: tuple, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """What a pass over no tokens or no sequences gives: nothing, the state it began with, and zero gradients."""
    num_states = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = state_dtype(k, v)
    inputs = [x for x in (q, k, v, *gates) if x is not None]
    zero = sum(x.flatten()[:0].sum(dtype=dtype) for x in inputs)
    if state is None:
        state = k.new_zeros(num_states, v.shape[2], k.shape[3], v.shape[3], dtype=dtype)
    return None if q is None else torch.zeros_like(v) + zero.to(v.dtype), state.to(dtype) + zero


class ReferencePass:
    """Passes over the same tokens from any state by the token recurrence, which is read anew for each."""

    def __init__(self, *tokens: Tensor, **options):
        self.tokens, self.options = tokens, options

    def run(self, q: Tensor | None, state: Tensor | None, scale: float) -> tuple[Tensor | None, Tensor]:
        k, v, g, beta = self.tokens
        o, state = gated_delta_rule_reference(
            k if q is None else q, k, v, g, beta, initial_state=state, scale=scale, **self.options
        )
        return None if q is None else o.to(v.dtype), state

    def transition(self) -> tuple[Tensor, Tensor]:
        k, v, g, beta = self.tokens
        cu_seqlens = self.options.get("cu_seqlens")
        num_states = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        K, (HV, V) = k.shape[3], v.shape[2:]
        widened = torch.cat([v.new_zeros(*v.shape[:3], K), v], -1)
        start = torch.eye(K, K + V, dtype=state_dtype(k, v), device=v.device).expand(num_states, HV, -1, -1)
        _, state = gated_delta_rule_reference(k, k, widened, g, beta, initial_state=start, scale=1.0, **self.options)
        return state[..., :K], state[..., K:]


def prepare_pass(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, impl: str, longest: int | None = None, **options):
    """An object with `run(q, state, scale)` and `transition()`: one pass over these tokens, from any state.

    impl is one of "triton", "torch" and "reference" (see `choose_rule_impl`); `options` are those of `TorchPass`.
    Arguments are already checked, autocast is off.
    """
    if impl == "reference":
        return ReferencePass(k, v, g, beta, **options)
    if impl == "torch":
        return TorchPass(k, v, g, beta, longest=longest, **options)
    # Imported where it is used: everything else works without Triton.
    from sleep_ops.ops.chunk_triton import TritonPass

    return TritonPass(k, v, g, beta, longest=longest, **options)


def run_pass(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    scale: float,
    *,
    impl: str,
    cu_seqlens: Tensor | None = None,
    **options,
) -> tuple[Tensor | None, Tensor]:
    """What `prepare_pass(...).run(q, state, scale)` gives; for Triton in one launch where the sequences are short."""
    if impl == "triton" and cu_seqlens is None:
        from sleep_ops.kernels.configs import architecture, single_chunk_config

        if single_chunk_config(k.shape[3], v.shape[3], k.shape[1], k.dtype, architecture(k.device)) is not None:
            from sleep_ops.ops.window_triton import window_gated_delta_rule

            return window_gated_delta_rule(q, k, v, g, beta, scale=scale, initial_state=state, **options)
    return prepare_pass(k, v, g, beta, impl=impl, cu_seqlens=cu_seqlens, **options).run(q, state, scale)
