"""The examples run and show what they say."""

import runpy
from pathlib import Path

import pytest
from safetensors import safe_open

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_a_memory_saved_by_one_session_answers_in_another(tmp_path):
    right = runpy.run_path(EXAMPLES / "persistent_memory.py")["main"](["--out", str(tmp_path), "--steps", "330"])
    assert right > 0.3  # guessing: 0.03; one document's numbers guessed at random: 0.125
    with safe_open(tmp_path / "memory.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == {f"blocks.{i}.{part}" for i in (0, 2) for part in ("fast_weights", "conv_tail")} | {
        f"blocks.1.{part}" for part in ("keys", "values")
    }
