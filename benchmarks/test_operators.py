"""pytest-benchmark of the small cases: the operator, replay, the layer and a training step.

    python -m pytest benchmarks                          # the device there is; CUDA in bfloat16, the CPU in float32
    python -m pytest benchmarks --benchmark-json=out.json

CUDA times include the host and end with a synchronisation: for these sizes launches are part of the cost.
"""

import pytest
import torch

from sleep_ops import HybridConfig, SleepGDNLayer, SleepHybridModel
from sleep_ops.bench.cases import KERNEL_CASES, PASSES_CASES, make_inputs
from sleep_ops.bench.providers import operator_problem, replay_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def problem(provider, case):
    device = torch.device(DEVICE)
    return operator_problem(replay_of(provider, case, device), case, make_inputs(case, 0, device))


def measure(benchmark, run, leaves, backward):
    def once():
        if backward:
            torch.autograd.grad(run().float().square().mean(), leaves, allow_unused=True)
        else:
            with torch.no_grad():
                run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    once()
    benchmark.extra_info.update(device=DEVICE, dtype=str(DTYPE))
    benchmark(once)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("case", ["rule110", "depo", "mid"])
def test_gated_delta_rule(benchmark, case, backward):
    """`sleep-ops bench kernels` in small: one pass."""
    x = problem("ours", KERNEL_CASES[DEVICE][case])
    measure(benchmark, lambda: x.run(1)[0], x.leaves, backward)


@pytest.mark.parametrize(
    ("provider", "passes"),
    [("ours", n) for n in (1, 2, 3, 4, 8, 64)] + [("ours-chained", n) for n in (1, 2, 3, 4)],
    ids=lambda x: x if isinstance(x, str) else f"N{x}",
)
def test_replay(benchmark, provider, passes):
    """`sleep-ops bench passes` in small: the sleep operator, and as many calls of the one-pass operator."""
    x = problem(provider, PASSES_CASES[DEVICE]["mid"])
    measure(benchmark, lambda: x.run(passes)[0], x.leaves, True)


@pytest.mark.parametrize("passes", [1, 4])
def test_layer(benchmark, passes):
    torch.manual_seed(0)
    layer = SleepGDNLayer(256, num_heads=4, head_dim=64, passes=passes, window=64).to(DEVICE, DTYPE)
    x = torch.randn(2, 256, 256, device=DEVICE, dtype=DTYPE, requires_grad=True)
    measure(benchmark, lambda: layer(x), [x, *layer.parameters()], True)


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_training_step(benchmark, passes):
    """Forward and backward of the Rule 110 hybrid, four windows of 24 tokens and the answers."""
    width, batch = (64, 16) if DEVICE == "cpu" else (256, 512)
    torch.manual_seed(0)
    model = SleepHybridModel(
        HybridConfig(vocab_size=3, hidden_size=width, layers=("attn", "gdn") * 2, window=24, passes=passes)
    ).to(DEVICE)
    ids = torch.randint(0, 2, (batch, 100), device=DEVICE)
    labels = ids.masked_fill(torch.arange(100, device=DEVICE) < 96, -100)
    mask = torch.arange(100).expand(batch, 100) >= 96  # on the CPU: no wait for the device

    def run():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            return model(ids, labels=labels, loss_mask=mask, return_state=False).loss

    measure(benchmark, run, list(model.parameters()), True)
