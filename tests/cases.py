"""Inputs of the gated delta rule that every implementation must get right, and the rule by which they are judged.

The 2x rule: on the same quantised inputs, and measured against the token recurrence in float64, the error of the
output, the final state and every gradient is at most twice that of the yardstick, the chunked PyTorch form with
operands of products in the same dtype, plus rounding, and what counts as zero. Gradients of A_log and dt_bias, few sums
of what g gets, are held against the largest error among theirs and g's.
"""

import itertools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from judge import outcome, within_two_times
from torch import Tensor

from sleep_ops.ops.rule import RuleOptions
from sleep_ops.reference import gated_delta_rule_reference
from sleep_ops.verify.yardstick import RoundedPass, rounded_as_kernels

NAMES = ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias")
GATED = {"use_qk_l2norm": True, "use_beta_sigmoid": True}
NEGATIVE = GATED | {"allow_neg_eigval": True}
MAX_INTERPRETED = 1 << 21


def slow_unless(quick: Collection[str], values: Iterable[Any], ids: Callable | Iterable[str] = str) -> list:
    """The values as parameters of a test, those whose ids are not among the `quick` ones marked slow."""
    values = list(values)
    names = list(map(ids, values) if callable(ids) else ids)
    assert set(quick) <= set(names), f"no parameters: {set(quick) - set(names)}"
    marks = [() if name in quick else pytest.mark.slow for name in names]
    return [pytest.param(x, id=n, marks=m) for x, n, m in zip(values, names, marks, strict=True)]


# Over the fixture `dtype`, where one dtype tells enough on the CPU; bfloat16 needs a GPU, and is quick there.
float16_is_slow = pytest.mark.parametrize(
    "dtype", slow_unless(("float32", "bfloat16"), ("float32", "float16", "bfloat16")), indirect=True
)


@dataclass(frozen=True)
class Case:
    """One problem. `heads` are (H, HV), `dims` (K, V); lengths of packed sequences replace B and T.

    gate and beta name the values: "random", "zero", "extreme" (0 to -70), "reset" (some of -1e9, -1e6 and -inf among
    ordinary ones), "strong" (-4 to -7), "one", "two", "wide" (0 to 2); keys: "random", "repeated", "zero". With options
    of GATED, gates and beta are drawn as the raw inputs of their activations.
    amplification: by how much the problem enlarges a rounding of <k_i, k_j> that all tokens share, or one of decays;
        its root counts in 16 bits.
    """

    id: str
    T: int = 75
    dims: tuple[int, int] = (16, 16)
    heads: tuple[int, int] = (1, 1)
    B: int = 1
    lengths: tuple[int, ...] = ()
    gate: str = "random"
    beta: str = "random"
    keys: str = "random"
    initial_state: bool = True
    final_cotangent: bool = True
    strided: bool = False
    amplification: float = 1.0
    rule: str = "delta"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def interpretable(self) -> bool:
        """Small enough for the interpreter."""
        return self.B * self.T * self.heads[1] * self.dims[0] * self.dims[1] <= MAX_INTERPRETED

    def __str__(self) -> str:
        return self.id


CASES = [
    *(Case(f"T{T}", T=T, B=3, heads=(2, 4)) for T in (1, 15)),
    *(Case(f"T{T}", T=T) for T in (63, 64, 65, 75, 100, 1000)),
    Case("K1-V1", T=33, dims=(1, 1), B=4, heads=(2, 4)),
    *(Case(f"K{K}-V{V}", T=33, dims=(K, V)) for K, V in ((16, 60), (60, 16), (64, 64), (96, 100), (100, 96))),
    *(Case(f"K{K}-V{V}", T=20, dims=(K, V)) for K, V in ((128, 128), (192, 16), (16, 256), (256, 192))),
    *(Case(f"T300-K{K}-V{V}", T=300, dims=(K, V), heads=(2, 4)) for K, V in ((64, 64), (128, 128), (192, 256))),
    Case("batch-grouped", T=40, B=2, heads=(2, 6), dims=(16, 24)),
    Case("grouped-gated", T=70, heads=(1, 3), options=GATED),
    Case("gated-negative-eigenvalues", options=NEGATIVE),
    Case("normalised-K100", T=40, dims=(100, 20), options={"use_qk_l2norm": True}),
    Case("hebbian", T=40, heads=(1, 2), rule="hebbian"),
    Case("hebbian-gated", B=3, heads=(2, 4), rule="hebbian", options=GATED),
    Case("packed", lengths=(15, 0, 64, 1, 33), heads=(1, 2)),
    Case("packed-empty-ends", lengths=(0, 40, 35, 0), dims=(20, 16), options=GATED),
    Case("packed-one", lengths=(70,), initial_state=False),
    Case("no-states", T=40, initial_state=False, final_cotangent=False),
    Case("gate-extreme", gate="extreme"),
    Case("gate-reset", gate="reset", B=2, heads=(1, 2)),
    Case("gate-reset-hebbian", gate="reset", rule="hebbian", B=2, heads=(1, 2)),
    Case("gate-reset-packed", gate="reset", lengths=(3, 0, 40, 27), heads=(1, 2)),
    Case("gate-strong", gate="strong", B=2, heads=(1, 2)),
    Case("gate-zero", gate="zero"),
    Case("gate-zero-beta-two-repeated-keys", gate="zero", beta="two", keys="repeated", amplification=40),
    Case("beta-zero", T=40, beta="zero"),
    Case("beta-one", T=40, beta="one"),
    Case("keys-zero", T=40, keys="zero"),
    Case("keys-zero-normalised", T=20, keys="zero", options={"use_qk_l2norm": True}),
    Case("strided", T=40, B=2, heads=(2, 4), strided=True),
]


def make_inputs(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Tensor | None]:
    """Tensors by the names of NAMES, cu_seqlens, and the cotangents d_output and d_final_state."""
    generator = torch.Generator().manual_seed(seed)
    (H, HV), (K, V), B = case.heads, case.dims, case.B
    T = sum(case.lengths) or case.T
    N = len(case.lengths) or B

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    q, k, v = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, HV, V)
    if case.keys == "repeated":
        k = k[:, :1].expand(B, T, H, K).clone()
    if not case.options.get("use_qk_l2norm"):
        k = F.normalize(k, dim=-1)
    if case.keys == "zero":
        k[:, ::2] = 0
    gate_parameters = "use_beta_sigmoid" in case.options
    g = {
        "random": normal(B, T, HV) if gate_parameters else -0.3 * torch.rand(B, T, HV, generator=generator),
        "zero": torch.zeros(B, T, HV),
        "extreme": torch.tensor([0.0, -70.0, -1e-3, -20.0, 0.0]).repeat(T)[:T].view(1, T, 1),
        "reset": torch.tensor([-0.37, -0.1, -1e9, -0.2, -0.37, -0.01, -1e6, -0.3, 0.0, -torch.inf, -0.5])
        .repeat(T)[:T]
        .view(1, T, 1),
        "strong": -4 - 3 * torch.rand(B, T, HV, generator=torch.Generator().manual_seed(seed)),
    }[case.gate].expand(B, T, HV)
    beta = normal(B, T, HV) if gate_parameters else torch.rand(B, T, HV, generator=generator)
    beta = {
        "random": beta,
        "wide": 2 * beta,
        "zero": torch.zeros(B, T, HV),
        "one": torch.ones(B, T, HV),
        "two": torch.full((B, T, HV), 2.0),
    }[case.beta]
    q, k, v, d_output = (x.to(device, dtype) for x in (q, k, v, normal(B, T, HV, V)))
    if case.strided:
        packed = torch.cat([x.flatten(2) for x in (q, k, v)], -1)
        q, k, v = (
            x.unflatten(-1, (heads, -1))
            for x, heads in zip(packed.split([H * K, H * K, HV * V], -1), (H, H, HV), strict=True)
        )
    ends = [0, *itertools.accumulate(case.lengths)]
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "g": g.clone(),
        "beta": beta,
        "initial_state": normal(N, HV, K, V) if case.initial_state else None,
        "A_log": 0.5 * normal(HV) if gate_parameters else None,
        "dt_bias": normal(HV) if gate_parameters else None,
        "cu_seqlens": torch.tensor(ends, dtype=torch.int32) if case.lengths else None,
        "d_output": d_output,
        "d_final_state": normal(N, HV, K, V) if case.final_cotangent else None,
    }
    return {name: None if x is None else x.to(device) for name, x in inputs.items()}


def arguments(
    case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """For the public operators: the tensors, as leaves, and the options. float64 is every tensor's.

    Gates are such that a state outlives some tens of tokens.
    """
    inputs = make_inputs(case, dtype, device, seed)
    if inputs["A_log"] is not None:
        inputs["A_log"] -= 2
    tensors = {name: inputs[name] for name in NAMES if inputs[name] is not None}
    tensors = {name: (x.double() if dtype == torch.float64 else x).requires_grad_() for name, x in tensors.items()}
    return tensors, {"rule": case.rule, "cu_seqlens": inputs["cu_seqlens"], **case.options}


def evaluate(function: Any, case: Case, inputs: dict[str, Tensor | None], dtype: torch.dtype | None = None, **extra):
    """The `outcome` on inputs of `make_inputs`, with its cotangents; inputs are cast to `dtype` if given."""
    tensors = {name: inputs[name].detach() for name in NAMES if inputs[name] is not None}
    tensors = {name: x.to(dtype or x.dtype).requires_grad_() for name, x in tensors.items()}
    options = {"scale": case.dims[0] ** -0.5, "cu_seqlens": inputs["cu_seqlens"], "rule": case.rule, **case.options}
    return outcome(function, tensors, (inputs["d_output"], inputs["d_final_state"]), **options, **extra)


def single_pass(kind: type) -> Any:
    """One pass by `kind` (RoundedPass, TritonPass) with the signature of `gated_delta_rule_reference`."""

    def function(q, k, v, g, beta, *, scale, initial_state=None, cu_seqlens=None, **options):
        return kind(k, v, g, beta, RuleOptions(**options), cu_seqlens=cu_seqlens).run(q, initial_state, scale)

    return function


def check_two_times(
    function: Any, case: Case, dtype: torch.dtype, device: str, *, specification=gated_delta_rule_reference, plain=None
) -> None:
    """The 2x rule for `function`, with the signature of the specification, as has `plain`: PyTorch with its roundings.

    What `plain` calls with impl="torch" is the yardstick.
    """
    inputs = make_inputs(case, dtype, device)
    truth = evaluate(specification, case, inputs, torch.float64)
    with rounded_as_kernels():
        plain = evaluate(plain or single_pass(RoundedPass), case, inputs)
    results = evaluate(function, case, inputs)
    # In 16 bits the yardstick's own roundings are enlarged too: by as much, but for chance.
    enlarged = 8 * case.amplification if dtype == torch.float32 else 0.5 * case.amplification**0.5
    rounding = torch.finfo(dtype).eps * enlarged
    within_two_times(results, plain, truth, rounding)
