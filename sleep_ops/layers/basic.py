"""PyTorch's modules with this package's operations: the same parameters under the same names."""

from torch import Tensor, nn

from sleep_ops.ops.linear import linear
from sleep_ops.ops.rms_norm import rms_norm


class Linear(nn.Linear):
    """`nn.Linear` by `sleep_ops.ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` with a weight [size], by `sleep_ops.ops.rms_norm`."""

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
