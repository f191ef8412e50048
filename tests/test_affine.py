"""Segment transitions against chained reference passes, in float64."""

import math

import pytest
import torch
from cases import NEGATIVE, Case, arguments
from judge import close, exact, identical
from torch.utils._python_dispatch import TorchDispatchMode

from sleep_ops.ops.affine import Transition, segment_transition
from sleep_ops.ops.gated_delta_rule import sleep_gated_delta_rule
from sleep_ops.reference import sleep_gated_delta_rule_reference

B, T, H, HV, K, V = 2, 40, 2, 4, 8, 6


def problem(B=B, T=T, lengths=()):
    """Tensors of a transition, options, and a state."""
    case = Case("transition", B=B, T=T, heads=(H, HV), dims=(K, V), lengths=lengths, options=NEGATIVE)
    tensors, options = arguments(case)
    tensors["A_log"] = (tensors["A_log"] - 2).detach().requires_grad_()
    del tensors["q"]
    return tensors, options, tensors.pop("initial_state")


def reference_state(tensors, state, passes=1, **options):
    return sleep_gated_delta_rule_reference(
        tensors["k"], **tensors, initial_state=state, passes=passes, **options
    ).final_state


def assert_same_with_gradients(got, want, tensors, state, **tolerance):
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(9), dtype=want.dtype)
    leaves = [*tensors.values(), state]
    exact(
        *(
            (x, *torch.autograd.grad((x * weight).sum(), leaves, retain_graph=True, materialize_grads=True))
            for x in (got, want)
        ),
        **tolerance,
    )


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("rule", ["delta", "hebbian"])
def test_is_the_pass(rule, impl):
    tensors, options, state = problem()
    options["rule"] = rule
    transition = segment_transition(**tensors, impl=impl, **options)
    assert transition.P.shape == (B, HV, K, K) and transition.R.shape == (B, HV, K, V)
    assert_same_with_gradients(transition.apply(state), reference_state(tensors, state, **options), tensors, state)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 8])
def test_power_is_n_passes(n):
    tensors, options, state = problem()
    got = segment_transition(**tensors, **options).power(n).apply(state)
    want = reference_state(tensors, state, passes=n, **options) if n else state * 1
    assert_same_with_gradients(got, want, tensors, state, rtol=1e-9)


def test_segments_compose():
    tensors, options, state = problem()
    halves = [
        segment_transition(**{name: x[:, part] if x.ndim > 1 else x for name, x in tensors.items()}, **options)
        for part in (slice(0, 13), slice(13, T))
    ]
    both = halves[0].then(halves[1])
    exact(tuple(both), tuple(segment_transition(**tensors, **options)))
    exact(both.apply(state), halves[1].apply(halves[0].apply(state)))


def test_fixed_point_is_where_passes_end():
    tensors, options, state = problem()
    got = segment_transition(**tensors, **options).fixed_point()
    want = reference_state(tensors, state, passes=150, **options)
    assert_same_with_gradients(got, want, tensors, state, rtol=1e-8, atol=1e-8)


def test_no_sequences_have_no_fixed_points():
    tensors, options, _ = problem(B=0)
    transition = segment_transition(**tensors, **options)
    limit = transition.fixed_point()
    assert limit.shape == transition.R.shape == (0, HV, K, V)
    gradients = torch.autograd.grad(limit.sum(), list(tensors.values()), allow_unused=True)
    assert not any(x.any() for x in gradients if x is not None)


def test_packed_sequences_each_have_a_map():
    tensors, options, state = problem(B=1, lengths=(15, 0, 25))
    got = segment_transition(**tensors, **options)
    exact(got.apply(state), reference_state(tensors, state, **options))
    identical(got.P[1], torch.eye(K, dtype=torch.float64).expand(HV, K, K))
    assert not got.R[1].any()


def test_norm_is_at_most_one():
    tensors, options, _ = problem(T=200)
    P = segment_transition(**tensors, **options).P
    assert torch.linalg.matrix_norm(P, ord=2).max() <= 1 + 1e-12


def test_no_fixed_point_is_an_error():
    """Without decay, three keys leave a direction of an eight-dimensional key space as it was."""
    tensors, _ = arguments(Case("three", T=3, dims=(K, V), gate="zero", beta="one", initial_state=False))
    q = tensors.pop("q")
    with pytest.raises(ValueError, match="spectral radius below 1"):
        segment_transition(**tensors).fixed_point()
    with pytest.raises(ValueError, match="^passes: .*math.inf"):
        sleep_gated_delta_rule(q, **tensors, passes=math.inf)


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
    tensors, options, _ = problem()
    half = {name: x.detach().half() for name, x in tensors.items()}
    got = segment_transition(**half, **options)
    want = segment_transition(**{name: x.double() for name, x in half.items()}, **options)
    assert got.P.dtype == got.R.dtype == torch.float32
    exact([x.double() for x in got], list(want), rtol=0, atol=1e-2)


def test_parts_of_a_transition_are_checked():
    P, R = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4)
    for bad in (Transition(P[0], R), Transition(P.double(), R), Transition(P[..., :2], R)):
        for use in (lambda t: t.apply(R), lambda t: t.power(2), lambda t: t.then(t), lambda t: t.fixed_point()):
            with pytest.raises(ValueError, match="^P: expected .* got"):
                use(bad)


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
    close((dP, dR), (torch.full_like(dP, 3.0), torch.ones_like(dR)))


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
        exact(derivative(function)(P), derivative(plainly)(P))
    P = torch.stack([P, 2 * P])
    exact(torch.func.vmap(function)(P), torch.func.vmap(plainly)(P))
