"""Segment transitions against chained reference passes, in float64."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sleep_ops.ops.affine import Transition, segment_transition
from sleep_ops.ops.gated_delta_rule import sleep_gated_delta_rule
from sleep_ops.reference import sleep_gated_delta_rule_reference

B, T, H, HV, K, V = 2, 40, 2, 4, 8, 6
EXACT = {"rtol": 1e-11, "atol": 1e-11}
ACTIVATED = {"use_qk_l2norm": True, "use_beta_sigmoid": True, "allow_neg_eigval": True}


def make_inputs(seed=0, batch=B, tokens=T, states=None):
    """k, v, g, beta (raw, for `ACTIVATED`), A_log, dt_bias, and a state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    inputs = {
        "k": normal(batch, tokens, H, K),
        "v": normal(batch, tokens, HV, V),
        "g": normal(batch, tokens, HV),
        "beta": normal(batch, tokens, HV),
        "A_log": (normal(HV) - 4).detach().requires_grad_(),
        "dt_bias": normal(HV),
    }
    return inputs, normal(states or batch, HV, K, V)


def reference_state(inputs, state, passes=1, **options):
    run = sleep_gated_delta_rule_reference(
        inputs["k"], **inputs, initial_state=state, passes=passes, **ACTIVATED, **options
    )
    return run.final_state


def gradients(result, inputs, state):
    weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(9), dtype=result.dtype)
    return torch.autograd.grad((result * weight).sum(), [*inputs.values(), state], allow_unused=True)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("rule", ["delta", "hebbian"])
def test_is_the_pass(rule, impl):
    inputs, state = make_inputs()
    transition = segment_transition(**inputs, rule=rule, impl=impl, **ACTIVATED)
    got, want = transition.apply(state), reference_state(inputs, state, rule=rule)
    assert transition.P.shape == (B, HV, K, K) and transition.R.shape == (B, HV, K, V)
    torch.testing.assert_close(got, want, **EXACT)
    for a, b in zip(gradients(got, inputs, state), gradients(want, inputs, state), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 8])
def test_power_is_n_passes(n):
    inputs, state = make_inputs()
    got = segment_transition(**inputs, **ACTIVATED).power(n).apply(state)
    want = state * 1 if n == 0 else reference_state(inputs, state, passes=n)
    torch.testing.assert_close(got, want, **EXACT)
    if n:
        for a, b in zip(gradients(got, inputs, state), gradients(want, inputs, state), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_segments_compose():
    inputs, state = make_inputs()
    parameters = ("A_log", "dt_bias")
    halves = [
        segment_transition(**{name: x if name in parameters else x[:, part] for name, x in inputs.items()}, **ACTIVATED)
        for part in (slice(0, 13), slice(13, T))
    ]
    whole = segment_transition(**inputs, **ACTIVATED)
    for a, b in zip(halves[0].then(halves[1]), whole, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    in_turn = halves[1].apply(halves[0].apply(state))
    torch.testing.assert_close(halves[0].then(halves[1]).apply(state), in_turn, **EXACT)


def test_fixed_point_is_where_passes_end():
    inputs, state = make_inputs()
    got = segment_transition(**inputs, **ACTIVATED).fixed_point()
    want = reference_state(inputs, state, passes=150)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for a, b in zip(gradients(got, inputs, state), gradients(want, inputs, state), strict=True):
        torch.testing.assert_close(b if a is None else a, b, rtol=1e-8, atol=1e-8)


def test_packed_sequences_each_have_a_map():
    inputs, state = make_inputs(batch=1, states=3)
    borders = torch.tensor([0, 15, 15, T])
    got = segment_transition(**inputs, cu_seqlens=borders, **ACTIVATED)
    torch.testing.assert_close(got.apply(state), reference_state(inputs, state, cu_seqlens=borders), **EXACT)
    assert torch.equal(got.P[1], torch.eye(K, dtype=torch.float64).expand(HV, K, K)) and not got.R[1].any()


def test_norm_is_at_most_one():
    inputs, _ = make_inputs(tokens=200)
    P = segment_transition(**inputs, **ACTIVATED).P
    assert torch.linalg.matrix_norm(P, ord=2).max() <= 1 + 1e-12


def test_no_fixed_point_is_an_error():
    """Without decay, three keys leave a direction of an eight-dimensional key space as it was."""
    inputs, _ = make_inputs(tokens=3)
    k = torch.nn.functional.normalize(inputs["k"], dim=-1)
    gates = torch.zeros(B, 3, HV, dtype=torch.float64)
    arguments = {"k": k, "v": inputs["v"], "g": gates, "beta": gates + 1}
    with pytest.raises(ValueError, match="spectral radius below 1"):
        segment_transition(**arguments).fixed_point()
    with pytest.raises(ValueError, match="^passes: .*math.inf"):
        sleep_gated_delta_rule(k, **arguments, passes=math.inf)


@pytest.mark.parametrize("n", [-1, 1.5, True])
def test_power_of_a_wrong_number(n):
    with pytest.raises(ValueError, match="^n: "):
        Transition(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 3)).power(n)


@pytest.mark.parametrize(
    "state",
    [None, torch.zeros(2, 2, 3), torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 2, 3).half()],
    ids=["none", "no_batch", "shape", "dtype"],
)
def test_state_of_a_transition_is_checked(state):
    with pytest.raises(ValueError, match="^state: expected .* got"):
        Transition(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 3)).apply(state)


def test_only_transitions_alike_compose():
    transition = Transition(torch.zeros(2, 2, 2, 2), torch.zeros(2, 2, 2, 3))
    for later in (
        3,
        tuple(transition),
        Transition(*(x[:1] for x in transition)),
        Transition(*(x.double() for x in transition)),
    ):
        with pytest.raises(ValueError, match="^later: expected .* got"):
            transition.then(later)


def test_float32_from_half_inputs():
    inputs, _ = make_inputs()
    half = {name: x.detach().half() for name, x in inputs.items()}
    got = segment_transition(**half, **ACTIVATED)
    want = segment_transition(**{name: x.double() for name, x in half.items()}, **ACTIVATED)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-2)


def test_parts_of_a_transition_are_checked():
    P, R = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4)
    for bad in (Transition(P[0], R), Transition(P.double(), R), Transition(P[..., :2], R)):
        for use in (lambda t: t.apply(R), lambda t: t.power(2), lambda t: t.then(t), lambda t: t.fixed_point()):
            with pytest.raises(ValueError, match="^P: expected .* got"):
                use(bad)


def test_bad_argument_is_named():
    inputs, _ = make_inputs()
    with pytest.raises(ValueError, match="^g: "):
        segment_transition(**{**inputs, "g": inputs["g"][:, 1:]})


def test_triton_gives_the_same_map():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, _ = make_inputs(batch=1, tokens=20)
    single = {name: x.detach().float().to(device) for name, x in inputs.items()}
    got = segment_transition(**single, **ACTIVATED, impl="triton")
    for a, b in zip(got, segment_transition(**inputs, **ACTIVATED), strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-4, atol=1e-4)


class Denormal(TorchDispatchMode):
    """Counts the entries that matrix products read and write, and which of them are denormal."""

    entries = denormal = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
            for x in (*args, out):
                self.entries += x.numel()
                self.denormal += int(((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).sum())
        return out


@pytest.mark.parametrize("decay", [-0.02, -0.1, -0.5, -1.5, -10.0])
@pytest.mark.parametrize(("tokens", "window"), [(75, None), (300, 75), (1024, None)])
def test_decays_lead_to_no_denormal_numbers(tokens, window, decay):
    """They would make replay many times slower on some CPUs; forwards and backwards, in one chain at most."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 1, 32, generator=generator) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    g = decay * torch.rand(1, tokens, 1, generator=generator)
    leaves = [x.requires_grad_() for x in (q, k, v, g, torch.rand(1, tokens, 1, generator=generator))]
    for passes in (1, 3, 64):
        with Denormal() as counted:
            output, state = sleep_gated_delta_rule(*leaves, passes=passes, window=window)
            (output.sum() + state.sum()).backward()
        assert counted.denormal <= 0.01 * counted.entries, (passes, counted.denormal / counted.entries)


def test_powers_that_vanish_are_still_differentiated():
    P = (1e-15 * torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    R = torch.ones(1, 1, 4, 3, requires_grad=True)
    power = Transition(P, R).power(3)
    assert not power.P.any()
    dP, dR = torch.autograd.grad(power.R.sum(), (P, R))
    torch.testing.assert_close(dP, torch.full_like(dP, 3.0))
    torch.testing.assert_close(dR, torch.ones_like(dR))


def test_transitions_have_every_kind_of_derivative():
    """They are plain PyTorch: forward mode, a second derivative and vmap too."""
    generator = torch.Generator().manual_seed(0)
    P, R, state = (torch.randn(1, 1, 3, n, generator=generator, dtype=torch.float64) / 3 for n in (3, 2, 2))

    def function(P):
        return Transition(P, R).power(5).apply(state).sum()

    def plainly(P):
        S = state
        for _ in range(5):
            S = P @ S + R
        return S.sum()

    for derivative in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(derivative(function)(P), derivative(plainly)(P))
    P = torch.stack([P, 2 * P])
    torch.testing.assert_close(torch.func.vmap(function)(P), torch.func.vmap(plainly)(P))
