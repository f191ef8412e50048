"""What every public operator promises, whatever it computes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from cases import NEGATIVE, Case, arguments, float16_is_slow, slow_unless
from judge import close, identical, leaves, outcome, relative_error
from small import DEVICE, normal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sleep_ops.ops.affine import segment_transition
from sleep_ops.ops.attention import causal_attention
from sleep_ops.ops.dynamic_conv import dynamic_convolution
from sleep_ops.ops.gated_delta_rule import delta_rule_state, gated_delta_rule, sleep_gated_delta_rule
from sleep_ops.ops.gated_norm import gated_rms_norm
from sleep_ops.ops.short_conv import short_convolution
from sleep_ops.ops.step import gated_delta_rule_step


class Operator(NamedTuple):
    """An operator on a small problem: its differentiable tensors, and what else it is called with."""

    function: Callable
    tensors: dict[str, torch.Tensor]
    options: dict

    def __call__(self, **changes):
        results = self.function(**self.tensors | self.options | changes)
        return (results,) if isinstance(results, torch.Tensor) else results

    def outcome(self, function: Callable | None = None, **changes) -> dict[str, torch.Tensor]:
        return outcome(function or self.function, leaves(self.tensors), **self.options | changes)


def rule(function, case, but=(), **options):
    tensors, of_case = arguments(case, torch.float32, DEVICE)
    if case.lengths:
        options["cu_seqlens"] = of_case["cu_seqlens"]
    tensors = {name: x for name, x in tensors.items() if name not in but}
    return Operator(function, tensors, {"rule": case.rule, **case.options, **options})


def step(case):
    """Of the first token."""
    whole = rule(gated_delta_rule_step, case)
    state = whole.tensors.pop("initial_state")
    tensors = {name: x[:, 0] if x.ndim > 1 else x for name, x in whole.tensors.items()} | {"state": state}
    return whole._replace(tensors={name: x.detach().clone().requires_grad_() for name, x in tensors.items()})


def other(function, options, **shapes):
    drawn = {name: normal(*shape, seed=n).requires_grad_() for n, (name, shape) in enumerate(shapes.items())}
    options = {name: torch.tensor(x, device=DEVICE) if isinstance(x, list) else x for name, x in options.items()}
    return Operator(function, drawn, options)


GROUPED = {"heads": (1, 2), "options": NEGATIVE}
BORDERS = {"cu_seqlens": [0, 0, 5, 11, 11]}
OPERATORS = {
    "pass": rule(gated_delta_rule, Case("", T=20, **GROUPED)),
    "packed": rule(gated_delta_rule, Case("", lengths=(0, 5, 17, 0), dims=(20, 16), **GROUPED)),
    "hebbian": rule(gated_delta_rule, Case("", T=20, rule="hebbian", initial_state=False)),
    "long-chunks": rule(gated_delta_rule, Case("", lengths=(0, 33, 1), dims=(20, 16), options=NEGATIVE)),
    "short": rule(gated_delta_rule, Case("", T=13, dims=(20, 40), **GROUPED)),
    "short-hebbian": rule(gated_delta_rule, Case("", T=13, B=2, rule="hebbian", initial_state=False)),
    "short-sleep": rule(sleep_gated_delta_rule, Case("", T=13, dims=(20, 40), **GROUPED), passes=3),
    "sleep": rule(sleep_gated_delta_rule, Case("", T=13, **GROUPED), passes=3, window=8, output_pass="first"),
    "packed-sleep": rule(sleep_gated_delta_rule, Case("", lengths=(7, 0, 15), **GROUPED), passes=5, window=12),
    "state": rule(delta_rule_state, Case("", T=13, heads=(2, 4), options=NEGATIVE), but=["q"]),
    "state-from-nothing": rule(delta_rule_state, Case("", T=13, rule="hebbian", initial_state=False), but=["q"]),
    "long-chunks-state": rule(delta_rule_state, Case("", lengths=(0, 33, 1), options=NEGATIVE), but=["q"]),
    "slept-state": rule(delta_rule_state, Case("", T=20, **GROUPED), but=["q"], passes=2),
    "short-slept-state": rule(
        delta_rule_state, Case("", T=13, B=2, rule="hebbian", initial_state=False), but=["q"], passes=6
    ),
    "transition": rule(segment_transition, Case("", T=20, **GROUPED), but=["q", "initial_state"]),
    "step": step(Case("", T=1, B=2, heads=(2, 6), dims=(20, 36), options=NEGATIVE)),
    "plain-step": step(Case("", T=1, B=2, rule="hebbian")),
    "short-conv": other(short_convolution, {"activation": None}, x=(2, 9, 20), weight=(20, 4)),
    "padded-short-conv": other(
        short_convolution, {"lengths": [9, 0, 2, 5]}, x=(4, 9, 20), weight=(20, 4), bias=(20,), conv_state=(4, 3, 20)
    ),
    "packed-short-conv": other(
        short_convolution, BORDERS, x=(1, 11, 70), weight=(70, 4), bias=(70,), conv_state=(4, 3, 70)
    ),
    "dynamic-conv": other(
        dynamic_convolution, {"lengths": [5, 1]}, x=(2, 5, 3), kernels=(2, 5, 3, 4), conv_state=(2, 3, 3)
    ),
    "packed-dynamic-conv": other(
        dynamic_convolution, BORDERS, x=(1, 11, 3), kernels=(1, 11, 3, 4), conv_state=(4, 3, 3)
    ),
    "norm": other(gated_rms_norm, {"eps": 1e-5}, x=(3, 11, 100), gate=(3, 11, 100), weight=(100,)),
    "attention": other(causal_attention, {"window": 3}, q=(2, 3, 4, 8), k=(2, 6, 2, 8), v=(2, 6, 2, 8)),
}
SINGLE = {name: x for name, x in OPERATORS.items() if x.function in (dynamic_convolution, causal_attention)}
FORMS = {
    f"{name}-{impl}": operator._replace(options=operator.options | {"impl": impl})
    for name, operator in OPERATORS.items()
    for impl in ("torch", "triton", *["reference"] * (name == "sleep"))
    if name not in SINGLE
} | SINGLE
KERNELS = [name for name in FORMS if name.endswith("-triton")]
RULES = [name for name in FORMS if "beta" in FORMS[name].tensors]
# Differentiated by autograd, in every mode and as often as wanted.
PLAIN = ["step-torch", "plain-step-torch", "norm-torch", "sleep-reference", "attention"]
SLEEPING = ["sleep-triton", "packed-sleep-triton", "slept-state-triton", "transition-triton"]
LARGE = [*SLEEPING, "pass-triton", "packed-triton", "long-chunks-triton"]
OPCHECKED = [f"{name}-triton" for name in ("long-chunks", "short-hebbian", "step", "packed-short-conv", "norm")]
COMPILED = [f"{name}-triton" for name in ("packed", "long-chunks", "short", "step")]
COMPILED += ["pass-torch", "packed-sleep-torch", "step-torch"]
PER_TOKEN = ("q", "k", "v", "g", "beta", "x", "kernels", "gate")
CARRIED = ("initial_state", "state", "conv_state")


def each(names, slow=(*SLEEPING, "pass-triton")):
    return pytest.mark.parametrize("operator", slow_unless([n for n in names if n not in slow], names), indirect=True)


@pytest.fixture
def operator(request):
    if request.param.startswith("long-chunks"):
        request.getfixturevalue("chunks_of_64")
    return FORMS.get(request.param) or OPERATORS[request.param]


@each(FORMS)
@float16_is_slow
def test_same_bits_every_run_and_inputs_as_they_were(operator, dtype):
    low = {n: x.detach().to(dtype).requires_grad_() for n, x in operator.tensors.items() if n in ("q", "k", "v", "x")}
    operator = operator._replace(tensors=operator.tensors | low)
    before = {name: x.detach().clone() for name, x in operator.tensors.items()}
    identical(operator.outcome(), operator.outcome())
    identical({name: x.detach() for name, x in operator.tensors.items()}, before)


@each(KERNELS, slow=())
def test_kernels_agree_with_pytorch(operator):
    truth = outcome(operator.function, leaves(operator.tensors, torch.float64), **operator.options | {"impl": "torch"})
    for name, x in operator.outcome().items():
        assert x.dtype == torch.float32 and relative_error(x, truth[name]) < 1e-5, name


@each(["padded-short-conv-triton", "norm-triton"])
def test_weights_may_be_of_a_higher_dtype(operator):
    half = {name: x.detach().half() for name, x in operator.tensors.items() if name in ("x", "gate", "conv_state")}
    operator = operator._replace(tensors=operator.tensors | {name: x.requires_grad_() for name, x in half.items()})
    got = operator.outcome()
    assert got["output"].dtype == torch.float16
    close(got, operator.outcome(impl="torch"), rtol=2e-3, atol=2e-3)


@each(KERNELS)
def test_everything_is_written(operator, poisoned):
    """With every buffer full of NaN before its kernel starts, no NaN comes out."""
    expected = operator.outcome()
    poisoned()
    identical(operator.outcome(), expected)


class Recorded(TorchDispatchMode):
    """Calls of the project's own custom operators, by what distinguishes them."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sleep_ops":
            kind = [type(x) if isinstance(x, torch.Tensor) else x for x in args]
            self.calls[f"{function} {kind}"] = function, args
        return function(*args, **(kwargs or {}))

    def check(self, differentiable):
        assert self.calls
        for function, args in self.calls.values():
            args = [
                x.detach().requires_grad_(differentiable and x.requires_grad) if isinstance(x, torch.Tensor) else x
                for x in args
            ]
            torch.library.opcheck(function, tuple(args))


@each(KERNELS, slow=[name for name in KERNELS if name not in OPCHECKED])
def test_opcheck(operator):
    """Every custom operator that a call takes, forwards and backwards."""
    with Recorded() as forwards:
        results = operator()
    with Recorded() as backwards:
        torch.autograd.grad(sum(x.sum() for x in results), list(operator.tensors.values()))
    forwards.check(differentiable=True)
    backwards.check(differentiable=False)


@each(["step-triton", "plain-step-triton"])
def test_opcheck_of_a_step_in_place(operator):
    with torch.no_grad(), Recorded() as calls:
        operator(state=operator.tensors["state"].clone(), inplace=True)
    calls.check(differentiable=False)


@each(FORMS, slow=[name for name in FORMS if name not in COMPILED])
def test_compiles_whole(operator):
    compiled = torch.compile(operator.function, fullgraph=True, backend="aot_eager")
    close(operator.outcome(compiled), operator.outcome())


@each(["short-torch", "pass-torch", "sleep-torch"], slow=["pass-torch", "sleep-torch"])
def test_compiles_whole_with_dynamic_shapes(operator):
    compiled = torch.compile(operator.function, fullgraph=True, dynamic=True, backend="aot_eager")
    close(operator.outcome(compiled), operator.outcome())


@each(FORMS, slow={*KERNELS} - {"pass-triton", "step-triton", "packed-short-conv-triton", "norm-triton"})
def test_checkpointing_changes_no_gradient(operator):
    def checkpointed(**arguments):
        return checkpoint(operator.function, use_reentrant=False, **arguments)

    identical(operator.outcome(checkpointed), operator.outcome())


@each(FORMS, slow=[*SLEEPING, "pass-triton", "long-chunks-triton"])
def test_views_are_as_good_as_copies(operator):
    """Every second element of a row, of borders and lengths too."""

    def strided(x):
        return x.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_(x.requires_grad)

    views = {name: strided(x) for name, x in operator.tensors.items()}
    options = {name: strided(x) if isinstance(x, torch.Tensor) else x for name, x in operator.options.items()}
    close(outcome(operator.function, views, **options), operator.outcome(), rtol=1e-6, atol=1e-6)


@each(FORMS, slow=LARGE)
def test_either_result_alone_and_frozen_inputs(operator):
    """One result has gradients without the others, and they don't hang on which inputs want some."""

    def gradients(results, tensors):
        total = sum(x.sum() for x in results)
        return torch.autograd.grad(total, tensors, retain_graph=True, materialize_grads=True)

    results, tensors = operator(), list(operator.tensors.values())
    parts = zip(*(gradients([x], tensors) for x in results), strict=True)
    whole = dict(zip(operator.tensors, gradients(results, tensors), strict=True))
    close([sum(x) for x in parts], list(whole.values()))
    name = "v" if "v" in operator.tensors else "x"
    frozen = {other: x.detach() for other, x in operator.tensors.items() if other != name}
    close(gradients(operator(**frozen), operator.tensors[name])[0], whole[name])


@each([name for name in FORMS if name not in PLAIN])
def test_second_derivatives_are_refused(operator):
    """The written-out backwards are no functions of the inputs to autograd: an error, not a wrong number."""
    x = operator.tensors["k" if "k" in operator.tensors else "x"]
    with pytest.raises(RuntimeError, match="create_graph|no autograd formula"):
        torch.autograd.grad(operator()[0].sum(), x, create_graph=True)[0].sum().backward()


@each([name for name in FORMS if name not in PLAIN])
def test_forward_mode_is_refused(operator):
    """Kernels and written-out backwards would drop the tangents."""
    told = operator.function.__name__.replace("delta_rule_state", "(sleep_)?gated_delta_rule")
    for name, x in operator.tensors.items():

        def function(x, name=name):
            return operator(**{name: x})[0]

        with pytest.raises(RuntimeError, match=f"^{told}: .*forward-mode"):
            torch.func.jvp(function, (x.detach(),), (x.detach(),))
    for derivative in (lambda x: torch.func.jacfwd(function)(x), lambda x: torch.func.linearize(function, x)):
        with pytest.raises(RuntimeError, match=f"^{told}: .*forward-mode"):
            derivative(x.detach())


@pytest.mark.skipif(DEVICE != "cpu", reason="values are checked on the CPU alone")
@pytest.mark.skipif(torch.__version__ < (2, 11), reason="torch 2.9 can't read them in forward mode; 2.11 can")
def test_borders_are_checked_in_forward_mode():
    operator = OPERATORS["packed"]

    def wrong(v):
        return operator(v=v, impl="reference", cu_seqlens=torch.tensor([0, 5, 3, 22, 22]))[0]

    v = operator.tensors["v"].detach()
    with pytest.raises(ValueError, match="cu_seqlens: expected borders"):
        torch.func.jvp(wrong, (v,), (v,))


@each(PLAIN[:-1])
def test_forward_mode_is_right(operator):
    for name, x in operator.tensors.items():

        def function(x, name=name):
            return sum(y.sum() for y in operator(**{name: x}))

        _, tangent = torch.func.jvp(function, (x.detach(),), (x.detach(),))
        close(tangent, (torch.func.grad(function)(x.detach()) * x).sum().detach())


@each(FORMS, slow=[*LARGE, "short-triton", "state-triton", "hebbian-triton"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(operator, mode):
    want = [x.detach() for x in operator()]
    with mode():
        got = list(operator())
    assert not any(x.requires_grad for x in got)
    identical(got, want)


@each(RULES, slow=KERNELS)
def test_autocast_has_no_effect_on_the_forward(operator):
    def autocast(**arguments):
        with torch.autocast(DEVICE, torch.bfloat16):
            return operator.function(**arguments)

    identical(operator.outcome(autocast), operator.outcome())


WRITTEN_OUT = [f"{name}-torch" for name in ("pass", "packed", "hebbian", "long-chunks", "short", "slept-state")]


@each([*WRITTEN_OUT, "transition-torch", "pass-triton"], slow=())
def test_autocast_has_no_effect_on_written_out_backwards(operator):
    expected = operator.outcome()
    with torch.autocast(DEVICE, torch.bfloat16):
        identical(operator.outcome(), expected)


@each(["short-torch", "pass-torch", "packed-sleep-torch"], slow=["pass-torch"])
def test_compiled_inside_autocast(operator):
    if "window" in operator.options:  # one too long for short_windows.py
        operator = operator._replace(options=operator.options | {"window": 14})
    compiled = torch.compile(operator.function, fullgraph=True, backend="aot_eager")

    def autocast(**arguments):
        with torch.autocast(DEVICE, torch.bfloat16):
            return compiled(**arguments)

    close(operator.outcome(autocast), operator.outcome())


@each(OPERATORS)
def test_meta_tensors_give_shapes(operator):
    tensors = {name: x for name, x in (operator.tensors | operator.options).items() if isinstance(x, torch.Tensor)}
    for x, expected in zip(operator(**{n: x.to("meta") for n, x in tensors.items()}), operator(), strict=True):
        assert x.is_meta and x.shape == expected.shape and x.dtype == expected.dtype


@each([name for name in FORMS if name != "attention"])
@pytest.mark.parametrize("without", ["rows", "tokens", "both"])
def test_nothing_to_read_leaves_what_is_carried_and_zero_gradients(operator, without):
    """An idle rank of several still runs its model, forwards and backwards."""
    rows, tokens = slice(0 if without != "tokens" else None), slice(0 if without != "rows" else None)
    if "cu_seqlens" in operator.options and without != "tokens":
        pytest.skip("one row")
    if operator.function is gated_delta_rule_step and without != "rows":
        pytest.skip("one token")
    changes = {}
    for name, x in operator.tensors.items():
        if name in PER_TOKEN:
            x = x[rows] if operator.function is gated_delta_rule_step else x[rows, tokens]
        elif name in CARRIED:
            x = x[rows]
        changes[name] = x.detach().requires_grad_()
    leaves = dict(changes)
    changes |= {"lengths": 0 * operator.options["lengths"][rows]} if "lengths" in operator.options else {}
    changes |= {"cu_seqlens": 0 * operator.options["cu_seqlens"]} if "cu_seqlens" in operator.options else {}
    results = list(operator(**changes))
    for x, full in zip(results, operator(), strict=True):
        assert x.ndim == full.ndim and x.dtype == full.dtype
    carried = next((name for name in CARRIED if name in leaves), None)
    if carried:
        identical(results[-1], leaves[carried])
    elif operator.function is segment_transition:
        P, R = results
        identical(P, torch.eye(16, device=DEVICE).expand_as(P))
        assert not R.any()
    sum(x.sum() for x in results).backward()
    for name, x in leaves.items():
        identical(x.grad, torch.ones_like(x) if name == carried else torch.zeros_like(x))


def refuses(operator, argument, wrong):
    """`wrong` replaces an argument or, called, makes one of the right one; on a CPU, where values are looked at too."""
    given = {n: x.cpu() if isinstance(x, torch.Tensor) else x for n, x in (operator.tensors | operator.options).items()}
    given[argument] = wrong(given[argument]) if callable(wrong) else wrong
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*got "):
        operator.function(**given)


FAULTS = {
    "missing": lambda x: None,
    "number": lambda x: 0.5,
    "integers": lambda x: x.detach().long(),
    "rank": lambda x: x[None],
    "size": lambda x: torch.cat([x, x[..., :1]], -1),
    "device": lambda x: x.to("meta"),
}
OPTIONAL = ("initial_state", "bias", "conv_state")
# Arguments that the others go by: of these no rank, size or device is wrong in itself.
LEADING = {
    "k": ("size", "device"),
    "v": ("size",),
    "x": ("size", "device"),
    "weight": ("size",),
    "kernels": ("size",),
}
WITH_FAULTS = ["packed", "packed-sleep", "state", "transition", "step"]
WITH_FAULTS += ["padded-short-conv", "packed-short-conv", "dynamic-conv", "packed-dynamic-conv"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", WITH_FAULTS)
def test_wrong_tensors_are_named(name, fault):
    for argument in OPERATORS[name].tensors:
        if not (fault == "missing" and argument in OPTIONAL or fault in LEADING.get(argument, ())):
            refuses(OPERATORS[name], argument, FAULTS[fault])


@pytest.mark.parametrize("argument", ["x", "gate", "weight"])
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_tensors_of_the_norm_are_named(argument, fault):
    if argument != "x" or fault not in ("rank", "size", "device"):
        refuses(OPERATORS["norm"], argument, FAULTS[fault])


PASSES, ALL_RULES = "packed packed-sleep", "packed packed-sleep state transition step"
WRONG = [
    ("packed packed-sleep step", "q", [torch.Tensor.half]),
    (PASSES, "k", [lambda k: k[..., :0]]),
    (PASSES, "v", [lambda v: v[:, :-1]]),
    ("state", "v", [lambda v: v[:, :, :3]]),
    ("step", "v", [lambda v: v[:, :5]]),
    (PASSES, "initial_state", [torch.Tensor.double]),
    ("step", "state", [torch.Tensor.half]),
    ("packed packed-sleep step", "scale", [math.nan, 10**400]),
    (ALL_RULES, "rule", ["oja"]),
    (ALL_RULES, "impl", ["cuda"]),
    (ALL_RULES, "use_qk_l2norm", ["no", 1]),
    (ALL_RULES, "use_beta_sigmoid", [1]),
    ("plain-step hebbian short-hebbian", "allow_neg_eigval", [True]),
    (PASSES, "cu_seqlens", [torch.tensor(x) for x in ([0.0, 22.0], [0, 12, 2, 22], [0, 21], [0])]),
    ("packed-short-conv packed-dynamic-conv", "cu_seqlens", [torch.tensor(x) for x in ([0, 10], [0, 7, 3, 11])]),
    ("packed packed-short-conv packed-dynamic-conv", "cu_seqlens", [[0, 11]]),
    ("short-hebbian short-conv", "cu_seqlens", [torch.tensor([0, 13])]),
    ("packed", "segments", [0, -1, 2.0, True, "auto"]),
    ("packed-sleep state", "passes", [0, 2.5, math.nan, torch.tensor([2, 3])]),
    ("packed-sleep state", "window", [0, math.nan, 4.0]),
    ("packed-sleep", "output_pass", ["middle"]),
    ("step", "inplace", ["no"]),
    ("padded-short-conv", "lengths", [torch.tensor(x) for x in ([1, 1], [1.0] * 4, [2, 10, 1, 1], [2, -1, 1, 1])]),
    ("padded-short-conv", "lengths", [[2, 2, 2, 2]]),
    ("packed-short-conv", "conv_state", [lambda x: x.to(torch.complex64)]),
    ("dynamic-conv", "lengths", [torch.tensor([6, 1])]),
    ("packed-short-conv packed-dynamic-conv", "lengths", [torch.tensor([11])]),
    ("packed-dynamic-conv", "kernels", [lambda x: x[..., :0], lambda x: x[:, 1:]]),
    ("packed-short-conv packed-dynamic-conv", "activation", ["gelu"]),
    ("packed-short-conv norm", "impl", ["fast"]),
    ("norm", "x", [torch.tensor(1.0)]),
    ("norm", "eps", [-1.0, math.nan, "1e-5", 10**400]),
    ("attention", "backend", ["fast"]),
]


@pytest.mark.parametrize(
    ("name", "argument", "wrong"),
    [
        pytest.param(name, argument, wrong, id=f"{name}-{argument}-{n}")
        for names, argument, values in WRONG
        for name in names.split()
        for n, wrong in enumerate(values)
    ],
)
def test_wrong_arguments_are_named(name, argument, wrong):
    refuses(OPERATORS[name], argument, wrong)
