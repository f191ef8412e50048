"""`sleepify`: the forward pass of a transformers causal language model, replaced by one that sleeps."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from sleep_ops.adapters.hf import inputs
from sleep_ops.adapters.hf.cache import ATTENTION
from sleep_ops.adapters.hf.families import HYBRIDS, check_family, check_fast_weights, check_place
from sleep_ops.adapters.hf.generation import generate, with_stop_strings
from sleep_ops.adapters.hf.mixers import replace_mixers
from sleep_ops.adapters.hf.reader import HFReader
from sleep_ops.config import SleepSettings, expect
from sleep_ops.sleep import SleepState


@dataclass
class SleepCausalLMOutput(ModelOutput):
    """What a sleepified model returns; what is None is left out.

    loss: mean over the loss tokens, or their sum over `num_items_in_batch`. logits: `[B, T', vocab_size]`, from first
    passes only (causal): of every position, or of the windows with loss alone, see `all_logits`; then positions,
    int64 `[T']`, tells the columns. state: what a continuation passes as `state`, where asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    positions: Tensor | None = None
    state: SleepState | None = None


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
    activation_checkpointing: bool | None = None,
    attention_backend: str | None = None,
    impl: str | None = None,
) -> PreTrainedModel | nn.Module:
    """Makes a transformers causal language model read every text with sleep, in place; returns it.

    model: of the families in `families.py` (qwen3_5, qwen3_5_moe, olmo_hybrid, qwen3_next, or an attention-only model
    after `insert_fast_weights`), or a peft model of one. The other arguments are those of `SleepSettings`; loop counts
    the model's layers. What is not given is as the model's configuration remembers it from an earlier call
    (`config.sleep`, saved and loaded with the model), else `SleepSettings`' default; the first time, window must be
    given.

    Afterwards `model(...)` takes transformers' usual arguments and returns a `SleepCausalLMOutput`; `model.generate`
    decodes through a `SleepSession`; `gradient_checkpointing_enable` recomputes each (window, pass). Mixers run on this
    project's kernels, attention on its own; weights and their names stay.

    Raises ValueError, with the model unchanged, for a family that can't sleep, for settings that can't be, and for a
    window longer than the model has positions.
    """
    given = {k: v for k, v in locals().items() if k != "model" and v is not None}
    whole = model
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    check_family(model)
    check_fast_weights(model)
    check_place(model)
    values = (getattr(model.config, "sleep", None) or {}) | given
    expect("window" in values, "window", "a number of tokens", None)
    chosen = SleepSettings.from_dict(values)
    chosen.resolve_loop(len(model.model.layers))
    longest = getattr(model.config, "max_position_embeddings", None)
    fits = longest is None or chosen.window <= longest
    expect(fits, "window", f"at most the model's {longest} positions", chosen.window)
    if isinstance(getattr(model, "sleep", None), HFReader) and "activation_checkpointing" not in given:
        kept = model.sleep.chosen.activation_checkpointing
        chosen = replace(chosen, activation_checkpointing=kept)
    for module in model.modules():  # transformers' own checkpointing would lose the states
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
            chosen = replace(chosen, activation_checkpointing=True)

    if model.config.model_type in HYBRIDS:
        replace_mixers(model, impl=chosen.impl)
    model.set_attn_implementation(ATTENTION)
    model.sleep = HFReader(model, chosen)
    model.config.sleep = chosen.to_dict()
    # Partial functions, since a bound method of another class can't be pickled.
    model.forward = partial(_forward, model)
    model.generate = partial(_generate, model)
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        setattr(model, f"{name}_enable", partial(_checkpointing_enable, model))
        setattr(model, f"{name}_disable", partial(_checkpointing_disable, model))
    return whole


def _forward(
    self,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values=None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    *,
    shift_labels: Tensor | None = None,
    loss_mask: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    passes: int | float | None = None,
    state: SleepState | None = None,
    windows_by: str = "tokens",
    all_logits: bool | None = None,
    return_state: bool = False,
    return_dict: bool | None = None,
    **options,
) -> SleepCausalLMOutput | tuple:
    """Reads the text window by window, predicts awake, sleeps on full windows, evicts (Algorithm 1).

    input_ids, attention_mask (padding anywhere), labels (shifted here), shift_labels (already shifted),
    num_items_in_batch, logits_to_keep: as in transformers. position_ids: None, plain, or those of packed sequences
    (B = 1); cu_seqlens or cu_seq_lens_q: their borders. loss_mask, passes, state, windows_by, return_state: as in
    `SleepHybridModel.forward`. all_logits: of every window, not only of those with loss (default: without labels, and
    in evaluation). Raises ValueError naming the argument.
    """
    inputs.check_unused(
        options,
        past_key_values=(past_key_values, "None: a model that sleeps keeps its own state"),
        inputs_embeds=(inputs_embeds, "None: windows are cut from input_ids"),
    )
    got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
    expect(isinstance(input_ids, Tensor) and input_ids.dim() == 2, "input_ids", "a tensor [B, T]", got)
    borders = cu_seqlens if cu_seqlens is not None else cu_seq_lens_q
    if borders is None:
        borders = inputs.sequence_borders(position_ids, attention_mask, input_ids, state)
    targets = inputs.shifted(labels, shift_labels)
    # One of several batches that count together may have no label; its gradients are zeros, which other ranks wait for.
    nothing = targets is not None and num_items_in_batch is not None and not bool((targets != -100).any())
    if nothing:
        targets = loss_mask = None
    if all_logits is None:
        all_logits = targets is None or not self.training or isinstance(logits_to_keep, Tensor) or logits_to_keep > 0
    reading = self.sleep.plan(
        input_ids,
        targets,
        loss_mask,
        attention_mask,
        passes,
        state,
        cu_seqlens=borders,
        windows_by=windows_by,
        all_logits=all_logits,
        return_state=return_state,
    )
    read = self.sleep.run(reading)
    loss = read.loss
    if nothing:
        loss = torch.zeros_like(read.logits, dtype=torch.float32).mul(read.logits).sum()
    elif loss is not None and num_items_in_batch is not None:
        loss = loss * reading.loss_tokens / num_items_in_batch
    logits, positions = read.logits, read.positions
    if all_logits:
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
        logits, positions = logits[:, kept], None
    output = SleepCausalLMOutput(loss=loss, logits=logits, positions=positions, state=read.state)
    return output.to_tuple() if return_dict is False else output


def _generate(self, *args, custom_generate=generate, streamer=None, **kwargs):
    """transformers' `generate`, decoding through a `SleepSession` unless told otherwise; see `generation.generate`."""
    inputs.check_unused(
        {},
        past_key_values=(kwargs.get("past_key_values"), "None: what was read before is passed as session="),
        inputs_embeds=(kwargs.get("inputs_embeds"), "None: windows are cut from input_ids"),
    )
    if callable(custom_generate):  # transformers itself gives such loops neither streamer nor tokenizer
        kwargs = with_stop_strings(kwargs)
        custom_generate = custom_generate if streamer is None else partial(custom_generate, streamer=streamer)
    return type(self).generate(self, *args, custom_generate=custom_generate, streamer=streamer, **kwargs)


def _checkpointing_enable(self, how: object = None, every_n_layers: int = 1, offload: bool = False, **_) -> None:
    """Recompute each (window, pass) in the backward pass; `how` PyTorch does that is not up to transformers here."""
    expect(every_n_layers == 1, "every_n_layers", "1: what is recomputed is a pass over a window", every_n_layers)
    expect(not offload, "offload", "False: what is stored stays on the device", offload)
    self.sleep.chosen = replace(self.sleep.chosen, activation_checkpointing=True)


def _checkpointing_disable(self, *args, **kwargs) -> None:
    self.sleep.chosen = replace(self.sleep.chosen, activation_checkpointing=False)
