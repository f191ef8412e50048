"""The Gated DeltaNet mixer with an explicit state, able to replay windows (sleep) on its own.

Yang, Kautz, Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464, with the replay passes of Lee et al., "Do Language
Models Need Sleep?", arXiv 2605.26099, over fixed q, k, v, g, beta.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sleep_ops.ops.gated_delta_rule import delta_rule_state, gated_delta_rule, sleep_gated_delta_rule
from sleep_ops.ops.gated_norm import gated_rms_norm
from sleep_ops.ops.gates import CLOSED
from sleep_ops.ops.short_conv import carried_tail, short_convolution
from sleep_ops.ops.step import gated_delta_rule_step
from sleep_ops.validation import (
    FLOAT_DTYPES,
    IMPLS,
    RULES,
    check_choice,
    check_count,
    check_cu_seqlens,
    check_eps,
    check_flags,
    check_full,
    check_lengths,
    check_passes,
    check_state,
    check_tensor,
)

MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOAT_DTYPES)


class GDNState(NamedTuple):
    """What a GDN layer keeps of the tokens before: N is the batch size, or the number of packed sequences.

    fast_weights [N, HV, K, V], float32 (float64 in a float64 layer); conv_tail [N, conv_size - 1, channels], the last
    convolution inputs, oldest first, channels being those of q, k and v in this order.
    """

    fast_weights: Tensor
    conv_tail: Tensor


class GDNWrites(NamedTuple):
    """What the tokens of a pass write, whatever fast weights they meet: all that replaying the pass needs.

    k [B, T, H, K] and v [B, T, HV, V], convolved; a, b [B, T, HV], the raw inputs of the decay and of beta, closed at
    padding (it leaves the fast weights as they are).
    """

    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


class ShortConvolution(nn.Module):
    """Causal depthwise convolution with SiLU: weight [channels, width], no bias."""

    def __init__(self, channels: int, width: int, impl: str = "auto"):
        super().__init__()
        self.width, self.impl = width, impl
        # The range torch gives a depthwise Conv1d, as in the published layer.
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-(width**-0.5), width**-0.5))

    def forward(self, x: Tensor, tail: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None):
        """x [B, T, channels] and the tail [N, width - 1, channels] before it -> (output, new tail)."""
        return short_convolution(x, self.weight, tail=tail, lengths=lengths, cu_seqlens=cu_seqlens, impl=self.impl)


class GatedRMSNorm(nn.Module):
    """RMSNorm(x) * weight * SiLU(gate) over the last axis: weight [size]."""

    def __init__(self, size: int, eps: float, impl: str = "auto"):
        super().__init__()
        self.eps, self.impl = eps, impl
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, self.weight, eps=self.eps, impl=self.impl)


class SleepGDNLayer(nn.Module):
    """Gated DeltaNet mixer [B, T, hidden_size] -> the same shape; causal, so it stands in for an attention mixer.

    Args:
        hidden_size: width of the model.
        num_heads, head_dim: query and key heads (H) and their size (K).
        num_v_heads, head_v_dim: value heads (HV, a multiple of H) and their size (V); default H and K.
        conv_size: taps of the short convolution over q, k and v.
        allow_neg_eigval: beta in (0, 2) instead of (0, 1).
        norm_eps: of the output norm.
        passes: replay passes over each window; 1 is plain Gated DeltaNet, math.inf replays to convergence.
        window: tokens per window, counted from the first token of each call; None makes every call one window.
        output_pass: "first" (causal) or "last" (outputs see their whole window).
        rule: "delta" or "hebbian".
        impl: as in `gated_delta_rule`.

    Gates, softplus and states are float32 under autocast too. Raises ValueError for a bad argument.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        num_v_heads: int | None = None,
        head_v_dim: int | None = None,
        conv_size: int = 4,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
        passes: int | float = 1,
        window: int | None = None,
        output_pass: str = "first",
        rule: str = "delta",
        impl: str = "auto",
    ):
        super().__init__()
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        head_v_dim = head_dim if head_v_dim is None else head_v_dim
        counts = dict(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim, num_v_heads=num_v_heads)
        counts |= dict(head_v_dim=head_v_dim, conv_size=conv_size)
        for name, value in counts.items():
            check_count(name, value)
        if num_v_heads % num_heads:
            raise ValueError(f"num_v_heads: expected a multiple of num_heads = {num_heads}, got {num_v_heads}")
        check_flags(allow_neg_eigval=allow_neg_eigval)
        check_eps("norm_eps", norm_eps)
        check_passes(passes, window, output_pass)
        check_choice("rule", rule, RULES)
        check_choice("impl", impl, IMPLS)

        self.hidden_size, self.conv_size = hidden_size, conv_size
        self.num_heads, self.head_dim = num_heads, head_dim
        self.num_v_heads, self.head_v_dim = num_v_heads, head_v_dim
        self.passes, self.window, self.output_pass = passes, window, output_pass
        self.rule, self.allow_neg_eigval, self.impl = rule, allow_neg_eigval, impl
        self.key_channels, self.value_channels = num_heads * head_dim, num_v_heads * head_v_dim

        self.q_proj = nn.Linear(hidden_size, self.key_channels, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_channels, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_channels, bias=False)
        self.a_proj = nn.Linear(hidden_size, num_v_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_v_heads, bias=False)
        self.g_proj = nn.Linear(hidden_size, self.value_channels, bias=False)
        self.o_proj = nn.Linear(self.value_channels, hidden_size, bias=False)

        plain = "torch" if impl == "reference" else impl
        self.q_conv = ShortConvolution(self.key_channels, conv_size, plain)
        self.k_conv = ShortConvolution(self.key_channels, conv_size, plain)
        self.v_conv = ShortConvolution(self.value_channels, conv_size, plain)
        self.o_norm = GatedRMSNorm(head_v_dim, norm_eps, plain)

        # Decay rates uniform in (0, 16), time steps log-uniform in [1e-3, 1e-1]; the first clamp keeps the log finite.
        self.A_log = nn.Parameter(torch.empty(num_v_heads).uniform_(0, 16).clamp_(min=1e-4).log())
        dt = torch.empty(num_v_heads).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp_(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self._mark_parameters()

    def _mark_parameters(self) -> None:
        for parameter in (self.A_log, self.dt_bias):
            parameter._no_weight_decay = True

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._mark_parameters()  # a copied parameter has lost the mark

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> GDNState:
        """A state of zeros: fast weights in float32 (float64 in a float64 layer), the tail in `dtype`."""
        weight = self.k_proj.weight
        device = weight.device if device is None else device
        kept = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return GDNState(
            torch.zeros(batch_size, self.num_v_heads, self.head_dim, self.head_v_dim, device=device, dtype=kept),
            torch.zeros(
                batch_size,
                self.conv_size - 1,
                2 * self.key_channels + self.value_channels,
                device=device,
                dtype=weight.dtype if dtype is None else dtype,
            ),
        )

    def forward(
        self,
        x: Tensor,
        *,
        state: GDNState | None = None,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
        return_writes: bool = False,
    ) -> Tensor | tuple[Tensor, GDNState] | tuple[Tensor, GDNState, GDNWrites]:
        """Mix the tokens of x.

        Args:
            x: [B, T, hidden_size].
            state: what the tokens before left behind; None for none. With passes > 1 every call begins a new window.
            attention_mask: [B, T], nonzero at real tokens. Padding may lie anywhere in a row: its output is zero,
                windows count real tokens only, and a row of padding keeps its state.
            lengths: int64 [B], real tokens per row, padding at the right: the same without moving tokens.
            cu_seqlens: int32 or int64 [num_seqs + 1], borders of sequences packed into B = 1.

        Returns y, (y, state) with `return_state`, or (y, state, writes) with `return_writes`: what `replay` takes, the
        real tokens at the left of their row. Raises ValueError for a wrong shape, dtype or device, or for more than one
        of attention_mask, lengths and cu_seqlens.
        """
        self._check(x, state, attention_mask, lengths, cu_seqlens)
        if attention_mask is None:
            y, state, writes = self._mix(x, state, lengths, cu_seqlens)
        else:
            place, lengths = _left_places(attention_mask != 0)
            place = place[..., None].expand_as(x)
            y, state, writes = self._mix(torch.zeros_like(x).scatter(1, place, x), state, lengths, None)
            y = y.gather(1, place)
        if return_writes:
            return y, state, writes
        return (y, state) if return_state else y

    def update_state(
        self, x: Tensor, state: GDNState | None, *, lengths: Tensor | None = None, return_writes: bool = False
    ) -> GDNState | tuple[GDNState, GDNWrites]:
        """The state `forward` leaves behind, without outputs: queries only for the tail, no gate, no output projection.

        x [B, T, hidden_size]; lengths int64 [B] or None, as in `forward`. Returns state, or (state, writes) with
        `return_writes`.
        """
        self._check(x, state, None, lengths, None)
        if lengths is not None:
            x = x.masked_fill(_padded(x, lengths), 0)
        fast_weights, (q_tail, k_tail, v_tail) = self._unpack(state)
        writes, k_tail, v_tail = self._writes(x, k_tail, v_tail, lengths, None)

        kept = self.conv_size - 1
        if lengths is None:
            last, real = x[:, max(x.shape[1] - kept, 0) :], None
        else:
            first, real = (lengths - kept).clamp(min=0), lengths.clamp(max=kept)
            index = (first[:, None] + torch.arange(min(kept, x.shape[1]), device=x.device)).clamp(max=x.shape[1] - 1)
            last = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
        if kept:
            q_tail = carried_tail(self.q_proj(last), self.conv_size, q_tail, real)
        else:
            q_tail = writes.k.new_zeros(x.shape[0], 0, self.key_channels)

        fast_weights = delta_rule_state(
            *writes, passes=self.passes, window=self.window if self.passes > 1 else None,
            initial_state=fast_weights, **self._rule_options(),
        )  # fmt: skip
        state = GDNState(fast_weights, torch.cat([q_tail, k_tail, v_tail], dim=-1))
        return (state, writes) if return_writes else state

    def replay(
        self, writes: GDNWrites, fast_weights: Tensor, *, passes: int | float, lengths: Tensor | None = None
    ) -> Tensor:
        """The fast weights [B, HV, K, V] that `passes` further passes over the same writes make of `fast_weights`.

        writes: of B rows, from `forward` or `update_state`, or several calls' joined along T. passes: >= 1, or math.inf
        for the fixed point. lengths: int64 [B], how many of each row's writes count, from the left; None for all.
        Raises ValueError for a wrong shape, dtype, device or number, and with math.inf where passes don't converge.
        """
        self._check_replay(writes, fast_weights, lengths)
        k, v, a, b = writes
        if lengths is not None:
            a, b = _closed(a, b, lengths)
        return delta_rule_state(k, v, a, b, passes=passes, initial_state=fast_weights, **self._rule_options())

    def _mix(self, x, state, lengths, cu_seqlens):
        if lengths is not None:
            x = x.masked_fill(_padded(x, lengths), 0)  # whatever stands there, NaN included, reaches no gradient
        fast_weights, (q_tail, k_tail, v_tail) = self._unpack(state)
        writes, k_tail, v_tail = self._writes(x, k_tail, v_tail, lengths, cu_seqlens)
        q, q_tail = self.q_conv(self.q_proj(x), q_tail, lengths, cu_seqlens)
        q = q.unflatten(-1, (self.num_heads, self.head_dim))

        options = self._rule_options()
        if self.passes > 1:
            o, fast_weights = sleep_gated_delta_rule(
                q, *writes, passes=self.passes, window=self.window, output_pass=self.output_pass,
                initial_state=fast_weights, cu_seqlens=cu_seqlens, **options,
            )  # fmt: skip
        elif x.shape[1] == 1 and fast_weights is not None and cu_seqlens is None:
            token = (t[:, 0] for t in (q, *writes))
            o, fast_weights = gated_delta_rule_step(*token, fast_weights, **options)
            o = o[:, None]
        else:
            o, fast_weights = gated_delta_rule(q, *writes, initial_state=fast_weights, cu_seqlens=cu_seqlens, **options)

        gate = self.g_proj(x).unflatten(-1, (self.num_v_heads, self.head_v_dim))
        # A padded position has q = 0, so o, the norm of it and its bias-free projection are exactly 0.
        y = self.o_proj(self.o_norm(o, gate).flatten(2))
        return y, GDNState(fast_weights, torch.cat([q_tail, k_tail, v_tail], dim=-1)), writes

    def _writes(self, x, k_tail, v_tail, lengths, cu_seqlens):
        """What x writes, and the new tails of k and v."""
        k, k_tail = self.k_conv(self.k_proj(x), k_tail, lengths, cu_seqlens)
        v, v_tail = self.v_conv(self.v_proj(x), v_tail, lengths, cu_seqlens)
        a, b = self.a_proj(x), self.b_proj(x)
        if lengths is not None:
            a, b = _closed(a, b, lengths)
        k = k.unflatten(-1, (self.num_heads, self.head_dim))
        v = v.unflatten(-1, (self.num_v_heads, self.head_v_dim))
        return GDNWrites(k, v, a, b), k_tail, v_tail

    def _rule_options(self):
        A_log, dt_bias = (p if p.dtype == torch.float64 else p.float() for p in (self.A_log, self.dt_bias))
        return dict(
            rule=self.rule, use_qk_l2norm=True, A_log=A_log, dt_bias=dt_bias, use_beta_sigmoid=True,
            allow_neg_eigval=self.allow_neg_eigval, impl=self.impl,
        )  # fmt: skip

    def _unpack(self, state):
        if state is None:
            return None, (None, None, None)
        fast_weights, tail = state
        return fast_weights, tail.split([self.key_channels, self.key_channels, self.value_channels], dim=-1)

    def _check(self, x, state, attention_mask, lengths, cu_seqlens):
        check_full("x", x, 3, "[B, T, hidden_size]")
        batch, tokens, _ = x.shape
        check_tensor("x", x, (batch, tokens, self.hidden_size), "[B, T, hidden_size]", self.A_log.device)
        dtype = self.k_proj.weight.dtype  # not a float's where the projection is quantised: then x is its affair
        if dtype in FLOAT_DTYPES and x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"x: expected dtype {dtype} of the layer, got {x.dtype}")
        given = dict(attention_mask=attention_mask, lengths=lengths, cu_seqlens=cu_seqlens)
        given = [name for name, value in given.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: expected None together with {given[0]}, got both")
        num_seqs = batch
        if attention_mask is not None:
            check_tensor("attention_mask", attention_mask, (batch, tokens), "[B, T]", x.device, MASK_DTYPES)
        elif lengths is not None:
            check_lengths(lengths, batch, tokens, x.device)
        elif cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, batch, tokens, x.device)
            num_seqs = cu_seqlens.shape[0] - 1
        if state is None:
            return
        if not isinstance(state, tuple) or len(state) != 2:
            raise ValueError(f"state: expected GDNState(fast_weights, conv_tail), got {type(state).__name__}")
        fast_weights, tail = state
        shape = (num_seqs, self.num_v_heads, self.head_dim, self.head_v_dim)
        check_state("state.fast_weights", fast_weights, shape, x)
        shape = (num_seqs, self.conv_size - 1, 2 * self.key_channels + self.value_channels)
        check_tensor("state.conv_tail", tail, shape, "[N, conv_size - 1, channels]", x.device)

    def _check_replay(self, writes, fast_weights, lengths):
        if not isinstance(writes, tuple) or len(writes) != 4:
            raise ValueError(f"writes: expected GDNWrites(k, v, a, b), got {type(writes).__name__}")
        k, v, a, b = writes
        check_full("writes.k", k, 4, "[B, T, H, K]")
        batch, tokens, device = k.shape[0], k.shape[1], self.A_log.device
        keys, values = (batch, tokens, self.num_heads, self.head_dim), (batch, tokens, self.num_v_heads)
        check_tensor("writes.k", k, keys, "[B, T, H, K]", device)
        check_tensor("writes.v", v, (*values, self.head_v_dim), "[B, T, HV, V]", device, (k.dtype,))
        check_tensor("writes.a", a, values, "[B, T, HV]", device)
        check_tensor("writes.b", b, values, "[B, T, HV]", device)
        check_state("fast_weights", fast_weights, (batch, self.num_v_heads, self.head_dim, self.head_v_dim), k)
        if lengths is not None:
            check_lengths(lengths, batch, tokens, device)


def _left_places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token of mask [B, T] goes when real ones move to the left in order, and how many are real."""
    lengths = mask.sum(1)
    place = torch.where(mask, mask.cumsum(1) - 1, lengths[:, None] + (~mask).cumsum(1) - 1)
    return place, lengths


def _closed(a: Tensor, b: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The raw gates a and b [B, T, HV], shut at the right padding."""
    padded = _padded(a, lengths)
    return a.masked_fill(padded, CLOSED), b.masked_fill(padded, CLOSED)


def _padded(x: Tensor, lengths: Tensor) -> Tensor:
    """True at the right padding of x [B, T, .]: [B, T, 1]."""
    return (torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None]
