"""Hugging Face models that sleep. Needs transformers 5.7 or newer: `pip install sleep-ops[hf]`.

    from sleep_ops.adapters.hf import sleepify
    model = AutoModelForCausalLM.from_pretrained(folder)
    sleepify(model, window=2048, passes=4)

From then on `model(...)`, `model.generate(...)`, `Trainer` and `SleepSession(model)` read every
text window by window, with sleep in between (Algorithm 1 of arXiv 2605.26099).
"""

from importlib.metadata import PackageNotFoundError, version

OLDEST = (5, 7)


def _require_transformers() -> None:
    """ImportError that says what to install where transformers is missing or too old."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = "none"
    numbers = tuple(int(x) for x in found.split(".")[:2]) if found[0].isdigit() else (0, 0)
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        wanted = f"expected transformers {oldest} or newer (pip install 'sleep-ops[hf]')"
        raise ImportError(f"sleep_ops.adapters.hf: {wanted}, found {found}")


_require_transformers()

from sleep_ops.adapters.hf.forward import SleepBackboneOutput, SleepCausalLMOutput  # noqa: E402
from sleep_ops.adapters.hf.generation import generate  # noqa: E402
from sleep_ops.adapters.hf.insert import insert_fast_weights  # noqa: E402
from sleep_ops.adapters.hf.loading import from_pretrained  # noqa: E402
from sleep_ops.adapters.hf.mixers import replace_mixers, replaced_mixers  # noqa: E402
from sleep_ops.adapters.hf.sleepify import sleepify  # noqa: E402

__all__ = [
    "SleepBackboneOutput",
    "SleepCausalLMOutput",
    "from_pretrained",
    "generate",
    "insert_fast_weights",
    "replace_mixers",
    "replaced_mixers",
    "sleepify",
]
