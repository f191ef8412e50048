"""What all gated-delta-rule mixers share: an explicit state, padding, packing, replay passes.

Yang, Kautz, Hatamizadeh, "Gated Delta Networks", arXiv 2412.06464, with the replay passes of Lee et
al., "Do Language Models Need Sleep?", arXiv 2605.26099, over fixed q, k, v, g, beta.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from sleep_ops.checks import check_count, check_flags, expect
from sleep_ops.ops.gated_delta_rule import delta_rule_state, gated_delta_rule, sleep_gated_delta_rule
from sleep_ops.ops.gates import CLOSED
from sleep_ops.ops.step import gated_delta_rule_step
from sleep_ops.validation import (
    FLOAT_DTYPES,
    check_cu_seqlens,
    check_full,
    check_lengths,
    check_passes,
    check_state,
    check_tensor,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOAT_DTYPES)


class GDNState(NamedTuple):
    """What a GDN layer keeps of the tokens before; N: the batch size, or that of packed sequences.

    fast_weights: [N, HV, K, V], float32 (float64 in a float64 layer).
    conv_state: [N, conv_size - 1, channels], the last inputs of the convolutions, oldest first; the
        channels are those of q, k and v in this order (of v alone in a `JetBlock`).
    """

    fast_weights: Tensor
    conv_state: Tensor


class ReplayInputs(NamedTuple):
    """What the tokens of a pass write, whatever fast weights they meet: all that a replay needs.

    k, v: [B, T, H, K] and [B, T, HV, V], convolved.
    a, b: [B, T, HV], the raw inputs of the decay and of beta, closed at padding (it leaves the fast
        weights as they are).
    """

    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


class GDNMixer(nn.Module):
    """What gated-delta-rule mixers do with their projections: states, padding, passes, replays.

    A subclass has the sizes hidden_size, num_heads (H), head_dim (K), num_v_heads (HV), head_v_dim
    (V), conv_size and conv_channels (what its convolutions carry from token to token), the
    parameters A_log and dt_bias [HV], and

        _dtype()                                             what it expects of x
        _project(x, conv_state, lengths, cu_seqlens)         -> (q [B, T, H, K], writes, conv_state, gate)
        _project_writes(x, conv_state, lengths, cu_seqlens)  -> (writes, conv_state), where these come for less
        _emit(o [B, T, HV, V], gate)                         -> y [B, T, hidden_size], zero where o is

    writes are `ReplayInputs`, and the conv_state returned is the one after x.

    Padded positions of x are zero, and `lengths` marks them at the right; this class closes the
    gates there.
    """

    passes: int | float = 1
    window: int | None = None
    output_pass, rule, impl = "first", "delta", "auto"
    allow_neg_eigval = False

    def _project_writes(self, x, conv_state, lengths, cu_seqlens):
        _, writes, conv_state, _ = self._project(x, conv_state, lengths, cu_seqlens)
        return writes, conv_state

    def init_state(self, batch_size: int, *, dtype: torch.dtype | None = None) -> GDNState:
        """A state of zeros, the convolution's in `dtype`. ValueError for a batch_size that is no integer >= 0."""
        check_count("batch_size", batch_size, 0)
        device = self.A_log.device
        kept = torch.float64 if self._dtype() == torch.float64 else torch.float32
        if dtype is None:  # a quantised projection's is that of its storage
            dtype = self._dtype() if self._dtype() in FLOAT_DTYPES else self.dt_bias.dtype
        return GDNState(
            torch.zeros(batch_size, self.num_v_heads, self.head_dim, self.head_v_dim, device=device, dtype=kept),
            torch.zeros(batch_size, self.conv_size - 1, self.conv_channels, device=device, dtype=dtype),
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
        output: bool = True,
        passes: int | float | None = None,
        window: int | None = None,
        group: "ProcessGroup | None" = None,
    ) -> Tensor | None | tuple[Tensor | None, GDNState] | tuple[Tensor | None, GDNState, ReplayInputs]:
        """Mix the tokens of x.

        x: [B, T, hidden_size].
        state: what the tokens before left behind; None for none. With passes > 1 every call begins
            a new window.
        attention_mask: [B, T], nonzero at real tokens. Padding may lie anywhere in a row: its
            output is zero, windows count real tokens only, and a row of padding keeps its state.
        lengths: int64 [B], real tokens per row, padding at the right: the same without moving
            tokens.
        cu_seqlens: int32 or int64 [num_seqs + 1], borders of sequences packed into B = 1.
        output: False gives None for y, and computes no more than the rest needs.
        passes, window: instead of the layer's; both or neither.
        group: process group whose ranks have consecutive parts of the rows, at least conv_size - 1
            tokens each, as in `gated_delta_rule`. A state given is that before the first rank's;
            the one returned has the fast weights after the last rank's tokens.

        Returns y, (y, state) with `return_state`, or (y, state, writes) with `return_writes`: what
        `replay` takes, the real tokens at the left of their row. Raises ValueError for a wrong
        shape, dtype or device, for more than one of attention_mask, lengths and cu_seqlens, for
        passes and a window that can't be, or for a flag that is neither True nor False.
        """
        check_flags(return_state=return_state, return_writes=return_writes, output=output)
        self._check(x, state, attention_mask, lengths, cu_seqlens)
        sleep = (*self._sleep(passes, window), group)
        if group is not None:
            x, state = self._go_on(x, state, attention_mask, lengths, group)
        if attention_mask is None:
            y, state, writes = self._mix(x, state, lengths, cu_seqlens, output, *sleep)
        else:
            place, lengths = _left_places(attention_mask != 0)
            place = place[..., None].expand_as(x)
            x = torch.zeros_like(x).scatter(1, place, x)
            y, state, writes = self._mix(x, state, lengths, None, output, *sleep)
            y = y.gather(1, place) if output else None
        if return_writes:
            return y, state, writes
        return (y, state) if return_state else y

    def replay(
        self, writes: ReplayInputs, fast_weights: Tensor, *, passes: int | float, lengths: Tensor | None = None
    ) -> Tensor:
        """`fast_weights` [B, HV, K, V] after `passes` further passes over the same writes.

        writes: of B rows, from `forward`, or several calls' joined along T.
        passes: >= 1, or math.inf for the fixed point.
        lengths: int64 [B], how many of each row's writes count, from the left; None for all.

        Raises ValueError for a wrong shape, dtype, device or number, and with math.inf where passes
        don't converge.
        """
        self._check_replay(writes, fast_weights, lengths)
        writes = _closed(writes, lengths)
        return delta_rule_state(*writes, passes=passes, initial_state=fast_weights, **self._rule_options())

    def _go_on(self, x, state, attention_mask, lengths, group):
        """x, and the state that its convolutions go on from: the rank before has what that is made of."""
        from sleep_ops.ops.sequence_parallel import check_group, tokens_before_this_rank

        check_group(group)
        for name, value in (("attention_mask", attention_mask), ("lengths", lengths)):
            if value is not None:
                raise ValueError(f"{name}: expected None with group, got a tensor")
        if self.conv_size == 1:
            return x, state
        x, before = tokens_before_this_rank(x, self.conv_size - 1, group)
        if group.rank() == 0:
            return x, state
        _, conv_state = self._project_writes(before, None, None, None)
        fast_weights = self.init_state(len(x)).fast_weights if state is None else state.fast_weights
        return x, GDNState(fast_weights, conv_state)

    def _mix(self, x, state, lengths, cu_seqlens, output, passes, window, group):
        if lengths is not None:
            x = x.masked_fill(_padded(x, lengths), 0)  # whatever stands there, NaN included, reaches no gradient
        fast_weights, conv_state = (None, None) if state is None else state
        options = self._rule_options()
        before = dict(initial_state=fast_weights, cu_seqlens=cu_seqlens)
        sleep = dict(passes=passes, window=window, group=group)
        if not output:
            writes, conv_state = self._project_writes(x, conv_state, lengths, cu_seqlens)
            writes = _closed(writes, lengths)
            return None, GDNState(delta_rule_state(*writes, **sleep, **before, **options), conv_state), writes

        q, writes, conv_state, gate = self._project(x, conv_state, lengths, cu_seqlens)
        writes = _closed(writes, lengths)
        if passes > 1:
            sleep["output_pass"] = self.output_pass
            o, fast_weights = sleep_gated_delta_rule(q, *writes, **sleep, **before, **options)
        elif x.shape[1] == 1 and fast_weights is not None and cu_seqlens is None and group is None:
            token = (t[:, 0] for t in (q, *writes))
            o, fast_weights = gated_delta_rule_step(*token, fast_weights, **options)
            o = o[:, None]
        else:
            o, fast_weights = gated_delta_rule(q, *writes, **before, **options, group=group)
        return self._emit(o, gate), GDNState(fast_weights, conv_state), writes

    def _rule_options(self):
        A_log, dt_bias = (p if p.dtype == torch.float64 else p.float() for p in (self.A_log, self.dt_bias))
        return dict(
            rule=self.rule, use_qk_l2norm=True, A_log=A_log, dt_bias=dt_bias, use_beta_sigmoid=True,
            allow_neg_eigval=self.allow_neg_eigval, impl=self.impl,
        )  # fmt: skip

    def _sleep(self, passes, window):
        """The passes and the window of a call: the layer's where it names neither."""
        if passes is None:
            expect(window is None, "window", "None without passes (both or neither)", window)
            passes, window = self.passes, self.window
        check_passes(passes, window, self.output_pass)
        return passes, window

    def _check(self, x, state, attention_mask, lengths, cu_seqlens):
        check_full("x", x, 3, "[B, T, hidden_size]", 2)
        batch, tokens, _ = x.shape
        check_tensor("x", x, (batch, tokens, self.hidden_size), "[B, T, hidden_size]", self.A_log.device)
        dtype = self._dtype()  # not a float's where the projection is quantised: then x is its affair
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
            raise ValueError(f"state: expected GDNState(fast_weights, conv_state), got {type(state).__name__}")
        fast_weights, conv_state = state
        shape = (num_seqs, self.num_v_heads, self.head_dim, self.head_v_dim)
        check_state("state.fast_weights", fast_weights, shape, x)
        shape = (num_seqs, self.conv_size - 1, self.conv_channels)
        check_tensor("state.conv_state", conv_state, shape, "[N, conv_size - 1, channels]", x.device)

    def _check_replay(self, writes, fast_weights, lengths):
        if not isinstance(writes, tuple) or len(writes) != 4:
            raise ValueError(f"writes: expected ReplayInputs(k, v, a, b), got {type(writes).__name__}")
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
    """Where tokens of mask [B, T] go when real ones move to the left, and how many are real."""
    lengths = mask.sum(1)
    place = torch.where(mask, mask.cumsum(1) - 1, lengths[:, None] + (~mask).cumsum(1) - 1)
    return place, lengths


def _closed(writes: ReplayInputs, lengths: Tensor | None) -> ReplayInputs:
    """The writes with the raw gates a and b [B, T, HV] shut at the right padding."""
    if lengths is None:
        return writes
    padded = _padded(writes.a, lengths)
    a, b = (x.masked_fill(padded, CLOSED) for x in (writes.a, writes.b))
    return ReplayInputs(writes.k, writes.v, a, b)


def _padded(x: Tensor, lengths: Tensor) -> Tensor:
    """True at the right padding of x [B, T, .]: [B, T, 1]."""
    return (torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None]
