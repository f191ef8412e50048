"""Which transformers models can sleep, and for the others, why not."""

from transformers import PreTrainedModel

from sleep_ops.checks import expect

# Model types whose linear-attention mixer is the gated delta rule with one decay per head.
HYBRIDS = ("qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "qwen3_next")
# Attention-only ones that are called layer by layer in the same way; they need `insert_fast_weights` first.
ATTENTION_ONLY = ("llama", "mistral", "qwen2", "qwen3", "olmo2")

_REASONS = {
    "qwen3_5": "a model with vision; load its language model with AutoModelForCausalLM",
    "qwen3_5_moe": "a model with vision; load its language model with AutoModelForCausalLM",
    "kimi_linear": "its memory decays per channel, not per head",
    "bailing_hybrid": "its memory decays per channel, not per head",
    "glm5_next": "its memory decays per channel and its layers are joined by hyper-connections",
    "glm5_next_text": "its memory decays per channel and its layers are joined by hyper-connections",
    "qwen4_exp": "its layers are joined by hyper-connections",
    "qwen4_exp_text": "its layers are joined by hyper-connections",
    "deepseek_v4": "its layers are joined by hyper-connections, and it has no fast weights",
    "hy_v4": "its layers are joined by hyper-connections, and it has no fast weights",
}


def check_family(model: PreTrainedModel) -> None:
    """Raises ValueError, with the reason, for a model that can't sleep as it is."""
    expect(isinstance(model, PreTrainedModel), "model", "a transformers causal language model", type(model).__name__)
    kind, config = model.config.model_type, model.config
    known = HYBRIDS + ATTENTION_ONLY
    supported = f"one of {', '.join(HYBRIDS)}, or after insert_fast_weights one of {', '.join(ATTENTION_ONLY)}"
    if kind not in known:
        why = _REASONS.get(kind, "a family nothing is known of")
        raise ValueError(f"model: expected {supported}, got {kind} ({why})")
    if not (hasattr(model, "model") and hasattr(model, "lm_head") and hasattr(model.model, "layers")):
        raise ValueError(f"model: expected a causal language model with its head, got {type(model).__name__}")
    activation = getattr(config, "hidden_act", "silu")
    expect(kind not in HYBRIDS or activation == "silu", "hidden_act", "'silu' (the convolutions')", activation)
    dropout = getattr(config, "attention_dropout", 0.0)
    expect(dropout == 0, "attention_dropout", "0: the attention used has none", dropout)
    router = getattr(config, "output_router_logits", False)
    expect(not router, "output_router_logits", "False: the routers' loss is not computed over windows", router)


def check_fast_weights(model: PreTrainedModel) -> None:
    """Raises ValueError for a model without fast weights: it would forget what it evicts."""
    if model.config.model_type in ATTENTION_ONLY and not hasattr(model.model, "fast_weights"):
        raise ValueError(
            "model: expected fast-weight layers, which keep what is evicted, got an attention-only "
            f"{model.config.model_type}; give it some with insert_fast_weights(model, layers=...) or --insert first"
        )


def check_place(model: PreTrainedModel) -> None:
    """Raises ValueError for a model on several devices or a disk: states don't follow it there."""
    places = sorted({str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()})
    expect(len(places) <= 1 and "disk" not in places, "device_map", "one device for the whole model", places)


def check_positions(model: PreTrainedModel) -> None:
    """Raises ValueError for rotary frequencies that change with a call's length.

    A text read in steps would be another.
    """
    kinds = getattr(getattr(model.model, "rotary_emb", None), "rope_type", None)
    for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
        expected = (
            "one of fixed frequencies, such as 'default', 'linear', 'yarn' or 'llama3' (those of the others depend on "
            "how far a call sees; load the model with another in config.rope_parameters)"
        )
        expect(kind is None or not ("dynamic" in kind or kind == "longrope"), "rope_type", expected, kind)
