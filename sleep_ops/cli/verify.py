"""`sleep-ops verify`: everything that can be confirmed and measured on the machine at hand, and one report of it."""

from pathlib import Path
from typing import Annotated

import typer

from sleep_ops.cli.common import run_console
from sleep_ops.cli.options import Device, Resume, command, option


@command
def verify(
    budget: Annotated[float, option("Minutes there are for all of it.")] = 30.0,
    device: Device = "auto",
    out: Annotated[Path | None, option("Folder; runs/verify-cpu or runs/verify-cuda by default.")] = None,
    resume: Resume = True,
) -> None:
    """Check, tune and measure everything this machine can, one step after another, and write a report.

    Every step has its share of the minutes, never more than 9, and what does not fit or can't run here is left out, as
    the report says. The same command again goes on with what has not passed yet. Exit code 0 if all that ran passed.
    """
    console = run_console()
    from rich.progress import Progress

    from sleep_ops.training.config import resolve_device
    from sleep_ops.verify import report
    from sleep_ops.verify.run import Verification, check_budget, terminated_like_interrupted
    from sleep_ops.verify.steps import Place, checkout

    seconds, where = check_budget(budget), resolve_device(device)
    place = Place(out or Path("runs") / f"verify-{where.type}", where, checkout())
    verification = Verification(place, resume=resume)
    with (
        terminated_like_interrupted(),
        Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("", total=len(verification.steps), completed=verification.done)

        def after(step, outcome) -> None:
            text = f"{step.name}: {outcome.outcome}"
            text += f" after {outcome.seconds:.0f} s" if outcome.limit else ""
            text += f": {outcome.why}" if outcome.why else ""
            bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            report.write(verification)
            bar.advance(task)

        verification.run(seconds, lambda step: bar.update(task, description=step.name), after)
    path = report.write(verification)
    console.print(report.summary(verification), highlight=False)
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    if not verification.passed:
        raise typer.Exit(1)
