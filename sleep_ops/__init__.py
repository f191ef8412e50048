"""Sleep for language models: looped consolidation of fast weights before the attention cache is evicted."""

from sleep_ops.affine import Transition, segment_transition
from sleep_ops.config import HybridConfig
from sleep_ops.layers.gdn import SleepGDNLayer
from sleep_ops.layers.mixer import GDNState
from sleep_ops.model import SleepHybridModel, SleepOutput
from sleep_ops.ops.gated_delta_rule import DeltaRuleOutput, gated_delta_rule, sleep_gated_delta_rule
from sleep_ops.ops.step import gated_delta_rule_step
from sleep_ops.session import SleepSession

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
