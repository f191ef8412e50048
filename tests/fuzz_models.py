"""Random models that sleep, their sessions and sleepified transformers models, against Algorithm 1 written anew.

    python tests/fuzz_models.py [--seconds 600] [--first 0] [--only model|session|sleepify]

One case a seed. The slow form below reads one row at a time without padding, window by window, with its own norms,
rotary positions, attention over explicit key lists, convolutions and token recurrence; it takes nothing but parameters
from the model (of transformers models also norms, MLPs and whole attention layers). In float64 the model has to agree
with it to rounding: logits, losses, gradients in every parameter, and all that the final state holds.
"""

import copy
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from fuzz import search

from sleep_ops import HybridConfig, SleepHybridModel, SleepSession
from sleep_ops.reference import one_pass

TOLERANCE = 1e-7  # of the largest element; many passes, one on another, make that of float64's rounding
ENTRIES = ("model", "session", "sleepify")
FAMILIES = ("qwen3_5", "qwen3_next", "olmo_hybrid", "llama", "qwen3", "olmo2", "mistral")
VOCAB = 13


class Fast(NamedTuple):
    """What a fast-weight block remembers of a row: S `[HV, K, V]`, the last convolution inputs `[W - 1, channels]`."""

    S: Tensor
    conv_state: Tensor


class Keys(NamedTuple):
    """What an attention block remembers of a row, oldest first: `[n, HKV, D]` each."""

    keys: Tensor
    values: Tensor


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """x `[T, H, D]` at positions from `position` on; cosines and sines are rounded to float32, as documented."""
    half = x.shape[-1] // 2
    out = []
    for t in range(x.shape[0]):
        angle = torch.tensor([(position + t) / theta ** (j / half) for j in range(half)], dtype=torch.float64)
        turn = torch.complex(angle.cos().float().double(), angle.sin().float().double())
        y = torch.complex(x[t, :, :half], x[t, :, half:]) * turn
        out.append(torch.cat([y.real, y.imag], -1))
    return torch.stack(out)


def attended(q: Tensor, memory: Keys, held: int, limit: int | None) -> Tensor:
    """Queries `[T, H, D]` over keys of which `held` are older than the first query: `[T, H, D]`."""
    groups = q.shape[1] // memory.keys.shape[1]
    out = []
    for t in range(q.shape[0]):
        end = held + t + 1
        seen = slice(0 if limit is None else max(0, end - limit), end)
        k, v = (x[seen].repeat_interleave(groups, 1) for x in memory)
        score = torch.einsum("hd,nhd->hn", q[t], k) * q.shape[-1] ** -0.5
        out.append(torch.einsum("hn,nhd->hd", score.softmax(-1), v))
    return torch.stack(out)


def convolved(x: Tensor, conv_state: Tensor, taps: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
    """x `[T, channels]` after `conv_state`, with filters taps(t) `[channels, W]` of token t; also the new one."""
    whole, kept = torch.cat([conv_state, x]), conv_state.shape[0]
    y = torch.stack([(whole[t : t + kept + 1].T * taps(t)).sum(-1) for t in range(x.shape[0])])
    return silu(y), whole[whole.shape[0] - kept :]


class Memory:
    """The gated delta rule of a mixer: what it writes, and passes over what was written."""

    def __init__(self, mixer: nn.Module, rule: str, doubled: bool):
        self.mixer, self.rule, self.factor = mixer, rule, 2.0 if doubled else 1.0

    def writes(self, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        """k `[T, H, K]`, v `[T, HV, V]` and raw gates `[T, HV]` -> (k, v, g, beta) by value head."""
        m = self.mixer
        k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        g = -m.A_log.exp() * torch.logaddexp(a + m.dt_bias, torch.zeros_like(a))
        return k.repeat_interleave(v.shape[1] // k.shape[1], 1), v, g, self.factor / (1 + torch.exp(-b))

    def read(self, q: Tensor, writes: tuple[Tensor, ...], S: Tensor) -> tuple[Tensor, Tensor]:
        q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        q = q.repeat_interleave(writes[1].shape[1] // q.shape[1], 1)
        o, S = one_pass(q[None], *(x[None] for x in writes), S[None], q.shape[-1] ** -0.5, self.rule)
        return o[0], S[0]

    def replayed(self, writes: tuple[Tensor, ...], S: Tensor) -> Tensor:
        return self.read(torch.zeros_like(writes[0]), writes, S)[1]


class SlowBlock:
    """A block of `SleepHybridModel` for one row: block(h `[T, hidden]`, memory, position) -> (h, memory, writes)."""

    def __init__(self, block: nn.Module, eps: float, window: int | None, *, rule: str = "delta", theta: float = 1e4):
        self.block, self.eps, self.theta = block, eps, theta
        m = self.mixer = block.mixer
        self.fast = hasattr(m, "A_log")
        if self.fast:
            self.memory = Memory(m, rule, getattr(m, "allow_neg_eigval", False))
            self.sizes = (m.num_heads, m.head_dim, m.num_v_heads, m.head_v_dim)
        else:
            limits = [n for n in (window, m.sliding_window) if n is not None]
            self.limit = min(limits, default=None)

    def begin(self) -> Fast | Keys:
        zero = self.block.mixer_norm.weight.new_zeros
        if not self.fast:
            return Keys(*(zero(0, self.mixer.num_kv_heads, self.mixer.head_dim) for _ in range(2)))
        H, K, HV, V = self.sizes
        channels = HV * V if hasattr(self.mixer, "dynamic_conv1d") else 2 * H * K + HV * V
        return Fast(zero(HV, K, V), zero(self.mixer.conv_size - 1, channels))

    def __call__(self, h: Tensor, memory: Fast | Keys, position: int):
        x, writes = rms(h, self.block.mixer_norm.weight, self.eps), None
        if self.fast:
            y, memory, writes = self._mix(x, memory)
        else:
            y, memory = self._attend(x, memory, position)
        h = h + y
        if self.block.mlp is not None:
            x, mlp = rms(h, self.block.mlp_norm.weight, self.eps), self.block.mlp
            h = h + (silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
        return h, memory, writes

    def _attend(self, x: Tensor, memory: Keys, position: int) -> tuple[Tensor, Keys]:
        m = self.mixer
        q, k, v = ((x @ p.weight.T).view(x.shape[0], -1, m.head_dim) for p in (m.q_proj, m.k_proj, m.v_proj))
        held = memory.keys.shape[0]
        memory = Keys(torch.cat([memory.keys, turned(k, position, self.theta)]), torch.cat([memory.values, v]))
        return attended(turned(q, position, self.theta), memory, held, self.limit).flatten(
            1
        ) @ m.o_proj.weight.T, memory

    def _mix(self, x: Tensor, memory: Fast):
        m, T, (H, K, HV, V) = self.mixer, x.shape[0], self.sizes
        q, k, v = (x @ p.weight.T for p in (m.q_proj, m.k_proj, m.v_proj))
        if hasattr(m, "dynamic_conv1d"):
            w1, w2 = m.dynamic_conv1d.kernel_generator.w1, m.dynamic_conv1d.kernel_generator.w2
            filters = (silu(x @ w1.weight.T) @ w2.weight.T + w2.bias).view(T, HV * V, m.conv_size)
            q, k = silu(q), silu(k)
            v, conv_state = convolved(v, memory.conv_state, lambda t: filters[t])
        else:
            weight = torch.cat([m.q_conv1d.weight, m.k_conv1d.weight, m.v_conv1d.weight])
            y, conv_state = convolved(torch.cat([q, k, v], -1), memory.conv_state, lambda t: weight)
            q, k, v = y.split([H * K, H * K, HV * V], -1)
        writes = self.memory.writes(
            k.reshape(T, H, K), v.reshape(T, HV, V), x @ m.a_proj.weight.T, x @ m.b_proj.weight.T
        )
        o, S = self.memory.read(q.reshape(T, H, K), writes, memory.S)
        o = rms(o, m.o_norm.weight, self.eps) * silu((x @ m.g_proj.weight.T).view(T, HV, V))
        return o.flatten(1) @ m.o_proj.weight.T, Fast(S, conv_state), writes


class SlowLayer:
    """A layer of a transformers model: its attention called whole, its fast-weight mixer written anew."""

    def __init__(self, model: nn.Module, layer: nn.Module, window: int):
        self.model, self.layer, self.window = model, layer, window
        m = self.mixer = getattr(layer, "linear_attn", None)
        self.fast = m is not None
        if self.fast:
            self.memory = Memory(m, "delta", getattr(m, "allow_neg_eigval", False))
            self.sizes = (m.num_k_heads, m.head_k_dim, m.num_v_heads, m.head_v_dim)

    def begin(self) -> Fast | Keys:
        zero = next(self.model.parameters()).new_zeros
        if not self.fast:
            config = self.model.config
            return Keys(*(zero(0, config.num_key_value_heads, self.layer.self_attn.head_dim) for _ in range(2)))
        H, K, HV, V = self.sizes
        return Fast(zero(HV, K, V), zero(self.mixer.conv_kernel_size - 1, 2 * H * K + HV * V))

    def __call__(self, h: Tensor, memory: Fast | Keys, position: int):
        if not self.fast:
            return *self._attend(h, memory, position), None
        y, memory, writes = self._mix(self.layer.input_layernorm(h[None])[0], memory)
        h = h + y
        y = self.layer.mlp(self.layer.post_attention_layernorm(h[None]))
        return h + (y[0] if isinstance(y, tuple) else y)[0], memory, writes

    def _attend(self, h: Tensor, memory: Keys, position: int) -> tuple[Tensor, Keys]:
        kept = SimpleNamespace(after=None)

        def update(keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
            new = (x[0].transpose(0, 1) for x in (keys, values))
            kept.after = Keys(*(torch.cat(pair) for pair in zip(memory, new, strict=True)))
            return tuple(x.transpose(0, 1)[None] for x in kept.after)

        cache = SimpleNamespace(update=update)
        held, T, config = memory.keys.shape[0], h.shape[0], self.model.config
        limit = min(self.window, getattr(config, "sliding_window", None) or self.window)
        query, key = torch.arange(held, held + T)[:, None], torch.arange(held + T)
        mask = torch.zeros(T, held + T, dtype=h.dtype).masked_fill((key > query) | (key <= query - limit), -torch.inf)
        positions = torch.arange(position, position + T)[None]
        from hf_models import rotations

        h = self.layer(
            h[None],
            position_embeddings=rotations(self.model, h[None], positions),
            attention_mask=mask[None, None],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return h[0], kept.after

    def _inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v joined, raw gates, output gate."""
        m, (H, K, HV, V) = self.mixer, self.sizes
        if hasattr(m, "in_proj_qkvz"):
            n = HV // H
            qkvz = (x @ m.in_proj_qkvz.weight.T).view(x.shape[0], H, -1)
            ba = (x @ m.in_proj_ba.weight.T).view(x.shape[0], H, 2 * n)
            ends = (K, 2 * K, 2 * K + n * V)
            parts = [qkvz[:, :, i:j].flatten(1) for i, j in zip((0, *ends), (*ends, None), strict=True)]
            return torch.cat(parts[:3], -1), ba[:, :, n:].flatten(1), ba[:, :, :n].flatten(1), parts[3]
        if hasattr(m, "in_proj_qkv"):
            names = ("in_proj_qkv", "in_proj_a", "in_proj_b", "in_proj_z")
            return tuple(x @ getattr(m, name).weight.T for name in names)
        qkv = torch.cat([x @ p.weight.T for p in (m.q_proj, m.k_proj, m.v_proj)], -1)
        return qkv, x @ m.a_proj.weight.T, x @ m.b_proj.weight.T, x @ m.g_proj.weight.T

    def _mix(self, x: Tensor, memory: Fast):
        m, T, (H, K, HV, V) = self.mixer, x.shape[0], self.sizes
        qkv, a, b, z = self._inputs(x)
        convolutions = [m.conv1d] if hasattr(m, "conv1d") else [m.q_conv1d, m.k_conv1d, m.v_conv1d]
        weight = torch.cat([c.weight[:, 0] for c in convolutions])
        y, conv_state = convolved(qkv, memory.conv_state, lambda t: weight)
        q, k, v = y.split([H * K, H * K, HV * V], -1)
        writes = self.memory.writes(k.reshape(T, H, K), v.reshape(T, HV, V), a, b)
        o, S = self.memory.read(q.reshape(T, H, K), writes, memory.S)
        norm, out = (m.norm, m.out_proj) if hasattr(m, "norm") else (m.o_norm, m.o_proj)
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        o = rms(o, norm.weight, eps) * silu(z.view(T, HV, V))
        return o.flatten(1) @ out.weight.T, Fast(S, conv_state), writes


class Slow(NamedTuple):
    """A model for the slow form: blocks, embed(ids `[T]`), predict(h), between(h, entry), and its settings."""

    blocks: list
    embed: Callable[[Tensor], Tensor]
    predict: Callable[[Tensor], Tensor]
    between: Callable[[Tensor, Tensor], Tensor]
    settings: dict
    parameters: list[nn.Parameter]

    def read(self, ids: Tensor, windows: list[tuple[int, bool, bool]], passes: int):
        """(first-pass logits `[T, vocab]`, memories) of a row cut into windows of (length, evicted?, asleep?)."""
        s, blocks, count = self.settings, self.blocks, len(self.blocks)
        first, last = s["loop"] or (0, count - 1)
        memories, logits, position = [b.begin() for b in blocks], [], 0
        for length, evicted, asleep in windows:
            before, writes = list(memories), [None] * count
            h = self.embed(ids[position : position + length])
            entry = hidden = h
            for i, block in enumerate(blocks):
                entry = h if i == first else entry
                h, memories[i], writes[i] = block(h, memories[i], position)
                hidden = h if i == last else hidden
            logits.append(self.predict(h))
            if asleep and passes > 1 and s["sleep_kind"] == "replay":
                for i in range(first, last + 1):
                    for _ in range(passes - 1 if blocks[i].fast else 0):
                        new = blocks[i].memory.replayed(writes[i], memories[i].S)
                        memories[i] = memories[i]._replace(S=new)
            elif asleep and passes > 1:
                h = hidden
                for n in range(2, passes + 1):
                    if s["backprop_passes"] is not None and n == passes - s["backprop_passes"] + 1:
                        h = h.detach()
                        memories = [m._replace(S=m.S.detach()) if isinstance(m, Fast) and first <= i <= last else m
                                    for i, m in enumerate(memories)]  # fmt: skip
                    h = self.between(h, entry)
                    for i in range(first, last + 1):
                        begin = before[i]
                        if blocks[i].fast:
                            kept = begin.conv_state * (s["conv_boundary"] == "snapshot")
                            begin = Fast(memories[i].S, kept)
                        h, memories[i], _ = blocks[i](h, begin, position)
                for i in range(last + 1, count):
                    h, memories[i], _ = blocks[i](h, before[i], position)
            if evicted:
                kept = s["window"] - 1 if s["eviction"] == "sliding" else 0
                for i, m in enumerate(memories):
                    if not blocks[i].fast:
                        memories[i] = Keys(*(x[max(0, x.shape[0] - kept) :] for x in m))
            position += length
        empty = self.embed(ids[:0]).new_zeros(0, 1)
        return (torch.cat(logits) if logits else empty), memories


def cut(length: int, window: int | None, absent: int = 0, marks: list[bool] | None = None) -> list:
    """The windows of a row, of which those with a mark do not sleep; the first lacks `absent` places."""
    windows, start = [], 0
    while start < length:
        room = length if window is None else window - (absent if start == 0 else 0)
        end = min(length, start + room)
        full = window is not None and end - start == room
        windows.append((end - start, full, full and not (marks is not None and any(marks[start:end]))))
        start = end
    return windows


def draw(seed: int) -> dict:
    """The settings of one case."""
    r = random.Random(seed)
    entry = r.choice([*ENTRIES, "model"])
    window = r.choice([None, 1, 2, 3, 4, 5, 7, 9, 40]) if entry != "sleepify" else r.choice([1, 3, 4, 7, 8, 40])
    kind = r.choice(["refine", "refine", "replay"])
    case = {
        "entry": entry,
        "window": window,
        "passes": 1 if window is None else r.choice([1, 2, 2, 3, 3, 4, 6]),
        "sleep_kind": kind,
        "eviction": r.choice(["hard", "sliding"]),
        "sleep_on": r.choice(["every", "every", "unlabelled"]),
        "conv_boundary": r.choice(["snapshot", "snapshot", "zero"]),
        "backprop_passes": r.choice([None, None, None, 1, 2]) if kind == "refine" else None,
        "activation_checkpointing": r.random() < 0.2,
    }
    lengths = [r.choice([0, 1, 2, 3, 5, 8, 9, 13, 17, 24]) for _ in range(r.choice([1, 2, 3]))]
    if not any(lengths):
        lengths[0] = r.randint(1, 12)
    if r.random() < 0.35:
        lengths = [max(lengths)] * len(lengths)
    if window is not None and kind == "refine" and case["passes"] * max(lengths) > 30 * window:
        case["passes"] = min(case["passes"], 2)  # so many passes, one on another, make chaos of any rounding
    case |= {
        "padding": r.choice(["right", "left", "mixed", "packed"]) if len(set(lengths)) > 1 or r.random() < 0.2 else "",
        "lengths": lengths,
        "by": r.choice(["tokens", "tokens", "positions"]),
        "labels": r.choice(["none", "dense", "sparse", "last"]),
        "loss_mask": r.random() < 0.3,
        "all_logits": r.choice([None, True, False]),
        "pieces": r.choice([1, 1, 2, 4]),
        "return_logits": random.Random(seed + 3).random() < 0.6,
        "return_state": r.random() < 0.7,
        "int32": r.random() < 0.2,
        "given_passes": r.random() < 0.3,
        "steps": r.randint(2, 10),
    }
    if entry == "sleepify":
        return case | _draw_family(r)
    layers = tuple(r.choice(["attn", "swa", "gdn", "gdn", "jet"]) for _ in range(r.randint(1, 4)))
    repeats = r.choice([1, 1, 1, 2, 3]) if len(layers) < 3 else 1
    heads = r.choice([1, 2, 3, 4])
    gdn = r.choice([1, 2])
    refine = kind == "refine"
    return case | {
        "layers": layers,
        "tied_repeats": repeats,
        "loop": _range(r, len(layers) * repeats),
        "hidden_size": r.choice([4, 7, 8, 12]),
        "num_heads": heads,
        "num_kv_heads": r.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "head_dim": r.choice([2, 4, 6]),
        "gdn_num_heads": gdn,
        "gdn_num_v_heads": gdn * r.choice([1, 1, 2, 3]),
        "gdn_head_dim": r.choice([1, 3, 4]),
        "gdn_head_v_dim": r.choice([2, 3, 5]),
        "conv_size": r.choice([1, 2, 3, 4, 4]),
        "sliding_window": r.choice([1, 2, 3, 6, 50]),
        "allow_neg_eigval": r.random() < 0.3,
        "rule": r.choice(["delta", "delta", "hebbian"]),
        "intermediate_size": r.choice([None, 1, 9]),
        "tie_embeddings": r.random() < 0.3,
        "loop_gate": refine and r.random() < 0.25,
        "reinject": refine and r.random() < 0.25,
        "rope_theta": r.choice([10000.0, 100.0]),
    }


def _range(r: random.Random, count: int) -> tuple[int, int] | None:
    first = r.randrange(count)
    return (first, r.randrange(first, count)) if r.random() < 0.5 else None


def _draw_family(r: random.Random) -> dict:
    family = r.choice(FAMILIES)
    layers = r.choice([1, 2, 3])
    heads = r.choice([1, 2])
    hybrid = family in FAMILIES[:3]
    types = [r.choice(["linear_attention", "full_attention"]) for _ in range(layers)]
    if "linear_attention" not in types:
        types[0] = "linear_attention"
    if family == "olmo_hybrid" and "full_attention" not in types:
        types = [*types, "full_attention"]
    sizes = dict(
        linear_num_key_heads=heads, linear_num_value_heads=heads * r.choice([1, 2]), linear_key_head_dim=4,
        linear_value_head_dim=r.choice([3, 4]), linear_conv_kernel_dim=r.choice([2, 4]),
    )  # fmt: skip
    changes = dict(sizes, layer_types=types) if hybrid else {}
    if family == "olmo_hybrid":
        changes["linear_allow_neg_eigval"] = r.random() < 0.5
    if family == "mistral":
        changes["sliding_window"] = r.choice([None, 2, 5])
    count = len(types) if hybrid else layers
    return {
        "family": family,
        "changes": changes | dict(num_hidden_layers=count, hidden_size=16, intermediate_size=24),
        "insert": sorted(r.sample(range(count), r.randint(1, count))) if not hybrid or r.random() < 0.2 else [],
        "loop": _range(r, count),
        "use": r.choice(["call", "call", "session", "generate"]),
    }


def _noisy(model: nn.Module, seed: int, std: float) -> None:
    """No parameter is left at a value at which a mistake would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith(("A_log", "dt_bias")):
                p += std * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def hybrid(case: dict, seed: int) -> tuple[SleepHybridModel, Slow]:
    """The model of a case and its slow form."""
    torch.manual_seed(seed)
    names = set(HybridConfig.__dataclass_fields__) & case.keys()
    config = HybridConfig(vocab_size=VOCAB, initializer_range=0.2, impl="torch", **{n: case[n] for n in names})
    model = SleepHybridModel(config).double().train()
    _noisy(model, seed, 0.1)
    eps = config.norm_eps

    def between(h: Tensor, entry: Tensor) -> Tensor:
        h = entry + model.loop_gate * (h - entry) if config.loop_gate else h
        return h + entry if config.reinject else h

    blocks = [SlowBlock(b, eps, config.window, rule=config.rule, theta=config.rope_theta) for b in model.blocks]
    slow = Slow(
        blocks * config.tied_repeats,
        lambda ids: model.embed.weight[ids],
        lambda h: rms(h, model.norm.weight, eps) @ model.lm_head.weight.T,
        between,
        case,
        list(model.parameters()),
    )
    return model, slow


def _exactly(model: nn.Module) -> None:
    """transformers' norms compute in float32; here they must not."""
    for module in model.modules():
        name = type(module).__name__
        if type(module).__module__.startswith("transformers") and name.endswith("RMSNorm"):
            eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
            shift = 1.0 if name.startswith(("Qwen3_5", "Qwen3Next")) else 0.0

            def forward(self, x, eps=eps, shift=shift):
                return rms(x, self.weight + shift, eps)

            module.__class__ = type(name, (type(module),), {"forward": forward})


def transformer(case: dict, seed: int) -> tuple[nn.Module, Slow]:
    """The sleepified model of a case and the slow form over an unmodified copy."""
    from hf_models import build

    from sleep_ops.adapters.hf import insert_fast_weights, sleepify

    model = build(case["family"], seed=seed, dtype=torch.float64, **case["changes"])
    if case["insert"]:
        insert_fast_weights(model, case["insert"], num_heads=2, head_dim=4, head_v_dim=3)
    _exactly(model)
    _noisy(model, seed, 0.1)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    names = ("window", "passes", "loop", "eviction", "sleep_kind", "sleep_on", "conv_boundary", "backprop_passes")
    names += ("activation_checkpointing",)
    model = sleepify(model, impl="torch", **{n: case[n] for n in names if case[n] is not None}).train()
    blocks, loop, inserted = [], [], case["insert"]
    for i, layer in enumerate(plain.model.layers):
        own = [SlowLayer(plain, layer, case["window"])]
        if i in inserted:
            block = plain.model.fast_weights[str(i)]
            own.append(SlowBlock(block, plain.config.rms_norm_eps, case["window"]))
        if case["loop"] is None or case["loop"][0] <= i <= case["loop"][1]:
            loop += range(len(blocks), len(blocks) + len(own))
        blocks += own
    slow = Slow(
        blocks,
        plain.get_input_embeddings(),
        lambda h: plain.lm_head(plain.model.norm(h)),
        lambda h, entry: h,
        case | {"loop": (loop[0], loop[-1])},
        list(plain.parameters()),
    )
    return model, slow


class Text(NamedTuple):
    """ids, mask, labels, loss mask `[B, T]`, and the columns of each row's real tokens (packed: of each sequence's)."""

    ids: Tensor
    mask: Tensor | None
    labels: Tensor | None
    loss_mask: Tensor | None
    columns: list[tuple[int, list[int]]]
    borders: Tensor | None


def text_of(case: dict, seed: int, vocab: int = VOCAB) -> Text:
    """The input of a case."""
    r, lengths = random.Random(seed + 1), case["lengths"]
    generator = torch.Generator().manual_seed(seed)
    borders = mask = None
    if case["padding"] == "packed":
        ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        borders, shape = torch.tensor(ends), (1, ends[-1])
        columns = [(0, list(range(a, b))) for a, b in zip(ends, ends[1:], strict=False)]
    else:
        width = max(lengths) + (r.choice([0, 1, 4]) if case["padding"] else 0)
        shape, columns = (len(lengths), width), []
        for b, n in enumerate(lengths):
            start = {"right": 0, "left": width - n}.get(case["padding"], 0)
            own = sorted(r.sample(range(width), n)) if case["padding"] == "mixed" else range(start, start + n)
            columns.append((b, list(own)))
        if case["padding"]:
            mask = torch.zeros(shape, dtype=r.choice([torch.int64, torch.bool, torch.float32]))
            for b, own in columns:
                mask[b, own] = 1
    ids = torch.randint(0, vocab, shape, generator=generator, dtype=torch.int32 if case["int32"] else torch.int64)
    labels = loss_mask = None
    if case["labels"] != "none":
        labels = torch.randint(0, vocab, shape, generator=generator, dtype=ids.dtype)
        keep = torch.rand(shape, generator=generator) < 0.15
        if case["labels"] == "last":
            keep = torch.zeros(shape, dtype=torch.bool)
            for b, own in columns:
                keep[b, own[-2:]] = True
        if case["labels"] != "dense":
            labels = labels.masked_fill(~keep, -100)
    if case["loss_mask"]:
        loss_mask = torch.rand(shape, generator=generator) < r.choice([0.1, 0.7])
    return Text(ids, mask, labels, loss_mask, columns, borders)


def _differ(what: str, found: Tensor, exact: Tensor, tolerance: float = TOLERANCE) -> str:
    found, exact = found.detach(), exact.detach()
    if found.shape != exact.shape:
        return f"{what}: {tuple(found.shape)} instead of {tuple(exact.shape)}"
    if not exact.numel():
        return ""
    scale = max(1.0, exact.abs().max().item())
    error = (found - exact).abs().max().item() / scale
    return "" if error <= tolerance else f"{what}: error {error:.1e} of {scale:.1e}"


def _state_differs(state, memories: list[list], counts: list[tuple[int, int]]) -> str:
    """What a state holds, against the memories of every row; counts: tokens (read, in the open window) of a row."""
    for b, (position, in_window) in enumerate(counts):
        if (state.position[b], state.in_window[b]) != (position, in_window):
            found = state.position[b], state.in_window[b]
            return f"row {b}: position, in_window {found} instead of {position, in_window}"
        for i, memory in enumerate(memories[b]):
            held = state.blocks[i]
            if isinstance(memory, Keys):
                held = [x[b, : state.carried[b] + state.in_window[b]] for x in held]
            else:
                held = [x[b] for x in held]
            for name, found, exact in zip(memory._fields, held, memory, strict=True):
                if why := _differ(f"row {b} block {i} {name}", found, exact):
                    return why
    return ""


def _live(windows: list) -> int:
    return windows[-1][0] if windows and not windows[-1][1] else 0


def call_fault(model: nn.Module, slow: Slow, case: dict, text: Text) -> str:
    """Calls of a model with all their results, against the slow form."""
    ids, columns, window = text.ids, text.columns, case["window"]
    passes = case["passes"]
    if case["given_passes"] and window is not None:
        passes = passes % 4 + 1
    by = case["by"] if case["padding"] in ("", "left", "right") and case["pieces"] == 1 else "tokens"
    width = ids.shape[1]
    inner = sorted(random.Random(width).sample(range(1, width), min(case["pieces"], width) - 1))
    real = torch.zeros(ids.shape, dtype=torch.bool)
    for b, own in columns:
        real[b, own] = True
    ends = [c for c in inner if text.borders is None and real[:, :c].any() and real[:, c:].any()]
    starts = [0]
    for c in ends:
        if real[:, starts[-1] : c].any():
            starts.append(c)
    spans = list(zip(starts, [*starts[1:], width], strict=True))
    if not real[:, spans[-1][0] :].any():
        spans[-2:] = [(spans[-2][0], width)]
    counted = torch.zeros_like(real)
    if text.labels is not None or text.loss_mask is not None:
        counted = real.clone()
        for x in (None if text.labels is None else text.labels != -100, text.loss_mask):
            counted &= True if x is None else x
    sleepified = case["entry"] == "sleepify"
    state, losses, cotangent = None, [], torch.Generator().manual_seed(5)
    vocab = model.vocab_size
    grid = torch.zeros(*ids.shape, vocab, dtype=torch.float64)
    needed = torch.zeros_like(real)
    last = None
    for a, b in spans:
        part, end = counted[:, a:b], b == width
        labels = None if text.labels is None or not part.any() else text.labels[:, a:b]
        marks = None if text.loss_mask is None else text.loss_mask[:, a:b]
        if text.labels is not None and labels is None:
            marks = None  # a piece without loss tokens has neither labels nor marks
        everything = case["all_logits"]
        if everything is None and sleepified:
            everything = labels is None and marks is None
        alone = labels is not None and not everything and not case["return_logits"]
        keep = not end or case["return_state"]
        out = model(
            ids[:, a:b],
            loss_mask=marks,
            attention_mask=None if text.mask is None else text.mask[:, a:b],
            passes=passes if case["given_passes"] else None,
            state=state,
            cu_seqlens=text.borders,
            windows_by=by,
            all_logits=everything,
            return_logits=not alone,
            return_state=keep,
            **{"shift_labels" if sleepified else "labels": labels},
        )
        everything = labels is None and marks is None if everything is None else everything
        if (out.logits is None) != (alone or (not everything and not part.any())):
            return f"logits {out.logits is not None} with return_logits {not alone}"
        if out.logits is not None:
            needed[:, a:b] = real[:, a:b] if everything else part
            places = torch.arange(b - a) if out.positions is None else out.positions
            grid = grid.index_add(1, a + places, out.logits)
        if (out.loss is None) != (labels is None):
            return f"loss {out.loss} with labels {labels is not None}"
        if labels is not None:
            losses.append((out.loss, part, a, b))
        state = last = out.state
        if (state is not None) != keep:
            return f"state {state is not None} with return_state {keep}"

    exact = torch.zeros_like(grid)
    memories, counts = [], []
    for b, own in columns:
        marks = [bool(counted[b, c]) for c in own] if case["sleep_on"] == "unlabelled" else None
        absent = own[0] % window if by == "positions" and own and window and text.mask is not None else 0
        windows = cut(len(own), window, absent, marks)
        logits, memory = slow.read(ids[b, own], windows, passes)
        memories.append(memory)
        counts.append((len(own), _live(windows)))
        if own:
            place = torch.zeros_like(real)
            place[b, own] = True
            exact = exact.masked_scatter(place[..., None], logits)

    shown = grid.detach().abs().amax(-1) > 0
    if (shown & ~real).any():
        return "logits at padding"
    check = needed | (shown & real)
    if why := _differ("logits", grid[check], exact[check]):
        return why
    total, slow_total = grid.new_zeros(()), grid.new_zeros(())
    for loss, part, a, b in losses:
        target = text.labels[:, a:b][part].long()
        reference = F.cross_entropy(exact[:, a:b][part], target, reduction="sum") / int(part.sum())
        if why := _differ("loss", loss, reference):
            return why
        total, slow_total = total + loss, slow_total + reference
    if not losses and needed.any():
        weight = torch.randn(grid[needed].shape, generator=cotangent, dtype=grid.dtype)
        total, slow_total = total + (grid[needed] * weight).sum(), slow_total + (exact[needed] * weight).sum()
    if last is not None:
        if why := _state_differs(last, memories, counts):
            return why
        for i, block in enumerate(slow.blocks):
            if block.fast:
                found = last.blocks[i].fast_weights
                weight = torch.randn(found.shape, generator=cotangent, dtype=found.dtype)
                total = total + (found * weight).sum()
                slow_total = slow_total + sum((m[i].S * w).sum() for m, w in zip(memories, weight, strict=True))
    if not total.requires_grad:
        return ""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    reference = torch.autograd.grad(slow_total, slow.parameters, allow_unused=True)
    for name, p, x, y in zip(parameters, parameters.values(), found, reference, strict=True):
        x, y = (torch.zeros_like(p) if g is None else g for g in (x, y))
        if why := _differ(f"gradient of {name}", x, y, 10 * TOLERANCE):
            return why
    return ""


class _Told:
    """A session, and what has become of each of its rows: ids read, windows closed, tokens live, logits to check."""

    def __init__(self, session: SleepSession, rows: int, window: int | None):
        self.session, self.window = session, window
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.closed: list[list[tuple[int, bool, bool]]] = [[] for _ in range(rows)]
        self.live = [0] * rows
        self.shown: list[list[tuple[int, Tensor]]] = [[] for _ in range(rows)]

    def copy(self, session: SleepSession, rows: list[int] | None = None) -> "_Told":
        rows = list(range(len(self.ids))) if rows is None else rows
        other = _Told(session, len(rows), self.window)
        for name in ("ids", "closed", "live", "shown"):
            setattr(other, name, [copy.copy(getattr(self, name)[b]) for b in rows])
        return other

    def note(self, b: int, ids: list[int]) -> None:
        for token in ids:
            self.ids[b].append(token)
            self.live[b] += 1
            if self.live[b] == self.window:
                self.close(b)

    def close(self, b: int) -> None:
        if self.live[b]:
            self.closed[b].append((self.live[b], True, True))
            self.live[b] = 0

    def show(self, b: int, logits: Tensor, back: int = 1) -> None:
        """logits follow the row's last token, or the one `back - 1` before it."""
        self.shown[b].append((len(self.ids[b]) - back, logits))

    def fault(self, slow: Slow, passes: int) -> str:
        memories, counts = [], []
        for b, ids in enumerate(self.ids):
            windows = self.closed[b] + ([(self.live[b], False, False)] if self.live[b] else [])
            logits, memory = slow.read(torch.tensor(ids, dtype=torch.int64), windows, passes)
            memories.append(memory)
            counts.append((len(ids), self.live[b]))
            for place, found in self.shown[b]:
                if why := _differ(f"row {b} logits after token {place}", found, logits[place]):
                    return why
        return _state_differs(self.session.state, memories, counts)


def session_fault(model: nn.Module, slow: Slow, case: dict, seed: int, vocab: int = VOCAB) -> str:
    """A session through random calls, against the slow form of all it has then read."""
    r, rows, window, passes = random.Random(seed + 2), len(case["lengths"]), case["window"], case["passes"]
    if case["given_passes"] and window is not None:
        passes = passes % 4 + 1
    told = _Told(SleepSession(model, passes if case["given_passes"] else None), rows, window)
    everyone = [told]
    for _ in range(case["steps"]):
        rows = len(told.ids)
        ways = ["read", "read", "step", "all"]
        if told.session.state is not None:
            ways += ["fork", "file", "select"] + (["sleep", "sleep"] if window is not None else [])
            if all(told.ids) and told.session.logits is not None:
                ways += ["generate", "generate"]
        way = r.choice(ways)
        session = told.session
        if way in ("read", "all", "step"):
            width = 1 if way == "step" else r.randint(1, 12)
            ids = torch.tensor([[r.randrange(vocab) for _ in range(width)] for _ in range(rows)])
            mask = None
            if way != "step" and r.random() < 0.6:
                mask = torch.tensor([[r.random() < r.choice([0.3, 0.9]) for _ in range(width)] for _ in range(rows)])
                mask = mask if mask.any() else None
            logits = session.step(ids[:, 0]) if way == "step" else session.read(ids, mask, all_logits=way == "all")
            for b in range(rows):
                real = [t for t in range(width) if mask is None or mask[b, t]]
                told.note(b, ids[b, real].tolist())
                if way == "all":
                    for i, t in enumerate(real):
                        told.show(b, logits[b, t], len(real) - i)
                    if mask is not None and logits[b, ~mask[b]].any():
                        return "logits at padding"
                elif real:
                    told.show(b, logits[b])
                if told.ids[b]:
                    told.show(b, session.logits[b])
        elif way == "generate":
            end = r.choice([None, r.randrange(vocab)])
            new = session.generate(max_new_tokens=r.randint(1, 7), eos_token_id=end)
            for b in range(rows):
                for token in new[b].tolist():
                    best = told.shown[b][-1][1]
                    if best.max() - best[token] > 1e-9:
                        return f"row {b}: generated {token}, which is not the likeliest"
                    told.note(b, [token])
                    told.shown[b].append((len(told.ids[b]) - 1, _logits_of(slow, told, b, passes)))
                    if token == end:
                        break
                told.show(b, session.logits[b])
        elif way == "sleep":
            session.sleep()
            for b in range(rows):
                told.close(b)
        elif way == "fork":
            told = told.copy(session.fork())
            everyone.append(told)
        elif way == "select":
            chosen = [r.randrange(rows) for _ in range(r.randint(1, 3))]
            told = told.copy(session.select(chosen), chosen)
            everyone.append(told)
        else:
            with tempfile.TemporaryDirectory() as folder:
                session.save(Path(folder) / "session.safetensors")
                told.session = SleepSession.load(Path(folder) / "session.safetensors", model)
                if [p.name for p in Path(folder).iterdir()] != ["session.safetensors"]:
                    return "files beside the session's"
    for one in everyone:
        if one.session.state is not None and (why := one.fault(slow, passes)):
            return why
    return ""


def _logits_of(slow: Slow, told: _Told, b: int, passes: int) -> Tensor:
    windows = told.closed[b] + ([(told.live[b], False, False)] if told.live[b] else [])
    return slow.read(torch.tensor(told.ids[b]), windows, passes)[0][-1]


def generate_fault(model: nn.Module, slow: Slow, case: dict, seed: int, vocab: int) -> str:
    """transformers' `generate` of a left-padded batch, against greedy choices by the slow form, row by row."""
    lengths = [max(n, 1) for n in case["lengths"]]
    text = text_of(case | {"lengths": lengths, "padding": "left", "int32": False}, seed, vocab)
    model.eval()
    count = case["steps"]
    out = model.generate(
        text.ids, attention_mask=text.mask.long(), max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=2
    )
    new = out[:, text.ids.shape[1] :]
    for b, own in text.columns:
        ids = text.ids[b, own]
        for i in range(count):
            if i >= new.shape[1]:
                return f"row {b}: {new.shape[1]} tokens"
            logits = slow.read(ids, cut(len(ids), case["window"]), case["passes"])[0][-1]
            token = new[b, i]
            if logits.max() - logits[token] > 1e-5:
                return f"row {b}: generated {int(token)} at {i}, which is not the likeliest"
            ids = torch.cat([ids, token[None]])
            if token == 2:
                break
    return ""


def fault(seed: int) -> str:
    """What is wrong with a case, empty for nothing."""
    case = draw(seed)
    if case["entry"] != "sleepify":
        model, slow = hybrid(case, seed)
        if case["entry"] == "session":
            with torch.no_grad():
                return session_fault(model, slow, case, seed)
        return call_fault(model, slow, case, text_of(case, seed))
    from hf_models import VOCAB as vocab

    model, slow = transformer(case, seed)
    model.vocab_size = vocab
    if case["use"] == "call":
        return call_fault(model, slow, case, text_of(case, seed, vocab))
    with torch.no_grad():
        if case["use"] == "session":
            return session_fault(model, slow, case, seed, vocab)
        return generate_fault(model, slow, case, seed, vocab)


if __name__ == "__main__":
    search(draw, fault, __doc__.splitlines()[0], ENTRIES)
