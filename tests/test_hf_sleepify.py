"""transformers models that sleep, against the unmodified models driven by hand."""

import copy
import json
import subprocess
import sys
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import slow_unless
from hf_models import ATTENTION_ONLY, HYBRIDS, VERSION, VOCAB, build, config, needs_cache, rotations, tokens
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, DynamicCache

from sleep_ops import SleepSession
from sleep_ops.adapters.hf import from_pretrained, insert_fast_weights, sleepify

CLOSE = dict(rtol=2e-4, atol=2e-5)


class Store(dict):
    """Tensors by layer, None where there is none yet."""

    def __missing__(self, i):
        return None


CONVOLUTIONS = ("conv", "conv_states_q", "conv_states_k", "conv_states_v")  # the last three: olmo_hybrid before 5.15


class HandCache:
    """What transformers' layers ask of a cache, kept in plain dictionaries of tensors that are never changed."""

    def __init__(self, linear):
        """linear: the numbers of the linear layers."""
        self.linear = linear
        for name in (*CONVOLUTIONS, "recurrent_states", "keys", "values"):
            setattr(self, name, Store())

    def get_conv_state(self, i, state_idx=0):
        return self.conv[i]

    def get_recurrent_state(self, i, state_idx=0):
        return self.recurrent_states[i]

    def is_recording_past(self, i):
        return True  # keeps single tokens off the path that changes the convolution state in place

    def has_previous_state(self, i=None, **_):
        return (self.linear[-1] if i is None else i) in self.recurrent_states

    @property
    def layers(self):
        """What transformers before 5.20 looks into, where later ones call the methods above."""
        states = [(self.conv[i], self.recurrent_states[i]) for i in range(4)]
        if VERSION >= (5, 14):
            states = [({0: c}, {0: r}) for c, r in states]
        return [SimpleNamespace(record_past=True, conv_states=c, recurrent_states=r) for c, r in states]

    def update_conv_state(self, x, i, conv_kernel_size=None, **_):
        if conv_kernel_size is None:  # before 5.15 the layers join and cut by themselves
            self.conv[i] = x
            return x
        old = self.conv[i] if i in self.conv else x.new_zeros(*x.shape[:2], conv_kernel_size)
        whole = torch.cat([old, x], dim=-1)
        self.conv[i] = whole[..., -conv_kernel_size:]
        return whole

    def update_recurrent_state(self, state, i, **_):
        self.recurrent_states[i] = state

    def update(self, keys, values, i, *_, **__):
        for store, new in ((self.keys, keys), (self.values, values)):
            store[i] = torch.cat([store[i], new], dim=2) if i in store else new
        return self.keys[i], self.values[i]

    def copy(self):
        other = HandCache(self.linear)
        for name, store in vars(self).items():
            setattr(other, name, copy.copy(store))
        return other

    def restore(self, i, before, names):
        for name in names:
            store, old = getattr(self, name), getattr(before, name)
            if i in store:
                nothing = store[i][:, :, :0] if name in ("keys", "values") else torch.zeros_like(store[i])
                store[i] = old[i] if i in old else nothing


def algorithm_1(model, ids, window, passes, *, loop=None, eviction="hard"):
    """Logits `[B, T, vocab]` by Algorithm 1, with an unmodified transformers model's own layers called one by one."""
    backbone, count = model.model, len(model.model.layers)
    first, last = loop or (0, count - 1)
    cache, logits = HandCache([i for i in range(count) if hasattr(backbone.layers[i], "linear_attn")]), []

    def run(indices, h, start, kept):
        positions = torch.arange(start, start + h.shape[1])
        keys = torch.arange(start - kept, start + h.shape[1])
        seen = (keys <= positions[:, None]) & (keys > positions[:, None] - window)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
        rotated = rotations(model, h, positions[None])
        for i in indices:
            linear = hasattr(backbone.layers[i], "linear_attn")
            h = backbone.layers[i](
                h,
                position_embeddings=rotated,
                attention_mask=None if linear else mask,
                position_ids=positions[None],
                past_key_values=cache,
                use_cache=True,
            )
        return h

    kept = 0
    for start in range(0, ids.shape[1], window):
        part = ids[:, start : start + window]
        before = cache.copy()
        hidden = run(range(last + 1), backbone.embed_tokens(part), start, kept)
        out = run(range(last + 1, count), hidden, start, kept)
        logits.append(model.lm_head(backbone.norm(out)))
        if part.shape[1] < window:
            continue
        for _ in range(passes - 1):
            for i in range(first, last + 1):
                cache.restore(i, before, (*CONVOLUTIONS, "keys", "values"))
            hidden = run(range(first, last + 1), hidden, start, kept)
        if passes > 1:
            for i in range(last + 1, count):
                cache.restore(i, before, (*CONVOLUTIONS, "keys", "values", "recurrent_states"))
            run(range(last + 1, count), hidden, start, kept)
        kept = min(window - 1, kept + window) if eviction == "sliding" else 0
        for store in (cache.keys, cache.values):
            for i in store:
                store[i] = store[i][:, :, store[i].shape[2] - kept :]
    return torch.cat(logits, dim=1)


def mean_loss(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("family", HYBRIDS)
def test_one_pass_over_a_window_that_covers_the_text_is_the_model(family):
    model, ids = build(family), tokens(2, 30)
    sleeping = sleepify(copy.deepcopy(model), window=64)
    expected, out = model(ids, labels=ids, use_cache=False), sleeping(ids, labels=ids)
    torch.testing.assert_close(out.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(out.loss, expected.loss, **CLOSE)
    assert out.positions is None and out.state is None


@pytest.mark.parametrize("family", HYBRIDS)
def test_one_pass_with_windows_is_the_model_with_its_cache_evicted_by_hand(family):
    """The unmodified model called on one window after another; between them its attention cache alone is replaced."""
    needs_cache(family)
    model, ids = build(family), tokens(2, 37)
    cache, pieces = None, []
    with torch.no_grad():
        for start in range(0, 37, 10):
            part = ids[:, start : start + 10]
            positions = torch.arange(start, start + part.shape[1])[None].expand(2, -1)
            out = model(part, position_ids=positions, past_key_values=cache, use_cache=True)
            pieces.append(out.logits)
            cache = out.past_key_values
            for i, kind in enumerate(model.config.layer_types):
                if kind == "full_attention" and hasattr(cache, "key_cache"):  # olmo_hybrid before 5.15
                    cache.key_cache[i] = cache.value_cache[i] = None
                elif kind == "full_attention":
                    cache.layers[i] = type(cache.layers[i])()
        out = sleepify(copy.deepcopy(model), window=10)(ids)
    torch.testing.assert_close(out.logits, torch.cat(pieces, dim=1), **CLOSE)


CASES = {
    "two-passes": dict(passes=2),
    "four-passes": dict(passes=4),
    "sliding": dict(passes=3, eviction="sliding"),
    "sliding-one-pass": dict(passes=1, eviction="sliding"),
    "middle-layers": dict(passes=3, loop=(1, 2)),
    "middle-layers-sliding": dict(passes=3, loop=(1, 2), eviction="sliding"),
    "last-layers": dict(passes=2, loop=(2, 3)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("family", ("qwen3_5", "olmo_hybrid"))
def test_passes_and_evictions_are_algorithm_1(family, case):
    """Logits of every window and every gradient, against the layers called by hand."""
    model, ids = build(family), tokens(2, 23)
    sleeping = sleepify(copy.deepcopy(model), window=8, **case)
    case = dict(case)
    expected = algorithm_1(model, ids, 8, case.pop("passes"), **case)
    mean_loss(expected, ids).backward()
    out = sleeping(ids, labels=ids)
    torch.testing.assert_close(out.logits, expected, **CLOSE)
    out.loss.backward()
    for (name, p), q in zip(model.named_parameters(), sleeping.parameters(), strict=True):
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(q.grad, p.grad, rtol=2e-3, atol=2e-4 * scale + 1e-7, msg=name)


@pytest.mark.parametrize("family", ("qwen3_5_moe", "qwen3_next", "qwen3_next_moe"))
def test_passes_in_the_other_families(family):
    model, ids = build(family), tokens(2, 23)
    with torch.no_grad():
        out = sleepify(copy.deepcopy(model), window=8, passes=3)(ids)
        torch.testing.assert_close(out.logits, algorithm_1(model, ids, 8, 3), **CLOSE)


def test_attention_sees_a_sliding_window_even_inside_a_long_window():
    model = insert_fast_weights(build("mistral", sliding_window=5), [1])
    plain, ids = build("mistral", sliding_window=5), tokens(1, 30)
    with torch.no_grad():
        out = sleepify(model, window=30)(ids)
        torch.testing.assert_close(out.logits, plain(ids).logits, **CLOSE)


@pytest.mark.parametrize("kind", ("refine", "replay"))
def test_checkpointing_changes_no_gradient(kind):
    ids, grads = tokens(2, 20), []
    for checkpointing in (False, True):
        model = sleepify(build("qwen3_5"), window=8, passes=3, sleep_kind=kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_checkpointing_stores_less():
    ids, sizes = tokens(2, 64), []
    for checkpointing in (False, True):
        model = sleepify(build("qwen3_5"), window=8, passes=4, activation_checkpointing=checkpointing).train()
        stored = 0

        def pack(x):
            nonlocal stored
            stored += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(ids, labels=ids)
        sizes.append(stored)
    assert sizes[1] < 0.2 * sizes[0]


def test_checkpointing_switched_on_before_is_kept():
    model = build("qwen3_5").train()
    model.gradient_checkpointing_enable()
    sleepify(model, window=8, passes=2)
    assert model.sleep.settings.activation_checkpointing
    assert not model.is_gradient_checkpointing  # their own would lose the states
    ids = tokens(1, 20)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.gradient_checkpointing_disable()
    assert not model.sleep.settings.activation_checkpointing


@pytest.mark.parametrize("side", ("left", "right", "middle"))
def test_padding_changes_no_logit(side):
    model = sleepify(build("qwen3_5"), window=8, passes=3)
    rows = [tokens(1, 21, seed=2), tokens(1, 13, seed=3)]
    with torch.no_grad():
        expected = [model(row).logits[0] for row in rows]
    padded, mask = torch.zeros(2, 24, dtype=torch.long), torch.zeros(2, 24, dtype=torch.long)
    for b, row in enumerate(rows):
        n = row.shape[1]
        columns = {"left": range(24 - n, 24), "right": range(n), "middle": [*range(5), *range(29 - n, 24)]}[side]
        columns = torch.tensor(list(columns))
        padded[b, columns], mask[b, columns] = row[0], 1
    with torch.no_grad():
        logits = model(padded, attention_mask=mask).logits
    for b in range(2):
        torch.testing.assert_close(logits[b, mask[b].bool()], expected[b], **CLOSE)


def test_loss_ignores_padding_and_counts_as_transformers_does():
    model, ids = build("qwen3_5"), tokens(2, 20)
    sleeping = sleepify(copy.deepcopy(model), window=32)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[1, 12:], mask[1, 12:] = -100, 0
    labels[0, :4] = -100
    inputs = dict(attention_mask=mask, labels=labels)
    torch.testing.assert_close(sleeping(ids, **inputs).loss, model(ids, **inputs).loss, **CLOSE)
    inputs |= dict(num_items_in_batch=100)
    torch.testing.assert_close(sleeping(ids, **inputs).loss, model(ids, **inputs).loss, **CLOSE)


def test_packed_sequences_are_read_apart():
    """By borders, by transformers' names for them, or by positions that start again."""
    model = sleepify(build("olmo_hybrid"), window=8, passes=2)
    parts = [tokens(1, 11, seed=4), tokens(1, 19, seed=5)]
    packed = torch.cat(parts, dim=1)
    borders = torch.tensor([0, 11, 30], dtype=torch.int32)
    positions = torch.cat([torch.arange(11), torch.arange(19)])[None]
    with torch.no_grad():
        expected = torch.cat([model(part).logits for part in parts], dim=1)
        numbers = torch.tensor([[0] * 11 + [1] * 19], dtype=torch.int32)
        told = (
            dict(cu_seqlens=borders),
            dict(cu_seq_lens_q=borders),
            dict(position_ids=positions),
            dict(seq_idx=numbers),
        )
        for inputs in told:
            torch.testing.assert_close(model(packed, **inputs).logits, expected, **CLOSE)
            inputs |= dict(attention_mask=torch.ones_like(packed))
            torch.testing.assert_close(model(packed, **inputs).logits, expected, **CLOSE)


@pytest.mark.parametrize(
    "options", ({}, dict(return_flash_attn_kwargs=True, return_seq_idx=True)), ids=("plain", "all")
)
def test_what_the_flattening_collator_hands_over(options):
    model = sleepify(build("qwen3_5"), window=8, passes=2)
    rows = [{"input_ids": row.tolist()} for row in (tokens(1, 11, seed=4)[0], tokens(1, 19, seed=5)[0])]
    batch = DataCollatorWithFlattening(**options)(rows)
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in rows], dim=1)
        out = model(**batch)
    torch.testing.assert_close(out.logits, expected, **CLOSE)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[0, :-1], batch["labels"][0, 1:]), **CLOSE)


def test_rows_of_one_sequence_each_may_be_numbered():
    model, ids = sleepify(build("qwen3_5"), window=8), tokens(2, 10)
    numbers = torch.tensor([[0], [1]]).expand(2, 10)
    assert torch.equal(model(ids, seq_idx=numbers).logits, model(ids).logits)
    mixed = torch.tensor([[0] * 4 + [1] * 6]).expand(2, 10)
    with pytest.raises(ValueError, match="seq_idx: expected one sequence in each row, or one row"):
        model(ids, seq_idx=mixed)
    with pytest.raises(ValueError, match="position_ids: expected .*packed sequences: in one row"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]).expand(2, 10))


def test_plain_positions_are_accepted_and_others_refused():
    model, ids = sleepify(build("qwen3_5"), window=8), tokens(2, 10)
    plain = torch.arange(10).expand(2, -1)
    assert torch.equal(model(ids, position_ids=plain).logits, model(ids).logits)
    with pytest.raises(ValueError, match="position_ids: expected None, or 0, 1, 2"):
        model(ids, position_ids=plain + 3)


def test_logits_of_windows_with_loss_alone_while_training():
    model, ids = sleepify(build("qwen3_5"), window=8, passes=2), tokens(2, 24)
    labels = ids.clone()
    labels[:, :17] = -100
    whole = model(ids, labels=labels)
    assert whole.logits.shape == (2, 24, VOCAB) and whole.positions is None
    out = model.train()(ids, labels=labels)
    assert out.positions.tolist() == list(range(16, 24))
    torch.testing.assert_close(out.logits, whole.logits[:, 16:])
    torch.testing.assert_close(out.loss, whole.loss)
    assert model(ids, labels=labels, logits_to_keep=3).logits.shape == (2, 3, VOCAB)


def test_read_on_from_a_state():
    model, ids = sleepify(build("qwen3_next"), window=8, passes=2), tokens(2, 30)
    with torch.no_grad():
        first = model(ids[:, :13], return_state=True)
        second = model(ids[:, 13:], state=first.state)
        expected = model(ids).logits
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), expected, **CLOSE)


def test_replayed_windows_agree_with_sessions():
    model, ids = sleepify(build("qwen3_5"), window=8, passes=5, sleep_kind="replay"), tokens(1, 21)
    with torch.no_grad():
        expected = model(ids).logits
    session = SleepSession(model)
    steps = torch.stack([session.step(ids[:, t]) for t in range(21)], dim=1)
    torch.testing.assert_close(steps, expected, **CLOSE)


@pytest.mark.parametrize("family", ("qwen3_5", "olmo_hybrid"))
def test_bfloat16_is_as_near_float32_as_the_model_itself(family):
    model, ids = build(family), tokens(2, 30)
    with torch.no_grad():
        truth = algorithm_1(model, ids, 8, 3)
        theirs = algorithm_1(copy.deepcopy(model).bfloat16(), ids, 8, 3).float()
        ours = sleepify(model.bfloat16(), window=8, passes=3)(ids).logits
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - truth).norm() <= 2 * (theirs - truth).norm()


def test_settings_and_weights_survive_saving(tmp_path):
    model, ids = sleepify(build("qwen3_5"), window=8, passes=3, loop=(1, 3), eviction="sliding"), tokens(1, 30)
    names = set(build("qwen3_5").state_dict())
    model.save_pretrained(tmp_path)
    assert set(model.state_dict()) == names
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["sleep"]["window"] == 8 and saved["architectures"] == ["Qwen3_5ForCausalLM"]
    with torch.no_grad():
        expected = model(ids).logits
        loaded = sleepify(AutoModelForCausalLM.from_pretrained(tmp_path))
        torch.testing.assert_close(loaded(ids).logits, expected)
        torch.testing.assert_close(from_pretrained(tmp_path)(ids).logits, expected)
    assert from_pretrained(tmp_path, passes=2).sleep.settings.passes == 2


def test_a_copy_sleeps_on_its_own():
    model, ids = sleepify(build("qwen3_5"), window=8, passes=2), tokens(1, 20)
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(ids).logits
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(other(ids).logits, expected)
    assert other.sleep.model is other


@pytest.mark.parametrize("family", ATTENTION_ONLY)
def test_inserted_fast_weights_start_as_the_model_and_then_learn(family):
    plain, ids = build(family), tokens(2, 20)
    names = set(plain.state_dict())
    model = insert_fast_weights(copy.deepcopy(plain), [0, 2], num_heads=2, head_dim=16)
    assert {n for n in model.state_dict() if not n.startswith("model.fast_weights.")} == names
    sleepify(model, window=32)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, **CLOSE)
    sleepify(model, window=8, passes=2)
    loss = model(ids, labels=ids).loss
    loss.backward()
    gradient = model.model.fast_weights["2"].mixer.o_proj.weight.grad
    assert gradient.abs().max() > 0


def test_inserted_fast_weights_survive_saving(tmp_path):
    model = sleepify(insert_fast_weights(build("llama"), [1], num_heads=2, head_dim=16), window=8, passes=2)
    torch.nn.init.normal_(model.model.fast_weights["1"].mixer.o_proj.weight)
    model.save_pretrained(tmp_path)
    ids = tokens(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_loop_counts_the_models_layers_where_blocks_are_inserted():
    model = sleepify(insert_fast_weights(build("llama"), [0, 1, 3]), window=8, passes=2, loop=(1, 2))
    assert len(model.sleep.sleep_blocks) == 7
    assert model.sleep.settings.loop == (2, 4)  # layer 1, its block, layer 2


REFUSALS = {
    "no-window": (lambda: sleepify(build("qwen3_5")), "window: expected a number of tokens, got None"),
    "long-window": (
        lambda: sleepify(build("qwen3_5"), window=513),
        "window: expected at most the model's 512",
    ),
    "no-window-saved": (
        lambda: sleepify(build("qwen3_5", sleep={"window": None})),
        "window: expected a number of tokens, got None",
    ),
    "no-settings": (
        lambda: sleepify(build("qwen3_5", sleep="deep"), window=8),
        "config.sleep: expected settings of sleep, got 'deep'",
    ),
    "loop": (lambda: sleepify(build("qwen3_5"), window=8, loop=(0, 4)), "loop: expected .* last < 4"),
    "passes": (lambda: sleepify(build("qwen3_5"), window=8, passes=0), "passes: expected"),
    "eviction": (lambda: sleepify(build("qwen3_5"), window=8, eviction="soft"), "eviction: expected"),
    "no-fast-weights": (lambda: sleepify(build("llama"), window=8), "insert_fast_weights"),
    "not-a-model": (lambda: sleepify(torch.nn.Linear(2, 2), window=8), "a transformers causal language model"),
    "backbone": (lambda: sleepify(build("qwen3_5").model, window=8), "with its head, got Qwen3_5TextModel"),
    "dropout": (lambda: sleepify(build("qwen3_5", attention_dropout=0.1), window=8), "attention_dropout: expected 0"),
    "router": (
        lambda: sleepify(build("qwen3_next_moe", output_router_logits=True), window=8),
        "output_router_logits: expected False",
    ),
    "insert-twice": (
        lambda: insert_fast_weights(insert_fast_weights(build("llama"), [1]), [2]),
        "model: expected one without inserted blocks",
    ),
    "insert-nowhere": (lambda: insert_fast_weights(build("llama"), [4]), "layers: expected distinct .* 0 to 3"),
}


@pytest.mark.parametrize("call, message", REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


FOREIGN = {"kimi_linear": "per channel", "qwen4_exp_text": "hyper-connections", "gpt2": "nothing is known"}


@pytest.mark.parametrize("kind, why", FOREIGN.items(), ids=FOREIGN)
def test_other_families_are_refused_with_the_reason(kind, why):
    model = build("llama")
    model.config.model_type = kind
    for attempt in (lambda: sleepify(model, window=8), lambda: insert_fast_weights(model, [1])):
        with pytest.raises(ValueError, match=f"expected one of qwen3_5_text.*got {kind} .*{why}"):
            attempt()


def test_a_refusal_leaves_the_model_as_it_was():
    model, ids = build("qwen3_5"), tokens(1, 10)
    expected = model(ids).logits
    with pytest.raises(ValueError):
        sleepify(model, window=8, loop=(3, 1))
    assert "forward" not in vars(model) and not hasattr(model.config, "sleep")
    assert torch.equal(model(ids).logits, expected)


CALLS = {
    "cache": (dict(cache=DynamicCache()), "^cache: expected None: a model that sleeps"),
    "former-cache": (
        dict(past_key_values=DynamicCache()),
        "past_key_values: expected None: a model that sleeps",
    ),
    "embeddings": (dict(inputs_embeds=torch.zeros(1, 4, 64)), "inputs_embeds: expected None"),
    "attentions": (dict(output_attentions=True), "output_attentions: expected nothing"),
    "unknown": (dict(token_types=1), "token_types: expected nothing: a model that sleeps does not know it"),
    "cache-position": (
        dict(cache_position=torch.arange(4)),
        "cache_position: expected nothing: positions run on .*state=",
    ),
    "return-loss": (
        dict(return_loss=True),
        "return_loss: expected nothing: the loss is returned where labels are given",
    ),
    "wide-mask": (
        dict(attention_mask=torch.ones(1, 1, 4, 4)),
        r"attention_mask: expected shape \(1, 4\), 1 = real token",
    ),
    "mask-mapping": (dict(attention_mask={"full_attention": None}), "attention_mask: expected shape .* got 'dict'"),
    "short-labels": (dict(labels=torch.ones(1, 3).long()), r"labels: expected a tensor of .* \(1, 4\), got \(1, 3\)"),
    "short-unlabelled": (
        dict(labels=torch.full((1, 3), -100), num_items_in_batch=4),
        r"labels: expected a tensor of .* \(1, 4\), got \(1, 3\)",
    ),
    "short-shifted": (dict(shift_labels=torch.full((1, 3), -100), num_items_in_batch=4), r"labels: expected shape"),
    "listed-positions": (dict(position_ids=[0, 1, 2, 3]), r"position_ids: expected .* \(1, 4\), got 'list'"),
    "more-positions": (dict(position_ids=torch.arange(4).expand(2, 4)), r"position_ids: expected .* got \(2, 4\)"),
    "no-logits": (dict(logits_to_keep=None), "logits_to_keep: expected an integer >= 0, got None"),
    "negative-logits": (dict(logits_to_keep=-1), "logits_to_keep: expected an integer >= 0, got -1"),
    "passes": (dict(passes=0), "passes: expected"),
    "no-label": (dict(labels=torch.full((1, 4), -100)), "labels: expected at least one loss token"),
}


@pytest.mark.parametrize("inputs, message", CALLS.values(), ids=CALLS)
def test_what_a_call_cannot_take_is_refused(inputs, message):
    model = sleepify(build("qwen3_5"), window=8)
    with pytest.raises(ValueError, match=message):
        model(tokens(1, 4), **inputs)


def test_a_state_passed_as_a_cache_is_pointed_to_its_place():
    model = sleepify(build("qwen3_5"), window=8)
    state = model(tokens(1, 4), return_state=True).state
    with pytest.raises(ValueError, match="a SleepState is passed as state="):
        model(tokens(1, 4), past_key_values=state)


def fused_forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
    """What puts a fused loss in place of a model's forward pass: the backbone, then the head in chunks."""
    outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, output_attentions=False, **kwargs)
    h, targets = outputs[0][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    losses = [
        F.cross_entropy(self.lm_head(x).float(), y, reduction="sum")
        for x, y in zip(h.split(7), targets.split(7), strict=True)
    ]
    loss = sum(losses) / (targets != -100).sum()
    return SimpleNamespace(loss=loss, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states)


class TestBackboneCalledByItself:
    """No door leads past sleep."""

    def logits(self, model, hidden):
        """Window by window, as the model computes them: a product's last bit may depend on its rows."""
        return torch.cat([model.lm_head(h) for h in hidden.split(8, dim=1)], dim=1)

    def sleeping(self, family="qwen3_5", **settings):
        model = build(family)
        if family == "llama":
            torch.nn.init.normal_(insert_fast_weights(model, [1]).model.fast_weights["1"].mixer.o_proj.weight, std=0.04)
        return sleepify(model, **dict(window=8, passes=3) | settings)

    @pytest.mark.parametrize("family", ("qwen3_5", "olmo_hybrid", "llama"))
    def test_its_hidden_states_have_slept(self, family):
        model, ids = self.sleeping(family), tokens(2, 21)
        with torch.no_grad():
            expected = model(ids).logits
            for backbone in (model.model, model.base_model, model.get_decoder()):
                assert torch.equal(self.logits(model, backbone(ids).last_hidden_state), expected)
            for ignored in (dict(return_dict=False), dict(logits_to_keep=3, num_items_in_batch=5)):
                assert torch.equal(self.logits(model, model.model(ids, **ignored)[0]), expected)
            assert not torch.allclose(model(ids, passes=1).logits, expected, **CLOSE)

    def test_the_unbound_forward_of_its_class_reads_through_the_backbone(self):
        model, ids = self.sleeping(), tokens(2, 21)
        with torch.no_grad():
            logits = type(model).forward(model, ids).logits
            assert torch.equal(logits, model.lm_head(model.model(ids).last_hidden_state))
            torch.testing.assert_close(logits, model(ids).logits, **CLOSE)

    def test_padding_packing_states_and_passes(self):
        model, ids = self.sleeping(), tokens(2, 21)
        mask, row = torch.ones_like(ids), ids[:1]
        mask[1, 15:] = 0
        positions = torch.cat([torch.arange(9), torch.arange(12)])[None]
        with torch.no_grad():
            for given, inputs in ((ids, dict(attention_mask=mask)), (row, dict(position_ids=positions, passes=2))):
                logits, real = model.lm_head(model.model(given, **inputs)[0]), mask[: len(given)].bool()
                torch.testing.assert_close(logits[real], model(given, **inputs).logits[real])
            first = model.model(row[:, :13], return_state=True)
            second = model.model(row[:, 13:], state=first.state)
            torch.testing.assert_close(model.lm_head(second[0]), model(row).logits[:, 13:], **CLOSE)

    @pytest.mark.parametrize("checkpointing", (False, True))
    def test_a_fused_loss_in_place_of_the_forward_pass(self, checkpointing):
        ids, losses, grads = tokens(2, 21), [], []
        for fused in (False, True):
            model = self.sleeping(activation_checkpointing=checkpointing).train()
            if fused:
                model.forward = MethodType(fused_forward, model)
            extra = dict(num_items_in_batch=40, return_token_accuracy=True) if fused else {}
            losses.append(model(ids, labels=ids, **extra).loss)
            losses[-1].backward()
            grads.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(*losses)
        for own, expected in zip(*grads, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-5)

    def test_the_layers_alone_are_refused(self):
        model = self.sleeping()
        with pytest.raises(ValueError, match=r"forward: expected model\(...\) or model.model\(...\) .* elsewhere"):
            type(model.model).forward(model.model, tokens(1, 10))

    def test_caches_and_hidden_states_are_refused_there_too(self):
        model = self.sleeping()
        with pytest.raises(ValueError, match="past_key_values: expected None"):
            model.model(tokens(1, 10), past_key_values=DynamicCache())
        with pytest.raises(ValueError, match="output_hidden_states: expected nothing: .*model.model"):
            model.model(tokens(1, 10), output_hidden_states=True)
        with pytest.raises(ValueError, match="pases: expected nothing"):
            model.model(tokens(1, 10), pases=2)

    def test_where_labelled_windows_stay_awake_they_must_be_told(self):
        model, ids = self.sleeping(sleep_on="unlabelled").train(), tokens(1, 21)
        labels = ids.clone()
        labels[:, :9] = -100
        with pytest.raises(ValueError, match="loss_mask: expected a mask of the loss tokens .* where the backbone"):
            model.model(ids)
        expected = model(ids, labels=labels, all_logits=True).logits
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        for told in (dict(shift_labels=shifted), dict(loss_mask=shifted != -100)):
            torch.testing.assert_close(model.lm_head(model.model(ids, **told)[0]), expected)
        none = torch.zeros(ids.shape, dtype=torch.bool)
        assert torch.equal(self.logits(model, model.model(ids, loss_mask=none)[0]), model(ids).logits)

    def test_a_copy_reads_by_its_own(self):
        model, ids = self.sleeping(), tokens(1, 21)
        other = copy.deepcopy(model)
        with torch.no_grad():
            expected = model.model(ids)[0]
            for parameter in model.parameters():
                parameter.zero_()
            torch.testing.assert_close(other.model(ids)[0], expected)


@pytest.mark.parametrize("kind", ("refine", "replay"))
def test_a_last_full_window_that_nothing_sees_does_not_sleep(kind):
    model, ids = sleepify(build("qwen3_5"), window=8, passes=4, sleep_kind=kind), tokens(2, 24)
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = model(ids, labels=ids, return_state=True)
        slept = len(calls)
        for inputs in (dict(labels=ids), dict()):
            calls.clear()
            out = model(ids, **inputs)
            assert torch.equal(out.logits, expected.logits)
            assert len(calls) == slept - (3 if kind == "refine" else 0)
        assert torch.equal(model(ids, labels=ids).loss, expected.loss)
        calls.clear()
        model(ids[:, :8])
    assert len(calls) == 1


def test_fields_that_general_code_looks_for_are_none():
    model, ids = sleepify(build("qwen3_5_moe"), window=8), tokens(1, 10)
    out = model(ids, labels=ids)
    for name in ("cache", "past_key_values", "hidden_states", "attentions", "aux_loss", "router_logits"):
        assert getattr(out, name) is None and name not in out
    assert set(out) == {"loss", "logits"} and len(out.to_tuple()) == 2


def test_a_routers_loss_wished_for_later_is_refused():
    model = sleepify(build("qwen3_5_moe"), window=8)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits: expected nothing: the routers' loss is not computed"):
        model(tokens(1, 10))


@pytest.mark.parametrize(
    "where", (dict(subfolder="inside"), dict(variant="fp16"), dict(subfolder="a", variant="b")), ids=str
)
@pytest.mark.parametrize("size", ("5GB", "20KB"))
def test_inserted_fast_weights_in_other_files(where, size, tmp_path):
    model = sleepify(insert_fast_weights(build("llama"), [1], num_heads=2, head_dim=16), window=8, passes=2)
    torch.nn.init.normal_(model.model.fast_weights["1"].mixer.o_proj.weight)
    folder = tmp_path / where.get("subfolder", "")
    model.save_pretrained(folder, variant=where.get("variant"), max_shard_size=size)
    ids = tokens(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(from_pretrained(tmp_path, **where)(ids).logits, model(ids).logits)


ROPES = {
    "dynamic": dict(rope_type="dynamic", factor=4.0, rope_theta=1e4),
    "longrope": dict(
        rope_type="longrope",
        short_factor=[1.0] * 8,
        long_factor=[4.0] * 8,
        original_max_position_embeddings=16,
        rope_theta=1e4,
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_that_depend_on_the_call_are_refused(kind):
    model = insert_fast_weights(build("llama", rope_parameters=ROPES[kind]), [1])
    with pytest.raises(ValueError, match=f"rope_type: expected one of fixed frequencies, .* got '{kind}'"):
        sleepify(model, window=8)


@pytest.mark.parametrize("kind", ("linear", "yarn"))
def test_fixed_frequencies_read_in_steps_as_whole(kind):
    model = insert_fast_weights(build("llama", rope_parameters=dict(rope_type=kind, factor=4.0, rope_theta=1e4)), [1])
    sleepify(model, window=8, passes=2)
    ids, session = tokens(1, 21), SleepSession(model)
    with torch.no_grad():
        steps = torch.stack([session.step(ids[:, t]) for t in range(21)], dim=1)
        torch.testing.assert_close(steps, model(ids).logits, **CLOSE)


def test_ordinary_keywords_of_transformers_are_accepted():
    model, ids = sleepify(build("qwen3_5"), window=8), tokens(1, 10)
    out = model(input_ids=ids, use_cache=False, output_attentions=None, return_dict=False)
    assert isinstance(out, tuple) and torch.equal(out[0], model(ids).logits)


@pytest.mark.parametrize("found", slow_unless(["5.6.2"], ["none", "5.6.2"]))
def test_without_a_new_enough_transformers_the_extra_is_named(found):
    code = f"""
import importlib.metadata as m
real = m.version
def version(name):
    if name == "transformers":
        if {found!r} == "none":
            raise m.PackageNotFoundError(name)
        return {found!r}
    return real(name)
m.version = version
try:
    import sleep_ops.adapters.hf
except ImportError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout
    assert "transformers 5.7 or newer (pip install 'sleep-ops[hf]')" in out and f"found {found}" in out


def test_the_product_needs_no_transformers():
    code = "import sys, sleep_ops; print(any(m.split('.')[0] == 'transformers' for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout == "False\n"


def test_configurations_of_vision_models_point_to_the_text_model():
    from sleep_ops.adapters.hf.families import check_family

    model = build("qwen3_5")
    model.config.model_type = "qwen3_5"
    with pytest.raises(ValueError, match="load its language model with AutoModelForCausalLM"):
        check_family(model)
    assert config("qwen3_5").model_type == "qwen3_5_text"


def test_a_remembered_loop_gives_way_to_all_layers():
    model = sleepify(build("qwen3_5"), window=8, passes=2, loop=(1, 2))
    assert sleepify(model, passes=3).sleep.stack.loop == (1, 2)
    assert sleepify(model, loop="all").sleep.stack.loop == (0, 3)
    inserted = sleepify(insert_fast_weights(build("llama"), [1]), window=8, passes=2, loop="all")
    assert inserted.sleep.stack.loop == (0, 4)


@pytest.mark.parametrize("kind, port", [("ouro", "Ouro"), ("jet_nemotron", "JetNemotron")])
def test_folders_of_the_ports_are_pointed_to_them(kind, port, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=f"folder: expected a model of transformers .*{port}.from_pretrained"):
        from_pretrained(tmp_path, window=8)
