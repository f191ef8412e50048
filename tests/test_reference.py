"""The specification against the equations written out per head, and its own invariants."""

import subprocess
import sys

import pytest
import torch
from judge import exact

from sleep_ops.reference import gated_delta_rule_reference, sleep_gated_delta_rule_reference

B, T, H, HV, K, V = 2, 11, 2, 4, 5, 3


def make_inputs(seed=0, batch=B):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return {
        "q": normal(batch, T, H, K),
        "k": torch.nn.functional.normalize(normal(batch, T, H, K), dim=-1),
        "v": normal(batch, T, HV, V),
        "g": -normal(batch, T, HV).abs(),
        "beta": 2 * torch.rand(batch, T, HV, generator=generator, dtype=torch.float64),
    }


def equation(q, k, v, g, beta, S, rule):
    """One head, as printed: q, k [T, K], v [T, V], g, beta [T], S [K, V]."""
    outputs = []
    for t in range(len(v)):
        if rule == "delta":
            S = torch.exp(g[t]) * (S - beta[t] * torch.outer(k[t], k[t]) @ S) + beta[t] * torch.outer(k[t], v[t])
        else:
            S = torch.exp(g[t]) * S + beta[t] * torch.outer(k[t], v[t])
        outputs.append(S.T @ q[t] * K**-0.5)
    return torch.stack(outputs), S


@pytest.mark.parametrize("rule", ["delta", "hebbian"])
def test_every_head_follows_the_equation(rule):
    inputs = make_inputs()
    S = torch.randn(B, HV, K, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = gated_delta_rule_reference(**inputs, initial_state=S, rule=rule)
    for b in range(B):
        for h in range(HV):
            q, k = inputs["q"][b, :, h // 2], inputs["k"][b, :, h // 2]
            o, state = equation(q, k, *(inputs[name][b, :, h] for name in ("v", "g", "beta")), S[b, h], rule)
            exact(got.output[b, :, h], o)
            exact(got.final_state[b, h], state)


def test_activations():
    inputs = make_inputs()
    A_log, dt_bias = torch.tensor([0.3, -1.0, 0.0, 1.0]).double(), torch.tensor([0.1, 0.2, -3.0, 4.0]).double()
    got = gated_delta_rule_reference(
        **inputs, use_qk_l2norm=True, A_log=A_log, dt_bias=dt_bias, use_beta_sigmoid=True, allow_neg_eigval=True
    )
    by_hand = {name: inputs[name] / (inputs[name].pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for name in ("q", "k")}
    by_hand["v"] = inputs["v"]
    by_hand["g"] = -A_log.exp() * torch.log1p(torch.exp(inputs["g"] + dt_bias))
    by_hand["beta"] = 2 / (1 + torch.exp(-inputs["beta"]))
    want = gated_delta_rule_reference(**by_hand)
    exact(tuple(got), tuple(want))


@pytest.mark.parametrize("output_pass", ["first", "last"])
@pytest.mark.parametrize("window", [None, 1, 4, 11, 50])
def test_sleep_is_passes_in_turn_over_each_window(window, output_pass):
    inputs, passes, state, outputs = make_inputs(), 3, None, []
    length = window or T
    for first in range(0, T, length):
        part = {name: x[:, first : first + length] for name, x in inputs.items()}
        by_pass = []
        for _ in range(passes):
            o, state = gated_delta_rule_reference(**part, initial_state=state)
            by_pass.append(o)
        outputs.append(by_pass[0 if output_pass == "first" else -1])
    got = sleep_gated_delta_rule_reference(**inputs, passes=passes, window=window, output_pass=output_pass)
    exact(tuple(got), (torch.cat(outputs, 1), state))


def test_replay_converges_to_recall():
    """Without decay, epochs of the delta rule reach the state that recalls every key's value."""
    inputs = make_inputs()
    inputs = {**inputs, "g": torch.zeros(B, T, HV).double(), "beta": torch.ones(B, T, HV).double(), "q": inputs["k"]}
    few = {name: x[:, :4] for name, x in inputs.items()}
    got = sleep_gated_delta_rule_reference(**few, passes=2000, scale=1.0)
    exact(got.output, few["v"], rtol=1e-5, atol=1e-5)


def test_packed_sequences_are_separate():
    inputs = make_inputs(batch=1)
    state = torch.randn(4, HV, K, V, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    borders = [0, 3, 3, 10, T]
    options = {"passes": 2, "window": 3}
    got = sleep_gated_delta_rule_reference(**inputs, initial_state=state, cu_seqlens=torch.tensor(borders), **options)
    for i, (start, end) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        if start == end:
            assert torch.equal(got.final_state[i], state[i])
            continue
        part = {name: x[:, start:end] for name, x in inputs.items()}
        want = sleep_gated_delta_rule_reference(**part, initial_state=state[i : i + 1], **options)
        exact(got.output[:, start:end], want.output)
        exact(got.final_state[i : i + 1], want.final_state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_computes_in_float32_or_float64(dtype):
    got = gated_delta_rule_reference(**{name: x.to(dtype) for name, x in make_inputs().items()})
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.output.dtype == got.final_state.dtype == expected


def test_differentiable():
    inputs = {name: x[:1, :3].requires_grad_() for name, x in make_inputs().items()}

    def function(*args):
        return sleep_gated_delta_rule_reference(*args, passes=2, window=2)

    assert torch.autograd.gradcheck(function, list(inputs.values()))


def test_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import sleep_ops.reference, sleep_ops.ops.gated_delta_rule, sleep_ops.ops.step, sleep_ops.ops.affine"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
