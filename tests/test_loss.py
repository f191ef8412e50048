"""Loss without logits: the same values and gradients, one chunk of logits at a time, forward and backward."""

import itertools
import weakref
from functools import partial

import pytest
import torch
from cases import slow_unless
from judge import close, exact, identical, kept_bytes
from small import VOCAB, hybrid, tiny, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sleep_ops.model import loss as module
from sleep_ops.model.loss import chunked_cross_entropy, summed_cross_entropy
from sleep_ops.model.sleeping import Call

TOKENS, WIDTH, WORDS = 13, 6, 17
tight = dict(rtol=1e-12, atol=1e-12)  # in float64


@pytest.fixture
def at_a_time(monkeypatch):
    """Sets how many tokens of a vocabulary, in float64, go into a chunk."""

    def set_tokens(count, vocab=WORDS, size=8):
        monkeypatch.setattr(module, "CHUNK_BYTES", count * vocab * size)

    return set_tokens


class Adapted(nn.Module):
    """A frozen head with an adapter of low rank, as PEFT wraps one."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.base, self.dropout = nn.Linear(WIDTH, WORDS).requires_grad_(False), nn.Dropout(dropout)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WORDS, bias=False)

    def forward(self, h):
        return self.base(h) + self.up(self.down(self.dropout(h)))


HEADS = {
    "linear": lambda: nn.Linear(WIDTH, WORDS, bias=False),
    "bias": lambda: nn.Linear(WIDTH, WORDS),
    "norm": lambda: nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)),
    "frozen": lambda: nn.Linear(WIDTH, WORDS).requires_grad_(False),
    "adapted": Adapted,
}


def problem(name="norm", dtype=torch.float64):
    torch.manual_seed(0)
    head = HEADS[name]().to(dtype)
    h = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, WORDS, (TOKENS,))
    targets[[2, 5]] = -100
    return head, h, targets


def whole(head, targets):
    return lambda h: summed_cross_entropy(head(h), targets)


def results(loss, head, h):
    """The loss, and gradients by name, of what is not frozen."""
    head.zero_grad()
    h.grad = None
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in head.parameters())
    return loss.detach(), h.grad, {name: p.grad for name, p in head.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("count", (1, 3, 4, 6, 12, 13, 100))
@pytest.mark.parametrize("name", HEADS)
def test_values_and_gradients_are_those_of_whole_logits(name, count, at_a_time):
    head, h, targets = problem(name)
    at_a_time(count)
    found = results(chunked_cross_entropy(head, h, targets, vocab_size=WORDS), head, h)
    close(found, results(whole(head, targets)(h), head, h), **tight)


@pytest.mark.parametrize("count", (1, 5))
@pytest.mark.parametrize("precision", ("float32", "bfloat16", "autocast"))
def test_in_other_precisions(precision, count, at_a_time):
    head, h, targets = problem(dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32)
    at_a_time(count, size=4)
    found = []
    for form in (lambda h: chunked_cross_entropy(head, h, targets, vocab_size=WORDS), whole(head, targets)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = form(h)
        assert loss.dtype == torch.float32
        found.append(results(loss, head, h))
    assert found[0][1].dtype == h.dtype
    near = dict(rtol=1e-5, atol=1e-6) if precision == "float32" else dict(rtol=2e-2, atol=2e-2)
    close(*found, **near)


def test_it_comes_out_the_same_again(at_a_time):
    head, h, targets = problem(dtype=torch.float32)
    at_a_time(3, size=4)
    first, second = (results(chunked_cross_entropy(head, h, targets, vocab_size=WORDS), head, h) for _ in range(2))
    identical(first, second)


def test_second_derivatives(at_a_time):
    head, h, targets = problem()
    at_a_time(4)
    weight = head[1].weight

    def through(h, weight):
        return chunked_cross_entropy(lambda x: head[0](x) @ weight.T, h, targets, vocab_size=WORDS)

    assert torch.autograd.gradgradcheck(through, (h, weight))


def test_a_head_that_draws_random_numbers_draws_them_again(at_a_time):
    head, h, targets = Adapted(dropout=0.5).double(), *problem()[1:]
    at_a_time(4)
    found = []
    for form in (
        lambda: chunked_cross_entropy(head, h, targets, vocab_size=WORDS, random=True),
        lambda: sum(summed_cross_entropy(head(x), t) for x, t in zip(h.split(4), targets.split(4), strict=True)),
    ):
        torch.manual_seed(1)
        found.append(results(form(), head, h))
    close(*found, **tight)


@pytest.mark.parametrize("count, calls", ((100, 1), (13, 1), (12, 3), (5, 5)))
def test_the_head_is_called_again_for_all_chunks_but_the_last(count, calls, at_a_time):
    head, h, targets = problem("linear")
    at_a_time(count)
    seen = []
    head.register_forward_hook(lambda _, given, out: seen.append(len(out)))
    chunked_cross_entropy(head, h, targets, vocab_size=WORDS).backward()
    assert len(seen) == calls and max(seen) <= count
    seen.clear()
    with torch.no_grad():
        chunked_cross_entropy(head, h, targets, vocab_size=WORDS)
    assert sum(seen) == TOKENS


class Made(TorchDispatchMode):
    """Counts the bytes of what operations make: of the largest tensor, and of all at a time."""

    def __init__(self):
        super().__init__()
        self.largest, self.live, self.peak, self.known = 0, 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.known | given:
                    self._note(storage)
        return out

    def _note(self, storage):
        size, key = storage.nbytes(), storage._cdata
        self.known.add(key)
        self.live += size
        self.largest, self.peak = max(self.largest, size), max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self.known.discard(key)
        self.live -= size


def made(function):
    with Made() as seen:
        function()
    return seen


def test_no_more_than_a_chunk_of_logits_is_there_at_a_time(at_a_time):
    torch.manual_seed(0)
    count, words, chunk = 256, 1024, 8
    head = nn.Linear(WIDTH, words, bias=False)
    h, targets = torch.randn(count, WIDTH, requires_grad=True), torch.randint(0, words, (count,))
    at_a_time(chunk, words, 4)
    logits = 4 * count * words

    def step():
        chunked_cross_entropy(head, h, targets, vocab_size=words).backward()

    step()
    found, expected = made(step), made(lambda: summed_cross_entropy(head(h), targets).backward())
    assert expected.largest == logits and expected.peak > 2 * logits
    assert found.largest == max(4 * chunk * words, 4 * WIDTH * words)
    assert found.peak < logits / 4
    loss = []
    kept = kept_bytes(lambda: loss.append(chunked_cross_entropy(head, h, targets, vocab_size=words)))
    assert kept < 2 * 4 * chunk * words + sum(x.nbytes for x in (h, targets, head.weight))


@pytest.mark.parametrize("passes", (1, 2))
def test_nor_in_a_step_of_the_model(passes, at_a_time):
    words, length = 2048, 40
    model = tiny(vocab_size=words, passes=passes).float()
    ids, labels = tokens(2, length, vocab=words), tokens(2, length, seed=2, vocab=words)
    at_a_time(4, words, 4)

    def step(return_logits):
        model(ids, labels=labels, return_logits=return_logits, return_state=False).loss.backward()

    found = [made(partial(step, logits)) for logits in (False, True)]
    logits, weight = 4 * ids.numel() * words, model.lm_head.weight.nbytes
    assert found[0].largest == weight < found[1].largest == logits
    assert found[0].peak + logits < found[1].peak


MODELS = {
    "plain": {},
    "no-window": {"window": None, "passes": 1},
    "tied": {"passes": 2, "tie_embeddings": True},
    "replay": {"passes": 3, "sleep_kind": "replay"},
    "sliding": {"passes": 2, "eviction": "sliding"},
    "unlabelled": {"passes": 2, "sleep_on": "unlabelled"},
    "recomputed": {"passes": 2, "activation_checkpointing": True},
}
TEXTS = ("whole", "mask", "rows", "padded", "packed", "positions", "state", "last")


def text(kind):
    """Arguments of a call."""
    ids, labels = tokens(3, 18), tokens(3, 18, seed=2)
    given = {"labels": labels}
    if kind in ("mask", "rows", "state", "last"):
        mask = torch.zeros(3, 18, dtype=torch.bool)
        mask[:, [17] if kind == "last" else [3, 15, 16, 17]] = True
        if kind == "rows":
            mask[0, 3], mask[1, 9], mask[2] = False, True, False
        given["loss_mask"] = mask
    if kind in ("padded", "positions"):
        real = torch.ones(3, 18, dtype=torch.bool)
        real[0, :4], real[1, 11:] = False, False
        labels[~real] = -100
        labels[0, 9] = -100
        given |= {"attention_mask": real, "windows_by": "positions" if kind == "positions" else "tokens"}
    if kind == "packed":
        ids, given = ids[:1], {"labels": labels[:1], "cu_seqlens": torch.tensor([0, 7, 7, 18])}
    return ids, given


CASES = {f"{kind}-{name}": (kind, name) for kind, name in itertools.product(TEXTS, MODELS)}
QUICK = [f"{kind}-{name}" for kind, name in CASES.values() if kind == "rows" or name == "unlabelled"]


@pytest.mark.parametrize("case", slow_unless(QUICK, CASES))
@pytest.mark.parametrize("count", slow_unless(["3"], [1, 3, 1000]))
def test_models_have_the_loss_of_their_logits(case, count, at_a_time):
    kind, name = CASES[case]
    at_a_time(count, VOCAB)
    model = tiny(**MODELS[name])
    ids, given = text(kind)
    if kind == "state":
        given["state"] = model(tokens(3, 7, seed=3)).state
    found = []
    for logits in (False, True):
        out = model(ids, **given, return_logits=logits)
        assert (out.logits is not None) == (out.positions is not None) == logits
        gradients = torch.autograd.grad(out.loss, [*model.parameters()], retain_graph=True, materialize_grads=True)
        found.append((out.loss, gradients, tree_leaves(out.state)))
    close(*found, **tight)


def test_a_jet_hybrid(at_a_time):
    at_a_time(5, VOCAB)
    model = hybrid(passes=2)
    ids, given = text("mask")
    losses = [model(ids, **given, return_logits=logits).loss for logits in (False, True)]
    exact(*losses)
    exact(*(torch.autograd.grad(loss, [*model.parameters()], materialize_grads=True) for loss in losses))


def test_only_tokens_with_loss_have_logits():
    model, (ids, given) = tiny(), text("rows")
    seen = []
    model.lm_head.register_forward_hook(lambda _, x, out: seen.append(tuple(out.shape)))
    model(ids, **given, return_logits=False)
    assert seen == [(int(given["loss_mask"].sum()), VOCAB)]


def test_marked_positions_without_a_label_add_nothing():
    """A mask that is elsewhere than the labels is taken at its word."""
    model, (ids, given) = tiny(), text("mask")
    plan = model.plan(Call(ids, **given))
    plan.labels[0, 16] = -100
    losses = [model.run(plan._replace(return_logits=logits)).loss for logits in (False, True)]
    close(*losses, **tight)


def test_neither_logits_nor_loss_is_refused():
    model, (ids, given) = tiny(), text("mask")
    with pytest.raises(ValueError, match="labels: expected a tensor with return_logits=False, got None"):
        model(ids, loss_mask=given["loss_mask"], return_logits=False)


def test_with_all_logits_every_window_takes_part_in_the_backward():
    model, (ids, _), losses = tiny().train(), text("mask"), []
    labels = torch.where(torch.arange(ids.shape[1]) < 2, ids, -100)
    windows = len(range(0, ids.shape[1], model.config.window))
    for all_logits, expected in ((False, 1), (True, windows)):
        calls = []
        hook = model.blocks[0].register_full_backward_hook(lambda *a, calls=calls: calls.append(1))
        out = model(ids, labels=labels, all_logits=all_logits, return_logits=False, return_state=False)
        out.loss.backward()
        hook.remove()
        assert out.logits is None and len(calls) == expected > 0
        losses.append(out.loss)
    close(*losses, **tight)
