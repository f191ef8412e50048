"""Steps one after another, each in a process of its own with a limit to its time; the same call again goes on.

Each gets of the time that is left what its weight is among the steps still to come, but never STEP_SECONDS; what one
does not need goes to the later ones. OUT/verify.json says how each ended.
"""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from sleep_ops.bench.harness import environment
from sleep_ops.files import check_folder, write_atomically
from sleep_ops.verify.steps import STEPS, Place, Step, missing

STATE_FILE = "verify.json"
PASSED, FAILED, STOPPED, LEFT_OUT = "passed", "failed", "stopped", "left out"
STEP_SECONDS = 540
GRACE = 10  # seconds to end by itself for a process that is asked to
OURS_WRONG = re.compile(r".*\b(ours|ours-chained|layer) is WRONG.*")
WORKING = 0.7  # of its limit a step is told to work for: starting, compiling and plotting come on top


@dataclass(frozen=True)
class Outcome:
    """How a step ended, after how many seconds, with what limit, and why where it did not pass."""

    outcome: str
    seconds: float = 0.0
    limit: float = 0.0
    why: str = ""


class Verification:
    """What is known so far in the folder `place.out`.

    resume  go on with what the folder holds; False deletes what earlier ones left there.

    Raises ValueError for a folder that is a file, and for one whose results are of another device or other code.
    """

    def __init__(self, place: Place, *, resume: bool = True, steps: Sequence[Step] | None = None):
        self.place, self.steps = place, tuple(STEPS if steps is None else steps)
        self.settings = settings(place.device)
        self.outcomes: dict[str, Outcome] = {}
        check_folder("out", place.out)
        path = place.out / STATE_FILE
        if not resume:
            self._delete()
        elif path.exists():
            try:
                state = json.loads(path.read_text(encoding="utf-8"))
                before, found = dict(state["settings"]), {name: Outcome(**x) for name, x in state["steps"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"out: expected the {STATE_FILE} of a verification, got {path}; use --fresh"
                ) from error
            for name, now in self.settings.items():
                if before.get(name) != now:
                    raise ValueError(
                        f"out: expected results for {name} {now}, as there is now, got those for {before.get(name)} in "
                        f"{place.out}; another --out, or --fresh to begin anew"
                    )
            self.outcomes = found

    def run(self, seconds: float, show: Callable[[Step], None], after: Callable[[Step, Outcome], None]) -> None:
        """Every step that has not passed yet, within `seconds`; show: of what comes next; after: of how it ended."""
        begin = time.monotonic()
        self.place.out.mkdir(parents=True, exist_ok=True)
        waiting = [step for step in self.steps if self._outcome(step) != PASSED]
        possible = [step for step in waiting if not missing(step, self.place)]
        for step in waiting:
            show(step)
            left = seconds - (time.monotonic() - begin)
            if why := missing(step, self.place):
                outcome = Outcome(LEFT_OUT, why=why)
            else:
                limit = shares(possible, left).get(step.name)
                possible.remove(step)
                if limit is None:
                    why = (
                        f"it needs at least {step.least} s, and {max(left, 0):.0f} s were left for it and what follows"
                    )
                    outcome = Outcome(LEFT_OUT, why=f"{why}; a larger --budget has it")
                else:
                    outcome = self._run(step, limit)
            self.outcomes[step.name] = outcome
            self._save()
            after(step, outcome)

    @property
    def passed(self) -> bool:
        """Whether every step that ran passed."""
        return all(x.outcome in (PASSED, LEFT_OUT) for x in self.outcomes.values())

    @property
    def done(self) -> int:
        """How many steps have passed."""
        return sum(self._outcome(step) == PASSED for step in self.steps)

    def _outcome(self, step: Step) -> str:
        return self.outcomes[step.name].outcome if step.name in self.outcomes else ""

    def _run(self, step: Step, limit: float) -> Outcome:
        out, begin = self.place.out.resolve(), time.monotonic()
        for name in step.files:  # of an attempt before; a failure must not stand beside its figures
            (out / name).unlink(missing_ok=True)
            (out / name).parent.mkdir(parents=True, exist_ok=True)
        place = Place(out, self.place.device, self.place.checkout)
        command = step.command(place, max(1, int(WORKING * limit)))
        # Wide enough for tables, unbuffered so that the log of a step that is stopped says how far it came.
        added = {"COLUMNS": "160", "PYTHONUNBUFFERED": "1"} | step.environment
        kept = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
        if place.device.type == "cuda":
            added.pop("TRITON_INTERPRET", None)
        cwd = place.checkout if step.in_checkout else None
        code = run_limited(command, out / f"{step.name}.log", limit, kept | added, cwd)
        seconds = round(time.monotonic() - begin, 1)
        if code is None:
            return Outcome(STOPPED, seconds, round(limit, 1), f"stopped at its limit of {limit:.0f} s")
        # A benchmark leaves out whoever is wrong and goes on with the others.
        if code == 0 and (wrong := OURS_WRONG.search((out / f"{step.name}.log").read_text(errors="replace"))):
            return Outcome(FAILED, seconds, round(limit, 1), f"it says: {wrong[0]}")
        return Outcome(
            PASSED if code == 0 else FAILED, seconds, round(limit, 1), "" if code == 0 else f"exit code {code}"
        )

    def _save(self) -> None:
        state = {"settings": self.settings, "steps": {name: vars(x) for name, x in self.outcomes.items()}}
        write_atomically(self.place.out / STATE_FILE, (json.dumps(state, indent=2) + "\n").encode())

    def _delete(self) -> None:
        for step in self.steps:
            for name in (*step.files, f"{step.name}.log"):
                (self.place.out / name).unlink(missing_ok=True)
            for name in step.folders:
                shutil.rmtree(self.place.out / name, ignore_errors=True)
        for name in (STATE_FILE, "report.md"):
            (self.place.out / name).unlink(missing_ok=True)


def settings(device: torch.device) -> dict[str, str]:
    """What results depend on: another of these, and they are not those of this code on this machine."""
    found = environment(device)
    names = {"device": "device", "torch": "torch", "triton": "triton"}
    return {name: found[column] for name, column in names.items()} | {"code": code()}


def code() -> str:
    """A fingerprint of the package's sources, committed or not."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted({*root.glob("**/*.py"), *(root / "kernels").glob("*.py")}):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def shares(steps: Sequence[Step], seconds: float) -> dict[str, float]:
    """Seconds of each of the steps that fit; the last that would get less than its least gives way to the others."""
    steps = list(steps)
    while steps:
        whole = sum(step.weight for step in steps)
        found = {step.name: min(seconds * step.weight / whole, STEP_SECONDS - GRACE) for step in steps}
        short = [step for step in steps if found[step.name] < step.least]
        if not short:
            return found
        steps.remove(short[-1])
    return {}


def run_limited(command: list[str], log: Path, limit: float, environment: dict, cwd: Path | None = None) -> int | None:
    """The exit code of a command, its output in `log`; None where it was stopped after `limit` seconds.

    It is stopped by SIGTERM, on which a training saves, and after GRACE seconds by SIGKILL, its own children too.
    """
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=cwd, start_new_session=True
            )
        except OSError as error:
            file.write(f"{error}\n".encode())
            return 127
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    _signal(process, signal.SIGKILL)  # what it has left behind, too
    process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextmanager
def terminated_like_interrupted():
    """SIGTERM ends the block as Ctrl-C does, so that no step is left running behind it."""

    def end(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_budget(minutes: float) -> float:
    """The seconds; ValueError unless they are positive and finite."""
    if not 0 < minutes < math.inf:
        raise ValueError(f"budget: expected a number of minutes > 0, got {minutes}")
    return 60 * minutes
