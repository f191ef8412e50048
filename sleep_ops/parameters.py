"""Other parameters in the place of a module's own, for good or for a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

Change = Callable[[str, nn.Parameter], nn.Parameter]


def exchange(module: nn.Module, change: Change) -> dict[str, nn.Parameter]:
    """A module's parameters become change(name, parameter), one after another; tied ones stay tied. Returns the new."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for key, p in owner._parameters.items():
            if p is not None:
                places.setdefault(p, []).append((owner, key))
    others = {}
    for name, p in [*module.named_parameters()]:
        others[name] = change(name, p)
        for owner, key in places.pop(p):
            owner._parameters[key] = others[name]
    return others


@contextmanager
def replaced(module: nn.Module, change: Change) -> Iterator[dict[str, nn.Parameter]]:
    """Within it a module computes with change(name, parameter) for each parameter; tied ones stay tied."""
    before = dict(module.named_parameters())
    try:
        yield exchange(module, change)
    finally:
        exchange(module, lambda name, _: before[name])
