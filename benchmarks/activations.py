"""Bytes of activations for each token, layer and pass, by what is recomputed: rehearsed, not measured.

    python benchmarks/activations.py

Four layers of Qwen3.5 in their default sizes, three with fast weights and one of attention, read a
text in bfloat16. How far the peak of the backward grows from a shorter text to a longer one is what
every token adds; how far this grows with one pass more, what every token adds in every pass.
"""

import tempfile
from functools import partial
from pathlib import Path

from transformers import Qwen3_5TextConfig

from sleep_ops.adapters.loading import load_model
from sleep_ops.training import TrainConfig
from sleep_ops.training.rehearsal import rehearse

WINDOW, WINDOWS, PASSES = 2000, (8, 12), (3, 4)  # so many that activations are most of what grows
RECIPE = TrainConfig(batch_size=1, precision="bf16", param_dtype="bf16")
MODEL = Qwen3_5TextConfig(num_hidden_layers=4, vocab_size=1024)
RECOMPUTED = {"-": {}} | {
    name: dict(activation_checkpointing=True, recompute=name) for name in ("pass", "block", "window")
}


def peak(folder: Path, windows: int, passes: int, recomputed: dict) -> float:
    """Bytes in the backward, forward included, of a text of so many windows."""
    chosen = dict(impl="triton", attention_backend="torch", **recomputed)
    build = partial(load_model, folder, weights=False, window=WINDOW, passes=passes, **chosen)
    return sum(rehearse(build, RECIPE, tokens=windows * WINDOW).phases["backward"].values())


def main() -> None:
    tokens = (WINDOWS[1] - WINDOWS[0]) * WINDOW * MODEL.num_hidden_layers
    print("| recomputed | per token, layer and pass | per token and layer, N = 3 | N = 4 |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        MODEL.save_pretrained(place)
        for name, recomputed in RECOMPUTED.items():
            few, many = (
                (peak(Path(place), WINDOWS[1], n, recomputed) - peak(Path(place), WINDOWS[0], n, recomputed)) / tokens
                for n in PASSES
            )
            print(f"| {name} | {many - few:,.0f} | {few:,.0f} | {many:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
