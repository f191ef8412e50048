"""All whole windows of a text read at once, against the same model reading them one after another."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hf_models import build
from hf_models import tokens as hf_tokens
from small import VOCAB, WINDOW, same, tiny, tokens

from sleep_ops import HybridConfig
from sleep_ops.adapters.hf import insert_fast_weights, sleepify
from sleep_ops.model.sleeping import sleeping
from sleep_ops.model.spans import at_once, spans

SETTINGS = {
    "one pass": dict(),
    "replay": dict(passes=4, sleep_kind="replay"),
    "some blocks": dict(passes=3, sleep_kind="replay", loop=(2, 3)),
    "endless": dict(passes=float("inf"), sleep_kind="replay"),
    "sliding blocks": dict(layers=("swa", "jet", "attn", "gdn"), sliding_window=3, passes=3, sleep_kind="replay"),
    "recomputed": dict(passes=3, sleep_kind="replay", activation_checkpointing=True),
    "by block": dict(passes=3, sleep_kind="replay", activation_checkpointing=True, recompute="block"),
}
LENGTH = 4 * WINDOW + 3


def pair(**settings):
    """The same model, reading windows one by one and at once; a decay at which replays converge."""
    return [tiny(dt_bias=-1, **settings, windows_at_once=way).train() for way in (False, True)]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("columns", [None, (7, 13), (2,)], ids=["all", "two", "one"])
def test_the_same_loss_gradients_and_state(name, columns):
    ids, labels = tokens(2, LENGTH), tokens(2, LENGTH, seed=2)
    if columns:
        kept = torch.zeros(LENGTH, dtype=torch.bool)
        kept[list(columns)] = True
        labels[:, ~kept] = -100
    found = []
    for model in pair(**SETTINGS[name]):
        out = model(ids, labels=labels)
        after = model(tokens(2, WINDOW, seed=3), state=out.state)
        (out.loss + model(ids, labels=labels, return_state=False).loss + after.logits.sum()).backward()
        found.append((out, after.logits, {n: p.grad for n, p in model.named_parameters()}))
    (one, next_one, grads), (other, next_other, others) = found
    same(other.loss, one.loss)
    same(other.logits, one.logits)
    same(next_other, next_one)
    assert torch.equal(other.positions, one.positions)
    assert [x.shape for x in other.state.blocks[0]] == [x.shape for x in one.state.blocks[0]]
    assert other.state[4:] == one.state[4:]
    for name, grad in grads.items():
        assert (grad is None) == (others[name] is None), name
        if grad is not None:
            same(others[name], grad)


def test_each_block_is_called_once_for_all_whole_windows():
    one, other = pair(passes=3, sleep_kind="replay")
    for model, expected in ((one, 5), (other, 2)):
        calls = []
        model.blocks[1].register_forward_hook(lambda *a, calls=calls: calls.append(1))
        model(tokens(2, LENGTH))
        assert len(calls) == expected


@pytest.mark.parametrize("case", ["padded", "packed", "continued", "positions"])
def test_rows_out_of_phase_read_on_as_before(case):
    one, other = pair(passes=3, sleep_kind="replay")
    ids = tokens(2, LENGTH)
    if case == "continued":
        given = [dict(state=model(tokens(2, 3, seed=4)).state) for model in (one, other)]
    elif case == "packed":
        ids, given = ids.reshape(1, -1), [dict(cu_seqlens=torch.tensor([0, 2 * WINDOW, LENGTH, 2 * LENGTH]))] * 2
    else:
        mask = torch.ones(2, LENGTH, dtype=torch.bool)
        mask[0, :WINDOW] = False
        given = [dict(attention_mask=mask) | ({"windows_by": "positions"} if case == "positions" else {})] * 2
    same(other(ids, **given[1]).logits, one(ids, **given[0]).logits)


def test_refining_reads_window_by_window_but_for_one_pass():
    one, other = pair(passes=3)
    ids = tokens(2, LENGTH)
    for passes in (None, 1):
        same(other(ids, passes=passes).logits, one(ids, passes=passes).logits)


@pytest.mark.parametrize("family", ["qwen3_5", "olmo_hybrid", "llama"])
def test_models_of_transformers(family):
    ids, found = hf_tokens(2, 30), []
    for way in (False, True):
        torch.manual_seed(0)
        model = build(family)
        if family == "llama":
            model = insert_fast_weights(model, [1], num_heads=2, head_dim=16)
            torch.nn.init.normal_(model.model.fast_weights["1"].mixer.o_proj.weight, std=0.04)
        model = sleepify(model, window=8, passes=3, sleep_kind="replay", windows_at_once=way).double().train()
        assert sleeping(model).settings.windows_at_once == way
        out = model(ids, labels=ids, all_logits=True)
        out.loss.backward()
        found.append((out.loss, out.logits, [p.grad for p in model.parameters() if p.grad is not None]))
    (loss, logits, grads), (other_loss, other_logits, others) = found
    same(other_loss, loss)
    same(other_logits, logits)
    for grad, other in zip(grads, others, strict=True):
        same(other, grad)


@pytest.fixture
def alone(tmp_path):
    """The group of this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store")), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("name", ["one pass", "replay"])
def test_a_group_of_one_changes_nothing(alone, name, windows):
    ids, found = tokens(2, windows * WINDOW), []
    _, model = pair(**SETTINGS[name])
    for group in (None, alone):
        out = model(ids, labels=ids, return_logits=False, return_state=False, group=group)
        found.append((out.loss, torch.autograd.grad(out.loss, list(model.parameters()))))
    same(found[1][0], found[0][0])
    for x, y in zip(found[1][1], found[0][1], strict=True):
        same(x, y)
    nothing = model(ids, labels=torch.full_like(ids, -100), return_logits=False, return_state=False, group=alone).loss
    nothing.backward()
    assert nothing == 0 and all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())


def test_texts_that_cannot_be_parted_are_refused(alone):
    one, other = pair(passes=3, sleep_kind="replay")
    ids = tokens(2, 2 * WINDOW)
    given = dict(labels=ids, return_state=False, group=alone)
    for model, changes, match in (
        (one, {}, "group: expected None but for windows_at_once"),
        (pair(passes=3)[1], {}, "group: expected None but for windows_at_once"),
        (other, dict(input_ids=ids[:, 1:], labels=ids[:, 1:]), "input_ids: expected whole windows of 5 tokens"),
        (other, dict(attention_mask=torch.ones_like(ids)), "attention_mask: expected None with group"),
        (other, dict(return_state=True), "return_state: expected False with group"),
        (other, dict(state=other(ids).state), "state: expected None with group"),
    ):
        with pytest.raises(ValueError, match=match):
            model(**dict(input_ids=ids) | given | changes)


def test_windows_that_follow_one_another_are_one_span():
    every = [range(14)] * 2
    given = dict(filled=(2, 2), labelled=(False, False), wanted=every)
    cut = list(spans((13, 13), 4, **given))
    joined = list(at_once(iter(cut), 4))
    assert [span.lengths for span in joined] == [(2, 2), (8, 8), (3, 3)]
    assert joined[1].windows == tuple(cut[1:3]) and joined[1].starts == (2, 2) and joined[1].full == (True, True)
    assert joined[0] == cut[0] and joined[2] == cut[3]
    assert list(at_once(iter(cut[:2]), 4)) == cut[:2]


@pytest.mark.parametrize("changes", [dict(eviction="sliding"), dict(sleep_on="unlabelled")])
def test_settings_that_need_one_window_after_another_are_refused(changes):
    config = HybridConfig(vocab_size=VOCAB, hidden_size=8, layers=("attn", "gdn"), num_heads=1, window=4)
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name}: expected .* with windows_at_once"):
        replace(config, windows_at_once=True, **changes)
