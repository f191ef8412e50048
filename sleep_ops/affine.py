"""A pass over a segment of tokens as an affine map of the fast weights: S_out = P S_in + R, per head.

With k, v, g and beta fixed, every write of the gated delta rule is affine in S, so segments compose and N replay
passes are a power. For normalised keys, beta in [0, 2] and g <= 0 the norm of P is at most 1, so powers are stable.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sleep_ops.ops.dispatch import run_pass
from sleep_ops.validation import check_delta_rule, check_tensor


class Transition(NamedTuple):
    """S -> P S + R, with P [N, HV, K, K] and R [N, HV, K, V], float32 (float64 from float64 inputs).

    Differentiable; every method returns new tensors.
    """

    P: Tensor
    R: Tensor

    def apply(self, state: Tensor) -> Tensor:
        """The state left by the segment from `state` [N, HV, K, V], of P's dtype. ValueError for any other."""
        check_tensor("state", state, self.R.shape, "[N, HV, K, V]", self.P.device, (self.P.dtype,))
        with torch.autocast(device_type=self.P.device.type, enabled=False):
            return self.P @ state + self.R

    def then(self, later: "Transition") -> "Transition":
        """This segment, then `later`: (P2 P1, P2 R1 + R2). ValueError unless both have the same shapes and dtype."""
        if not isinstance(later, Transition):
            raise ValueError(f"later: expected a Transition, got {type(later).__name__}")
        for mine, other in zip(self, later, strict=True):
            check_tensor("later", other, mine.shape, "of this Transition", mine.device, (mine.dtype,))
        with torch.autocast(device_type=self.P.device.type, enabled=False):
            return Transition(later.P @ self.P, later.P @ self.R + later.R)

    def power(self, n: int) -> "Transition":
        """n passes over the segment, by repeated squaring; n = 0 is the identity. ValueError for n < 0."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"n: expected an integer >= 0, got {n!r}")
        identity = torch.eye(self.P.shape[-1], dtype=self.P.dtype, device=self.P.device).expand_as(self.P)
        result, square = Transition(identity, torch.zeros_like(self.R)), self
        while n:
            if n & 1:
                result = result.then(square)
            n >>= 1
            if n:
                square = square.then(square)
        return result

    def fixed_point(self) -> Tensor:
        """The state infinitely many passes converge to from any start, (I - P)^-1 R, [N, HV, K, V].

        Raises ValueError where passes don't converge: P has an eigenvalue of modulus 1, as without decay when the
        segment's keys don't span the key space. Looking for one makes the host wait for the device; under
        torch.compile nothing is checked.
        """
        if not torch.compiler.is_compiling():
            radius = torch.linalg.eigvals(self.P.detach()).abs().amax().item()
            if not radius < 1 - self.P.shape[-1] * torch.finfo(self.P.dtype).eps:
                raise ValueError(f"P: expected a spectral radius below 1 for a fixed point, got {radius:.9g}")
        identity = torch.eye(self.P.shape[-1], dtype=self.P.dtype, device=self.P.device)
        return torch.linalg.solve(identity - self.P, self.R)


def segment_transition(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    rule: str = "delta",
    use_qk_l2norm: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    impl: str = "auto",
) -> Transition:
    """The map of one pass over k [B, T, H, K], v [B, T, HV, V] with g, beta [B, T, HV]; options of `gated_delta_rule`.

    One ordinary state pass over the widened values [0 | v] from the widened state [I | 0] leaves [P | R]. One map per
    batch row, or per sequence with `cu_seqlens` (an empty one is the identity). Differentiable in every tensor.
    """
    gates = {
        "cu_seqlens": cu_seqlens,
        "rule": rule,
        "use_qk_l2norm": use_qk_l2norm,
        "A_log": A_log,
        "dt_bias": dt_bias,
        "use_beta_sigmoid": use_beta_sigmoid,
        "allow_neg_eigval": allow_neg_eigval,
    }
    check_delta_rule(None, k, v, g, beta, scale=None, initial_state=None, impl=impl, **gates)
    key_dim, value_heads = k.shape[-1], v.shape[2]
    num_states = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    widened = torch.cat([v.new_zeros(*v.shape[:3], key_dim), v], -1)
    start = torch.eye(
        key_dim, key_dim + v.shape[-1], dtype=torch.promote_types(v.dtype, torch.float32), device=v.device
    )
    start = start.expand(num_states, value_heads, -1, -1).contiguous()
    options = {**gates, "scale": 1.0, "initial_state": start, "impl": impl}
    state = run_pass(None, k, widened, g, beta, **options)[1]
    return Transition(state[..., :key_dim], state[..., key_dim:])
