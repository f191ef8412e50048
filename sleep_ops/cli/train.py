"""`sleep-ops train`: a hybrid model from scratch, one command for each task."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sleep_ops.cli.common import (
    MODEL,
    RECIPE,
    RUN,
    TASK,
    BatchSize,
    CheckpointEvery,
    Checkpointing,
    ConvBoundary,
    Decay,
    Device,
    EvalEvery,
    EvalSamples,
    Eviction,
    FinalLr,
    GradClip,
    KeepCheckpoints,
    Loop,
    LrAdamW,
    LrMuon,
    MaxSkipped,
    MicroBatch,
    Momentum,
    Precision,
    Resume,
    Seed,
    SleepKind,
    SleepOn,
    Steps,
    Until,
    Warmup,
    WeightDecay,
    option,
    parse_loop,
    parse_passes,
    print_evaluations,
    refusals,
)

train_app = typer.Typer(help="Train a hybrid model on a task.", no_args_is_help=True)


@train_app.command("rule110")
def train_rule110(
    t: Annotated[int, option("Steps of the automaton.", TASK)] = 8,
    strings: Annotated[int, option("Strings per sequence.", TASK)] = 4,
    bits: Annotated[int, option("Bits per string.", TASK)] = 24,
    boundary: Annotated[str, option("periodic or zero.", TASK)] = "periodic",
    held_out: Annotated[float, option("Fraction of all strings kept out of training, to evaluate on.", TASK)] = 0.0,
    width: Annotated[int, option("Hidden size.", MODEL)] = 256,
    heads: Annotated[int, option("Heads, of attention and of the fast weights.", MODEL)] = 4,
    head_dim: Annotated[int | None, option("Head dim; width / heads by default.", MODEL)] = None,
    layers: Annotated[str, option("Blocks, attn or gdn, joined by dashes.", MODEL)] = "attn-gdn-attn-gdn",
    passes: Annotated[str, option("Passes per sleep, N; 1 is the ordinary hybrid, inf is for replay.", MODEL)] = "4",
    window: Annotated[int | None, option("Tokens before eviction, L; the string length by default.", MODEL)] = None,
    eviction: Eviction = "hard",
    loop: Loop = "all",
    sleep_kind: SleepKind = "refine",
    sleep_on: SleepOn = "every",
    conv_boundary: ConvBoundary = "snapshot",
    rule: Annotated[str, option("delta or hebbian.", MODEL)] = "delta",
    neg_eigval: Annotated[bool, option("beta in (0, 2).", MODEL)] = False,
    init_std: Annotated[float | None, option("Of the weights; (3 width) ** -0.5 by default.", MODEL)] = None,
    activation_checkpointing: Checkpointing = False,
    steps: Steps = 800,
    batch: BatchSize = 512,
    lr_muon: LrMuon = 2e-3,
    lr_adamw: LrAdamW = 5e-5,
    weight_decay: WeightDecay = 1e-4,
    momentum: Momentum = 0.95,
    grad_clip: GradClip = 1.0,
    warmup: Warmup = 0.05,
    decay: Decay = 0.2,
    final_lr: FinalLr = 1e-3,
    precision: Precision = "auto",
    max_skipped: MaxSkipped = 10,
    micro_batch: MicroBatch = None,
    trainable: Annotated[str, option("all, or fast_weights: the GDN mixers alone.", RECIPE)] = "all",
    seed: Seed = 0,
    device: Device = "auto",
    cuda_graph: Annotated[bool, option("Record a step once and launch it as one, on CUDA.", RUN)] = False,
    out: Annotated[Path, option("Run folder.", RUN)] = Path("runs/rule110"),
    resume: Resume = True,
    checkpoint_every: CheckpointEvery = 200,
    keep_checkpoints: KeepCheckpoints = 2,
    eval_every: EvalEvery = 100,
    eval_samples: EvalSamples = 2048,
    until: Until = None,
) -> None:
    """Rule 110: the first bit of each evicted string after t steps of the automaton."""
    console = Console()
    with refusals(console):
        from sleep_ops.model import HybridConfig
        from sleep_ops.tasks import Rule110
        from sleep_ops.training import RunConfig, TrainConfig, Trainer

        task = Rule110(t=t, strings=strings, bits=bits, boundary=boundary, held_out=held_out)
        if init_std is not None and not 0 < init_std < 10:
            raise ValueError(f"init_std: expected a number in (0, 10), got {init_std}")
        model = HybridConfig(
            vocab_size=task.vocab_size,
            hidden_size=width,
            num_heads=heads,
            head_dim=head_dim,
            layers=tuple(layers.split("-")),
            window=task.window if window is None else window,
            passes=parse_passes(passes),
            loop=parse_loop(loop),
            sleep_kind=sleep_kind,
            eviction=eviction,
            sleep_on=sleep_on,
            conv_boundary=conv_boundary,
            rule=rule,
            allow_neg_eigval=neg_eigval,
            initializer_range=(3 * max(width, 1)) ** -0.5 if init_std is None else init_std,
            activation_checkpointing=activation_checkpointing,
        )
        recipe = TrainConfig(
            steps=steps,
            batch_size=batch,
            seed=seed,
            lr_muon=lr_muon,
            lr_adamw=lr_adamw,
            weight_decay=weight_decay,
            momentum=momentum,
            grad_clip=grad_clip,
            warmup=warmup,
            decay=decay,
            final_lr=final_lr,
            precision=precision,
            max_skipped=max_skipped,
            eval_every=eval_every,
            eval_samples=eval_samples,
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
            device=device,
            cuda_graph=cuda_graph,
            micro_batch=micro_batch,
            trainable=trainable,
        )
        if until is not None and until < 1:
            raise ValueError(f"until: expected an integer >= 1, got {until}")
        config = RunConfig(task.to_dict(), model.to_dict(), recipe)
        trainer = Trainer(config, out, resume=resume, label=f"rule110 N={passes}", console=console)
        if trainer.step and trainer.step >= min(until or steps, steps):
            console.print(f"{out}: already at step {trainer.step}, nothing to do")
            return
        if trainer.step:
            console.print(f"{out}: going on from step {trainer.step}")
        result = trainer.fit(until)
    if result.signal is not None:
        console.print(f"stopped by signal {result.signal} at step {result.step}, saved; the same command goes on")
        raise typer.Exit(128 + result.signal)
    if result.evaluation:
        print_evaluations(console, task, [(model.passes, result.evaluation)])
    state = "finished" if result.finished else f"at step {result.step} of {steps}"
    console.print(f"{out}: {state}, {result.seconds:.0f} s of training, {result.skipped} steps skipped")
