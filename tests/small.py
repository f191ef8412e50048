"""Small mixers, models and tasks, what they read, and how close their results must come."""

import functools
import itertools
import math

import pytest
import torch
from judge import close

from sleep_ops import HybridConfig, SleepHybridModel
from sleep_ops.layers.gdn import SleepGDNLayer
from sleep_ops.layers.jet import JetBlock
from sleep_ops.layers.mixer import GDNState

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB, WINDOW = 11, 5

same = functools.partial(close, rtol=1e-8, atol=1e-8)  # in float64


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def vectors(B=3, T=11, seed=1, dtype=torch.float32):
    """What a mixer of `make` reads."""
    return normal(B, T, 20, seed=seed, dtype=dtype)


def make(mixer, seed=0, dtype=torch.float32, **options):
    """A mixer; the kernels of a Jet block do differ from token to token."""
    torch.manual_seed(seed)
    shape = dict(num_heads=2, head_dim=8, num_v_heads=4, head_v_dim=6)
    if mixer is not JetBlock:
        return mixer(20, **(shape | options)).to(DEVICE, dtype)
    layer = JetBlock(20, **(shape | dict(kernel_hidden=5) | options))
    for parameter in layer.dynamic_conv1d.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.to(DEVICE, dtype)


MIXERS = {"gdn": SleepGDNLayer, "jet": JetBlock}


def some_state(layer, B=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return GDNState(*(torch.randn(t.shape, generator=generator).to(t) for t in layer.init_state(B)))


def tokens(batch=2, length=18, seed=1, first=0, vocab=VOCAB):
    return torch.randint(first, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def tiny(dt_bias=None, **changes) -> SleepHybridModel:
    """attn, gdn, attn, gdn. dt_bias: of -1 gives a decay at which replays converge within some passes."""
    torch.manual_seed(0)
    settings = dict(vocab_size=VOCAB, hidden_size=16, layers=("attn", "gdn") * 2, window=WINDOW)
    settings |= dict(num_heads=2, num_kv_heads=1, initializer_range=0.3)
    model = SleepHybridModel(HybridConfig(**(settings | changes))).double()
    for block in model.blocks:
        if block.fast_weights and dt_bias is not None:
            torch.nn.init.constant_(block.mixer.dt_bias, dt_bias)
    return model


def hybrid(**changes) -> SleepHybridModel:
    """attn, jet, swa, jet, with kernels that do differ from token to token."""
    torch.manual_seed(0)
    settings = dict(vocab_size=VOCAB, hidden_size=16, layers=("attn", "jet", "swa", "jet"), window=WINDOW, num_heads=2)
    settings |= dict(sliding_window=3, gdn_num_v_heads=4, gdn_head_v_dim=6, jet_kernel_hidden=5, initializer_range=0.3)
    model = SleepHybridModel(HybridConfig(**(settings | changes)))
    for name, parameter in model.named_parameters():
        if "kernel_generator" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.double()


def _sleeps(kind, counts, **more):
    for eviction, loop, passes in itertools.product(("hard", "sliding"), (None, (1, 2)), counts):
        yield pytest.param(
            dict(eviction=eviction, loop=loop, passes=passes, **more),
            id=f"{kind}-{eviction}-{loop or 'all'}-N{passes}",
            marks=pytest.mark.slow if passes == 2 else (),
        )


# Arguments of `tiny` for each kind of sleep.
REFINE = list(_sleeps("refine", (1, 2, 3)))
REPLAY = list(_sleeps("replay", (2, 5, math.inf), sleep_kind="replay", dt_bias=-1))

# Arguments of `hybrid`.
HYBRIDS = [
    pytest.param(
        dict(sleep_kind=kind, eviction=eviction, loop=loop, passes=passes), id=f"{kind}-{eviction}-{loop}-{passes}"
    )
    for kind, eviction, loop, passes in itertools.product(
        ("refine", "replay"), ("hard", "sliding"), (None, (1, 2)), (1, 2, 3)
    )
    if passes > 1 or kind == "refine"
]


def fast_weights(model, state):
    return [s.fast_weights for s, b in zip(state.blocks, model.blocks, strict=True) if b.fast_weights]


def assert_same_state(model, a, b):
    assert (a.position, a.in_window, a.carried, a.labelled) == (b.position, b.in_window, b.carried, b.labelled)
    if model.config.sleep_kind == "replay":
        assert a.hidden is b.hidden is None and set(a.start) == set(b.start) == {None}
    a, b = (state.blocks + state.start + (state.hidden,) + state.writes for state in (a, b))
    for s, t in zip(a, b, strict=True):
        same(s, t, rtol=1e-9, atol=1e-9)


# Settings of tasks.
DEPO = {"min_nodes": 3, "max_nodes": 7, "vocabulary": 9, "queries": 4, "max_hops": 5, "window": 7}
PAIRS = {"num_pairs": 8, "num_queries": 4, "vocab_size": 50, "window": 4}
VARIABLES = {"chains": 3, "hops": 2, "queries": 3, "variables": 20, "values": 8, "window": 9}
