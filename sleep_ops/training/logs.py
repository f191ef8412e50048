"""A run's records: CSV files that a resumed run continues, TensorBoard, a progress bar."""

import csv
import io
import math
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sleep_ops.files import write_atomically


def kept_rows(path: Path, step: int) -> list[dict[str, str]]:
    """The rows of a log up to `step`; none where there is no file. ValueError, naming it, where they can't be read.

    What comes after the row of `step` is not looked at: a machine that went down may have left anything there.
    """
    rows: list[dict[str, str]] = []
    if not path.exists():
        return rows
    try:
        # Bytes that are no text are no number of a step either.
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            for row in reader if "step" in names else ():
                if None not in row.values() and int(row["step"]) <= step:
                    rows.append(row)
                if rows and int(rows[-1]["step"]) == step:
                    break
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}: expected the log of a run up to step {step}, got a damaged one ({error})") from error
    if "step" not in names:
        raise ValueError(f"{path}: expected a log with a column step, got {names}")
    return rows


class CsvLog:
    """Rows of `path`, appended.

    Opened at `step`, it first drops rows of later steps (a stopped run's surplus).
    """

    def __init__(self, path: Path, columns: list[str], step: int):
        self.columns = columns
        rows = kept_rows(path, step) if step else []
        text = io.StringIO()
        # A column that an older run did not have stays unknown.
        writer = csv.DictWriter(text, columns, restval="nan", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, text.getvalue().encode())
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns, extrasaction="ignore", lineterminator="\n")

    def write(self, row: dict) -> None:
        # repr of a float is the shortest text that reads back to the same number, so logs compare bit for bit.
        self._writer.writerow({k: repr(v) if isinstance(v, float) else v for k, v in row.items()})

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def tensorboard_writer(folder: Path, step: int):
    """A SummaryWriter, or None where tensorboard (the `train` extra) is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


class RunLog:
    """What a run writes of itself, from `step` on: metrics, evaluations, TensorBoard events.

    active: False for one that writes nothing. ValueError where a log that is there can't be gone on with.
    """

    def __init__(self, metrics: Path, evaluations: Path, board: Path, columns: list[str], step: int, active: bool):
        self._evaluations, self._folder, self._step, self._active = evaluations, board, step, active
        if active and step:
            kept_rows(evaluations, step)
        self._metrics = CsvLog(metrics, columns, step) if active else None
        self._evals: CsvLog | None = None
        self._board = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for log in (self._metrics, self._evals, self._board):
            if log is not None:
                log.close()

    def train(self, row: dict) -> None:
        if self._active:
            self._metrics.write(row)
            self._scalars("train", {key: row[key] for key in _SHOWN}, row["step"])

    def evaluation(self, step: int, tokens: int, found: dict[str, float]) -> None:
        if self._active:
            columns = ["step", "tokens", *found]
            self._evals = self._evals or CsvLog(self._evaluations, columns, step - 1)
            self._evals.write({"step": step, "tokens": tokens, **found})
            self._evals.flush()
            self._scalars("eval", found, step)

    def flush(self) -> None:
        if self._active:
            self._metrics.flush()

    def _scalars(self, group: str, values: dict[str, float], step: int) -> None:
        if self._folder is not None and self._board is None:
            self._board = tensorboard_writer(self._folder, self._step)
            self._folder = None
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(f"{group}/{key}", value, step)


_SHOWN = ("loss", "grad_norm", "lr_muon", "tokens_per_second", "mfu", "peak_memory")  # in TensorBoard
_TOLD_EVERY = 15.0  # seconds between plain lines


class ProgressBar:
    """Loss, speed, memory and time left; plain lines where the output is not a terminal."""

    def __init__(self, console: Console, label: str, step: int, steps: int):
        self._console, self._label, self._steps = console, label, steps
        self._told = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=steps, completed=step, figures="")

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()

    def update(self, row: dict, note: str = "") -> None:
        """row: of the metrics, after a step. Figures that are not known (NaN) are left out."""
        step, figures = row["step"], f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
        if not math.isnan(row["mfu"]):
            figures += f"  {row['mfu']:.1%} MFU"
        if not math.isnan(row["peak_memory"]):
            figures += f"  {row['peak_memory'] / 2**30:.1f} GiB"
        figures += note
        self._bar.update(self._task, completed=step, figures=figures)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._told > _TOLD_EVERY or step == self._steps):
            self._told = now
            self._console.print(f"{self._label}  step {step}/{self._steps}  {figures}")

    def print(self, text: str) -> None:
        self._console.print(text)
