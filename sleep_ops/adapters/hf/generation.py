"""`model.generate` for models that sleep: what transformers knows of decoding, over a session."""

import copy

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from sleep_ops.adapters.hf import inputs
from sleep_ops.checks import expect
from sleep_ops.model.session import SleepSession

# Arguments of the forward pass that say how one call reads a text: transformers hands them on to decoding loops.
_OF_ONE_CALL = (
    "labels", "shift_labels", "loss_mask", "num_items_in_batch", "cu_seqlens", "cu_seq_lens_q", "seq_idx",
    "windows_by", "group", "predict", "state",
)  # fmt: skip


def with_stop_strings(options: dict, own: GenerationConfig) -> dict:
    """`generate`'s options, with stop_strings as a stopping criterion; `own` is the model's configuration.

    transformers gives custom decoding loops no tokenizer.
    """
    config, tokenizer = options.get("generation_config"), options.get("tokenizer")
    strings = options.get("stop_strings") or getattr(config, "stop_strings", None) or own.stop_strings
    if strings is None or tokenizer is None:
        return options
    criteria = [*(options.get("stopping_criteria") or ()), StopStringCriteria(tokenizer, strings)]
    options = {k: v for k, v in options.items() if k not in ("stop_strings", "tokenizer")}
    if config is not None:
        options["generation_config"] = config = copy.copy(config)
        config.stop_strings = None
    if own.stop_strings is not None:  # transformers would put them in place of those taken out
        options["stop_strings"] = None
    return options | {"stopping_criteria": StoppingCriteriaList(criteria)}


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    *,
    passes: int | float | None = None,
    session: SleepSession | None = None,
    **model_kwargs,
) -> Tensor | GenerateDecoderOnlyOutput:
    """The decoding loop of `model.generate` once `sleepify` ran (its `custom_generate`).

    passes: N, instead of the model's own.
    session: a `SleepSession` to go on from; input_ids then come after what it has read, and in the
        end it has read everything returned.

    Greedy or sampled; the memory does not grow with the text. Raises ValueError for other
    generation modes, for what a session doesn't give, for position_ids other than 0, 1, 2, ... over
    the real tokens, and for another model's session.
    """
    mode = generation_config.get_generation_mode()
    possible = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    expect(mode in possible, "generation mode", "greedy or sampled (num_beams=1)", mode.value)
    for name in ("output_attentions", "output_hidden_states"):
        expect(not getattr(generation_config, name), name, "False: a session keeps neither", True)
    guidance = getattr(generation_config, "guidance_scale", None)
    expect(guidance in (None, 1), "guidance_scale", "None: the text is read once, with the prompt", guidance)
    for name in _OF_ONE_CALL:
        got = model_kwargs.get(name)
        instead = "what was read before is passed as session=" if name == "state" else "it is for model(...) alone"
        expect(got is None, name, f"None: {instead}", type(got).__name__)
    keep = session is not None
    expect(not keep or passes is None, "passes", "None with a session, which has its own", passes)
    if keep:
        expect(isinstance(session, SleepSession), "session", "a SleepSession", type(session).__name__)
        own = getattr(session.model, "model", None) is model
        expect(own, "session", "one over this very model", f"one over another {type(session.model).__name__}")
    mask = model_kwargs.get("attention_mask")
    inputs.check_plain(input_ids, mask, model_kwargs.get("position_ids"))  # transformers' own, where none are given
    session = session or SleepSession(model, passes)
    logits = session.begin(input_ids, mask)
    pad = generation_config._pad_token_tensor
    alive = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    all_scores, all_logits = [], []
    while bool(alive.any()):
        logits = logits.float()
        scores = logits_processor(input_ids, logits)
        if generation_config.output_scores:
            all_scores.append(scores)
        if generation_config.output_logits:
            all_logits.append(logits)
        if generation_config.do_sample:
            token = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
        else:
            token = scores.argmax(-1)
        reading = alive | (pad is None)  # without a token to fill them, rows that have stopped go on with the others
        if not bool(reading.all()):
            token = torch.where(reading, token, pad)
        input_ids = torch.cat([input_ids, token[:, None]], dim=1)
        if streamer is not None:
            streamer.put(token.cpu())
        alive = alive & ~stopping_criteria(input_ids, scores)
        if keep or bool(alive.any()):
            logits = session.read(token[:, None], None if bool(reading.all()) else reading[:, None])
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids, scores=tuple(all_scores) or None, logits=tuple(all_logits) or None
    )
