"""What a CUDA graph captures of a training step: nothing the host must wait for, and replayed, the same losses."""

import contextlib
import itertools
import math

import pytest
import small
import torch
import torch.nn.functional as F
from cases import slow_unless
from judge import exact
from rich.console import Console
from small import VOCAB, WINDOW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sleep_ops import HybridConfig, SleepHybridModel
from sleep_ops.files import read_csv
from sleep_ops.model import loss
from sleep_ops.model.sleeping import Call
from sleep_ops.tasks import Batch, Rule110
from sleep_ops.training import RunConfig, TrainConfig, Trainer, graph
from sleep_ops.training.graph import MAX_GRAPHS, StepGraphs

LENGTH = 18
LOSS_ALONE = {"return_logits": False, "return_state": False}  # as training asks for it
aten = torch.ops.aten
SLEEPS = {
    name: {"passes": passes, "eviction": eviction, "sleep_kind": kind, "loop": loop}
    for passes, eviction, kind, loop in itertools.product(
        (1, 2, 4), ("hard", "sliding"), ("refine", "replay"), (None, (1, 2))
    )
    for name in [f"{kind}-{eviction}-{'all' if loop is None else 'middle'}-N{passes}"]
    if passes > 1 or kind == "refine"
}
QUICK = ["refine-hard-all-N1", "refine-sliding-middle-N2", "replay-hard-all-N2", "replay-sliding-middle-N2"]
SLEEPS = slow_unless(QUICK, SLEEPS.values(), ids=SLEEPS)


class Uncapturable(TorchDispatchMode):
    """Raises at every operation for which the host waits for the device, or reads pageable memory.

    `torch.tensor` of host numbers is seen as the `lift_fresh` it ends with. inside_operators: also in the bodies of the
    project's own operators, whose names are kept in `operators`.
    """

    FORBIDDEN = {
        aten._local_scalar_dense,
        aten.equal,
        aten.is_nonzero,
        aten.lift_fresh,
        aten.lift_fresh_copy,
        aten.linalg_eigvals,
        aten.masked_select,
        aten.nonzero,
        aten.nonzero_numpy,
        aten._unique2,
        aten.unique_consecutive,
        aten.unique_dim,
    }
    INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}

    def __init__(self, inside_operators=False):
        super().__init__()
        self.inside_operators, self.operators = inside_operators, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = function.overloadpacket
        if self.inside_operators and function.namespace == "sleep_ops":
            self.operators.add(packet.__name__)
            with self:
                return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        masks = [x for x in tensors[1:] if x.dtype in (torch.bool, torch.uint8)]
        if packet in self.FORBIDDEN or (packet in self.INDEXING and masks):
            raise AssertionError(f"{function} can't be captured")
        out = function(*args, **kwargs)
        placed = [x for x in tensors + tree_leaves(out) if isinstance(x, torch.Tensor) and x.dim() > 0]
        if len({x.device for x in placed}) > 1:
            raise AssertionError(f"{function} copies between {sorted({str(x.device) for x in placed})}")
        return out


def tiny(**changes) -> SleepHybridModel:
    return small.tiny(**changes).float()


def batch(seed=1, marked=(3, 15, 16, 17), rows=3):
    """ids, labels and a loss mask on the CPU; a label stands everywhere, so the mask has to be heeded."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(0, VOCAB, (2, rows, LENGTH), generator=generator)
    mask = torch.zeros(rows, LENGTH, dtype=torch.bool)
    mask[:, list(marked)] = True
    return ids, labels, mask


@pytest.fixture(autouse=True)
def in_chunks(monkeypatch):
    """The loss is taken of five tokens at a time."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 5 * 4 * VOCAB)


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Tensors on "meta" have no data, so whoever reads them fails, the Triton operators' host side included."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return torch.device("meta")


@pytest.fixture
def replayed(monkeypatch):
    """Without a GPU, a graph is played by taking its step again."""
    monkeypatch.setattr(graph, "_record", lambda step, device: step)


@pytest.mark.parametrize("options", SLEEPS)
def test_nothing_in_a_step_waits_for_the_device(options):
    ids, labels, mask = batch()
    model = tiny(**options)
    plan = model.plan(Call(ids, labels=labels, loss_mask=mask, **LOSS_ALONE))
    with Uncapturable():
        model.run(plan).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("options", SLEEPS)
def test_nothing_in_a_step_leaves_the_device(options, impl, like_a_gpu):
    ids, labels, mask = batch()
    model = tiny(**options, impl=impl).to(like_a_gpu)
    plan = model.plan(Call(ids.to(like_a_gpu), labels=labels.to(like_a_gpu), loss_mask=mask, **LOSS_ALONE))
    with Uncapturable():
        model.run(plan).loss.backward()
    assert all(p.grad.device == like_a_gpu for p in model.parameters())


@pytest.mark.parametrize("kind", slow_unless(["replay"], ["refine", "replay"]))
def test_no_launcher_of_a_kernel_waits(kind):
    if torch.cuda.is_available():
        pytest.skip("the interpreter's work, and where kernels are compiled graphs are tested themselves")
    model = tiny(passes=3, sleep_kind=kind, impl="triton", layers=("attn", "gdn"), activation_checkpointing=True)
    ids, labels, mask = (x[:1, : WINDOW + 1] for x in batch(marked=(3, 5)))
    plan = model.plan(Call(ids, labels=labels, loss_mask=mask, **LOSS_ALONE))
    with Uncapturable(inside_operators=True) as seen:
        model.run(plan).loss.backward()
    rule = "single_chunk" if kind == "refine" else "single_chunk_replay"
    assert {rule, f"{rule}_backward", "short_conv_backward", "gated_norm_backward"} <= seen.operators


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "mask": lambda x: x[x > 0],
    "masked write": lambda x: x.index_put_((x > 0,), torch.zeros((), device=x.device)),
    "nonzero": lambda x: x.nonzero(),
    "host list": lambda x: torch.tensor([1, 2], device=x.device),
    "equal": lambda x: torch.equal(x, x + 1),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_check_finds_what_waits(name):
    with pytest.raises(AssertionError, match="can't be captured"), Uncapturable():
        WAITS[name](torch.randn(4))


def test_the_check_finds_copies():
    with pytest.raises(AssertionError, match="copies between"), Uncapturable():
        torch.randn(4).to("meta")


def test_masks_on_the_host_are_heeded():
    """Labels stand everywhere; the loss is that of the marked ones, rows marked differently included."""
    ids, labels, mask = batch()
    mask[0, 3], mask[1, 9] = False, True
    model = tiny(passes=2).double()
    out = model(ids, labels=labels, loss_mask=mask)
    logits = model(ids, all_logits=True).logits
    exact(out.loss, F.cross_entropy(logits[mask], labels[mask]))


GRAPHED = {
    "refine": {"passes": 3},
    "replay": {"passes": 3, "sleep_kind": "replay"},
    "sliding": {"passes": 2, "eviction": "sliding", "loop": (1, 2)},
    "tied": {"passes": 2, "tie_embeddings": True},
    "recomputed": {"passes": 2, "activation_checkpointing": True},
    "unlabelled": {"passes": 2, "sleep_on": "unlabelled"},
}


@pytest.mark.parametrize("name", GRAPHED)
def test_replays_give_the_losses_and_gradients_of_eager_steps(name, replayed):
    model = tiny(**GRAPHED[name])
    graphs = StepGraphs(model, contextlib.nullcontext)
    for seed in range(3):
        ids, labels, mask = batch(seed)
        model.zero_grad()
        eager = model(ids, labels=labels, loss_mask=mask, return_logits=False).loss
        eager.backward()
        want = [p.grad for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        loss = graphs(Batch(ids, labels, mask))
        assert loss == eager and not loss.requires_grad
        for p, gradient in zip(model.parameters(), want, strict=True):
            assert torch.equal(p.grad, gradient)
    assert len(graphs) == 1


def test_buffers_outlive_cleared_gradients(replayed):
    model = tiny()
    model.embed.weight.requires_grad_(False)
    graphs = StepGraphs(model, contextlib.nullcontext)
    places = []
    for seed in range(2):
        graphs(Batch(*batch(seed)))
        places.append([p.grad.data_ptr() for p in model.parameters() if p.requires_grad])
        torch.nn.utils.clip_grad_norm_(graphs.parameters, 1e-3)
        model.zero_grad(set_to_none=True)
    assert places[0] == places[1] and len(set(places[0])) == len(graphs.parameters) == len(places[0])
    assert model.embed.weight.grad is None


def test_every_kind_of_batch_has_its_graph_and_later_ones_none(replayed):
    model = tiny()
    graphs = StepGraphs(model, contextlib.nullcontext)
    kinds = [Batch(*batch(marked=(column,))) for column in range(MAX_GRAPHS)]
    kinds[-1] = Batch(*batch(rows=2))
    for same in kinds + kinds:
        torch.testing.assert_close(graphs(same), model(same.input_ids, same.labels, same.loss_mask).loss.detach())
    assert len(graphs) == MAX_GRAPHS
    model.zero_grad()
    assert graphs(Batch(*batch(marked=(9,)))) is None and len(graphs) == MAX_GRAPHS
    assert all(p.grad is None for p in model.parameters())
    assert graphs(kinds[0]) is not None


def test_batches_no_graph_serves(replayed):
    ids, labels, mask = batch()
    assert StepGraphs(tiny(), contextlib.nullcontext)(Batch(ids, labels, None)) is None
    assert StepGraphs(tiny(), contextlib.nullcontext)(Batch(ids, labels, mask.to("meta"))) is None
    endless = tiny(passes=math.inf, sleep_kind="replay")
    assert StepGraphs(endless, contextlib.nullcontext)(Batch(ids, labels, mask)) is None
    mask[0, 9] = True
    assert StepGraphs(tiny(), contextlib.nullcontext)(Batch(ids, labels, mask)) is not None
    differing = StepGraphs(tiny(passes=2, sleep_on="unlabelled"), contextlib.nullcontext)
    assert differing(Batch(ids, labels, mask)) is None and len(differing) == 0


TASK = Rule110(t=2, strings=2, bits=6)


def trainer(out, device="cpu", **recipe):
    model = HybridConfig(vocab_size=3, hidden_size=16, layers=("attn", "gdn"), window=6, passes=2, num_heads=2)
    settings = dict(steps=6, batch_size=8, eval_every=3, eval_samples=8, checkpoint_every=2, device=device)
    config = RunConfig(TASK.to_dict(), model.to_dict(), TrainConfig(**settings | recipe))
    return Trainer(config, out, console=Console(quiet=True))


def graphed(out, **recipe):
    run = trainer(out, **recipe)
    run.graphs = StepGraphs(run.model, contextlib.nullcontext)
    return run


def losses(out):
    return [(row["step"], row["loss"], row["grad_norm"], row["skipped"]) for row in read_csv(out / "metrics.csv")]


def test_a_graphed_run_is_the_eager_run(tmp_path, replayed):
    trainer(tmp_path / "eager").fit()
    run = graphed(tmp_path / "graphed")
    run.fit(until=3)
    assert len(run.graphs) == 1
    graphed(tmp_path / "graphed").fit()
    assert losses(tmp_path / "eager") == losses(tmp_path / "graphed")
    assert (tmp_path / "eager/eval.csv").read_text() == (tmp_path / "graphed/eval.csv").read_text()
    graphed(tmp_path / "mixed").fit(until=3)
    trainer(tmp_path / "mixed").fit()  # a run goes on without
    assert losses(tmp_path / "mixed") == losses(tmp_path / "eager")


def test_a_bad_step_spoils_no_buffer(tmp_path, replayed, monkeypatch):
    run = graphed(tmp_path)
    calls, forward = [], run.model.run

    def poisoned(plan):
        calls.append(None)
        out = forward(plan)
        return out._replace(loss=out.loss * math.nan) if len(calls) == 2 else out

    monkeypatch.setattr(run.model, "run", poisoned)
    monkeypatch.setattr(run, "evaluate", lambda: {"exact": 0.0})
    assert run.fit().skipped == 1
    assert [skipped for *_, skipped in losses(tmp_path)] == [0, 1, 1, 1, 1, 1]
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_a_graph_without_cuda_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cuda_graph: expected False without CUDA, got True on cpu"):
        trainer(tmp_path / "run", cuda_graph=True)
    assert not (tmp_path / "run").exists()


def test_only_the_hybrid_is_graphed(tmp_path, monkeypatch):
    monkeypatch.setattr("sleep_ops.training.trainer.resolve_device", lambda device: torch.device("cuda"))
    config = RunConfig(TASK.to_dict(), {}, TrainConfig(cuda_graph=True))
    other = torch.nn.Linear(2, 2)
    other.to = lambda device: other
    with pytest.raises(ValueError, match="cuda_graph: expected .*, got True with a Linear"):
        Trainer(config, tmp_path / "run", model=other, console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_a_captured_run_is_the_eager_run(tmp_path, precision):
    trainer(tmp_path / "eager", "cuda", precision=precision).fit()
    run = trainer(tmp_path / "captured", "cuda", precision=precision, cuda_graph=True)
    run.fit()
    assert len(run.graphs) == 1
    assert losses(tmp_path / "eager") == losses(tmp_path / "captured")
