"""What is checked: the public operators and the layer on small inputs of every kind that they must get right."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sleep_ops import (
    SleepGDNLayer,
    gated_delta_rule,
    gated_delta_rule_step,
    segment_transition,
    sleep_gated_delta_rule,
)
from sleep_ops.ops.gated_delta_rule import delta_rule_state
from sleep_ops.ops.gated_norm import gated_rms_norm
from sleep_ops.ops.short_conv import short_convolution

GATED = {"use_qk_l2norm": True, "use_beta_sigmoid": True, "allow_neg_eigval": True}
PACKED = (15, 0, 64, 1, 33)


class Problem(NamedTuple):
    """call(impl, **leaves) -> results, all differentiable; leaves are float64 on the CPU.

    interpreted: whether it is one of the few for Triton's interpreter, which takes seconds for what is here.
    """

    operator: str
    case: str
    leaves: dict[str, Tensor]
    call: Callable[..., tuple[Tensor, ...]]
    interpreted: bool = True


@dataclass(frozen=True)
class Case:
    """Tokens for an operator of the rule; heads (H, HV), dims (K, V), lengths of packed sequences instead of B and T.

    gated: gates and beta are raw inputs of their activations, keys and queries are normalised inside.
    options: further arguments of the operator.
    """

    operator: str
    name: str
    T: int = 75
    dims: tuple[int, int] = (16, 24)
    heads: tuple[int, int] = (1, 2)
    B: int = 1
    lengths: tuple[int, ...] = ()
    rule: str = "delta"
    gated: bool = False
    options: tuple[tuple[str, int], ...] = ()
    interpreted: bool = False

    def problem(self, seed: int) -> Problem:
        call = partial(_CALLS[self.operator], self)
        return Problem(self.operator, self.name, self._leaves(seed), call, self.interpreted)

    def arguments(self, impl: str, like: Tensor) -> dict:
        found = {"impl": impl, "rule": self.rule, **(GATED if self.gated else {}), **dict(self.options)}
        if self.lengths:
            ends = [0, *accumulate(self.lengths)]
            found["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32, device=like.device)
        return found

    def _leaves(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        (H, HV), (K, V), B = self.heads, self.dims, self.B
        T = sum(self.lengths) or self.T
        q, k, v, g, beta = (normal(B, T, *size) for size in ((H, K), (H, K), (HV, V), (HV,), (HV,)))
        leaves = {
            "q": q,
            "k": k,
            "v": v,
            "g": g,
            "beta": beta,
            "initial_state": normal(len(self.lengths) or B, HV, K, V),
        }
        if self.gated:
            # Weak decays, so that what crosses a window is more than its rounding.
            return leaves | {"A_log": 0.5 * normal(HV), "dt_bias": normal(HV) - 4}
        return leaves | {"k": F.normalize(k, dim=-1), "g": -0.2 * g.abs(), "beta": beta.sigmoid()}


def _transition(case: Case, impl: str, q, initial_state, **leaves):
    return tuple(segment_transition(**leaves, **case.arguments(impl, q)))


def _state(case: Case, impl: str, q, **leaves):
    return (delta_rule_state(**leaves, **case.arguments(impl, q)),)


def _step(case: Case, impl: str, initial_state, **leaves):
    token = {name: x[:, 0] if x.ndim > 1 else x for name, x in leaves.items()}
    return tuple(gated_delta_rule_step(**token, state=initial_state, **case.arguments(impl, initial_state)))


def _rule(operator: Callable, case: Case, impl: str, **leaves):
    return tuple(operator(**leaves, **case.arguments(impl, leaves["q"])))


_CALLS: dict = {
    "gated_delta_rule": partial(_rule, gated_delta_rule),
    "sleep_gated_delta_rule": partial(_rule, sleep_gated_delta_rule),
    "segment_transition": _transition,
    "delta_rule_state": _state,
    "gated_delta_rule_step": _step,
}


def _passes(n: int, window: int | None = None) -> tuple[tuple[str, int], ...]:
    return (("passes", n),) if window is None else (("passes", n), ("window", window))


_RULE, _SLEEP = "gated_delta_rule", "sleep_gated_delta_rule"
SMALL = [
    Case(_RULE, "ragged, grouped heads", B=2),
    Case(_RULE, "five chunks", T=130, dims=(16, 16), interpreted=True),
    Case(_RULE, "packed", lengths=PACKED),
    Case(_RULE, "gates inside", T=40, heads=(1, 3), gated=True, interpreted=True),
    Case(_RULE, "Hebbian", T=40, rule="hebbian"),
    Case(_RULE, "one launch", T=24, gated=True, interpreted=True),
    *(Case(_SLEEP, f"N = {n}", T=40, options=_passes(n), interpreted=n == 4) for n in (1, 2, 3, 4)),
    Case(_SLEEP, "N = 4, windows of 40", T=100, gated=True, options=_passes(4, 40)),
    Case(_SLEEP, "N = 3, packed, Hebbian", lengths=PACKED, rule="hebbian", options=_passes(3)),
    Case("segment_transition", "ragged", T=40, heads=(2, 6), gated=True, interpreted=True),
    Case("delta_rule_state", "N = 3, windows of 24", T=40, options=_passes(3, 24), interpreted=True),
    Case("gated_delta_rule_step", "one token", T=1, B=3, gated=True, interpreted=True),
]
LARGE = [
    Case(_RULE, "128 x 128, 300 tokens", T=300, dims=(128, 128), heads=(2, 4), B=2, gated=True),
    Case(_RULE, "96 x 256, 300 tokens", T=300, dims=(96, 256), heads=(2, 2)),
    Case(_RULE, "64 x 64, 1000 tokens", T=1000, dims=(64, 64), heads=(2, 4), gated=True),
    Case(_RULE, "64 x 64, one launch", T=24, dims=(64, 64), heads=(4, 4), B=16, gated=True),
    Case(_SLEEP, "128 x 128, N = 4, windows of 75", T=300, dims=(128, 128), options=_passes(4, 75), gated=True),
    Case("gated_delta_rule_step", "128 x 128", T=1, dims=(128, 128), heads=(4, 8), B=8, gated=True),
]


def _convolution(lengths: tuple[int, ...], impl: str, x, weight, bias, conv_state):
    cu_seqlens = None
    if lengths:
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=x.device)
    return tuple(short_convolution(x, weight, bias, conv_state=conv_state, cu_seqlens=cu_seqlens, impl=_impl(impl)))


def _norm(impl: str, x, gate, weight):
    return (gated_rms_norm(x, gate, weight, eps=1e-5, impl=_impl(impl)),)


def _impl(impl: str) -> str:
    """What has no token recurrence is compared with its own PyTorch form, in float64."""
    return "torch" if impl == "reference" else impl


def _layer(settings: dict, impl: str, x, **parameters):
    layer = SleepGDNLayer(**settings, impl=impl)
    y, state = torch.func.functional_call(layer, parameters, (x,), {"return_state": True})
    return y, state.fast_weights


def problems(large: bool) -> Iterator[Problem]:
    """The small ones, and the large ones where asked for."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    for seed, case in enumerate(SMALL + LARGE if large else SMALL):
        yield case.problem(seed)
    for name, shape, lengths in (("ragged", (2, 75), ()), ("packed", (1, sum(PACKED)), PACKED)):
        leaves = {"x": normal(*shape, 40), "weight": normal(40, 4), "bias": normal(40)}
        leaves["conv_state"] = normal(len(lengths) or shape[0], 3, 40)
        yield Problem("short_convolution", name, leaves, partial(_convolution, lengths), interpreted=not lengths)
    leaves = {"x": normal(2, 75, 2, 24), "gate": normal(2, 75, 2, 24), "weight": normal(24)}
    yield Problem("gated_rms_norm", "ragged", leaves, _norm)
    sizes = [("32 wide", 32, {"num_heads": 1, "num_v_heads": 2, "head_dim": 16, "head_v_dim": 24})]
    if large:
        sizes.append(("512 wide", 512, {"num_heads": 4, "head_dim": 128}))
    for name, width, heads in sizes:
        for n, window in ((1, None), (4, 24)):
            settings: dict = {"hidden_size": width, **heads, "passes": n, "window": window}
            torch.manual_seed(0)
            parameters = {key: p.detach().double() for key, p in SleepGDNLayer(**settings).named_parameters()}
            leaves = {"x": normal(1 if width == 32 else 4, 40, width)} | parameters
            yield Problem("SleepGDNLayer", f"{name}, N = {n}", leaves, partial(_layer, settings), interpreted=n > 1)
