"""The forward passes of a transformers model that sleeps: its own, and that of its backbone alone.

Both read through the model's `HFSleepingModel`, so no door leads past sleep: whoever calls the
backbone and the head himself, as fused and chunked losses do, or puts another forward pass in place
of the model's, gets hidden states of the sleeping model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from sleep_ops.adapters.hf import inputs
from sleep_ops.checks import check_count, expect
from sleep_ops.model.sleeping import Call
from sleep_ops.model.state import SleepState


@dataclass
class SleepCausalLMOutput(ModelOutput):
    """What a sleepified model returns; what is None is left out.

    loss: mean over the loss tokens, or their sum over `num_items_in_batch`.
    logits: `[B, T', vocab_size]`, from first passes only (causal): of every position, or of the
        windows with loss alone, see `all_logits`; None without return_logits.
    positions: int64 `[T']`, the columns of the latter; None for every position or none.
    state: what a continuation passes as `state`, where asked for.

    The others are always None: what general code of transformers looks for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    positions: Tensor | None = None
    state: SleepState | None = None
    cache: None = None
    past_key_values: None = None
    hidden_states: None = None
    attentions: None = None
    aux_loss: None = None
    router_logits: None = None


@dataclass
class SleepBackboneOutput(ModelOutput):
    """What the backbone of a sleepified model returns; what is None is left out.

    last_hidden_state: `[B, T, hidden_size]`, normed, from first passes only (causal); zero at
        padding.
    state: what a continuation passes as `state`, where asked for.

    The others are always None.
    """

    last_hidden_state: Tensor | None = None
    state: SleepState | None = None
    cache: None = None
    past_key_values: None = None
    hidden_states: None = None
    attentions: None = None
    router_logits: None = None


class Bound(partial):
    """A function with its model, in place of a method, which could not be pickled."""

    @property
    def __func__(self):
        """As a bound method's, which accelerate wraps and unwraps."""
        return self.func


def attach(model: PreTrainedModel) -> None:
    """Puts the forward passes below in place of the model's and its backbone's."""
    model.forward = Bound(forward, model)
    model.model.forward = Bound(backbone_forward, model)


def forward(
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
    seq_idx: Tensor | None = None,
    passes: int | float | None = None,
    state: SleepState | None = None,
    windows_by: str = "tokens",
    all_logits: bool | None = None,
    return_logits: bool = True,
    return_state: bool = False,
    group: ProcessGroup | None = None,
    predict: Callable[[Tensor], Tensor] | None = None,
    return_dict: bool | None = None,
    **options,
) -> SleepCausalLMOutput | tuple:
    """Algorithm 1: reads window by window, predicts awake, sleeps on full windows, evicts.

    input_ids, num_items_in_batch, logits_to_keep: as in transformers.
    attention_mask: as in transformers; padding may stand anywhere.
    labels: as in transformers, shifted here.
    shift_labels: the same, already shifted.
    position_ids: None, plain, or those of packed sequences (B = 1).
    cu_seqlens or cu_seq_lens_q: borders of packed sequences.
    seq_idx: their numbers.
    loss_mask, passes, state, windows_by, return_logits, return_state, group, predict: as in
        `SleepHybridModel.forward`.
    all_logits: of every window, not only of those with loss (default: without labels, and in
        evaluation).

    Raises ValueError naming the argument.
    """
    inputs.check_unused(self.config, options, past_key_values, inputs_embeds)
    borders, attention_mask = inputs.sequence_borders(
        input_ids, attention_mask, position_ids, state, cu_seqlens if cu_seqlens is not None else cu_seq_lens_q, seq_idx
    )
    targets = inputs.shifted(labels, shift_labels, input_ids)
    if not isinstance(logits_to_keep, Tensor):
        check_count("logits_to_keep", logits_to_keep, 0)
    chosen = isinstance(logits_to_keep, Tensor) or logits_to_keep > 0
    expect(return_logits or not chosen, "logits_to_keep", "0 with return_logits=False", logits_to_keep)
    if all_logits is None:
        all_logits = chosen or (return_logits and (targets is None or not self.training))
    call = Call(
        input_ids, targets, loss_mask, attention_mask, passes, state, borders, windows_by,
        all_logits, return_logits, return_state, group, predict,
    )  # fmt: skip
    plan = self.sleep.plan(call, may_lack_loss=num_items_in_batch is not None)
    nothing = targets is not None and plan.loss_tokens == 0 and group is None
    if nothing:
        all_logits = return_logits
        plan = plan._replace(labels=None, counted=None, all_logits=True, return_logits=True)
    # Without return_logits one number takes the place of each token's, and has their gradients.
    made = predict or self.sleep.predict
    short = made if return_logits else lambda h: made(h).mean(-1, keepdim=True)
    read = self.sleep.run(plan, short if nothing else made)
    loss = read.loss
    if nothing:
        # One of several batches that count together may have no label; its gradients are zeros, which other ranks wait
        # for. Evaluated alone it has no mean, and is not to be counted as 0.
        loss = torch.zeros_like(read.logits, dtype=torch.float32).mul(read.logits).sum()
        loss = loss if self.training else loss / num_items_in_batch
    elif loss is not None and num_items_in_batch is not None:
        loss = loss * plan.loss_tokens / num_items_in_batch
    logits, positions = (read.logits, read.positions) if return_logits else (None, None)
    if all_logits and return_logits:
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
        logits, positions = logits[:, kept], None
    output = SleepCausalLMOutput(loss=loss, logits=logits, positions=positions, state=read.state)
    return output.to_tuple() if return_dict is False else output


def backbone_forward(
    self,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values=None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    *,
    shift_labels: Tensor | None = None,
    loss_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    passes: int | float | None = None,
    state: SleepState | None = None,
    windows_by: str = "tokens",
    return_state: bool = False,
    return_dict: bool | None = None,
    **options,
) -> SleepBackboneOutput | tuple:
    """The last hidden states of the text, as the model (self) reads it; arguments as there.

    The head makes of them the model's logits. What is meant for head and loss (`inputs.FOR_LOSS`)
    changes nothing, as in transformers, whose forward passes hand it on. shift_labels or loss_mask
    say which windows have loss; one of them must be given with `sleep_on="unlabelled"`.
    """
    options = {name: value for name, value in options.items() if name not in inputs.FOR_LOSS}
    inputs.check_unused(self.config, options, past_key_values, inputs_embeds)
    borders, attention_mask = inputs.sequence_borders(
        input_ids, attention_mask, position_ids, state, cu_seqlens if cu_seqlens is not None else cu_seq_lens_q, seq_idx
    )
    if loss_mask is None and shift_labels is not None:
        loss_mask = shift_labels != -100
    told = loss_mask is not None or self.sleep.settings.sleep_on == "every"
    where = "a mask of the loss tokens (zeros for none) where the backbone is called by itself and sleep_on is"
    expect(told, "loss_mask", f"{where} 'unlabelled'; or call the model, with labels", None)
    call = Call(
        input_ids, None, loss_mask, attention_mask, passes, state, borders, windows_by, True, return_state=return_state
    )
    read = self.sleep.run(self.sleep.plan(call), predict=self.model.norm)
    output = SleepBackboneOutput(last_hidden_state=read.logits, state=read.state)
    return output.to_tuple() if return_dict is False else output
