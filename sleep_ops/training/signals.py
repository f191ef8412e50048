"""Signals that ask long work to save and stop."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def noted(note: Callable[[int], object]) -> Iterator[None]:
    """Within it SIGTERM and Ctrl-C call note(number); Ctrl-C after either of them raises KeyboardInterrupt.

    Nothing changes outside the main thread, where signals are someone else's business.
    """
    known = False

    def handle(number, _frame):
        nonlocal known
        if known and number == signal.SIGINT:
            raise KeyboardInterrupt
        known = True
        note(number)

    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
