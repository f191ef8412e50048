"""Checks of the public operators' arguments: a ValueError names the argument, what was expected and what was got.

Checks read shapes, dtypes and devices, never values of tensors, with one exception: `cu_seqlens` and `lengths` on the
CPU, outside torch.compile. On a GPU reading them would make the host wait for the device, so there their values are the
caller's duty.
"""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RULES = ("delta", "hebbian")
IMPLS = ("auto", "triton", "torch", "reference")
KERNEL_IMPLS = ("auto", "triton", "torch")  # of operators whose PyTorch form is their specification
OUTPUT_PASSES = ("first", "last")


def expect(condition: bool, name: str, expected: str, got: object) -> None:
    """ValueError in this project's words unless `condition`."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def check_tensor(
    name: str,
    x: object,
    shape: tuple[int, ...],
    dims: str,
    device: torch.device | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES,
) -> None:
    """Raise unless x is a tensor of this shape (described by `dims`), on `device`, of one of `dtypes`."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor {dims}, got {type(x).__name__}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {dims} = {list(shape)}, got {list(x.shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_flags(**flags: object) -> None:
    """Raise unless every flag is True or False: the truth of anything else, as of "no", would be a guess."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected True or False, got {value!r}")


def check_count(name: str, value: object) -> None:
    """Raise unless value is an int >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")


def check_eps(name: str, eps: object) -> None:
    """Raise unless eps is a finite number >= 0."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {eps!r}")


def check_full(name: str, x: object, ndim: int, dims: str, may_be_empty: int = 0) -> None:
    """Raise unless x is a float tensor of `ndim` dimensions (`dims`), none empty but of the first `may_be_empty`."""
    if not isinstance(x, Tensor) or x.ndim != ndim or 0 in x.shape[may_be_empty:]:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected a tensor {dims} with no empty dimension, got {got}")
    check_tensor(name, x, x.shape, dims)


def check_scale(scale: object) -> None:
    """Raise unless scale is None or a finite number."""
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale: expected None or a finite number, got {scale!r}")


def check_gates(
    value_heads: int,
    device: torch.device,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    use_beta_sigmoid: bool,
    allow_neg_eigval: bool,
) -> None:
    """Check the gate parameters: A_log and dt_bias come together, a doubled beta only with the sigmoid."""
    check_flags(use_beta_sigmoid=use_beta_sigmoid, allow_neg_eigval=allow_neg_eigval)
    if (A_log is None) != (dt_bias is None):
        missing, given = ("A_log", "dt_bias") if A_log is None else ("dt_bias", "A_log")
        raise ValueError(f"{missing}: expected a tensor [HV] together with {given}, got None")
    if A_log is not None:
        check_tensor("A_log", A_log, (value_heads,), "[HV]", device)
        check_tensor("dt_bias", dt_bias, (value_heads,), "[HV]", device)
    if allow_neg_eigval and not use_beta_sigmoid:
        raise ValueError(
            "allow_neg_eigval: expected use_beta_sigmoid=True with it (it doubles the sigmoid; a beta given directly "
            "may reach 2 by itself), got use_beta_sigmoid=False"
        )


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, tokens: int, device: torch.device) -> None:
    """Check the borders of packed sequences; their values only on the CPU and outside torch.compile."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        got = list(cu_seqlens.shape) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise ValueError(f"cu_seqlens: expected a tensor [num_seqs + 1] with at least one sequence, got {got}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens: expected dtype torch.int32 or torch.int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens: expected device {device}, got {cu_seqlens.device}")
    if batch != 1:
        raise ValueError(f"cu_seqlens: expected a batch of B = 1 with packed sequences, got B = {batch}")
    if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu":
        return
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != tokens or any(a > b for a, b in zip(borders[:-1], borders[1:], strict=True)):
        raise ValueError(f"cu_seqlens: expected borders rising from 0 to T = {tokens}, got {borders}")


def check_lengths(lengths: Tensor, batch: int, tokens: int, device: torch.device) -> None:
    """Check the real tokens of right-padded rows; their values only on the CPU and outside torch.compile."""
    check_tensor("lengths", lengths, (batch,), "[B]", device, (torch.int64,))
    if (
        not torch.compiler.is_compiling()
        and device.type == "cpu"
        and any(not 0 <= n <= tokens for n in lengths.tolist())
    ):
        raise ValueError(f"lengths: expected values from 0 to T = {tokens}, got {lengths.tolist()}")


def check_heads(key_heads: int, value_heads: int) -> None:
    """Raise unless every key head serves the same number of value heads."""
    if value_heads % key_heads:
        raise ValueError(f"v: expected HV to be a multiple of H = {key_heads}, got HV = {value_heads}")


def check_state(name: str, state: Tensor, shape: tuple[int, ...], k: Tensor) -> None:
    """Raise unless state is [N, HV, K, V] in float32, or float64 beside float64 inputs."""
    dtypes = (torch.float32, torch.float64) if k.dtype == torch.float64 else (torch.float32,)
    check_tensor(name, state, shape, "[N, HV, K, V]", k.device, dtypes)


def check_delta_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    rule: str,
    use_qk_l2norm: bool,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    use_beta_sigmoid: bool,
    allow_neg_eigval: bool,
    impl: str,
) -> None:
    """Check the arguments of `gated_delta_rule`; q is None where only the state is wanted."""
    check_full("k", k, 4, "[B, T, H, K]", 2)
    check_full("v", v, 4, "[B, T, HV, V]", 2)
    batch, tokens, key_heads, key_dim = k.shape
    value_heads, value_dim = v.shape[2:]
    if q is not None:
        check_tensor("q", q, k.shape, "[B, T, H, K] of k", k.device, (k.dtype,))
    check_tensor("v", v, (batch, tokens, value_heads, value_dim), "[B, T, HV, V]", k.device, (k.dtype,))
    check_heads(key_heads, value_heads)
    check_tensor("g", g, (batch, tokens, value_heads), "[B, T, HV]", k.device)
    check_tensor("beta", beta, (batch, tokens, value_heads), "[B, T, HV]", k.device)
    check_scale(scale)
    check_choice("rule", rule, RULES)
    check_flags(use_qk_l2norm=use_qk_l2norm)
    check_gates(value_heads, k.device, A_log, dt_bias, use_beta_sigmoid, allow_neg_eigval)
    check_choice("impl", impl, IMPLS)
    num_states = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, tokens, k.device)
        num_states = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check_state("initial_state", initial_state, (num_states, value_heads, key_dim, value_dim), k)


def check_passes(passes: object, window: object, output_pass: object) -> None:
    """Raise unless passes is an int >= 1 or math.inf, window None or an int >= 1, output_pass "first" or "last"."""
    endless = isinstance(passes, float) and passes == math.inf
    if not endless and (isinstance(passes, bool) or not isinstance(passes, int) or passes < 1):
        raise ValueError(f"passes: expected an integer >= 1 or math.inf, got {passes!r}")
    if window is not None:
        check_count("window", window)
    check_choice("output_pass", output_pass, OUTPUT_PASSES)


def check_no_tangents(operator: str, *tensors: Tensor | None) -> None:
    """Refuse forward-mode derivatives (torch.func.jvp, jacfwd, linearize, dual tensors): kernels would drop them."""
    if forward_ad._current_level < 0:
        return
    for x in tensors:
        if x is not None and (
            torch._C._functorch.is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None
        ):
            raise RuntimeError(f"{operator}: expected reverse mode, got a forward-mode derivative (torch.func.jvp)")


def check_first_order(operator: str) -> None:
    """Called in a written-out backward: refuse a graph of it (create_graph=True), whose derivatives would be wrong."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{operator}: expected one derivative (create_graph=False), got create_graph=True")
