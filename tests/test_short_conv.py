"""The short convolution: both forms against its definition, runs cut in two, padding."""

import functools

import pytest
import torch
import torch.nn.functional as F
from judge import close, exact, identical, largest_error, outcome, triton_within_two_times
from small import DEVICE, normal

from sleep_ops.ops.short_conv import ShortConvOutput, short_convolution

# name: (B, T, D, W, lengths or None, borders or None)
CASES = {
    "one_token": (2, 1, 20, 4, None, None),
    "shorter_than_state": (3, 2, 16, 5, None, None),
    "one_tap": (2, 9, 16, 1, None, None),
    "two_blocks": (2, 40, 70, 4, None, None),
    "padded": (4, 9, 20, 4, (9, 0, 2, 5), None),
    "packed": (1, 40, 20, 4, None, (0, 1, 1, 8, 38, 40)),
    "packed_one": (1, 5, 20, 3, None, (0, 5)),
}


def build(case, dtype=torch.float32):
    B, T, D, W, lengths, borders = CASES[case]
    N = B if borders is None else len(borders) - 1
    shapes = dict(x=(B, T, D), weight=(D, W), bias=(D,), conv_state=(N, W - 1, D))
    tensors = {name: normal(*shape, seed=n, dtype=dtype) for n, (name, shape) in enumerate(shapes.items())}
    options = {"lengths": lengths, "cu_seqlens": borders}
    options = {name: torch.tensor(x, device=DEVICE) for name, x in options.items() if x is not None}
    return {name: x.requires_grad_() for name, x in tensors.items()}, options


def one_by_one(x, weight, bias, conv_state, lengths=None, cu_seqlens=None, activation="silu"):
    """The definition, token by token and sequence by sequence."""
    W = weight.shape[1]
    output, states = torch.zeros_like(x), []
    for n in range(conv_state.shape[0]):
        if cu_seqlens is None:
            row, start, stop = n, 0, x.shape[1] if lengths is None else int(lengths[n])
        else:
            row, start, stop = 0, int(cu_seqlens[n]), int(cu_seqlens[n + 1])
        seen = torch.cat([conv_state[n], x[row, start:stop]])
        for t in range(stop - start):
            z = (seen[t : t + W] * weight.t()).sum(0) + (0 if bias is None else bias)
            output[row, start + t] = F.silu(z) if activation else z
        states.append(seen[seen.shape[0] - (W - 1) :])
    return ShortConvOutput(output, torch.stack(states))


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("case", CASES)
def test_torch_form_is_the_definition(case, activation):
    tensors, options = build(case, torch.float64)
    options["activation"] = activation
    got, truth = (outcome(f, tensors, **options) for f in (short_convolution, one_by_one))
    exact(got, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_triton_form_within_twice_the_error_of_torch(case, dtype):
    tensors, options = build(case, dtype)
    rounding = 4 * torch.finfo(torch.float32).eps
    triton_within_two_times(short_convolution, tensors, rounding, largest_error, **options)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("cut", [1, 2, 5])
def test_split_run_equals_whole_run(impl, cut):
    tensors, _ = build("shorter_than_state")
    x, conv_state = normal(3, 7, 16, seed=9), tensors["conv_state"].detach()
    convolve = functools.partial(
        short_convolution, weight=tensors["weight"].detach(), bias=tensors["bias"].detach(), impl=impl
    )
    whole, first = convolve(x, conv_state=conv_state), convolve(x[:, :cut], conv_state=conv_state)
    second = convolve(x[:, cut:], conv_state=first.conv_state)
    close(torch.cat([first.output, second.output], 1), whole.output)
    identical(second.conv_state, whole.conv_state)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_padding_is_never_read(impl):
    tensors, options = build("padded")
    tensors = {name: x.detach() for name, x in tensors.items()}
    clean = short_convolution(**tensors, **options, impl=impl)
    padded = torch.arange(9, device=DEVICE) >= options["lengths"][:, None]
    tensors["x"] = tensors["x"].masked_fill(padded[..., None], float("nan"))
    dirty = short_convolution(**tensors, **options, impl=impl)
    identical(tuple(dirty), tuple(clean))
    assert not dirty.output[padded].any()


def test_gradcheck():
    tensors, options = build("packed_one", torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, conv_state: short_convolution(
            x, weight, bias, conv_state=conv_state, impl="torch", **options
        ),
        list(tensors.values()),
    )
