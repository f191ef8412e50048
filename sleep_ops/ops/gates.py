"""Raw gate inputs and their activations, where operators over kernels share them."""

import torch.nn.functional as F
from torch import Tensor

# A raw gate or beta input so low that softplus and sigmoid, and their derivatives, are exactly 0 in every dtype.
CLOSED = -1e4


def log_decay_gradient(dg: Tensor, g: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of g (raw, [..., HV]), A_log and dt_bias from that of -exp(A_log) * softplus(g + dt_bias), float32.

    Those of A_log and dt_bias ([HV]) come in their dtypes, that of g in float32.
    """
    tokens = tuple(range(dg.ndim - 1))
    gate_input, rate = g.float() + dt_bias.float(), A_log.float().exp()
    dA_log = (dg * -rate * F.softplus(gate_input)).sum(tokens).to(A_log.dtype)
    dg = dg * -rate * gate_input.sigmoid()
    return dg, dA_log, dg.sum(tokens).to(dt_bias.dtype)
