"""Sessions over transformers models, and `model.generate` through them."""

import copy

import pytest
import torch
from hf_models import build, tokens
from test_adapter_loading import word_tokenizer
from transformers import DynamicCache, GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from sleep_ops import SleepSession
from sleep_ops.adapters.hf import generate, insert_fast_weights, sleepify
from sleep_ops.layers.attention import AttentionState
from sleep_ops.tokenizer import load_tokenizer

CLOSE = dict(rtol=2e-4, atol=2e-5)
GREEDY = dict(do_sample=False, max_new_tokens=25)


def sleeping(family="qwen3_5", **settings):
    return sleepify(build(family), **dict(window=8, passes=2) | settings)


def nbytes(session):
    tensors = [x for part in (session.state.blocks, session.state.start) for s in part if s is not None for x in s]
    hidden = session.state.hidden
    return sum(x.nbytes for x in tensors) + (0 if hidden is None else hidden.nbytes)


@pytest.mark.parametrize("eviction", ("hard", "sliding"))
@pytest.mark.parametrize("family", ("qwen3_5", "olmo_hybrid", "qwen3_next"))
def test_token_by_token_by_chunks_and_at_once_agree(family, eviction):
    """With a partial loop, whose later blocks run again once."""
    model, ids = sleeping(family, passes=3, loop=(1, 2), eviction=eviction), tokens(2, 29)
    with torch.no_grad():
        expected = model(ids).logits
    chunked, stepped = SleepSession(model), SleepSession(model)
    chunks = [chunked.read(part, all_logits=True) for part in ids.split((3, 11, 1, 14), dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, **CLOSE)
    steps = torch.stack([stepped.step(ids[:, t]) for t in range(29)], dim=1)
    torch.testing.assert_close(steps, expected, **CLOSE)
    for a, b in zip(chunked.state.blocks, stepped.state.blocks, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, **CLOSE)


def test_memory_stays_constant_over_a_text_of_many_windows():
    model = sleeping(passes=2, eviction="sliding")
    session, sizes = SleepSession(model), set()
    for part in tokens(1, 8 * 60).split(16, dim=1):
        session.read(part)
        sizes.add(nbytes(session))
    assert session.position == (480,)
    assert len(sizes) <= 2  # the first window keeps fewer keys than the others
    cached = [s.keys.shape[1] for s in session.state.blocks if isinstance(s, AttentionState)]
    assert cached == [7]


def test_positions_beyond_the_models_own_are_read():
    """A text longer than max_position_embeddings: positions run on."""
    model = sleeping(passes=1)
    session = SleepSession(model)
    logits = session.read(tokens(1, 600))
    assert session.position == (600,) and bool(logits.isfinite().all())


def test_generate_is_the_session_token_for_token():
    model, ids = sleeping(passes=3), tokens(2, 19)
    out = model.generate(ids, **GREEDY, eos_token_id=None)
    expected = SleepSession(model).generate(ids, 25)
    assert torch.equal(out, torch.cat([ids, expected], dim=1))
    assert torch.equal(model.generate(ids, custom_generate=generate, **GREEDY, eos_token_id=None), out)


def test_generate_rereads_the_text_at_every_token_to_the_same_end():
    """Each token generated is the likeliest of the model's forward pass over all before it."""
    model, ids = sleeping("olmo_hybrid", passes=2), tokens(1, 13)
    out = model.generate(ids, **GREEDY, eos_token_id=None)
    with torch.no_grad():
        predicted = model(out).logits.argmax(-1)
    assert torch.equal(out[:, 13:], predicted[:, 12:-1])


def test_left_padded_prompts_generate_what_they_do_alone():
    model = sleeping(passes=2)
    rows = [tokens(1, 17, seed=5), tokens(1, 11, seed=6)]
    padded, mask = torch.zeros(2, 17, dtype=torch.long), torch.zeros(2, 17, dtype=torch.long)
    for b, row in enumerate(rows):
        padded[b, -row.shape[1] :], mask[b, -row.shape[1] :] = row[0], 1
    out = model.generate(padded, attention_mask=mask, **GREEDY, eos_token_id=None)
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    options = dict(position_ids=counted, **GREEDY, eos_token_id=None)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options), out)
    assert torch.equal(padded != 0, mask.bool())  # so transformers can tell the padding by its token
    assert torch.equal(model.generate(padded, pad_token_id=0, **options), out)
    for b, row in enumerate(rows):
        assert torch.equal(out[b, 17:], model.generate(row, **GREEDY, eos_token_id=None)[0, row.shape[1] :])


def test_a_finished_row_is_filled_and_the_others_go_on():
    model, ids = sleeping(), tokens(3, 9)
    free = model.generate(ids, **GREEDY, eos_token_id=None)
    stop = free[0, 9 + 4].item()
    out = model.generate(ids, **GREEDY, eos_token_id=stop, pad_token_id=0)
    for b in range(3):
        row = free[b, 9:].tolist()
        end = row.index(stop) + 1 if stop in row else len(row)
        got = out[b, 9:].tolist()
        assert got[:end] == row[:end] and set(got[end:]) <= {0}


def test_sampling_is_seeded_and_uses_transformers_processors():
    model, ids = sleeping(), tokens(2, 9)
    options = dict(do_sample=True, top_k=5, temperature=0.7, max_new_tokens=15)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(model.generate(ids, **options))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    forbidden = model.generate(ids, **GREEDY)[0, 9].item()
    assert forbidden not in model.generate(ids, **GREEDY, suppress_tokens=[forbidden])[:, 9:]


def test_scores_and_logits_are_returned_when_asked():
    model, ids = sleeping(), tokens(2, 9)
    out = model.generate(
        ids, do_sample=False, max_new_tokens=3, eos_token_id=None,
        return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    assert out.sequences.shape == (2, 12) and len(out.scores) == len(out.logits) == 3
    assert torch.equal(out.logits[1].argmax(-1), out.sequences[:, 10])


def test_streaming_gives_every_token_as_it_comes():
    class Collect(BaseStreamer):
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    model, ids, streamer = sleeping(), tokens(1, 9), Collect()
    out = model.generate(ids, **GREEDY, eos_token_id=None, streamer=streamer)
    assert streamer.ended and sum(streamer.pieces, []) == out[0].tolist()


@pytest.mark.parametrize("how", ("keyword", "configuration", "model"))
def test_stop_strings(how, tmp_path):
    model, ids = sleeping(), tokens(1, 9)
    word_tokenizer(tmp_path, ["abcdef", *(f"w{i}" for i in range(3, 128))])  # the first: StopStringCriteria asks it
    tokenizer = load_tokenizer(tmp_path)
    out = model.generate(ids, **GREEDY, eos_token_id=None)
    stop = dict(stop_strings=[tokenizer.decode(out[0, 13])])
    options = GREEDY | stop if how == "keyword" else dict(generation_config=GenerationConfig(**GREEDY | stop))
    if how == "model":
        model.generation_config.stop_strings, options = stop["stop_strings"], GREEDY
    stopped = model.generate(ids, **options, eos_token_id=None, tokenizer=tokenizer)
    first = 9 + out[0, 9:].tolist().index(out[0, 13])
    assert torch.equal(stopped, out[:, : first + 1])


def test_going_on_from_a_session_that_has_read_a_document():
    model, document, question = sleeping(passes=2), tokens(1, 41, seed=7), tokens(1, 6, seed=8)
    session = SleepSession(model)
    session.read(document)
    out = model.generate(question, session=session, **GREEDY, eos_token_id=None)
    whole = model.generate(torch.cat([document, question], dim=1), **GREEDY, eos_token_id=None)
    assert torch.equal(out, whole[:, 41:])
    assert session.position == (whole.shape[1],)


def test_the_number_of_passes_of_one_call():
    model, ids = sleeping(passes=1), tokens(1, 20)
    assert torch.equal(
        model.generate(ids, passes=3, **GREEDY), sleepify(copy.deepcopy(model), passes=3).generate(ids, **GREEDY)
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layers=3), "layers: expected distinct layer numbers from 0 to 3, got 3"),
        (dict(layers=[1], head_dim=0), "head_dim: expected"),
        (dict(layers=[1], num_heads=0), "num_heads: expected"),
    ],
    ids=("layers", "head-dim", "heads"),
)
def test_blocks_that_cannot_be_inserted(options, message):
    with pytest.raises(ValueError, match=message):
        insert_fast_weights(build("llama"), **options)


def test_inserted_fast_weights_generate():
    model = insert_fast_weights(build("llama"), [0, 2], num_heads=2, head_dim=16)
    for block in model.model.fast_weights.values():
        torch.nn.init.normal_(block.mixer.o_proj.weight, std=0.1)
    sleepify(model, window=8, passes=2)
    ids = tokens(1, 21)
    out = model.generate(ids, **GREEDY, eos_token_id=None)
    with torch.no_grad():
        predicted = model(out).logits.argmax(-1)
    assert torch.equal(out[:, 21:], predicted[:, 20:-1])
    with pytest.raises(ValueError, match="^assistant_model: expected None"):
        model.generate(ids, assistant_model=build("llama"), **GREEDY)


def test_saved_sessions_go_on_and_know_their_model(tmp_path):
    model, ids = sleeping(passes=2), tokens(1, 21)
    session = SleepSession(model)
    session.read(ids)
    session.save(tmp_path / "session.safetensors")
    loaded = SleepSession.load(tmp_path / "session.safetensors", model)
    assert torch.equal(loaded.generate(max_new_tokens=10), session.generate(max_new_tokens=10))
    with pytest.raises(ValueError, match="model_type 'qwen3_5_text' .model: 'qwen3_next'"):
        SleepSession.load(tmp_path / "session.safetensors", sleeping("qwen3_next"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(linear_num_value_heads=2), r"fast_weights \[1, 2, 16, 16\] in block 0, got \[1, 4, 16, 16\]"),
        (dict(linear_conv_kernel_dim=3), r"conv_state \[1, 2, 128\] in block 0, got \[1, 3, 128\]"),
        (dict(num_key_value_heads=1), r"keys \[1, 16\] in block 3, got \[2, 16\]"),
        (dict(layer_types=["full_attention"] + 3 * ["linear_attention"]), "keys .* in block 0, got None"),
    ],
    ids=("heads", "convolution", "keys", "layers"),
)
def test_a_session_of_other_shapes_is_refused(changes, message, tmp_path):
    """Of a model that agrees in all that is compared of its configuration."""
    session = SleepSession(sleeping())
    session.read(tokens(1, 21))
    session.sleep()
    session.save(tmp_path / "memory", memory_only=True)
    other = sleepify(build("qwen3_5", **changes), window=8, passes=2)
    with pytest.raises(ValueError, match=f"^path: expected a session of this model, with {message}"):
        SleepSession.load(tmp_path / "memory", other)


REFUSED = {
    "beams": (dict(num_beams=2), "generation mode: expected greedy or sampled"),
    "cache": (dict(past_key_values=DynamicCache()), "past_key_values: expected None: .* passed as session="),
    "embeddings": (dict(inputs_embeds=torch.zeros(1, 4, 64)), "inputs_embeds: expected None"),
    "attentions": (dict(output_attentions=True, return_dict_in_generate=True), "output_attentions: expected False"),
    "hidden": (dict(output_hidden_states=True, return_dict_in_generate=True), "output_hidden_states: expected False"),
    "guidance": (dict(guidance_scale=1.5), "guidance_scale: expected None"),
    "labels": (dict(labels=tokens(1, 9)), r"labels: expected None: it is for model\(...\) alone, got 'Tensor'"),
    "windows": (dict(windows_by="positions"), "windows_by: expected None"),
    "positions": (dict(position_ids=torch.arange(3, 12)[None]), "position_ids: expected None, or 0, 1, 2, ..."),
    "packed": (dict(position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])), "position_ids: expected .*one sequence"),
    "no-session": (dict(session="night"), "session: expected a SleepSession, got 'str'"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_generated_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sleeping().generate(tokens(1, 9), max_new_tokens=3, **options)


@pytest.mark.parametrize("name", ("state", "past_key_values"))
def test_a_state_of_the_model_is_not_read_on_from(name):
    model, ids = sleeping(), tokens(1, 9)
    state = model(ids, return_state=True).state
    with pytest.raises(ValueError, match=f"^{name}: expected None: what was read before is passed as session="):
        model.generate(ids, max_new_tokens=3, **{name: state})


def test_every_row_needs_a_token_to_generate_from():
    model, ids = sleeping(), tokens(2, 9)
    mask = torch.tensor([[1], [0]]).expand(2, 9)
    session = SleepSession(model)
    for options in (dict(), dict(session=session)):
        with pytest.raises(ValueError, match=r"^input_ids: expected a prompt for every row, got none for rows \[1\]"):
            model.generate(ids, attention_mask=mask, **options, **GREEDY)
    assert session.state is None
    session.read(ids)
    assert model.generate(ids, attention_mask=mask, session=session, max_new_tokens=2).shape == (2, 11)


def test_rows_that_stop_go_on_where_no_token_fills_them():
    """As in transformers."""

    class FirstRow(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([True, False])

    model, ids = sleeping(), tokens(2, 9)
    model.generation_config = GenerationConfig()
    out = model.generate(ids, **GREEDY)
    session = SleepSession(model)
    assert torch.equal(model.generate(ids, stopping_criteria=[FirstRow()], session=session, **GREEDY), out)
    assert session.position == (34, 34)


def test_sessions_that_do_not_fit_the_call_are_refused():
    model, ids = sleeping(), tokens(1, 9)
    with pytest.raises(ValueError, match="input_ids: expected tokens to read after the session's"):
        model.generate(session=SleepSession(model), max_new_tokens=3)
    with pytest.raises(ValueError, match="position_ids: expected None, or 0, 1, 2"):
        model.generate(ids, session=SleepSession(model), position_ids=torch.arange(9, 18)[None], max_new_tokens=3)
    with pytest.raises(ValueError, match="passes: expected None with a session"):
        model.generate(ids, session=SleepSession(model), passes=2, max_new_tokens=3)
    with pytest.raises(ValueError, match="session: expected one over this very model"):
        model.generate(ids, session=SleepSession(sleeping()), max_new_tokens=3)


def test_a_session_needs_a_model_that_sleeps():
    with pytest.raises(ValueError, match="model: expected one that sleeps .see sleepify., got 'Qwen3_5ForCausalLM'"):
        SleepSession(build("qwen3_5"))
