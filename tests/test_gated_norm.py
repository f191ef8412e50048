import pytest
import torch
import torch.nn.functional as F

from sleep_ops.kernels import gated_norm
from sleep_ops.ops.gated_norm import gated_norm_backward, gated_norm_forward, gated_rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SHAPES = {"heads": (2, 5, 3, 64), "odd": (7, 100), "one_row": (1, 16), "narrow": (300, 8), "wide": (3, 2304)}
EPS = 1e-5


def build(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, gate, dy = (torch.randn(shape, generator=generator) for _ in range(3))
    weight = 1 + 0.1 * torch.randn(shape[-1], generator=generator)
    return [t.to(DEVICE, dtype) for t in (x, gate, weight, dy)]


def run(impl, x, gate, weight, dy):
    leaves = [t.detach().requires_grad_() for t in (x, gate, weight)]
    y = gated_rms_norm(*leaves, eps=EPS, impl=impl)
    return dict(zip(("y", "dx", "dgate", "dweight"), (y, *torch.autograd.grad(y, leaves, dy)), strict=True))


def test_torch_form_is_the_definition():
    x, gate, weight, _ = build((4, 6), torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight * F.silu(gate)
    torch.testing.assert_close(gated_rms_norm(x, gate, weight, eps=EPS, impl="torch"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_form_within_twice_the_error_of_torch(shape, dtype):
    inputs = build(SHAPES[shape], dtype)
    truth = run("torch", *(t.double() for t in inputs))
    plain, result = run("torch", *inputs), run("triton", *inputs)
    for name, value in result.items():
        assert value.dtype == dtype, name
        error = (value.double() - truth[name]).abs().max()
        slack = 4 * torch.finfo(torch.float32).eps * (1 + truth[name].abs().max())
        assert error <= 2 * (plain[name].double() - truth[name]).abs().max() + slack, name


def test_zero_rows_and_far_gates_stay_finite():
    x, gate = torch.zeros(4, 8, device=DEVICE), torch.full((4, 8), -200.0, device=DEVICE)
    x[1], gate[2] = 1e4, 200.0
    for impl in ("torch", "triton"):
        result = run(impl, x, gate, torch.ones(8, device=DEVICE), torch.ones(4, 8, device=DEVICE))
        assert all(value.isfinite().all() for value in result.values()), impl


def test_float32_weight_with_half_precision_rows():
    x, gate, weight, dy = build((5, 16), torch.float32)
    args = (x.half(), gate.half(), weight, dy.half())
    result, expected = run("triton", *args), run("torch", *args)
    for name, value in result.items():
        assert value.dtype == (torch.float32 if name == "dweight" else torch.float16), name
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=2e-3)


def test_weight_gradient_is_the_same_every_time():
    inputs = build((500, 16), torch.float32)
    assert torch.equal(run("triton", *inputs)["dweight"], run("triton", *inputs)["dweight"])


def test_gradcheck():
    leaves = [t.requires_grad_() for t in build((3, 5), torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *a: gated_rms_norm(*a, eps=EPS, impl="torch"), leaves)


def test_everything_is_written(poisoned):
    inputs = build((33, 100), torch.float32)
    expected = run("triton", *inputs)
    poisoned(gated_norm)
    for name, value in run("triton", *inputs).items():
        assert torch.equal(value, expected[name]), name


def test_opcheck():
    *inputs, dy = build((3, 2, 5), torch.float32)
    torch.library.opcheck(gated_norm_backward, (dy, *inputs, EPS))
    torch.library.opcheck(gated_norm_forward, (*(t.requires_grad_() for t in inputs), EPS))


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(x=torch.zeros(2, 8, dtype=torch.int32)), "x"),
        (dict(gate=torch.zeros(2, 7)), "gate"),
        (dict(weight=torch.zeros(7)), "weight"),
        (dict(weight=torch.zeros(8, device="meta")), "weight"),
        (dict(weight=torch.ones(8, dtype=torch.int64)), "weight"),
        (dict(weight=None), "weight"),
        (dict(x=None), "x"),
        (dict(x=torch.tensor(1.0)), "x"),
        (dict(eps=-1.0), "eps"),
        (dict(eps=float("nan")), "eps"),
        (dict(eps="1e-5"), "eps"),
        (dict(impl="fast"), "impl"),
    ],
)
def test_bad_inputs_name_the_argument(change, name):
    args = dict(x=torch.zeros(2, 8), gate=torch.zeros(2, 8), weight=torch.ones(8), eps=EPS)
    with pytest.raises(ValueError, match=f"^{name}: expected .*got "):
        gated_rms_norm(**(args | change))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 3, 8)])
def test_no_rows(shape, impl):
    leaves = [x.requires_grad_() for x in build(shape, torch.float32)[:3]]
    y = gated_rms_norm(*leaves, eps=EPS, impl=impl)
    y.sum().backward()
    assert y.shape == shape and all(x.grad.shape == x.shape and not x.grad.any() for x in leaves)
