"""Inference: a text read by token, by chunk or at once, that sleeps when its window is full."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sleep_ops import ragged
from sleep_ops.checks import check_flags, expect
from sleep_ops.layers.mixer import GDNState, ReplayInputs
from sleep_ops.model.sampling import check_sampling, sample
from sleep_ops.model.sleeping import SleepingModel, sleeping
from sleep_ops.model.spans import marked
from sleep_ops.model.state import SleepState
from sleep_ops.ragged import Lengths, Rows

FORMAT = "sleep-ops session"
VERSION = 3  # before 2, a window's first states are there even where they are the present ones; before 3, conv_tail


class SleepSession:
    """A running text, or a batch of them, over a model.

    Reading costs one pass per token; when a row's open window reaches L tokens the row sleeps N - 1
    further passes and its attention caches are evicted, so memory does not grow with the text.
    Nothing here is differentiable.

    passes: N, instead of the model's own; a ValueError where the model can't take it.
    """

    def __init__(self, model: SleepingModel, passes: int | float | None = None):
        self.model = sleeping(model)
        self._passes = self.model.settings.resolve_passes(passes)
        self.state: SleepState | None = None
        self.logits: Tensor | None = None
        self._ready: tuple[bool, ...] = ()  # rows whose logits follow a token, not a memory alone

    @property
    def passes(self) -> int | float:
        """N, the sleep duration; fixed, since an open window is begun for it."""
        return self._passes

    @property
    def position(self) -> Lengths:
        """Tokens read so far, per row."""
        return () if self.state is None else self.state.position

    @torch.no_grad()
    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, all_logits: bool = False) -> Tensor:
        """Reads tokens after those read before.

        input_ids: integer `[B, T]`, or `[T]` for one text.
        attention_mask: `[B, T]`, 1 = real token, padding anywhere.
        all_logits: those after every token, not after the last one alone.

        Returns the logits after each row's last real token `[B, vocab_size]`; with all_logits those
        after every token, `[B, T, vocab_size]`, zero at padding. Raises ValueError naming the
        argument; the session is then as before.
        """
        check_flags(all_logits=all_logits)
        return self._read(*self._rows(input_ids, attention_mask), all_logits)

    def _rows(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Rows, Tensor]:
        """As `SleepingModel.rows`; ValueError too where they are not as many as before."""
        if isinstance(input_ids, Tensor) and input_ids.dim() == 1:
            input_ids = input_ids[None]
        rows, ids = self.model.rows(input_ids, attention_mask)
        before, now = len(self.position), len(rows.lengths)
        expect(self.state is None or now == before, "input_ids", f"{before} rows as before", now)
        return rows, ids

    def _ready_after(self, lengths: Lengths) -> tuple[bool, ...]:
        """The rows that have logits to go on from once so many more tokens are read."""
        before = self._ready or (False,) * len(lengths)
        return tuple(a or n > 0 for a, n in zip(before, lengths, strict=True))

    def _read(self, rows: Rows, ids: Tensor, all_logits: bool = False) -> Tensor:
        """What `read` does with input that was checked."""
        lengths = rows.lengths
        state = self.model.init_state(len(lengths)) if self.state is None else self.state
        last, pieces = self.logits, []
        ends = [[0] * n + [1] for n in lengths]
        wanted = [range(n + 1) for n in lengths] if all_logits else ends
        reading = self.model.read(ids, lengths, state, passes=self.passes, wanted=wanted)
        for span, h in reading:
            if all_logits:
                pieces.append((span.starts, span.lengths, self.model.predict(h)))
            ending = marked(ends, span.starts, span.lengths)
            if any(ending):
                newest = tuple(max(n - 1, 0) for n in span.lengths)
                final = self.model.predict(ragged.take(h, newest, (1,) * len(newest))[:, 0])
                if not all(ending):
                    before = torch.zeros_like(final) if last is None else last
                    final = torch.where(torch.tensor(ending, device=h.device)[:, None], final, before)
                last = final
        self.state, self.logits, self._ready = reading.state, last, self._ready_after(lengths)
        return rows.unpack(pieces)[0] if all_logits else last

    @torch.no_grad()
    def begin(self, input_ids: Tensor | None, attention_mask: Tensor | None = None) -> Tensor:
        """Reads a prompt as `read` does, None for none: the logits to generate from.

        ValueError too where a row has no token to go on from; nothing is read then.
        """
        prompt = None if input_ids is None else self._rows(input_ids, attention_mask)
        ready = self._ready if prompt is None else self._ready_after(prompt[0].lengths)
        if not ready or not all(ready):
            held = "only a memory to go on from" if self.position else "nothing has been read yet"
            got = f"none for rows {[b for b, r in enumerate(ready) if not r]}" if ready else f"None, and {held}"
            raise ValueError(f"input_ids: expected a prompt for every row, got {got}")
        return self.logits if prompt is None else self._read(*prompt)

    def step(self, token_ids: Tensor) -> Tensor:
        """Reads one token per row: token_ids, integer `[B]`, -> logits `[B, vocab_size]`."""
        if not isinstance(token_ids, Tensor) or token_ids.dim() != 1:
            got = tuple(token_ids.shape) if isinstance(token_ids, Tensor) else type(token_ids).__name__
            raise ValueError(f"token_ids: expected a tensor [B], got {got}")
        return self.read(token_ids[:, None])

    @torch.no_grad()
    def sleep(self) -> None:
        """Sleeps now, before the window is full, and evicts; nothing where the window is empty."""
        if self.model.settings.window is None:
            raise ValueError("window: expected a model with a window, got None (it neither evicts nor sleeps)")
        if self.state is None or max(self.state.in_window) == 0:
            return
        rows = tuple(n > 0 for n in self.state.in_window)
        stack = self.model.stack
        self.state = stack.evict(stack.sleep(self.state, passes=self.passes, rows=rows), rows=rows)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        max_new_tokens: int = 32,
        *,
        attention_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
        on_token: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Reads input_ids (None: goes on from before) and generates up to max_new_tokens per row.

        temperature: 0 is greedy; otherwise logits are divided by it and sampled.
        top_k: from that many likeliest tokens.
        top_p: from the smallest set whose probability reaches it.
        eos_token_id: a row that has produced it stops, and is filled with pad_token_id.
        pad_token_id: default eos_token_id.
        generator: of random numbers.
        on_token: receives every new `[B]` as it appears.

        Returns the new tokens only, int64 `[B, <= max_new_tokens]`; the session has then read all
        of them but the filling. A bad argument, or a row without a token to go on from, is a
        ValueError that names the argument, and nothing is read.
        """
        check_sampling(
            max_new_tokens, temperature, top_k, top_p, eos_token_id, pad_token_id, generator, on_token,
            self.model.vocab_size,
        )  # fmt: skip
        alone = input_ids is None and attention_mask is not None
        expect(not alone, "attention_mask", "None without input_ids", "a mask")
        self.begin(input_ids, attention_mask)
        pad = eos_token_id if pad_token_id is None else pad_token_id
        alive = torch.ones(self.logits.shape[0], dtype=torch.bool, device=self.logits.device)
        tokens = []
        for _ in range(max_new_tokens):
            token = sample(self.logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if eos_token_id is not None:
                token = torch.where(alive, token, pad)
            tokens.append(token)
            if on_token is not None:
                on_token(token)
            everyone = eos_token_id is None or bool(alive.all())
            self.read(token[:, None], None if everyone else alive[:, None])
            if eos_token_id is not None:
                alive = alive & (token != eos_token_id)
                if not alive.any():
                    break
        return torch.stack(tokens, dim=1)

    def fork(self) -> "SleepSession":
        """An independent session that goes on from where this one stands."""
        other = SleepSession(self.model, self.passes)
        other.state, other.logits, other._ready = self.state, self.logits, self._ready
        return other

    def select(self, rows: Sequence[int]) -> "SleepSession":
        """An independent session of these rows in this order; a row may come several times.

        Raises ValueError for rows that are not there, and where nothing has been read yet.
        """
        if self.state is None:
            raise ValueError("session: expected something to have been read before selecting, got an empty session")
        rows, count = list(rows), len(self.state.position)
        if not rows or not all(type(b) is int and 0 <= b < count for b in rows):
            raise ValueError(f"rows: expected numbers from 0 to {count - 1}, got {rows}")
        other = SleepSession(self.model, self.passes)
        other.state = self.state.select(rows)
        if self.logits is not None:
            other.logits = self.logits[torch.tensor(rows, device=self.logits.device)]
            other._ready = tuple(self._ready[b] for b in rows)
        return other

    def save(self, path: str | os.PathLike, *, memory_only: bool = False) -> None:
        """Writes the session to one safetensors file, whole or not at all.

        The header holds the format's version, the configuration it belongs to and a digest of the
        tensors.

        memory_only: of a session that has slept, the fast weights (and convolution states) alone:
            neither the logits, so that the next thing must be to read, nor the keys a sliding
            window keeps. Its size does not depend on the text's length.

        Raises ValueError where nothing has been read yet, and for memory_only with a window begun.
        """
        check_flags(memory_only=memory_only)
        if self.state is None:
            raise ValueError("session: expected something to have been read before saving, got an empty session")
        if memory_only and max(self.state.in_window) > 0:
            got = f"{max(self.state.in_window)} tokens of an unfinished window"
            raise ValueError(f"memory_only: expected a session that has slept (see sleep), got {got}")
        path = Path(path)
        if not path.parent.is_dir() or path.is_dir():
            raise ValueError(f"path: expected a file in an existing folder, got {path}")
        state = _forget_keys(self.state, self.model) if memory_only else self.state
        named = _named(state)
        if self.logits is not None and not memory_only:
            named["logits"] = self.logits
        tensors = {name: x.detach().cpu().contiguous().clone() for name, x in named.items()}
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "config": json.dumps(self.model.identity(), sort_keys=True),
            "rows": json.dumps([state.position, state.in_window, state.carried, state.labelled, state.padded]),
            "passes": str(self.passes),
            "ready": json.dumps(self._ready if "logits" in named else ()),
        }
        header["digest"] = _digest(tensors, header)
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(tensors, partial, metadata=header)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike, model: SleepingModel) -> "SleepSession":
        """Reads what `save` wrote, onto the model's device and no wider than its dtype.

        The configuration must be the model's; that its weights are those the session was read with
        is up to the caller. Raises FileNotFoundError, and ValueError for a file that is damaged, of
        another format or version, or of a model with another configuration or states of other
        shapes.
        """
        model = sleeping(model)
        if not Path(path).exists():
            raise FileNotFoundError(f"path: expected a saved session, found nothing at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise ValueError(f"path: expected a saved session, got a file that can't be read: {error}") from error
        if header.get("format") != FORMAT or header.get("version") not in map(str, range(1, VERSION + 1)):
            got = f"{header.get('format')!r} version {header.get('version')!r}"
            raise ValueError(f"path: expected format {FORMAT!r} version 1 to {VERSION}, got {got}")
        if header.pop("digest", None) != _digest(tensors, header):
            raise ValueError("path: expected what was saved, got other contents (their digest differs)")
        tensors = {name.replace("conv_tail", "conv_state"): x for name, x in tensors.items()}
        saved, own = json.loads(header["config"]), json.loads(json.dumps(model.identity()))
        saved.setdefault("sleep_kind", "refine")  # of files written when there was no other kind
        different = sorted(k for k in own.keys() | saved.keys() if own.get(k) != saved.get(k))
        if different:
            got = ", ".join(f"{k} {saved.get(k)!r} (model: {own.get(k)!r})" for k in different)
            raise ValueError(f"path: expected a session of this model's configuration, got {got}")
        session = cls(model, math.inf if header["passes"] == "inf" else int(header["passes"]))
        rows = tuple(tuple(x) for x in json.loads(header["rows"]))
        rows += () if len(rows) == 5 else ((0,) * len(rows[0]),)  # of version 1: no places were padded
        empty = model.init_state(len(rows[0]))

        def tensor(part: str, i: int, name: str) -> Tensor:
            found = tensors.get(f"{part}.{i}.{name}", tensors.get(f"blocks.{i}.{name}"))
            skip = 2 if name in ("keys", "values") else 0  # rows, and as many tokens as were kept
            needed, shape = (
                None if x is None else list(x.shape[skip:]) for x in (getattr(empty.blocks[i], name), found)
            )
            if shape != needed:  # a configuration says less than shapes do
                raise ValueError(
                    f"path: expected a session of this model, with {name} {needed} in block {i}, got {shape}"
                )
            return found

        def fill(part: str) -> tuple:
            return tuple(
                s if s is None else type(s)(*(tensor(part, i, name) for name in s._fields))
                for i, s in enumerate(getattr(empty, part))
            )

        writes = tuple(
            ReplayInputs(*(tensors[f"writes.{i}.{name}"] for name in ReplayInputs._fields))
            if f"writes.{i}.k" in tensors
            else None
            for i in range(len(empty.blocks))
        )
        state = SleepState(fill("blocks"), fill("start"), tensors.get("hidden"), writes, *rows)
        weight = model.embedding_weight
        activations = (x for s in state.blocks for name, x in s._asdict().items() if name != "fast_weights")
        widest = max(x.element_size() for x in activations)
        dtype = weight.dtype if widest > weight.element_size() else None
        session.state = state.to(weight.device, dtype)
        if "logits" in tensors:
            session.logits = tensors["logits"].to(weight.device, dtype)
            begun = [n > 0 for n in state.position]  # files without "ready" say no more
            session._ready = tuple(json.loads(header["ready"]) if "ready" in header else begun)
        return session


def _forget_keys(state: SleepState, model: SleepingModel) -> SleepState:
    """The state of a text that has slept, without the keys and values kept from it."""
    empty = model.init_state(len(state.position)).blocks
    blocks = (s if isinstance(s, GDNState) else e for s, e in zip(state.blocks, empty, strict=True))
    return state.changed(blocks=tuple(blocks), carried=(0,) * len(state.position))


def _named(state: SleepState) -> dict[str, Tensor]:
    """Every tensor of a state by name; a window's first ones where they aren't the present ones."""

    def held(i: int, name: str) -> Tensor | None:
        return getattr(state.blocks[i], name, None)

    named = {}
    # Where no window is begun the first ones are the present ones, if perhaps as copies.
    for part in ("blocks", "start", "writes") if max(state.in_window) > 0 else ("blocks",):
        for i, s in enumerate(getattr(state, part)):
            if s is not None:
                own = {name: x for name, x in s._asdict().items() if part == "blocks" or x is not held(i, name)}
                named.update({f"{part}.{i}.{name}": x for name, x in own.items()})
    if state.hidden is not None:
        named["hidden"] = state.hidden
    return named


def _digest(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        total.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
