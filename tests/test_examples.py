"""The examples run and show what they say."""

import json
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from safetensors import safe_open

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def read(notebook: Path) -> dict:
    return json.loads(notebook.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_memory_saved_by_one_session_answers_in_another(tmp_path):
    right = runpy.run_path(EXAMPLES / "persistent_memory.py")["main"](["--out", str(tmp_path), "--steps", "330"])
    assert right > 0.3  # guessing: 0.03; one document's numbers guessed at random: 0.125
    with safe_open(tmp_path / "memory.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == {f"blocks.{i}.{part}" for i in (0, 2) for part in ("fast_weights", "conv_state")} | {
        f"blocks.1.{part}" for part in ("keys", "values")
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_clean(path):
    """Version 4 of the format, nothing run, nothing of the machine it was written on."""
    notebook = read(path)
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] >= 5
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code") and cell["metadata"] == {}
        assert all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            compile("".join(cell["source"]), path.name, "exec")
    text = path.read_text(encoding="utf-8")
    assert not [word for word in ("/home/", "/Users/", "/root/", "/work/", "/tmp/", "C:\\", "file:") if word in text]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, monkeypatch):
    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", lambda: None)
    names = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]):
        for number, cell in enumerate(read(path)["cells"]):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    assert plt.get_fignums()
    plt.close("all")
