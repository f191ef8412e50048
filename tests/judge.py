"""Results and gradients of an operator by their names, and how close they must come to others."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sleep_ops.verify.yardstick import plain_error

VANISHING = 1e-19  # what on a CPU counts as zero, see sleep_ops/ops/small.py

# Of tensors, and of dictionaries and sequences of them; a failure names the item.
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)  # in float32
exact = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)  # in float64
identical = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def leaves(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The same numbers in leaves of their own, in another dtype if given."""
    return {name: x.detach().to(dtype or x.dtype).requires_grad_(x.requires_grad) for name, x in tensors.items()}


def outcome(
    function: Callable, tensors: dict[str, Tensor], cotangents: Sequence[Tensor | None] = (), **options
) -> dict[str, Tensor]:
    """Results of function(**tensors, **options) by name, and as "d..." the gradient of each tensor that requires grad.

    cotangents: of the results, None for one that is not differentiated; random ones if none are given.
    """
    results = function(**tensors, **options)
    results = (results,) if isinstance(results, Tensor) else results
    names = getattr(results, "_fields", ("output", "final_state")[: len(results)])
    found = {name: x.detach() for name, x in zip(names, results, strict=True)}
    wanted = {f"d{name}": x for name, x in tensors.items() if x.requires_grad}
    if wanted:
        generator = torch.Generator().manual_seed(1)
        cotangents = cotangents or [torch.randn(x.shape, generator=generator) for x in results]
        weights = [None if c is None else c.to(x) for x, c in zip(results, cotangents, strict=True)]
        roots = [x for x, weight in zip(results, weights, strict=True) if weight is not None]
        weights = [weight for weight in weights if weight is not None]
        gradients = torch.autograd.grad(roots, list(wanted.values()), weights, materialize_grads=True)
        found |= zip(wanted, gradients, strict=True)
    return found


def relative_error(x: Tensor, truth: Tensor) -> float:
    """Norm of x - truth over that of truth; for a zero truth, the plain norm."""
    return (x.double() - truth).norm().item() / (truth.norm().item() or 1.0)


def largest_error(x: Tensor, truth: Tensor) -> float:
    """Of any element, over 1 and the largest element of truth."""
    return 0.0 if not x.numel() else ((x.double() - truth).abs().max() / (1 + truth.abs().max())).item()


def within_two_times(
    results: dict[str, Tensor],
    plain: dict[str, Tensor],
    truth: dict[str, Tensor],
    rounding: float,
    error: Callable[[Tensor, Tensor], float] = relative_error,
) -> None:
    """The 2x rule: errors are at most twice those of `plain`, plus rounding and what counts as zero."""
    failures = []
    for name, value in results.items():
        assert value.shape == truth[name].shape and value.dtype == plain[name].dtype, name
        found, zero = error(value, truth[name]), VANISHING / (truth[name].norm().item() or torch.inf)
        allowed = 2 * plain_error(name, plain, truth, error) + rounding + zero
        if not found <= allowed:
            failures.append(f"{name}: error {found:.2e}, allowed {allowed:.2e}")
    assert not failures, "; ".join(failures)


def triton_within_two_times(
    function: Callable, tensors: dict[str, Tensor], rounding: float, error: Callable = relative_error, **options
) -> None:
    """The 2x rule for the Triton form of an operator whose PyTorch form in float64 is the truth."""
    truth = outcome(function, leaves(tensors, torch.float64), impl="torch", **options)
    plain, results = (outcome(function, leaves(tensors), impl=impl, **options) for impl in ("torch", "triton"))
    within_two_times(results, plain, truth, rounding, error)


def kept_bytes(function: Callable) -> int:
    """Of the distinct tensors that autograd keeps for the backward of what `function` does, its inputs included."""
    kept = []

    def keep(x):
        kept.append(x.untyped_storage())  # alive until counted: no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        results = function()
    del results
    return sum({x.data_ptr(): x.nbytes() for x in kept}.values())
