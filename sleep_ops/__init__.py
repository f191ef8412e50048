"""Sleep for language models: looped consolidation of fast weights before the attention cache is evicted."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sleep_ops.layers.gdn import SleepGDNLayer
    from sleep_ops.layers.mixer import GDNState
    from sleep_ops.model.config import HybridConfig
    from sleep_ops.model.hybrid import SleepHybridModel, SleepOutput
    from sleep_ops.model.session import SleepSession
    from sleep_ops.ops.affine import Transition, segment_transition
    from sleep_ops.ops.gated_delta_rule import gated_delta_rule, sleep_gated_delta_rule
    from sleep_ops.ops.step import gated_delta_rule_step
    from sleep_ops.reference import DeltaRuleOutput

_HOMES = {
    "DeltaRuleOutput": "reference",
    "GDNState": "layers.mixer",
    "HybridConfig": "model.config",
    "SleepGDNLayer": "layers.gdn",
    "SleepHybridModel": "model.hybrid",
    "SleepOutput": "model.hybrid",
    "SleepSession": "model.session",
    "Transition": "ops.affine",
    "gated_delta_rule": "ops.gated_delta_rule",
    "gated_delta_rule_step": "ops.step",
    "segment_transition": "ops.affine",
    "sleep_gated_delta_rule": "ops.gated_delta_rule",
}
__all__ = [
    "DeltaRuleOutput",
    "GDNState",
    "HybridConfig",
    "SleepGDNLayer",
    "SleepHybridModel",
    "SleepOutput",
    "SleepSession",
    "Transition",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "segment_transition",
    "sleep_gated_delta_rule",
]


def __getattr__(name: str):
    """A public name, imported when it is first asked for: a command's help needs no PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
