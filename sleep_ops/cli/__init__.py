"""The command line: train, fine-tune, evaluate, plan, demonstrate, measure, verify.

Settings are checked before anything is written; a bad one is a message and exit code 2. Exit code 1 is a run that
failed, 128 + n one that signal n stopped (its checkpoint is saved).
"""

import typer

from sleep_ops.cli import evaluate, experiments, finetune
from sleep_ops.cli.bench import bench_app, bench_kernels, bench_launches, bench_passes, bench_train, bench_tune
from sleep_ops.cli.evaluate import demo, recall
from sleep_ops.cli.plan import plan
from sleep_ops.cli.train import train_app
from sleep_ops.cli.verify import verify

app = typer.Typer(
    name="sleep-ops",
    help="Sleep for language models: N passes over a window before it is evicted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(train_app, name="train")
app.add_typer(bench_app, name="bench")
app.command("finetune")(finetune.finetune)
app.command("eval")(evaluate.evaluate)
app.command("probe")(evaluate.probe)
app.command("sweep")(experiments.sweep)
app.command("plot")(experiments.plot)
app.command("data")(experiments.data)
app.command()(plan)
app.command()(demo)
app.command()(recall)
app.command()(verify)


def main() -> None:
    app()


__all__ = [
    "app",
    "bench_kernels",
    "bench_launches",
    "bench_passes",
    "bench_train",
    "bench_tune",
    "demo",
    "main",
    "plan",
    "recall",
    "verify",
]
