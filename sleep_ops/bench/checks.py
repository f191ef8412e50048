"""Whether a provider is right: every result and gradient against the float64 recurrence, before anything is timed."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sleep_ops.bench.cases import Case, make_inputs
from sleep_ops.bench.harness import Problem, first_line, gradients
from sleep_ops.bench.providers import LIBRARIES, operator_problem
from sleep_ops.reference import sleep_gated_delta_rule_reference

# The largest relative error (norm over norm, of the output, the final state and each gradient) that counts as right.
ERROR_BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
ERRORS = ["error_output", "error_state", "error_gradient", "error_bound"]
CHECKED_PASSES = (1, 2, 3, 4)


def operator_check(
    replay: Callable, case: Case, seed: int, device: torch.device, passes: Sequence[int] = CHECKED_PASSES
) -> dict[str, float]:
    """Errors on few tokens: of the last row and the outermost key heads, against the recurrence on just those."""
    case = case.shortened()
    inputs = make_inputs(case, seed, device)

    def part(x: Tensor, head_axis: int) -> Tensor:
        """x [batch, ...] with `heads` or `value_heads` along head_axis."""
        x = x[-1:].unflatten(head_axis, (case.heads, -1))
        chosen = torch.tensor(sorted({0, case.heads - 1}), device=x.device)
        return x.index_select(head_axis, chosen).flatten(head_axis, head_axis + 1).detach().cpu().double()

    exact = [part(x, 2) for x in inputs[:-1]] + [part(inputs[-1], 1)]
    truth = operator_problem(sleep_gated_delta_rule_reference, case, exact)
    return relative_errors(operator_problem(replay, case, inputs), truth, part, passes)


def relative_errors(
    problem: Problem, truth: Problem, part: Callable, passes: Sequence[int] = CHECKED_PASSES
) -> dict[str, float]:
    """The worst over `passes`, of the gradients also over the leaves. part(x, head axis): what `truth` has of x."""
    worst = dict.fromkeys(ERRORS[:3], 0.0)
    for n in passes:
        results = []
        for x in (problem, truth):
            roots = x.run(n)
            results.append([*roots, *gradients(x, roots)])
        for i, (found, exact) in enumerate(zip(*results, strict=True)):
            name, head_axis = ERRORS[min(i, 2)], 1 if i == 1 else 2
            error = (part(found, head_axis) - exact.detach()).norm() / exact.detach().norm().clamp(min=1e-30)
            worst[name] = max(worst[name], error.nan_to_num(nan=math.inf).item())
    return worst


def wrong(errors: dict[str, float], dtype: str) -> str:
    """The errors beyond the bound, in words; empty where there is none."""
    bound = ERROR_BOUNDS[dtype]
    beyond = [f"{what} = {error:.2g}" for what, error in errors.items() if not error <= bound]
    return f"{', '.join(beyond)}, at most {bound:g} expected" if beyond else ""


def right_ones(
    checks: dict[str, Callable[[], dict[str, float]]], dtype: str, tell: Callable[[str, str], None]
) -> dict[str, dict[str, float]]:
    """Of the providers' checks: the errors of those that are right. tell(provider, why) of the others.

    What another library raises is a reason to leave it out; what ours raises is raised.
    """
    right = {}
    for provider, check in checks.items():
        try:
            errors = check()
        except Exception as error:
            if provider not in LIBRARIES:
                raise
            tell(provider, f"is not timed: {first_line(error)}")
            continue
        if beyond := wrong(errors, dtype):
            tell(provider, f"is WRONG and not timed: {beyond}")
        else:
            right[provider] = errors | {"error_bound": ERROR_BOUNDS[dtype]}
    return right
