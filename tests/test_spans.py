"""Spans of a text: integers only, against a walk over its tokens one at a time."""

import random

import pytest

from sleep_ops.model.spans import Span, marked, spans


def cut(lengths, window, *, filled=None, labelled=None, wanted=None, loss=None, close=True) -> list[Span]:
    none = (0,) * len(lengths)
    every = [range(n + 1) for n in lengths]
    options = dict(filled=filled or none, labelled=labelled or (False,) * len(lengths), wanted=wanted or every)
    return list(spans(lengths, window, loss=loss, close=close, **options))


def counts(marks: list[list[bool]]) -> list[list[int]]:
    return [[sum(row[:t]) for t in range(len(row) + 1)] for row in marks]


def test_without_a_window_a_text_is_one_span():
    assert cut((7, 3), None) == [Span((0, 0), (7, 3), True, (False, False), (False, False), (False, False))]


def test_a_window_ends_a_span_and_sleeps():
    first, second = cut((5,), 3)
    assert first == Span((0,), (3,), True, (True,), (True,), (False,))
    assert second == Span((3,), (2,), True, (False,), (False,), (False,))


def test_what_is_taken_already_fills_a_window():
    assert [s.lengths for s in cut((5, 5), 4, filled=(3, 0))] == [(1, 4), (4, 1)]


def test_a_window_with_loss_stays_awake_alone_of_its_row():
    loss = counts([[False] * 6, [False, True] + [False] * 4])
    first, second = cut((6, 6), 3, loss=loss)
    assert first.full == (True, True) and first.asleep == (True, False) and first.labelled == (False, True)
    assert second.asleep == (True, True) and second.labelled == (False, False)


def test_loss_before_the_span_counts_until_the_window_ends():
    assert [s.asleep for s in cut((5,), 3, filled=(1,), labelled=(True,), loss=counts([[False] * 5]))] == [
        (False,),
        (True,),
    ]


def test_nothing_is_read_after_what_is_wanted():
    wanted = counts([[False] * 4 + [True] + [False] * 4])
    read = cut((9,), 3, wanted=wanted, close=False)
    assert [s.starts for s in read] == [(0,), (3,)]
    assert [s.wanted for s in read] == [False, True]
    assert [s.full for s in read] == [(True,), (False,)]  # nothing sees what the second leaves


@pytest.mark.parametrize("seed", range(40))
def test_as_a_walk_token_by_token(seed):
    r = random.Random(seed)
    lengths = tuple(r.randint(0, 12) for _ in range(r.randint(1, 3)))
    window = r.choice([1, 2, 3, 5, 20])
    filled = tuple(r.randrange(window) for _ in lengths)
    marks = [[r.random() < 0.2 for _ in range(n)] for n in lengths]
    loss = r.choice([None, counts(marks)])
    found = cut(lengths, window, filled=filled, loss=loss, wanted=counts(marks))
    for b, n in enumerate(lengths):
        place, labelled, events = filled[b], False, {}
        for t in range(n):
            place, labelled = place + 1, labelled or (loss is not None and marks[b][t])
            if place == window:
                events[t] = not labelled
                place, labelled = 0, False
        assert sum(s.lengths[b] for s in found) == n
        assert {s.starts[b] + s.lengths[b] - 1: s.asleep[b] for s in found if s.full[b]} == events
    for span in found:
        assert span.wanted == any(
            any(row[s : s + n]) for row, s, n in zip(marks, span.starts, span.lengths, strict=True)
        )
        assert marked(counts(marks), span.starts, span.lengths) == [
            any(row[s : s + n]) for row, s, n in zip(marks, span.starts, span.lengths, strict=True)
        ]
