"""The emulator computes what numpy does: arithmetic, sums across threads, and products in every form Triton emits."""

import itertools

import pytest
import torch
from ptx import toys
from ptx.emulation import DTYPES
from ptx.emulator import Unsupported, emulated
from ptx.emulator.parse import Parser
from ptx.emulator.translate import Translator


def nan(*sizes: int) -> torch.Tensor:
    return torch.full(sizes, torch.nan)


@pytest.mark.parametrize("arch", [90, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise(arch, dtype):
    x, y = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    z = nan(1000)
    with emulated(arch) as emulator:
        toys.elementwise_kernel[(4,)](x, y, z, 1000, BLOCK=256)
    torch.testing.assert_close(z, x.float().exp() + y.float(), rtol=2e-6, atol=1e-6)
    assert not emulator.reports, emulator.summary()


@pytest.mark.parametrize("arch", [90, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_and_signs_in_the_type_of_their_terms(arch, dtype):
    """Two of 16 bits are added at a time."""
    x, y = torch.randn(2, 512, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    y[::3] *= 2**-9
    z = nan(2, 512).to(x.dtype)
    with emulated(arch) as emulator:
        toys.sum_kernel[(1,)](x, y, z, BLOCK=512)
    assert torch.equal(z, torch.stack([x + y, -x]))
    assert not emulator.reports, emulator.summary()


def test_integers():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-1000, 1000, (128,), generator=generator, dtype=torch.int32) for _ in range(2))
    y[y == 0] = 1
    z = torch.zeros(8, 128, dtype=torch.int32)
    with emulated(90) as emulator:
        toys.integer_kernel[(1,)](x, y, z, BLOCK=128)
    quotient = torch.div(x, y, rounding_mode="trunc")
    shift = y & 7
    expected = [quotient, x - quotient * y, x << shift, x >> shift, (x & y) ^ (x | 5)]
    expected += [torch.minimum(x, y), torch.maximum(x, y), x.abs()]
    for row, value in zip(z, expected, strict=True):
        assert torch.equal(row, value)
    assert not emulator.reports, emulator.summary()


@pytest.mark.parametrize("arch", [90, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_functions(arch, dtype):
    x = (0.05 + 3 * torch.rand(256, generator=torch.Generator().manual_seed(0))).to(DTYPES[dtype])
    z = nan(11, 256)
    with emulated(arch) as emulator:
        toys.float_kernel[(1,)](x, z, BLOCK=256)
    a = x.double()
    expected = [a.exp2(), a.log(), a.sqrt(), a.rsqrt(), 1 / a, a.sigmoid(), torch.where(a > 1, a, -a), a.trunc()]
    expected += [a.cumsum(0), a - a.sum(), a - a.max()]
    torch.testing.assert_close(z.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert not emulator.reports, emulator.summary()


SHAPES = [(64, 64, 64), (16, 16, 16), (64, 32, 128), (128, 128, 32), (32, 128, 64), (64, 256, 16), (64, 16, 32)]
PRECISIONS = {"bf16": ("ieee",), "f16": ("ieee",), "f32": ("ieee", "tf32", "tf32x3")}
QUICK = [(64, 64, 64), (16, 16, 16)]


def forms() -> list:
    """Dtypes, shapes, transposition of either side, precision; large products of float32 are left out."""
    found = []
    for arch, dtype, shape, trans_a, trans_b in itertools.product(
        (90, 80), DTYPES, SHAPES, (False, True), (False, True)
    ):
        for precision in PRECISIONS[dtype]:
            if dtype == "f32" and shape[0] * shape[1] * shape[2] > 64**3:
                continue
            quick = shape in QUICK and (dtype == "bf16" or (precision != "ieee" and trans_a != trans_b))
            name = f"sm{arch}-{dtype}-{'x'.join(map(str, shape))}-{precision}" + "-ta" * trans_a + "-tb" * trans_b
            marks = () if quick else pytest.mark.slow
            found.append(pytest.param(arch, DTYPES[dtype], shape, trans_a, trans_b, precision, id=name, marks=marks))
    return found


@pytest.mark.parametrize(("arch", "dtype", "shape", "trans_a", "trans_b", "precision"), forms())
def test_products(arch, dtype, shape, trans_a, trans_b, precision):
    M, N, K = shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*size, generator=generator).to(dtype) for size in ((M, K), (K, N)))
    c = nan(M, N)
    stored = (x.T.contiguous() if transposed else x for x, transposed in ((a, trans_a), (b, trans_b)))
    with emulated(arch) as emulator:
        toys.dot_kernel[(1,)](*stored, c, M, N, K, trans_a, trans_b, precision)
    want = a.double() @ b.double()
    error = (c.double() - want).abs().max() / want.abs().max()
    assert error < (2e-3 if precision == "tf32" else 1e-5)
    assert not emulator.reports, emulator.summary()
    if dtype != torch.float32 or precision != "ieee":
        assert emulator.counts["dot_kernel"]["tensor"]


@pytest.mark.parametrize("arch", [90, 80])
@pytest.mark.parametrize(("M", "N", "D"), [(64, 64, 64), (32, 128, 16), (128, 64, 32)])
def test_transposed_product_of_a_product(arch, M, N, D):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(*size, generator=generator).bfloat16() / 8 for size in ((M, 64), (64, N), (M, D)))
    o = nan(N, D)
    with emulated(arch) as emulator:
        toys.chained_kernel[(1,)](a, b, c, o, M, N, 64, D)
    want = (a.double() @ b.double()).bfloat16().double().T @ c.double()
    assert (o.double() - want).norm() / want.norm() < 3e-3
    assert not emulator.reports, emulator.summary()


@pytest.mark.parametrize(("arch", "stages"), [(90, 1), (90, 3), (80, 2), (80, 4)])
def test_pipelined_products(arch, stages):
    x, y = torch.randn(2, 6, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    o, s = nan(64, 64), nan(64)
    with emulated(arch) as emulator:
        toys.pipelined_kernel[(1,)](x, y, o, s, 6, C=64, B=64, BOTH=False, num_stages=stages)
    want = (x.double() @ y.double().mT).sum(0)
    assert (o.double() - want).norm() / want.norm() < 1e-5
    assert not emulator.reports, emulator.summary()


def test_programs_that_part_ways():
    """Each program's loop is as long as its number says."""
    x = torch.arange(40.0)
    z = nan(3, 32)
    with emulated(90):
        toys.counted_kernel[(3,)](x, z, BLOCK=32)
    for i in range(3):
        assert torch.equal(z[i], sum((x[j : j + 32] for j in range(i + 1)), torch.zeros(32)))


MODULE = """
.visible .entry one(
\t.param .u64 one_param_0
)
{
\t.reg .b32 %r<4>;
\tINSTRUCTION
\tret;
                                        // -- End function
}
"""


@pytest.mark.parametrize(
    "instruction",
    ["atom.global.add.u32 %r1, [%r2], %r3;", "mbarrier.init.shared::cta.b64 [%r1], 1;", "bar.sync 1, 64;"],
)
def test_unknown_instructions_are_named(instruction):
    with pytest.raises(Unsupported, match=instruction.split()[0].replace(".", r"\.")):
        Translator(Parser(MODULE.replace("INSTRUCTION", instruction)).program())


def test_architectures_that_are_not_emulated_are_refused():
    with pytest.raises(ValueError, match="arch: expected one of"), emulated(100):
        pass
