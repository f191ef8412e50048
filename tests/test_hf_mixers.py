"""This project's kernels under transformers' own forward passes: the same logits, gradients and decoded tokens."""

import copy

import hf_models
import pytest
import torch
from hf_models import HYBRIDS, build, tokens
from transformers import AutoModelForCausalLM

from sleep_ops.adapters.hf import replace_mixers, replaced_mixers


def gradients(model, ids, **inputs):
    model.zero_grad()
    out = model(ids, labels=ids, **inputs)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", HYBRIDS)
def test_same_logits_and_gradients(family):
    model = build(family)
    ours, ids = replace_mixers(copy.deepcopy(model)), tokens(2, 21)
    logits, grads = gradients(model, ids)
    own_logits, own_grads = gradients(ours, ids)
    torch.testing.assert_close(own_logits, logits, rtol=1e-4, atol=1e-4)
    assert own_grads.keys() == grads.keys()
    for name in grads:
        scale = grads[name].abs().max().item()
        torch.testing.assert_close(own_grads[name], grads[name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


@pytest.mark.parametrize("family", HYBRIDS)
def test_same_logits_in_bfloat16(family):
    """As far from a float32 run as transformers' own bfloat16 is, within a factor."""
    model = build(family)
    ids = tokens(2, 30)
    with torch.no_grad():
        truth = model(ids).logits
        theirs = copy.deepcopy(model).bfloat16()(ids).logits.float()
        ours = replace_mixers(copy.deepcopy(model).bfloat16())(ids).logits.float()
    assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + 1e-3 * truth.norm()


@pytest.mark.parametrize("family", HYBRIDS)
def test_same_tokens_with_transformers_cache(family):
    model, ids = build(family), tokens(2, 9)
    ours = replace_mixers(copy.deepcopy(model))
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(ids, max_new_tokens=12, do_sample=False), expected)
    beams = dict(max_new_tokens=6, do_sample=False, num_beams=3)
    assert torch.equal(ours.generate(ids, **beams), model.generate(ids, **beams))


def test_a_text_continued_from_a_cache():
    """Several tokens after several: the convolution's tail and the fast weights both come from the cache."""
    model, ids = replace_mixers(build("qwen3_5")), tokens(2, 20)
    with torch.no_grad():
        whole = model(ids).logits
        cache, pieces = None, []
        for part in ids.split((2, 1, 7, 10), dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ("left", "right"))
def test_padding_changes_nothing(side):
    """On the right too, where transformers' own mixer lets padding into the state."""
    model, ids = replace_mixers(build("olmo_hybrid")), tokens(1, 12)
    padded = torch.zeros(1, 17, dtype=torch.long)
    real = slice(5, None) if side == "left" else slice(0, 12)
    mask = torch.zeros_like(padded)
    padded[:, real], mask[:, real] = ids, 1
    with torch.no_grad():
        out = model(padded, attention_mask=mask, use_cache=True)
        expected = model(ids, use_cache=True)
    torch.testing.assert_close(out.logits[:, real], expected.logits, rtol=1e-4, atol=1e-5)
    for layer, other in zip(out.past_key_values.layers, expected.past_key_values.layers, strict=True):
        if hasattr(layer, "recurrent_states"):
            torch.testing.assert_close(layer.recurrent_states[0], other.recurrent_states[0], rtol=1e-4, atol=1e-5)


def test_packed_sequences_do_not_meet():
    model = replace_mixers(build("qwen3_5"))
    borders = torch.tensor([0, 8, 20], dtype=torch.int32)
    mixer = model.model.layers[0].linear_attn
    x = torch.randn(1, 20, 64)
    with torch.no_grad():
        packed = mixer(x, cu_seq_lens_q=borders)
        apart = torch.cat([mixer(x[:, :8]), mixer(x[:, 8:])], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-6)


def test_weights_load_unchanged_into_the_swapped_classes(tmp_path):
    model, ids = build("qwen3_next"), tokens(1, 10)
    model.save_pretrained(tmp_path)
    with replaced_mixers():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "Sleep" in type(ours.model.layers[0].linear_attn).__name__
    assert "Sleep" not in type(plain.model.layers[0].linear_attn).__name__
    assert ours.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), model.state_dict().values(), strict=True))
    torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_impl_is_chosen_and_changed_by_a_second_call():
    model = replace_mixers(build("qwen3_5"), impl="torch")
    mixer = model.model.layers[0].linear_attn
    assert mixer.impl == "torch"
    assert replace_mixers(model, impl="reference").model.layers[0].linear_attn is mixer
    assert mixer.impl == "reference"
    with pytest.raises(ValueError, match="impl: expected"):
        replace_mixers(model, impl="fast")


def test_a_model_without_such_mixers_is_refused():
    with pytest.raises(ValueError, match="model: expected one with Qwen3_5GatedDeltaNet or .*, got 'LlamaForCausalLM'"):
        replace_mixers(build("llama"))


def test_a_cache_that_records_its_past_is_refused():
    model, ids = replace_mixers(build("qwen3_5")), tokens(1, 6)
    cache = model(ids, use_cache=True).past_key_values
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = True
    with pytest.raises(ValueError, match="past_key_values: expected a cache that is never rolled back"):
        model(ids, past_key_values=cache)


def test_the_families_of_these_tests_are_those_supported():
    from sleep_ops.adapters.hf import families

    tested = {hf_models.config(family).model_type for family in HYBRIDS}
    assert tested == set(families.HYBRIDS)
    assert {hf_models.config(family).model_type for family in hf_models.ATTENTION_ONLY} == set(families.ATTENTION_ONLY)
