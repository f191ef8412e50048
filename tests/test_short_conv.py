import pytest
import torch
import torch.nn.functional as F
from cases import slow_unless

from sleep_ops.kernels import short_conv
from sleep_ops.ops.short_conv import short_conv_backward, short_conv_forward, short_convolution

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
# name: (B, T, D, W, lengths or None, borders or None)
CASES = {
    "one_token": (2, 1, 20, 4, None, None),
    "shorter_than_tail": (3, 2, 16, 5, None, None),
    "one_tap": (2, 9, 16, 1, None, None),
    "two_blocks": (2, 40, 70, 4, None, None),
    "padded": (4, 9, 20, 4, (9, 0, 2, 5), None),
    "packed": (1, 40, 20, 4, None, (0, 1, 1, 8, 38, 40)),
    "packed_one": (1, 5, 20, 3, None, (0, 5)),
}


def build(case, dtype, seed=0):
    B, T, D, W, lengths, borders = CASES[case]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    N = B if borders is None else len(borders) - 1
    tensors = dict(x=draw(B, T, D), weight=draw(D, W), bias=draw(D), tail=draw(N, W - 1, D))
    options = {}
    if lengths is not None:
        options["lengths"] = torch.tensor(lengths, device=DEVICE)
    if borders is not None:
        options["cu_seqlens"] = torch.tensor(borders, device=DEVICE, dtype=torch.int32)
    return tensors, options, (draw(B, T, D), draw(N, W - 1, D))


def one_by_one(x, weight, bias, tail, lengths=None, cu_seqlens=None, activation="silu"):
    """The definition, token by token and sequence by sequence."""
    W = weight.shape[1]
    output, tails = torch.zeros_like(x), []
    for n in range(tail.shape[0]):
        if cu_seqlens is None:
            row, start, stop = n, 0, x.shape[1] if lengths is None else int(lengths[n])
        else:
            row, start, stop = 0, int(cu_seqlens[n]), int(cu_seqlens[n + 1])
        seen = torch.cat([tail[n], x[row, start:stop]])
        for t in range(stop - start):
            z = (seen[t : t + W] * weight.t()).sum(0) + (0 if bias is None else bias)
            output[row, start + t] = F.silu(z) if activation else z
        tails.append(seen[seen.shape[0] - (W - 1) :])
    return output, torch.stack(tails)


def run(function, tensors, options, cotangents, dtype=None):
    leaves = {k: v.to(dtype or v.dtype).requires_grad_() for k, v in tensors.items()}
    output, tail = function(**leaves, **options)
    loss = (output * cotangents[0].to(output.dtype)).sum() + (tail * cotangents[1].to(output.dtype)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    grads = [torch.zeros_like(v) if g is None else g for v, g in zip(leaves.values(), grads, strict=True)]
    named = dict(zip((f"d{name}" for name in leaves), grads, strict=True))
    return {"output": output.detach(), "tail": tail.detach()} | named


def worst(x):
    return float(x.double().abs().max()) if x.numel() else 0.0


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("case", CASES)
def test_torch_form_is_the_definition(case, activation):
    tensors, options, cotangents = build(case, torch.float64)
    options["activation"] = activation
    truth = run(one_by_one, tensors, options, cotangents)
    result = run(lambda **a: short_convolution(impl="torch", **a), tensors, options, cotangents)
    for name, value in result.items():
        torch.testing.assert_close(value, truth[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_triton_form_within_twice_the_error_of_torch(case, dtype):
    tensors, options, cotangents = build(case, dtype)
    truth = run(lambda **a: short_convolution(impl="torch", **a), tensors, options, cotangents, torch.float64)
    plain = run(lambda **a: short_convolution(impl="torch", **a), tensors, options, cotangents)
    result = run(lambda **a: short_convolution(impl="triton", **a), tensors, options, cotangents)
    for name, value in result.items():
        assert value.dtype == dtype, name
        slack = 4 * torch.finfo(torch.float32).eps * (1 + worst(truth[name]))
        assert worst(value - truth[name]) <= 2 * worst(plain[name] - truth[name]) + slack, name


def test_triton_form_without_tail_bias_and_activation():
    tensors, _, _ = build("two_blocks", torch.float32)
    args = (tensors["x"], tensors["weight"])
    result = short_convolution(*args, activation=None, impl="triton")
    expected = short_convolution(*args, activation=None, impl="torch")
    torch.testing.assert_close(result.output, expected.output)
    torch.testing.assert_close(result.tail, expected.tail, rtol=0, atol=0)


def test_float32_weights_with_half_precision_tokens():
    tensors, _, cotangents = build("two_blocks", torch.float32)
    tensors["x"], tensors["tail"] = tensors["x"].half(), tensors["tail"].half()
    result = run(lambda **a: short_convolution(impl="triton", **a), tensors, {}, cotangents)
    expected = run(lambda **a: short_convolution(impl="torch", **a), tensors, {}, cotangents)
    for name, value in result.items():
        assert value.dtype == (torch.float16 if name in ("output", "tail", "dx", "dtail") else torch.float32), name
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_weight_gradient_is_the_same_every_time(impl):
    tensors, options, cotangents = build("packed", torch.float32)
    first, second = (
        run(lambda **a: short_convolution(impl=impl, **a), tensors, options, cotangents)["dweight"] for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("cut", [1, 2, 5])
def test_split_run_equals_whole_run(impl, cut):
    tensors, _, _ = build("shorter_than_tail", torch.float32)
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rest = (tensors["weight"], tensors["bias"])
    whole = short_convolution(x, *rest, tail=tensors["tail"], impl=impl)
    first = short_convolution(x[:, :cut], *rest, tail=tensors["tail"], impl=impl)
    second = short_convolution(x[:, cut:], *rest, tail=first.tail, impl=impl)
    torch.testing.assert_close(torch.cat([first.output, second.output], 1), whole.output)
    assert torch.equal(second.tail, whole.tail)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_padding_is_never_read(impl):
    tensors, options, _ = build("padded", torch.float32)
    clean = short_convolution(**tensors, **options, impl=impl)
    padded = torch.arange(9, device=DEVICE) >= options["lengths"][:, None]
    tensors["x"] = tensors["x"].masked_fill(padded[..., None], float("nan"))
    dirty = short_convolution(**tensors, **options, impl=impl)
    assert torch.equal(dirty.output, clean.output) and torch.equal(dirty.tail, clean.tail)
    assert not dirty.output[padded].any()


def test_gradcheck():
    tensors, options, _ = build("packed_one", torch.float64)
    leaves = [v.requires_grad_() for v in tensors.values()]
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, tail: short_convolution(x, weight, bias, tail=tail, impl="torch", **options), leaves
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_second_derivatives_are_refused(impl):
    tensors, _, _ = build("one_token", torch.float32)
    output = short_convolution(**{name: x.requires_grad_() for name, x in tensors.items()}, impl=impl).output
    with pytest.raises(RuntimeError, match="create_graph|no autograd formula"):
        torch.autograd.grad(output.sum(), tensors["x"], create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("case", slow_unless(["padded", "packed"], ["two_blocks", "padded", "packed"]))
def test_everything_is_written(case, poisoned):
    tensors, options, cotangents = build(case, torch.float32)
    expected = run(lambda **a: short_convolution(impl="triton", **a), tensors, options, cotangents)
    poisoned(short_conv)
    for name, value in run(lambda **a: short_convolution(impl="triton", **a), tensors, options, cotangents).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("case", slow_unless(["packed"], ["padded", "packed", "bare"]))
def test_opcheck(case):
    tensors, options, (dy, _) = build("two_blocks" if case == "bare" else case, torch.float32)
    if case == "bare":
        tensors |= dict(bias=None, tail=None)
    places = (options.get("lengths"), options.get("cu_seqlens"), True)
    torch.library.opcheck(short_conv_backward, (dy, *tensors.values(), *places))
    leaves = [None if v is None else v.requires_grad_() for v in tensors.values()]
    torch.library.opcheck(short_conv_forward, (*leaves, *places))


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(x=torch.zeros(3, 16)), "x"),
        (dict(x=torch.zeros(3, 2, 16, dtype=torch.int64)), "x"),
        (dict(weight=torch.zeros(15, 5)), "weight"),
        (dict(bias=torch.zeros(15)), "bias"),
        (dict(tail=torch.zeros(3, 3, 16)), "tail"),
        (dict(lengths=torch.zeros(2, dtype=torch.int64)), "lengths"),
        (dict(lengths=torch.zeros(3)), "lengths"),
        (dict(lengths=[2, 2, 2]), "lengths"),
        (dict(lengths=torch.tensor([2, 3, 1])), "lengths"),
        (dict(lengths=torch.tensor([2, -1, 1])), "lengths"),
        (dict(cu_seqlens=torch.tensor([0, 2])), "cu_seqlens"),
        (dict(x=torch.zeros(1, 3, 16), tail=None, cu_seqlens=[0, 3]), "cu_seqlens"),
        (dict(x=torch.zeros(1, 3, 16), tail=None, cu_seqlens=torch.tensor([0, 2])), "cu_seqlens"),
        (dict(x=torch.zeros(1, 3, 16), tail=None, cu_seqlens=torch.tensor([0, 2, 1, 3])), "cu_seqlens"),
        (dict(x=None), "x"),
        (dict(weight=None), "weight"),
        (dict(weight=torch.zeros(16, 5, dtype=torch.int64)), "weight"),
        (dict(tail=torch.zeros(3, 4, 16, dtype=torch.complex64)), "tail"),
        (dict(activation="gelu"), "activation"),
        (dict(impl="fast"), "impl"),
        (dict(weight=torch.zeros(16, 5, device="meta")), "weight"),
    ],
)
def test_bad_inputs_name_the_argument(change, name):
    tensors = dict(x=torch.zeros(3, 2, 16), weight=torch.zeros(16, 5), bias=torch.zeros(16), tail=torch.zeros(3, 4, 16))
    with pytest.raises(ValueError, match=f"^{name}: expected .*got "):
        short_convolution(**(tensors | change))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("places", ["rows", "lengths", "cu_seqlens"])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0)])
def test_no_tokens(batch, tokens, places, impl):
    """The tail is handed on, and gradients are zero."""
    num_seqs, options = batch, {}
    if places == "lengths":
        options["lengths"] = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    if places == "cu_seqlens":
        batch, tokens, num_seqs = 1, 0, 2
        options["cu_seqlens"] = torch.zeros(num_seqs + 1, dtype=torch.int32, device=DEVICE)
    shapes = dict(x=(batch, tokens, 16), weight=(16, 4), bias=(16,), tail=(num_seqs, 3, 16))
    leaves = {name: torch.ones(shape, device=DEVICE, requires_grad=True) for name, shape in shapes.items()}
    output, tail = short_convolution(**leaves, **options, impl=impl)
    assert output.shape == (batch, tokens, 16) and torch.equal(tail, leaves["tail"])
    (output.sum() + tail.sum()).backward()
    assert not leaves["weight"].grad.any() and not leaves["bias"].grad.any()
    assert torch.equal(leaves["tail"].grad, torch.ones_like(tail))
