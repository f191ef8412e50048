"""The sizes of memories and caches that `python -m sleep_ops.adapters.sizes` prints, against sessions' own tensors."""

import json
import subprocess
import sys

import pytest
import torch
from hf_models import build, tokens

from sleep_ops import HybridConfig, SleepHybridModel, SleepSession
from sleep_ops.adapters.hf import insert_fast_weights, sleepify
from sleep_ops.adapters.sizes import sizes
from sleep_ops.layers.attention import AttentionState


def measured(model, count):
    """Bytes of a session's states after reading `count` tokens in one window: (memory, cache)."""
    session = SleepSession(model)
    session.read(tokens(1, count))
    split = {True: 0, False: 0}
    for state in session.state.blocks:
        split[isinstance(state, AttentionState)] += sum(x.nbytes for x in state)
    return split[False], split[True]


def test_sizes_are_those_of_a_session():
    models = [
        sleepify(build("qwen3_5"), window=64),
        sleepify(build("olmo_hybrid", dtype=torch.bfloat16), window=64),
        sleepify(insert_fast_weights(build("llama"), [1]), window=64),
        SleepHybridModel(HybridConfig(vocab_size=128, hidden_size=32, layers=("attn", "gdn"), window=64)),
    ]
    for model in models:
        found = sizes(model, 40)
        assert found.parameters == sum(p.numel() for p in model.parameters())
        assert (found.memory, found.cache) == measured(model, 40)


@pytest.mark.slow
def test_a_folder_is_measured_by_its_configuration_alone(tmp_path):
    model = build("qwen3_next")
    model.config.save_pretrained(tmp_path / "tiny")
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())["model_type"] == "qwen3_next"
    command = [sys.executable, "-m", "sleep_ops.adapters.sizes", str(tmp_path / "tiny"), "--tokens", "65536"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    expected = sizes(sleepify(model.bfloat16(), window=64), 65536)
    assert "cache of 65536" in " ".join(out.split()) and f"{expected.cache / 2**20:.1f} MiB" in out
