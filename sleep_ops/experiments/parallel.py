"""Runs one after another in this process, or several at a time in processes of their own.

A worker is spawned, not forked, takes one run after another, and sends what it prints and what its runs come to through
a pipe. It never hears of a terminal's Ctrl-C: this process passes signals on, once, as SIGTERM, at which a trainer
saves and returns. A worker that outlives this process sends itself the same.
"""

import io
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from multiprocessing import connection, resource_tracker
from typing import Any, NamedTuple

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sleep_ops.checks import check_count, expect
from sleep_ops.training import CheckpointError, TrainingDiverged
from sleep_ops.training.heap import keep_freed_memory
from sleep_ops.training.signals import noted

_EXPLAINED = (ValueError, OSError, CheckpointError, TrainingDiverged)  # other errors are shown with where they were
_PATIENCE = 60.0  # seconds for a worker to save


class Outcome(NamedTuple):
    """What one call of a run came to.

    signal: the one that stopped it. trained: whether it took any step. row: its figures; None in processes that do not
    write.
    """

    signal: int | None
    trained: bool
    row: dict | None


class Run(NamedTuple):
    """function(*arguments, label=label, console=console) -> Outcome is the run `name`; all of it can be pickled."""

    name: str
    label: str
    function: Callable[..., Outcome]
    arguments: tuple


class Ended(NamedTuple):
    """signal: the one that stopped the runs, or None. failed: why each of those failed that did, by name."""

    signal: int | None
    failed: dict[str, str]


def shares(jobs: int | None, runs: int, device: torch.device, processes: int = 1) -> tuple[int, int]:
    """(runs at a time, threads of each) for `runs` runs that train on `device`.

    jobs: how many are wanted; None for as many as PyTorch would use threads, on a CPU, and 1 on CUDA. Each gets an
    equal share of these threads. processes: those of `torchrun`, which train one run at a time.
    """
    threads = torch.get_num_threads()
    if jobs is None:
        jobs = threads if device.type == "cpu" and processes == 1 else 1
    check_count("jobs", jobs)
    expect(processes == 1 or jobs == 1, "jobs", "1 where several processes share a run", jobs)
    jobs = min(jobs, runs)
    return jobs, max(threads // jobs, 1)


def run_all(
    runs: Sequence[Run],
    report: Callable[[Run, Outcome], None],
    *,
    jobs: int,
    threads: int,
    console: Console,
    alone: bool = True,
) -> Ended:
    """Runs them in their order, `jobs` at a time; report(run, outcome) here, for each that was not stopped.

    jobs: 1 for this process. A run that fails does not keep the others from being run. alone: whether this process is;
    where others share its runs an error is raised, as they can't go on either.
    """
    if jobs > 1:
        return _Pool(runs, report, jobs, threads, console).run()
    failed: dict[str, str] = {}
    for run in runs:
        try:
            outcome = run.function(*run.arguments, label=run.label, console=console)
        except Exception as error:
            if not alone:
                raise
            failed[run.name] = _told(error)
            console.print(f"{run.label} failed: {failed[run.name]}", markup=False, soft_wrap=True)
            continue
        if outcome.signal is not None:
            return Ended(outcome.signal, failed)
        report(run, outcome)
    return Ended(None, failed)


def _told(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if isinstance(error, _EXPLAINED) else f"{text}\n{''.join(traceback.format_exception(error))}"


class _Worker:
    """A process that takes runs from its end of a pipe."""

    def __init__(self, threads: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, threads))
        resource_tracker.ensure_running()  # which the first start of a process would begin, and let interrupts through
        with _without_interrupts():
            self.process.start()
        other.close()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process started here inherits that SIGINT is held back; one that came meanwhile is delivered afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: connection.Connection, threads: int) -> None:
    """A worker's life: runs, until there are no more."""
    threading.Thread(target=_outlive, daemon=True).start()
    torch.set_num_threads(threads)
    keep_freed_memory()
    lines: Any = _Lines(pipe)
    console = Console(file=lines, width=1000, force_terminal=False, color_system=None)
    try:
        while True:
            run = pipe.recv()
            try:
                pipe.send(("done", run.function(*run.arguments, label=run.label, console=console)))
            except Exception as error:
                pipe.send(("failed", _told(error)))
    except (EOFError, OSError):  # no more runs, or nobody there
        pass


def _outlive() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


class _Lines(io.TextIOBase):
    """A file whose lines go through a pipe, and nowhere once its other end is gone."""

    def __init__(self, pipe: connection.Connection):
        self._pipe, self._rest = pipe, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        try:
            for line in lines:
                self._pipe.send(("line", line.rstrip()))
        except OSError:
            pass
        return len(text)


class _Pool:
    """Workers, one run in each, and what they tell."""

    def __init__(self, runs: Sequence[Run], report: Callable, jobs: int, threads: int, console: Console):
        self._waiting, self._report, self._jobs, self._threads = deque(runs), report, jobs, threads
        self._busy: dict[Any, tuple[_Worker, Run]] = {}
        self._failed: dict[str, str] = {}
        self._signal: int | None = None
        self._display = _Display(console, len(runs))

    def run(self) -> Ended:
        try:
            with noted(self._pass_on), self._display:
                for _ in range(self._jobs):
                    self._give(None)
                while self._busy:
                    for pipe in connection.wait(list(self._busy)):
                        self._hear(pipe)
        finally:
            workers = [worker for worker, _ in self._busy.values()]  # none, but after an error here
            for worker in workers:
                worker.process.terminate()
                worker.pipe.close()  # one that is between runs waits there
            for worker in workers:
                worker.process.join(_PATIENCE)
                worker.process.kill()
        return Ended(self._signal, self._failed)

    def _give(self, worker: _Worker | None) -> None:
        """The next run to this worker, or to a new one; without a run it is sent home."""
        if self._waiting and self._signal is None:
            worker, run = worker or _Worker(self._threads), self._waiting.popleft()
            self._busy[worker.pipe] = worker, run
            try:
                worker.pipe.send(run)
            except OSError:  # it has died, which is heard of in its turn
                pass
            if self._signal is not None:  # one that came while it was not yet among them
                worker.process.terminate()
        elif worker is not None:
            worker.pipe.close()
            worker.process.join(_PATIENCE)

    def _hear(self, pipe) -> None:
        worker, run = self._busy[pipe]
        what: Any
        try:
            kind, what = pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            kind, what, worker = "failed", f"its process ended with {worker.process.exitcode}", None
            if self._signal is not None:  # it had nothing to save
                del self._busy[pipe]
                return
        if kind == "line":
            self._display.tell(run, what)
            return
        del self._busy[pipe]
        if kind == "done" and what.signal is not None and self._signal is None:
            kind, what = "failed", f"stopped by signal {what.signal}, saved"
        if kind == "failed":
            self._failed[run.name] = what
        elif what.signal is None:
            self._report(run, what)
        self._display.end(run, f"{run.label} failed: {what}" if kind == "failed" else "")
        self._give(worker)

    def _pass_on(self, number: int) -> None:
        """A signal, to all workers; no more runs begin."""
        self._signal = number
        for worker, _ in list(self._busy.values()):
            worker.process.terminate()


class _Display:
    """In a terminal the newest line of each run that goes on, and how many are over; elsewhere all lines."""

    def __init__(self, console: Console, total: int):
        self._console = console
        self._rows = Progress(TextColumn("{task.description}", markup=False), console=console)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._all = Progress(*columns, console=console)
        self._over = self._all.add_task("runs", total=total)
        self._tasks: dict[str, Any] = {}
        self._live: Any = Live(Group(self._rows, self._all), console=console) if console.is_terminal else nullcontext()

    def __enter__(self):
        self._live.__enter__()
        return self

    def __exit__(self, *error):
        self._live.__exit__(*error)

    def tell(self, run: Run, line: str) -> None:
        own = line.startswith(run.label)
        if self._console.is_terminal and own:
            if run.name not in self._tasks:
                self._tasks[run.name] = self._rows.add_task("", total=None)
            self._rows.update(self._tasks[run.name], description=line)
        else:
            self._print(line if own else f"{run.label}  {line}")

    def end(self, run: Run, text: str) -> None:
        if run.name in self._tasks:
            self._rows.remove_task(self._tasks.pop(run.name))
        self._all.advance(self._over)
        if text:
            self._print(text)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
