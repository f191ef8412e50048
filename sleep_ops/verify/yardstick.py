"""The yardstick of the kernels' 2x rule: their arithmetic in plain PyTorch, operands of products in 16 bits.

Sums, gates, the inverse and the states are float32, as in the kernels; so are float32's own products.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from sleep_ops.ops import dispatch
from sleep_ops.ops.chunk_torch import BatchPass, TorchPass


@contextmanager
def rounded_as_kernels() -> Iterator[None]:
    """Meanwhile every operator of the rule computes like this where it is given impl="torch"."""
    with mock.patch.object(dispatch, "TorchPass", RoundedPass):
        yield


def plain_error(name: str, plain: dict[str, Tensor], truth: dict[str, Tensor], error: Callable) -> float:
    """By how much the yardstick's result of that name errs, by error(x, truth).

    A_log and dt_bias have few gradients, each a sum of what g gets over all tokens, in which errors may cancel by luck:
    what counts is the largest of their errors and g's.
    """
    sums = ("dA_log", "ddt_bias")
    names = [x for x in ("dg", *sums) if x in plain] if name in sums else [name]
    return max(error(plain[x], truth[x]) for x in names)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype)


class _Product(torch.autograd.Function):
    """x y [..., m, n] of rounded operands, as are those of its gradients."""

    @staticmethod
    def forward(ctx, x, y, dtype):
        x, y = _rounded(x, dtype), _rounded(y, dtype)
        ctx.save_for_backward(x, y)
        ctx.dtype = dtype
        return x @ y

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        grad = _rounded(grad, ctx.dtype)
        return grad @ y.mT, x.mT @ grad, None


class _Solution(torch.autograd.Function):
    """U = A X of L U = X, with A = L^-1 known: dX = A^T dU, dL = -dX U^T below the diagonal."""

    @staticmethod
    def forward(ctx, L, A, x, dtype):
        A = _rounded(A, dtype)
        U = A @ _rounded(x, dtype)
        ctx.save_for_backward(A, U)
        ctx.dtype = dtype
        return U

    @staticmethod
    def backward(ctx, grad):
        A, U = ctx.saved_tensors
        dX = A.mT @ _rounded(grad, ctx.dtype)
        dL = -(_rounded(dX, ctx.dtype) @ _rounded(U, ctx.dtype).mT).tril(-1)
        return _rounded(dL, ctx.dtype), None, dX, None


class _Weights(torch.autograd.Function):
    """The weights QK as they are, with their gradient rounded: decays get theirs from that too, as from dL."""

    @staticmethod
    def forward(ctx, QK, dtype):
        ctx.dtype = dtype
        return QK.view_as(QK)

    @staticmethod
    def backward(ctx, grad):
        return _rounded(grad, ctx.dtype), None


class RoundedBatch(BatchPass):
    """The equations of chunk_torch.py, chunk after chunk, differentiated by autograd."""

    def __init__(self, k, *others):
        self.dtype = k.dtype
        super().__init__(k, *others)
        self.is_short = False  # so that sleeps are made of rounded passes: short_windows.py rounds nothing

    def _key(self, x):
        return super()._key(x).to(x.dtype)

    def _product(self, x, y):
        lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        return _Product.apply(x.expand(*lead, -1, -1), y.expand(*lead, -1, -1), self.dtype)

    def _scan(self, q, v, state):
        n, N, R, _, V = v.shape
        S = v.new_zeros(N, R, self.k.shape[-1], V) if state is None else state
        outputs = []
        for i in range(n):
            k, G_exp, decay, U = self.k[i], self.G_exp[i], self.decay[i], self.beta[i] * v[i]
            if self.L is not None:
                Y = v[i] - G_exp * self._product(k, S)
                U = _Solution.apply(self.L[i], self.A[i], self.beta[i] * Y, self.dtype)
            if q is not None:
                QK = _Weights.apply(decay * self._product(q[i], k.mT), self.dtype)
                outputs.append(G_exp * self._product(q[i], S) + self._product(QK, U))
            S = G_exp[..., -1:, :] * S + self._product(k.mT, decay[..., -1:, :].mT * U)
        return S if q is None else (torch.stack(outputs), S)


class RoundedPass(TorchPass):
    """`TorchPass` with the kernels' roundings."""

    batch_pass = RoundedBatch
