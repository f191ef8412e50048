"""Sessions: reading in any chunks leaves the same state, generation, and files that are whole or refused."""

import itertools

import pytest
import torch
from judge import close, exact, identical
from safetensors import safe_open
from safetensors.torch import save_file
from small import VOCAB, WINDOW, assert_same_state, tiny, tokens

from sleep_ops import SleepSession
from sleep_ops.layers.mixer import GDNState
from sleep_ops.model.sampling import sample
from sleep_ops.model.session import _digest

LENGTH, NAN = 17, float("nan")
OPTIONS = [
    pytest.param(eviction, loop, passes, id=f"{eviction}-{'all' if loop is None else 'middle'}-N{passes}")
    for eviction, loop, passes in itertools.product(("hard", "sliding"), (None, (1, 2)), (1, 2, 3))
]


def _one_row():
    return torch.tensor([[1, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize("eviction, loop, passes", OPTIONS)
def test_token_by_token_chunks_and_at_once_agree(eviction, loop, passes):
    model, ids = tiny(eviction=eviction, loop=loop, passes=passes), tokens(length=LENGTH)
    whole = SleepSession(model)
    logits = whole.read(ids, all_logits=True)
    exact(logits, model(ids).logits)
    single = SleepSession(model)
    exact(torch.stack([single.step(ids[:, t]) for t in range(LENGTH)], dim=1), logits)
    assert_same_state(model, single.state, whole.state)
    for cuts in ((0, 3, 4, 12, LENGTH), (0, 5, 10, LENGTH), (0, 16, LENGTH)):
        chunked = SleepSession(model)
        last = [chunked.read(ids[:, a:b]) for a, b in itertools.pairwise(cuts)]
        exact(torch.stack(last, 1), logits[:, [c - 1 for c in cuts[1:]]])
        assert_same_state(model, chunked.state, whole.state)


@pytest.mark.parametrize("eviction, loop, passes", OPTIONS)
def test_rows_of_different_lengths_stay_independent(eviction, loop, passes):
    """Padded prompts leave the rows' windows out of phase; every row must still live as if alone."""
    model = tiny(eviction=eviction, loop=loop, passes=passes)
    prompts = [tokens(1, n, seed=n) for n in (9, 4, 6)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, 9 - prompt.shape[1] :], mask[b, 9 - prompt.shape[1] :] = prompt[0], 1
    together, more = SleepSession(model), tokens(3, 8, seed=7)
    first = together.read(ids, mask)
    steps = torch.stack([together.step(more[:, t]) for t in range(8)], dim=1)
    for b, prompt in enumerate(prompts):
        alone = SleepSession(model)
        exact(first[b : b + 1], alone.read(prompt))
        expected = alone.read(more[b : b + 1], all_logits=True)
        exact(steps[b : b + 1], expected)


def test_memory_does_not_grow_with_the_text():
    for eviction in ("hard", "sliding"):
        session = SleepSession(tiny(eviction=eviction, passes=2))
        sizes = []
        for _ in range(8):
            session.read(tokens(1, 2 * WINDOW))
            sizes.append(sum(x.numel() for s in session.state.blocks for x in s))
        assert len(set(sizes[1:])) == 1


def test_greedy_generation_equals_the_model_run_anew():
    model, prompt = tiny(passes=2), tokens(2, 7)
    text = prompt
    for _ in range(9):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
    session = SleepSession(model)
    identical(session.generate(prompt, 9), text[:, 7:])
    assert session.position == (16, 16)
    seen = []
    again = SleepSession(model)
    out = again.generate(prompt, 4, on_token=seen.append)
    more = again.generate(None, 5)
    identical(torch.cat([out, more], 1), text[:, 7:])
    identical(torch.stack(seen, 1), out)


def test_generation_stops_a_row_at_its_end():
    model, prompt = tiny(passes=2), tokens(3, 7)
    free = SleepSession(model).generate(prompt, 12)
    eos = int(free[0, 3])
    out = SleepSession(model).generate(prompt, 12, eos_token_id=eos, pad_token_id=-1)
    for b in range(3):
        row = free[b].tolist()
        end = row.index(eos) + 1 if eos in row else 12
        assert out[b].tolist()[:end] == row[:end]
        assert all(t == -1 for t in out[b].tolist()[end:])


def test_sampling_keeps_what_it_says():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)
    seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    assert (sample(logits) == 0).all()
    free = sample(logits, temperature=1.0, generator=seeded())
    close(free.bincount(minlength=4) / 4000.0, logits[0].softmax(-1), rtol=0, atol=0.03)
    identical(free, sample(logits, temperature=1.0, generator=seeded()))
    assert set(sample(logits, temperature=1.0, top_k=2, generator=seeded()).tolist()) == {0, 1}
    assert set(sample(logits, temperature=1.0, top_p=0.5, generator=seeded()).tolist()) == {0}
    assert set(sample(logits, temperature=1.0, top_p=0.7, generator=seeded()).tolist()) == {0, 1}
    hot = sample(logits, temperature=50.0, generator=seeded())
    close(hot.bincount(minlength=4) / 4000.0, torch.full((4,), 0.25), rtol=0, atol=0.04)


def test_sleep_on_request():
    model, ids = tiny(passes=3), tokens(1, 3)
    session = SleepSession(model)
    session.sleep()  # nothing read: nothing to do
    session.read(ids)
    before = session.state
    session.sleep()
    assert session.state.in_window == (0,) and session.state.position == (3,)
    assert session.state.blocks[0].keys.shape[1] == 0
    assert not torch.allclose(session.state.blocks[1].fast_weights, before.blocks[1].fast_weights)
    with pytest.raises(ValueError, match="^window:"):
        SleepSession(tiny(window=None)).sleep()


def test_fork_goes_its_own_way():
    model = tiny(passes=2)
    session = SleepSession(model)
    session.read(tokens(1, 7))
    other = session.fork()
    expected = session.fork().read(tokens(1, 6, seed=3))
    other.read(tokens(1, 9, seed=4))
    assert session.position == (7,) and other.position == (16,)
    exact(session.read(tokens(1, 6, seed=3)), expected)


@pytest.mark.parametrize("eviction, loop, passes", OPTIONS)
def test_saved_sessions_go_on_as_if_never_saved(eviction, loop, passes, tmp_path):
    model = tiny(eviction=eviction, loop=loop, passes=passes)
    session = SleepSession(model)
    session.read(tokens(2, 12))
    session.save(tmp_path / "session.safetensors")
    loaded = SleepSession.load(tmp_path / "session.safetensors", model)
    assert loaded.passes == passes
    assert_same_state(model, loaded.state, session.state)
    assert torch.equal(loaded.read(tokens(2, 9, seed=2)), session.read(tokens(2, 9, seed=2)))
    assert [p.name for p in tmp_path.iterdir()] == ["session.safetensors"]


def test_damaged_or_foreign_files_are_refused(tmp_path):
    model = tiny(passes=2)
    session = SleepSession(model)
    with pytest.raises(ValueError, match="empty session"):
        session.save(tmp_path / "none")
    session.read(tokens(2, 12))
    path = tmp_path / "session.safetensors"
    session.save(path)
    whole = path.read_bytes()

    def refused(content: bytes, match: str):
        broken = tmp_path / "broken"
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            SleepSession.load(broken, model)

    refused(whole[: len(whole) // 2], "^path: .*can't be read")
    refused(b"", "^path: .*can't be read")
    refused(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], "^path: .*digest")
    refused(whole.replace(b'"version":"3"', b'"version":"9"'), "^path: .*version '9'")
    with safe_open(path, framework="pt") as file:
        tensors, header = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, tmp_path / "other")
    with pytest.raises(ValueError, match="^path: .*format"):
        SleepSession.load(tmp_path / "other", model)
    save_file({k: v for k, v in tensors.items() if k != "logits"}, tmp_path / "less", metadata=header)
    with pytest.raises(ValueError, match="^path: .*digest"):
        SleepSession.load(tmp_path / "less", model)
    with pytest.raises(ValueError, match="window 5"):
        SleepSession.load(path, tiny(passes=2, window=6))
    with pytest.raises(FileNotFoundError):
        SleepSession.load(tmp_path / "missing", model)


@pytest.mark.parametrize("live", (0, 2), ids=("asleep", "live-window"))
def test_files_of_the_first_version_are_read(live, tmp_path):
    """They hold the states at the window's start even where those are the present ones, under a former name."""
    model = tiny(passes=2)
    session = SleepSession(model)
    session.read(tokens(length=2 * WINDOW + live))
    session.save(tmp_path / "new")
    with safe_open(tmp_path / "new", framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    for i, state in enumerate(session.state.start):
        if state is not None:
            tensors |= {f"start.{i}.{name}": x.clone() for name, x in state._asdict().items()}
    tensors = {name.replace("conv_state", "conv_tail"): x for name, x in tensors.items()}
    del header["digest"], header["ready"]
    header["version"] = "1"
    header["digest"] = _digest(tensors, header)
    save_file(tensors, tmp_path / "old", metadata=header)
    loaded = SleepSession.load(tmp_path / "old", model)
    assert_same_state(model, loaded.state, session.state)
    identical(loaded.generate(None, 3), session.fork().generate(None, 3))
    smaller = (tmp_path / "new").stat().st_size < (tmp_path / "old").stat().st_size
    assert smaller == (live == 0)


@pytest.mark.parametrize("kind", ("refine", "replay"))
@pytest.mark.parametrize("eviction", ("hard", "sliding"))
def test_a_saved_memory_is_the_fast_weights_alone(eviction, kind, tmp_path):
    """Its size does not depend on the text; what follows reads as after a session that forgot the keys it kept."""
    model, sizes = tiny(passes=2, eviction=eviction, sleep_kind=kind), []
    for length in (13, 63):
        session = SleepSession(model)
        session.read(tokens(length=length))
        with pytest.raises(ValueError, match="memory_only: expected a session that has slept"):
            session.save(tmp_path / "memory", memory_only=True)
        session.sleep()
        session.save(tmp_path / "memory", memory_only=True)
        with safe_open(tmp_path / "memory", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        sizes.append(sum(x.nbytes for x in tensors.values()))
    assert sizes[0] == sizes[1]
    assert sizes[0] == sum(x.nbytes for s in session.state.blocks if isinstance(s, GDNState) for x in s)

    loaded, question = SleepSession.load(tmp_path / "memory", model), tokens(length=7, seed=3)
    assert loaded.position == (63, 63) and loaded.logits is None
    with pytest.raises(ValueError, match="input_ids: expected a prompt for every row, got None, and only a memory"):
        loaded.generate()
    if eviction == "hard":
        assert torch.equal(loaded.read(question), session.read(question))
    else:
        assert not torch.allclose(loaded.read(question), session.read(question))


def test_every_row_needs_a_token_to_generate_from(tmp_path):
    """Not its memory alone, whatever becomes of the session, and whatever other rows have read."""
    model, path = tiny(passes=2), tmp_path / "session"
    fresh, session = SleepSession(model), SleepSession(model)
    session.read(tokens(length=7))
    session.sleep()
    session.save(path, memory_only=True)
    memory = SleepSession.load(path, model)
    for s in (fresh, memory):
        before, position = s.state, s.position
        with pytest.raises(ValueError, match=r"^input_ids: expected a prompt for every row, got none for rows \[1\]"):
            s.generate(tokens(length=3), 2, attention_mask=_one_row())
        assert s.state is before and s.position == position and s.logits is None

    memory.read(tokens(length=3), _one_row())
    memory.save(path)
    for s in (memory, memory.fork(), memory.select([0, 1]), SleepSession.load(path, model)):
        with pytest.raises(ValueError, match=r"got none for rows \[1\]"):
            s.generate()
        assert s.select([0, 0]).generate(None, 2).shape == (2, 2)
        s.read(tokens(length=2), _one_row().flip(0)[:, :2])
        assert s.generate(None, 2).shape == (2, 2)


@pytest.mark.parametrize("memory_only", (True, False))
def test_a_file_has_no_weights_twice(memory_only, tmp_path):
    """Of rows selected, and of some that slept before the others."""
    model, ids, saved = tiny(passes=2), tokens(length=9), []
    session, ragged = SleepSession(model), SleepSession(model)
    session.read(ids)
    ragged.read(ids, torch.arange(9) < torch.tensor([[9], [5]]))
    for s in (session, ragged):
        s.sleep()
    for s in (session, session.select([1, 0]), ragged):
        s.save(tmp_path / "session", memory_only=memory_only)
        with safe_open(tmp_path / "session", framework="pt") as file:
            saved.append(set(file.keys()))
        assert_same_state(model, SleepSession.load(tmp_path / "session", model).state, s.state)
    assert saved[0] == saved[1] == saved[2] and not any(name.startswith("start") for name in saved[0])


@pytest.mark.parametrize("kind", ("refine", "replay"))
def test_selected_rows_go_on_as_they_would_have(kind, tmp_path):
    """In another order, several times over, in the middle of a window, and from a saved memory."""
    model = tiny(passes=3, sleep_kind=kind, eviction="sliding")
    session = SleepSession(model)
    session.read(tokens(batch=3, length=13), torch.arange(13) < torch.tensor([[13], [9], [11]]))
    more = tokens(batch=3, length=8, seed=4)
    rows = [2, 0, 2]
    chosen = session.select(rows)
    assert chosen.position == (11, 13, 11)
    asked = more[[2, 0, 1]]
    expected = [session.select([b]).read(q[None])[0] for b, q in zip(rows, asked, strict=True)]
    exact(chosen.read(asked), torch.stack(expected))
    exact(session.read(more)[2], expected[0])  # itself unchanged before

    session.sleep()
    session.save(tmp_path / "memory", memory_only=True)
    one = SleepSession.load(tmp_path / "memory", model).select([1]).select([0, 0])
    assert one.logits is None and one.read(more[:2]).shape == (2, VOCAB)
    for rows in ([], [2], [-1], [True]):
        with pytest.raises(ValueError, match="rows: expected numbers from 0 to 1"):
            one.select(rows)
    with pytest.raises(ValueError, match="session: expected something to have been read"):
        SleepSession(model).select([0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_session_goes_on_in_a_narrower_model(dtype, tmp_path):
    session = SleepSession(tiny(passes=2))
    session.read(tokens(1, 13))
    session.save(tmp_path / "session")
    expected = session.read(tokens(1, 9, seed=2))
    loaded = SleepSession.load(tmp_path / "session", tiny(passes=2).to(dtype))
    assert loaded.state.blocks[1].fast_weights.dtype == torch.float32
    assert loaded.state.blocks[0].keys.dtype == loaded.logits.dtype == dtype
    logits = loaded.read(tokens(1, 9, seed=2)).double()
    assert (logits - expected).norm() < (0.2 if dtype == torch.bfloat16 else 1e-4) * expected.norm()


def test_options_that_change_no_state_do_not_keep_a_session_from_loading(tmp_path):
    session = SleepSession(tiny(passes=2))
    session.read(tokens(1, 7))
    session.save(tmp_path / "session")
    other = tiny(passes=1, loop=(0, 3), activation_checkpointing=True)
    assert SleepSession.load(tmp_path / "session", other).passes == 2


def test_sampling_at_the_edges():
    flat = torch.zeros(200, 4)
    assert len(set(sample(flat, temperature=1.0, top_k=1).tolist())) == 1
    for least in (1e-40, 1e-46):
        assert (sample(torch.tensor([[1.0, 2.0]]), temperature=least) == 1).all()
        assert (sample(torch.tensor([[1.0, 2.0]]), temperature=1.0, top_p=least) == 1).all()
    seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    both = (sample(flat, temperature=1.0, top_k=9, top_p=1.0, generator=g) for g in (seeded(), seeded()))
    assert torch.equal(*both)


@pytest.mark.parametrize(
    "name, call",
    [
        ("passes", lambda s: SleepSession(s.model, passes=0)),
        ("passes", lambda s: SleepSession(tiny(window=None), passes=2)),
        ("input_ids", lambda s: s.read(torch.zeros(2, 0, dtype=torch.long))),
        ("input_ids", lambda s: s.read(torch.zeros(2, 3))),
        ("input_ids", lambda s: s.read(torch.full((2, 3), VOCAB))),
        ("input_ids", lambda s: s.read(tokens(3, 2))),
        ("attention_mask", lambda s: s.read(tokens(2, 3), torch.ones(2, 2))),
        ("token_ids", lambda s: s.step(tokens(2, 1))),
        *(("max_new_tokens", lambda s, n=n: s.generate(tokens(2, 2), n)) for n in (0, True, 3.0, NAN, float("inf"))),
        ("temperature", lambda s: s.generate(None, 1, temperature=-1.0)),
        ("temperature", lambda s: s.generate(None, 1, temperature=NAN)),
        ("temperature", lambda s: s.generate(None, 1, temperature=10**400)),
        ("temperature", lambda s: s.generate(None, 1, temperature=None)),
        ("top_k", lambda s: s.generate(None, 1, top_k=0)),
        ("eos_token_id", lambda s: s.generate(None, 1, eos_token_id=VOCAB)),
        ("eos_token_id", lambda s: s.generate(None, 1, eos_token_id=True)),
        *(
            ("pad_token_id", lambda s, pad=pad: s.generate(tokens(2, 2), 1, eos_token_id=1, pad_token_id=pad))
            for pad in (1.5, "x", 2**63)
        ),
        ("generator", lambda s: s.generate(tokens(2, 2), 1, temperature=1.0, generator=3)),
        ("on_token", lambda s: s.generate(tokens(2, 2), 1, on_token=3)),
        ("attention_mask", lambda s: s.generate(None, 1, attention_mask=torch.zeros(7))),
        ("token_ids", lambda s: s.step(3)),
        ("input_ids", lambda s: s.read([1, 2])),
        ("all_logits", lambda s: s.read(tokens(2, 3), all_logits="no")),
        ("memory_only", lambda s: s.save("session", memory_only="no")),
        ("path", lambda s: s.save("no/such/folder/session")),
        ("input_ids", lambda s: SleepSession(s.model).generate(tokens(2, 3), 1, attention_mask=_one_row())),
        ("top_p", lambda s: s.generate(None, 1, top_p=1.5)),
        ("input_ids", lambda s: SleepSession(s.model).generate(None, 1)),
    ],
)
def test_bad_input_names_the_argument_and_changes_nothing(name, call):
    session = SleepSession(tiny(passes=2))
    session.read(tokens(2, 7))
    before = session.state
    with pytest.raises(ValueError, match=f"^{name}:"):
        call(session)
    assert session.state is before


@pytest.mark.parametrize("layers", (("gdn",), ("attn", "gdn")), ids=str)
def test_a_selected_row_sleeps_as_it_does_alone(layers):
    """Though others of its batch had read more."""
    model = tiny(layers=layers, passes=2)
    ids = tokens(2, 3)
    both, alone = SleepSession(model), SleepSession(model)
    both.read(ids, torch.tensor([[1, 1, 1], [1, 0, 0]]))
    alone.read(ids[1:, :1])
    one = both.select([1])
    for session in (one, alone):
        session.sleep()
    for mine, own in zip(one.state.blocks, alone.state.blocks, strict=True):
        for a, b in zip(mine, own, strict=True):
            exact(a, b)
    exact(one.read(ids[:1]), alone.read(ids[:1]))
