"""Which implementation suits the tensors, and passes of the gated delta rule by it, arguments already checked."""

import importlib.util
import os

import torch
from torch import Tensor

from sleep_ops.ops.chunk_torch import TorchPass
from sleep_ops.ops.rule import RuleOptions
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


def no_tokens(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    options: RuleOptions,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """What a pass over no tokens or no sequences gives: nothing, the state it began with, and zero gradients."""
    dtype = state_dtype(k, v)
    inputs = [x for x in (q, k, v, g, beta, options.A_log, options.dt_bias) if x is not None]
    zero: Tensor = sum(x.flatten()[:0].sum(dtype=dtype) for x in inputs)  # type: ignore[assignment]
    if state is None:
        state = k.new_zeros(_num_states(k, cu_seqlens), v.shape[2], k.shape[3], v.shape[3], dtype=dtype)
    return None if q is None else torch.zeros_like(v) + zero.to(v.dtype), state.to(dtype) + zero


def _num_states(k: Tensor, cu_seqlens: Tensor | None) -> int:
    return k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


class ReferencePass:
    """Passes over the same tokens from any state by the token recurrence, which is read anew for each."""

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        options: RuleOptions,
        *,
        cu_seqlens: Tensor | None = None,
        longest: int | None = None,
    ):
        self.tokens, self.options = (k, v, g, beta), {"cu_seqlens": cu_seqlens, **options._asdict()}

    def run(self, q: Tensor | None, state: Tensor | None, scale: float) -> tuple[Tensor | None, Tensor]:
        k, v, g, beta = self.tokens
        o, state = gated_delta_rule_reference(
            k if q is None else q, k, v, g, beta, initial_state=state, scale=scale, **self.options
        )
        return None if q is None else o.to(v.dtype), state

    def transition(self) -> tuple[Tensor, Tensor]:
        k, v, g, beta = self.tokens
        K, (HV, V) = k.shape[3], v.shape[2:]
        widened = torch.cat([v.new_zeros(*v.shape[:3], K), v], -1)
        start = torch.eye(K, K + V, dtype=state_dtype(k, v), device=v.device)
        start = start.expand(_num_states(k, self.options["cu_seqlens"]), HV, -1, -1)
        _, state = gated_delta_rule_reference(k, k, widened, g, beta, initial_state=start, scale=1.0, **self.options)
        return state[..., :K], state[..., K:]


def prepare_pass(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    options: RuleOptions,
    *,
    impl: str,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    q: Tensor | None = None,
):
    """An object with `run(q, state, scale)` and `transition()`: one pass over these tokens, from any state.

    impl is one of "triton", "torch" and "reference" (see `choose_rule_impl`); q, if it is known already, as in
    `TritonPass`; the rest as in `TorchPass`. Arguments are already checked, autocast is off.
    """
    if impl == "triton":
        # Imported where it is used: everything else works without Triton.
        from sleep_ops.ops.chunk_triton import TritonPass

        return TritonPass(k, v, g, beta, options, cu_seqlens=cu_seqlens, longest=longest, q=q)
    form = ReferencePass if impl == "reference" else TorchPass
    return form(k, v, g, beta, options, cu_seqlens=cu_seqlens, longest=longest)


def run_pass(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    options: RuleOptions,
    state: Tensor | None,
    scale: float,
    *,
    impl: str,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """What `prepare_pass(...).run(q, state, scale)` gives; for Triton in one launch where the sequences are short."""
    if is_single_chunk(k, v, impl, cu_seqlens):
        from sleep_ops.ops.single_chunk import single_chunk_pass

        return single_chunk_pass(q, k, v, g, beta, options, scale=scale, initial_state=state)
    return prepare_pass(k, v, g, beta, options, impl=impl, cu_seqlens=cu_seqlens, q=q).run(q, state, scale)


def is_single_chunk(k: Tensor, v: Tensor, impl: str, cu_seqlens: Tensor | None) -> bool:
    """Whether these sequences are short enough for the kernels that do everything in one launch."""
    if impl != "triton" or cu_seqlens is not None:
        return False
    from sleep_ops.kernels.configs import architecture, single_chunk_config

    return single_chunk_config(k.shape[3], v.shape[3], k.shape[1], k.dtype, architecture(k.device)) is not None


def replay_single_chunk(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    options: RuleOptions,
    state: Tensor | None,
    scale: float,
    passes: int,
    output_pass: str,
) -> tuple[Tensor | None, Tensor]:
    """`passes` >= 2 passes over sequences that are `is_single_chunk`: outputs of the first or last one, final state.

    One launch for the pass that puts out, and one for all the others.
    """
    from sleep_ops.ops.single_chunk import single_chunk_pass, single_chunk_passes

    if q is None:
        return None, single_chunk_passes(k, v, g, beta, options, passes, state)
    if output_pass == "first":
        output, state = single_chunk_pass(q, k, v, g, beta, options, scale=scale, initial_state=state)
        return output, single_chunk_passes(k, v, g, beta, options, passes - 1, state)
    state = single_chunk_passes(k, v, g, beta, options, passes - 1, state)
    return single_chunk_pass(q, k, v, g, beta, options, scale=scale, initial_state=state)
