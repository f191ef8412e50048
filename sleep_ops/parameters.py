"""Other parameters in the place of a module's own, for a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def replaced(
    module: nn.Module, change: Callable[[str, nn.Parameter], nn.Parameter]
) -> Iterator[dict[str, nn.Parameter]]:
    """Within it a module computes with change(name, parameter) for each parameter; tied ones stay tied."""
    others = {name: change(name, p) for name, p in module.named_parameters()}
    names = {p: name for name, p in module.named_parameters()}
    places = [(m, key, p) for m in module.modules() for key, p in m._parameters.items() if p is not None]
    for owner, key, p in places:
        owner._parameters[key] = others[names[p]]
    try:
        yield others
    finally:
        for owner, key, p in places:
            owner._parameters[key] = p
