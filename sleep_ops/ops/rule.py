"""Options that every form of the gated delta rule takes, and the checks of its tokens and options."""

from typing import NamedTuple

import torch
from torch import Tensor

from sleep_ops.checks import IMPLS, RULES, check_choice, check_flags
from sleep_ops.reference import log_decay, write_strength
from sleep_ops.validation import check_cu_seqlens, check_full, check_heads, check_scale, check_state, check_tensor


class RuleOptions(NamedTuple):
    """How tokens decay and write: see `gated_delta_rule`, whose arguments these are."""

    rule: str = "delta"
    use_qk_l2norm: bool = False
    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    use_beta_sigmoid: bool = False
    allow_neg_eigval: bool = False

    @property
    def beta_scale(self) -> float:
        """Factor of beta's sigmoid; 0 for a beta that needs none."""
        return (2.0 if self.allow_neg_eigval else 1.0) if self.use_beta_sigmoid else 0.0

    def activate(self, g: Tensor, beta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The log decay and the write strength [..., HV] that g and beta stand for, in `dtype`."""
        return (
            log_decay(g.to(dtype), self.A_log, self.dt_bias),
            write_strength(beta.to(dtype), self.use_beta_sigmoid, self.allow_neg_eigval),
        )

    def check(self, value_heads: int, device: torch.device) -> None:
        """ValueError for a wrong option; A_log and dt_bias come together, a doubled beta only with the sigmoid."""
        check_choice("rule", self.rule, RULES)
        check_flags(
            use_qk_l2norm=self.use_qk_l2norm,
            use_beta_sigmoid=self.use_beta_sigmoid,
            allow_neg_eigval=self.allow_neg_eigval,
        )
        parameters = {"A_log": self.A_log, "dt_bias": self.dt_bias}
        if (self.A_log is None) != (self.dt_bias is None):
            missing, given = parameters if self.A_log is None else reversed(parameters)
            raise ValueError(f"{missing}: expected a tensor [HV] together with {given}, got None")
        if self.A_log is not None:
            for name, x in parameters.items():
                check_tensor(name, x, (value_heads,), "[HV]", device)
        if self.allow_neg_eigval and not self.use_beta_sigmoid:
            raise ValueError(
                "allow_neg_eigval: expected use_beta_sigmoid=True with it (it doubles the sigmoid; a beta given "
                "directly may reach 2 by itself), got use_beta_sigmoid=False"
            )


def check_tokens(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    options: RuleOptions,
    *,
    lead: str = "B, T",
    scale: float | None = None,
    impl: str,
) -> None:
    """Check what a public form of the rule was given; q is None where only the state is wanted.

    lead: the dimensions before the heads, "B" for single tokens.
    """
    n = len(lead.split(", "))
    check_full("k", k, n + 2, f"[{lead}, H, K]", n)
    check_full("v", v, n + 2, f"[{lead}, HV, V]", n)
    shape, (key_heads, _), (value_heads, value_dim) = k.shape[:n], k.shape[n:], v.shape[n:]
    if q is not None:
        check_tensor("q", q, k.shape, f"[{lead}, H, K] of k", k.device, (k.dtype,))
    check_tensor("v", v, (*shape, value_heads, value_dim), f"[{lead}, HV, V]", k.device, (k.dtype,))
    check_heads(key_heads, value_heads)
    check_tensor("g", g, (*shape, value_heads), f"[{lead}, HV]", k.device)
    check_tensor("beta", beta, (*shape, value_heads), f"[{lead}, HV]", k.device)
    check_scale(scale)
    options.check(value_heads, k.device)
    check_choice("impl", impl, IMPLS)


def check_query(q: object, lead: str = "B, T") -> None:
    """Raise unless there is one, where outputs are wanted."""
    if not isinstance(q, Tensor):
        raise ValueError(f"q: expected a tensor [{lead}, H, K], got {type(q).__name__}")


def check_states(k: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Check the borders of packed sequences, and that there is one initial state for each, or for each row."""
    num_states, tokens = k.shape[:2]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, num_states, tokens, k.device)
        num_states = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check_state("initial_state", initial_state, (num_states, v.shape[2], k.shape[3], v.shape[3]), k)
