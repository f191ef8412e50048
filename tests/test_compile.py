"""torch.compile of the layer, the block and the whole model: one graph, the same outputs and gradients as eager."""

import functools

import pytest
import small
import torch
from cases import slow_unless
from judge import close
from small import VOCAB
from torch.utils._pytree import tree_leaves

from sleep_ops import SleepGDNLayer
from sleep_ops.layers.attention import SpanContext
from sleep_ops.model import loss
from sleep_ops.model.sleeping import Call

WINDOW, LENGTH = 4, 6
LAYERS = {
    "one-pass": {},
    "replay": {"passes": 4, "window": 4},
    "replay-whole-last": {"passes": 2, "output_pass": "last"},
}
MODELS = {
    "refine": {"passes": 2},
    "replay": {"passes": 3, "sleep_kind": "replay"},
    "sliding": {"passes": 2, "eviction": "sliding", "loop": (0, 0)},
}


@pytest.fixture(autouse=True)
def _forget():
    yield
    torch.compiler.reset()


tiny = functools.partial(small.tiny, layers=("attn", "gdn"), window=WINDOW)


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def random_state(module):
    state = module.init_state(2)
    return type(state)(*(torch.randn_like(x).requires_grad_() for x in state))


def assert_compiles(function, inputs, module):
    """Outputs, and gradients of a random projection of them with respect to the inputs and parameters."""
    # With decompositions, as inductor has them: plain aot_eager mispredicts the strides of softplus_backward.
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager_decomp_partition")
    sources = [x for x in (*tensors(inputs), *module.parameters()) if x.requires_grad]
    outputs = [tensors(f(*inputs)) for f in (compiled, function)]
    tolerance = {} if sources[0].dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-9}
    close(*outputs, **tolerance)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=generator) for x in outputs[0]]
    grads = []
    for found in outputs:
        total = sum((w * x).sum() for w, x in zip(weights, found, strict=True) if x.requires_grad)
        grads.append(torch.autograd.grad(total, sources, materialize_grads=True))
    close(*grads, **tolerance)


@pytest.mark.parametrize("impl", slow_unless(["torch"], ["torch", "triton"]))
@pytest.mark.parametrize("name", slow_unless(["replay"], LAYERS))
def test_layer(name, impl):
    torch.manual_seed(0)
    layer = SleepGDNLayer(20, num_heads=2, head_dim=8, num_v_heads=4, head_v_dim=6, impl=impl, **LAYERS[name])
    x = torch.randn(2, 7, 20, requires_grad=True)
    assert_compiles(lambda x, state: layer(x, state=state, return_state=True), (x, random_state(layer)), layer)


@pytest.mark.parametrize("kind", slow_unless(["attn"], ["attn", "gdn"]))
def test_block(kind):
    block = tiny(layers=(kind,)).blocks[0]

    def run(h, state):
        return block(h, state, SpanContext((WINDOW, WINDOW), (0, 0), (7, 7), WINDOW, h.device))

    assert_compiles(
        run, (torch.randn(2, WINDOW, 16, dtype=torch.float64, requires_grad=True), random_state(block)), block
    )


@pytest.mark.parametrize("name", slow_unless(["replay"], MODELS))
def test_training_step(name, monkeypatch):
    """Where loss is taken is for the host to say (`plan`); all the rest of a step is one graph."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 3 * 8 * VOCAB)
    model = tiny(**MODELS[name])
    ids, labels = torch.randint(0, VOCAB, (2, 2, LENGTH))
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[:, [1, LENGTH - 1]] = True
    plan = model.plan(Call(ids, labels=labels, loss_mask=mask, return_logits=False, return_state=False))
    assert_compiles(lambda *x: model.run(plan._replace(ids=x[0], labels=x[1])).loss, (ids, labels), model)


@pytest.mark.slow
def test_model_without_labels():
    model = tiny()
    assert_compiles(model, (torch.randint(0, VOCAB, (2, LENGTH)),), model)
