"""This project's kernels under transformers' own forward passes: the same logits, gradients and decoded tokens."""

import copy

import hf_models
import pytest
import torch
from hf_models import HYBRIDS, VERSION, build, needs_cache, tokens
from transformers import AutoModelForCausalLM, DynamicCache

from sleep_ops.adapters.hf import replace_mixers, replaced_mixers
from sleep_ops.adapters.hf.states import cached_state, store_state
from sleep_ops.layers.mixer import GDNState


def gradients(model, ids, **inputs):
    model.zero_grad()
    out = model(ids, labels=ids, **inputs)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", HYBRIDS)
def test_same_logits_and_gradients(family):
    needs_cache(family)
    model = build(family)
    ours, ids = replace_mixers(copy.deepcopy(model)), tokens(2, 21)
    logits, grads = gradients(model, ids)
    own_logits, own_grads = gradients(ours, ids)
    torch.testing.assert_close(own_logits, logits, rtol=1e-4, atol=1e-4)
    assert own_grads.keys() == grads.keys()
    for name in grads:
        # transformers' own gradients of A_log err by up to 1.2e-7 in a head of strong decays (float32; torch 2.9).
        scale = grads[name].abs().max().item()
        torch.testing.assert_close(own_grads[name], grads[name], rtol=1e-3, atol=1e-4 * scale + 2e-7, msg=name)


@pytest.mark.parametrize("family", HYBRIDS)
def test_same_logits_in_bfloat16(family):
    """As far from a float32 run as transformers' own bfloat16 is, within a factor.

    Tokens go to all experts: a rounded router may choose others, and the difference is then not one of rounding.
    """
    model = build(family, **dict(num_experts_per_tok=4) if "moe" in family else {})
    ids = tokens(2, 30)
    with torch.no_grad():
        rounded = copy.deepcopy(model).bfloat16()
        truth, theirs = (m(ids, use_cache=False).logits.float() for m in (model, rounded))
        ours = replace_mixers(rounded)(ids, use_cache=False).logits.float()
    assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + 1e-3 * truth.norm()


@pytest.mark.parametrize("family", HYBRIDS)
def test_same_tokens_with_transformers_cache(family):
    needs_cache(family)
    model, ids = build(family), tokens(2, 9)
    ours = replace_mixers(copy.deepcopy(model))
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(ids, max_new_tokens=12, do_sample=False), expected)
    beams = dict(max_new_tokens=6, do_sample=False, num_beams=3)
    assert torch.equal(ours.generate(ids, **beams), model.generate(ids, **beams))


@pytest.mark.parametrize(
    "turns", ((1, 1, 1, 1), (0, 1, 0, 1), (1, 0, 1, 0)), ids=("ours", "theirs-first", "ours-first")
)
@pytest.mark.parametrize("family", ("qwen3_5", "olmo_hybrid", "qwen3_next"))
def test_a_text_continued_from_a_cache(family, turns):
    """Several tokens after several: the convolution's state and the fast weights both come from the cache.

    It can be handed over to transformers' own mixers and back.
    """
    needs_cache(family)
    model, ids = build(family), tokens(2, 20)
    models = model, replace_mixers(copy.deepcopy(model))
    with torch.no_grad():
        whole = model(ids).logits
        cache, pieces = None, []
        for turn, part in zip(turns, ids.split((2, 1, 7, 10), dim=1), strict=True):
            out = models[turn](part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ("left", "right"))
def test_padding_changes_nothing(side):
    """On the right too, where transformers' own mixer lets padding into the state."""
    needs_cache("olmo_hybrid")
    model, ids = replace_mixers(build("olmo_hybrid")), tokens(1, 12)
    padded = torch.zeros(1, 17, dtype=torch.long)
    real = slice(5, None) if side == "left" else slice(0, 12)
    mask = torch.zeros_like(padded)
    padded[:, real], mask[:, real] = ids, 1
    with torch.no_grad():
        out = model(padded, attention_mask=mask, use_cache=True)
        expected = model(ids, use_cache=True)
    torch.testing.assert_close(out.logits[:, real], expected.logits, rtol=1e-4, atol=1e-5)
    mixers = [layer.linear_attn for layer in model.model.layers if hasattr(layer, "linear_attn")]
    assert len(mixers) == 3
    for mixer in mixers:
        state, other = (cached_state(o.past_key_values, mixer) for o in (out, expected))
        torch.testing.assert_close(state.fast_weights, other.fast_weights, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state.conv_state, other.conv_state, rtol=1e-4, atol=1e-5)


class PlainLayer:
    """A layer of a cache before transformers 5.14: plain tensors, written in place."""

    conv_states = recurrent_states = None
    has_previous_state = False

    def update_conv_state(self, new, **_):
        if self.conv_states is None:
            self.conv_states = torch.zeros_like(new)
        kept = self.conv_states.shape[-1]
        self.conv_states.copy_(torch.cat([self.conv_states, new], dim=-1)[..., -kept:])
        self.has_previous_state = True

    def update_recurrent_state(self, new, **_):
        if self.recurrent_states is None:
            self.recurrent_states = torch.zeros_like(new)
        self.recurrent_states.copy_(new)


class PlainCache:
    def __init__(self):
        self.layers = [PlainLayer()]

    def has_previous_state(self, i):
        return self.layers[i].has_previous_state

    def update_conv_state(self, new, i, **options):
        self.layers[i].update_conv_state(new, **options)

    def update_recurrent_state(self, new, i):
        self.layers[i].update_recurrent_state(new)


class CacheOfThree:
    """That of olmo_hybrid before transformers 5.15."""

    def __init__(self):
        self.conv_states_q, self.conv_states_k, self.conv_states_v, self.recurrent_states = ([None] for _ in range(4))


@pytest.mark.parametrize("cache", (PlainCache, CacheOfThree, DynamicCache), ids=lambda c: c.__name__)
def test_states_are_kept_in_every_cache(cache):
    """Replaced whole, and safe from what happens to the cache afterwards."""
    model = replace_mixers(build("qwen3_5"))
    mixer = model.model.layers[0].linear_attn
    cache = cache(config=model.config) if cache is DynamicCache else cache()
    assert cached_state(cache, mixer) is None
    states = [GDNState(*map(torch.randn_like, mixer.init_state(2))) for _ in range(3)]
    read = []
    for state in states:
        store_state(cache, mixer, state)
        found = cached_state(cache, mixer)
        assert all(torch.equal(x, y) for x, y in zip(found, state, strict=True))
        read.append(found.fast_weights)
    assert torch.equal(read[0], states[0].fast_weights)


def test_three_convolutions_are_one():
    """olmo_hybrid has three before transformers 5.15, and its checkpoints their names."""
    mixer, x = replace_mixers(build("olmo_hybrid")).model.layers[0].linear_attn, torch.randn(2, 9, 64)
    names, sizes = ("q_conv1d", "k_conv1d", "v_conv1d"), (mixer.key_dim, mixer.key_dim, mixer.value_dim)
    with torch.no_grad():
        expected = mixer(x)
        if hasattr(mixer, "conv1d"):
            for name, part in zip(names, mixer.conv1d.weight.split(sizes), strict=True):
                setattr(mixer, name, torch.nn.Conv1d(len(part), len(part), part.shape[-1], groups=len(part)))
                getattr(mixer, name).weight.copy_(part)
            del mixer.conv1d
        else:
            weight = torch.cat([getattr(mixer, name).weight for name in names])
            mixer.conv1d = torch.nn.Conv1d(len(weight), len(weight), weight.shape[-1], groups=len(weight))
            mixer.conv1d.weight.copy_(weight)
            for name in names:
                delattr(mixer, name)
        assert torch.equal(mixer(x), expected)


def test_the_norm_of_another_library_has_another_epsilon():
    """fla's, which transformers before 5.15 puts in where it is installed."""
    mixer, x = replace_mixers(build("qwen3_5")).model.layers[0].linear_attn, torch.randn(2, 9, 64)
    with torch.no_grad():
        expected = mixer(x)
        mixer.norm.eps = mixer.norm.variance_epsilon
        del mixer.norm.variance_epsilon
        assert torch.equal(mixer(x), expected)


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
    if VERSION < (5, 14):
        pytest.skip("caches record their past from transformers 5.14 on")
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
