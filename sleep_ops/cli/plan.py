"""`sleep-ops plan`: whether training a model fits, and how fast it may go, before there is a machine for it."""

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sleep_ops.checks import check_count, expect
from sleep_ops.cli.common import run_console
from sleep_ops.cli.options import MODEL, RECIPE, Fields, all_but, command, count_or_inf, integers, option
from sleep_ops.model.config import SleepSettings
from sleep_ops.training.config import FinetuneConfig
from sleep_ops.training.plan import Machine, Prediction

_SLEEP = all_but(SleepSettings, "passes", "attention_backend", "impl")
_RECIPE = (
    *("batch_size", "micro_batch", "precision", "trainable", "split"),
    *("parallel", "param_dtype", "reshard", "replicas", "offload"),
)
_KINDS = ("parameters", "optimizer", "gradients", "gathered", "activations", "updates")


@command
def plan(
    model: Annotated[
        str, typer.Argument(help="Checkpoint folder, of which config.json is read alone; or a family's name.")
    ],
    tokens: Annotated[int, option("Tokens of a text, all with loss.")],
    passes: Annotated[str, option("Passes per sleep, N; inf is for replay.", MODEL)],
    machine: Annotated[dict, Fields(Machine)],
    sleep: Annotated[dict, Fields(SleepSettings, _SLEEP, given=True, panel=MODEL)],
    recipe: Annotated[dict, Fields(FinetuneConfig.train, _RECIPE, given=True, panel=RECIPE)],
    insert: Annotated[
        str | None, option("Layers, separated by commas, after which to insert fast weights.", MODEL)
    ] = None,
    lora: Annotated[
        int | None, option("Rank of adapters, which learn in the place of what they adapt.", RECIPE)
    ] = None,
    lora_targets: Annotated[
        str | None, option("Modules with adapters, as q_proj,v_proj; all by default.", RECIPE)
    ] = None,
) -> None:
    """What fine-tuning will need of each GPU, and what makes it fit: predictions, made without a GPU.

    Every step is gone through with tensors without values: a minute or more for a large model. Settings that save
    memory are added one by one until it fits; those that are given stay.
    """
    on = Machine(**machine)
    settings = {"passes": count_or_inf("passes", passes)} | sleep
    train = replace(FinetuneConfig.train, **recipe)
    layers = None if insert is None else integers("insert", insert)
    if lora is not None:
        check_count("lora", lora)
    expect(lora_targets is None or lora is not None, "lora_targets", "none without --lora", lora_targets)

    import torch

    from sleep_ops.adapters.loading import load_model
    from sleep_ops.adapters.lora import add_lora
    from sleep_ops.adapters.sizes import FAMILIES, write_default
    from sleep_ops.training.plan import predictions

    console = run_console()
    with ExitStack() as stack:
        folder = Path(model)
        if not folder.is_dir():
            if model not in FAMILIES:
                raise ValueError(f"model: expected a checkpoint folder or one of {', '.join(FAMILIES)}, got {model!r}")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_default(model, folder)

        def build(param_dtype, **chosen):
            load = partial(load_model, folder, weights=False, insert=layers, **chosen)
            if lora is None:
                return load()
            base = load(dtype=torch.bfloat16 if param_dtype == "bf16" else torch.float32)
            return add_lora(base, rank=lora, targets=None if lora_targets is None else lora_targets.split(","))

        found = []
        given = frozenset(recipe) | frozenset(sleep)
        for prediction in predictions(build, train, settings, on, tokens=tokens, given=given):
            found.append(prediction)
            console.print(_told(prediction), highlight=False, soft_wrap=True)
    console.print(_table(found, on))
    last = found[-1]
    said = " ".join(f"--{name.replace('_', '-')}" + ("" if x is True else f" {x}") for name, x in last.added.items())
    if not last.fits:
        failed = f"predicted: does not fit into {on.usable / 1e9:.0f} GB, whatever was tried"
        hint = "; --lora RANK would train adapters alone" if lora is None else ""
        console.print(failed + hint, soft_wrap=True)
    elif last.added:
        console.print(f"predicted: fits with {said}", highlight=False, soft_wrap=True)
    else:
        console.print("predicted: fits as it is")


def _told(prediction: Prediction) -> str:
    return f"{_added(prediction)}: {prediction.step.peak / 1e9:.1f} GB, {'fits' if prediction.fits else 'does not fit'}"


def _added(prediction: Prediction) -> str:
    """The settings that were added last."""
    if not prediction.last:
        return "as given"
    return "+ " + ", ".join(name if value is True else f"{name} {value}" for name, value in prediction.last.items())


def _table(found: list[Prediction], machine: Machine) -> Table:
    title = f"predicted, GB of each of {machine.gpus} GPUs ({machine.usable / 1e9:.0f} of {machine.memory:g} to use)"
    kinds = [k for k in _KINDS if any(p.step.kinds.get(k, 0) >= 5e7 for p in found)]
    table = Table("", "peak", *kinds, "host", "tokens/s", title=title)
    rates = f"{machine.bandwidth:g} GB/s, and {machine.host_bandwidth:g} to and from the host,"
    table.caption = f"tokens/s if {machine.mfu:.0%} of {machine.peak:g} TFLOP/s and {rates} are reached"
    for p in found:
        cells = (f"{p.step.kinds.get(k, 0) / 1e9:.1f}" for k in kinds)
        peak = f"{p.step.peak / 1e9:.1f}{'' if p.fits else ' !'}"
        table.add_row(_added(p), peak, *cells, f"{p.step.host / 1e9:.1f}", f"{p.tokens_per_second:,.0f}")
    return table
