"""`sleepify`: a transformers causal language model whose forward passes and `generate` sleep."""

from dataclasses import replace
from functools import partial

from torch import nn
from transformers import PreTrainedModel

from sleep_ops.adapters.hf import inputs
from sleep_ops.adapters.hf.cache import ATTENTION
from sleep_ops.adapters.hf.families import HYBRIDS, check_family, check_fast_weights, check_place, check_positions
from sleep_ops.adapters.hf.forward import Bound, attach
from sleep_ops.adapters.hf.generation import generate, with_stop_strings
from sleep_ops.adapters.hf.mixers import replace_mixers
from sleep_ops.adapters.hf.sleeping import HFSleepingModel
from sleep_ops.checks import expect
from sleep_ops.model.config import SleepSettings


def sleepify(
    model: PreTrainedModel | nn.Module,
    *,
    window: int | None = None,
    passes: int | float | None = None,
    loop: tuple[int, int] | str | None = None,
    eviction: str | None = None,
    sleep_kind: str | None = None,
    sleep_on: str | None = None,
    conv_boundary: str | None = None,
    backprop_passes: int | None = None,
    windows_at_once: bool | None = None,
    activation_checkpointing: bool | None = None,
    recompute: str | None = None,
    attention_backend: str | None = None,
    impl: str | None = None,
) -> PreTrainedModel | nn.Module:
    """Makes a transformers causal language model read every text with sleep, in place; returns it.

    model: of the families in `families.py` (qwen3_5, qwen3_5_moe, olmo_hybrid, qwen3_next, or an
        attention-only model after `insert_fast_weights`), or a peft model of one.

    The other arguments are those of `SleepSettings`; loop counts the model's layers. What is not
    given is as the model's configuration remembers it from an earlier call (`config.sleep`, saved
    and loaded with the model), else `SleepSettings`' default; the first time, window must be given.

    Afterwards `model(...)` takes transformers' usual arguments and returns a `SleepCausalLMOutput`;
    the backbone called by itself, `model.model(...)`, reads with sleep too; `model.generate`
    decodes through a `SleepSession`; `gradient_checkpointing_enable` recomputes each (window,
    pass). Mixers run on this project's kernels, attention on its own; weights and their names stay.

    Raises ValueError, with the model unchanged, for a family that can't sleep, for settings that
    can't be, and for a window longer than the model has positions.
    """
    given = {k: v for k, v in locals().items() if k != "model" and v is not None}
    whole = model
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    check_family(model)
    check_fast_weights(model)
    check_place(model)
    check_positions(model)
    remembered = getattr(model.config, "sleep", None) or {}
    expect(isinstance(remembered, dict), "config.sleep", "settings of sleep", remembered)
    values = remembered | given
    expect(values.get("window") is not None, "window", "a number of tokens", None)
    chosen = SleepSettings.from_dict(values)
    chosen.resolve_loop(len(model.model.layers))
    longest = getattr(model.config, "max_position_embeddings", None)
    fits = longest is None or chosen.window <= longest
    expect(fits, "window", f"at most the model's {longest} positions", chosen.window)
    if isinstance(getattr(model, "sleep", None), HFSleepingModel) and "activation_checkpointing" not in given:
        kept = model.sleep.chosen.activation_checkpointing
        chosen = replace(chosen, activation_checkpointing=kept)
    for module in model.modules():  # transformers' own checkpointing would lose the states
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
            chosen = replace(chosen, activation_checkpointing=True)

    if model.config.model_type in HYBRIDS:
        replace_mixers(model, impl=chosen.impl)
    model.set_attn_implementation(ATTENTION)
    model.sleep = HFSleepingModel(model, chosen)
    model.config.sleep = chosen.to_dict()
    attach(model)
    model.generate = Bound(_generate, model)
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        setattr(model, f"{name}_enable", Bound(_checkpointing_enable, model))
        setattr(model, f"{name}_disable", Bound(_checkpointing_disable, model))
    return whole


def _generate(self, *args, custom_generate=generate, streamer=None, **kwargs):
    """transformers' `generate`, through a `SleepSession` unless told otherwise."""
    before = "what was read before is passed as session="
    inputs.check_cache(kwargs, kwargs.get("inputs_embeds"), before)
    helper = kwargs.get("assistant_model")
    expect(helper is None, "assistant_model", "None: decoding is not assisted", type(helper).__name__)
    prompt = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    told = prompt is not None or kwargs.get("session") is None  # transformers would begin a text
    expect(told, "input_ids", "tokens to read after the session's; session.generate() goes on without any", None)
    if callable(custom_generate):  # transformers itself gives such loops neither streamer nor tokenizer
        kwargs = with_stop_strings(kwargs, self.generation_config)
        custom_generate = custom_generate if streamer is None else partial(custom_generate, streamer=streamer)
    return type(self).generate(self, *args, custom_generate=custom_generate, streamer=streamer, **kwargs)


def _checkpointing_enable(self, how: object = None, every_n_layers: int = 1, offload: bool = False, **_) -> None:
    """Recompute each (window, pass) in the backward pass; `how` is not up to transformers here."""
    expect(every_n_layers == 1, "every_n_layers", "1: what is recomputed is a pass over a window", every_n_layers)
    expect(not offload, "offload", "False: what is stored stays on the device", offload)
    self.sleep.chosen = replace(self.sleep.chosen, activation_checkpointing=True)


def _checkpointing_disable(self, *args, **kwargs) -> None:
    self.sleep.chosen = replace(self.sleep.chosen, activation_checkpointing=False)
