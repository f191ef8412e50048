"""Options of refining passes: truncated gradients, the gate on the loop's residual, re-injection."""

import functools

import pytest
import small
import torch
from judge import exact
from small import VOCAB, tokens
from small import WINDOW as L

from sleep_ops import SleepSession
from sleep_ops.model.spans import Span

tiny = functools.partial(small.tiny, passes=4)


def gradients(model, ids, only=None):
    """Of the loss on the last window (or on the labels `only`)."""
    labels = torch.full_like(ids, -100) if only is None else only
    if only is None:
        labels[:, 2 * L :] = ids[:, 2 * L :]
    out = model(ids, labels=labels, return_state=False)
    out.loss.backward()
    return out.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_all_passes_counted_is_the_full_gradient():
    loss, grads = gradients(tiny(), tokens(2, 12))
    same_loss, same = gradients(tiny(backprop_passes=4), tokens(2, 12))
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(grads[name], same[name]) for name in grads)


@pytest.mark.parametrize("eviction", ("hard", "sliding"))
@pytest.mark.parametrize("loop", (None, (1, 2)))
@pytest.mark.parametrize("last", (1, 2, 3))
def test_truncated_gradients_are_those_from_a_given_start(last, loop, eviction):
    """Against the same sleep done in two halves: passes 1..N-k without a graph, the rest as a sleep of its own."""
    model = tiny(backprop_passes=last, loop=loop, eviction=eviction)
    ids = tokens(2, L + 3)
    labels = torch.full_like(ids, -100)
    labels[:, L:] = ids[:, L:]
    loss, grads = gradients(model, ids, labels)

    by_hand = tiny(loop=loop, eviction=eviction)
    first, final = by_hand.stack.loop
    stack, state = by_hand.stack, by_hand.init_state(2)
    both, neither = (True, True), (False, False)
    span = Span((0, 0), (L, L), wanted=False, full=both, asleep=both, labelled=neither)
    _, state = stack.wake(by_hand.embed(ids[:, :L]), state, span, passes=4)
    with torch.no_grad():  # passes 2..N-k, from the wake pass as it is
        early = stack.sleep(state, passes=4 - last, rows=(True, True)) if last < 3 else state
        hidden = refined(by_hand, state, 4 - last)
    blocks = [
        type(new)(new[0].detach(), old[1]) if by_hand.blocks[i].fast_weights and first <= i <= final else old
        for i, (new, old) in enumerate(zip(early.blocks, state.blocks, strict=True))
    ]
    state = state._replace(blocks=tuple(blocks), hidden=hidden.detach())
    state = stack.evict(stack.sleep(state, passes=1 + last, rows=(True, True)), rows=(True, True))
    out = by_hand(ids[:, L:], labels=labels[:, L:], state=state)
    out.loss.backward()
    exact(out.loss.detach(), loss)
    for name, p in by_hand.named_parameters():
        mine = torch.zeros_like(p) if p.grad is None else p.grad
        exact(grads.get(name, torch.zeros_like(p)), mine, msg=name)


def refined(model, state, passes):
    """What the looped blocks put out in pass `passes` over the open window (pass 1: awake)."""
    first, last = model.stack.loop
    caught = {}
    handle = model.blocks[last].register_forward_hook(lambda _m, _a, out: caught.update(h=out[0]))
    if passes > 1:  # one pass more, whose input is what is wanted: a pass that ends a sleep may put out nothing
        entering = model.blocks[first].register_forward_pre_hook(
            lambda _m, args: caught.setdefault("fed", []).append(args[0])
        )
        model.stack.sleep(state, passes=passes + 1, rows=(True, True))
        entering.remove()
    handle.remove()
    return state.hidden if passes == 1 else caught["fed"][passes - 1]


def test_nothing_is_learnt_through_more_passes_than_counted():
    """The embedding of tokens that stand in the first window alone: all its gradient goes through the first passes."""
    ids = tokens(2, 12) % (VOCAB - 1)
    ids[:, 1] = VOCAB - 1
    full, cut = (gradients(tiny(backprop_passes=k), ids)[1]["embed.weight"][VOCAB - 1] for k in (None, 2))
    assert full.abs().max() > 0 and bool((cut == 0).all())


def test_truncation_stores_less():
    stored = []
    for last in (None, 1):
        model, total = tiny(passes=6, backprop_passes=last), 0

        def pack(x):
            nonlocal total
            total += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            gradients(model, tokens(2, 12))
        stored.append(total)
    assert stored[1] < 0.6 * stored[0]


def test_a_closed_gate_feeds_every_pass_with_the_embedding():
    model, plain = tiny(loop_gate=True), tiny()
    fed = []
    model.blocks[0].register_forward_pre_hook(lambda _module, args: fed.append(args[0]))
    with torch.no_grad():
        logits = model(tokens(2, 12)).logits
        model.loop_gate.fill_(1.0)
        exact(model(tokens(2, 12)).logits, plain(tokens(2, 12)).logits)
    # wake, three passes, twice; then the last, partial window
    for window in (fed[0:4], fed[4:8]):
        assert all(torch.equal(x, window[0]) for x in window)
    assert logits.isfinite().all()


@pytest.mark.parametrize("loop", (None, (1, 2)))
@pytest.mark.parametrize(
    "options", (dict(reinject=True), dict(loop_gate=True, reinject=True)), ids=("reinject", "both")
)
def test_reinjection_adds_what_the_loop_was_fed(options, loop):
    model = tiny(loop=loop, **options)
    if model.config.loop_gate:
        torch.nn.init.constant_(model.loop_gate, 0.3)
    first = 0 if loop is None else loop[0]
    fed, put_out = [], []
    model.blocks[first].register_forward_pre_hook(lambda _module, args: fed.append(args[0]))
    last = len(model.blocks) - 1 if loop is None else loop[1]
    model.blocks[last].register_forward_hook(lambda _module, _args, out: put_out.append(out[0]))
    with torch.no_grad():
        model(tokens(2, L + 1))
    gate = model.loop_gate if model.config.loop_gate else 1.0
    for n in range(1, 4):
        h = fed[0] + gate * (put_out[n - 1] - fed[0])
        exact(fed[n], h + fed[0])


@pytest.mark.parametrize("options", (dict(reinject=True), dict(loop_gate=True)), ids=str)
def test_sessions_agree_and_every_parameter_learns(options, tmp_path):
    model, ids = tiny(loop=(1, 2), **options), tokens(2, 13)
    session = SleepSession(model)
    for t in range(8):
        session.step(ids[:, t])
    session.save(tmp_path / "session")
    session = SleepSession.load(tmp_path / "session", model)
    steps = [session.step(ids[:, t]) for t in range(8, 13)]
    with torch.no_grad():
        exact(torch.stack(steps, dim=1), model(ids).logits[:, 8:])
    _, grads = gradients(model, ids)
    assert all(bool(g.abs().max() > 0) for g in grads.values()) and len(grads) == len(list(model.parameters()))


def test_batched_rows_of_different_lengths():
    model, ids = tiny(reinject=True), tokens(2, 13)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1, :6] = False
    with torch.no_grad():
        both = model(ids, attention_mask=mask).logits
        alone = model(ids[1:, 6:]).logits
    exact(both[1, 6:], alone[0])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(backprop_passes=0), "backprop_passes: expected"),
        (dict(backprop_passes=1, sleep_kind="replay"), "backprop_passes: expected None where"),
        (dict(loop_gate=True, sleep_kind="replay"), "loop_gate: expected False where"),
        (dict(reinject=1), "reinject: expected"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny(**change)
