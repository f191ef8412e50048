"""A trace of some steps of a run, by torch.profiler, for TensorBoard, Perfetto or chrome://tracing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function


class Trace:
    """Records steps first..last of a run, both included, into FOLDER/steps-FIRST-LAST.RANK.pt.trace.json.gz.

    steps: (first, last), counted from 1, as the log counts them; None for no trace.

    A run that begins or ends between them leaves what it had of them. The file is whole, or not there.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None, device: torch.device, rank: int):
        self._folder, self._steps, self._device, self._rank = folder, steps or (1, 0), device, rank
        self._profile: profile | None = None
        self._first = self._last = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._write()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a step."""
        first, last = self._steps
        if not first <= step <= last:
            yield
            return
        if self._profile is None:
            cuda = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            activities = [ProfilerActivity.CPU, *cuda]
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True, acc_events=True)
            self._profile.start()
            self._first = step
        with record_function(f"ProfilerStep#{step}"):  # the name by which TensorBoard knows a step
            yield
        self._last = step
        if step == last:
            self._write()

    def _write(self) -> None:
        found, self._profile = self._profile, None
        if found is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found.stop()
        if self._last < self._first:  # stopped by an error in its first step
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self._first}-{self._last}.{self._rank}.pt.trace.json.gz"
        partial = self._folder / f".partial-{name}"
        found.export_chrome_trace(str(partial))
        os.replace(partial, self._folder / name)
