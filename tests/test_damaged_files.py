"""Files that are damaged, or of something else, are refused in one line that names them."""

import json

import pytest
from commands import run

from sleep_ops import HybridConfig
from sleep_ops.files import read_csv, read_table
from sleep_ops.tasks import Rule110, build_task
from sleep_ops.training import CheckpointError
from sleep_ops.training.checkpoint import load_checkpoint, save_checkpoint
from sleep_ops.training.logs import CsvLog


def refused(*arguments) -> str:
    """The message of a command that ends with exit code 2."""
    text = run(*arguments, code=2)
    assert "error" in text
    return text


@pytest.mark.parametrize(
    "manifest",
    [b"[]", b"null", b'{"version": 2}', b'{"version": 2, "files": []}', b"\xff\xfe", b"{"],
    ids=["list", "null", "no files", "files as list", "not UTF-8", "cut off"],
)
def test_a_damaged_manifest_is_a_damaged_checkpoint(manifest, tmp_path):
    path = save_checkpoint(tmp_path, 3, {}, {}).wait()
    (path / "manifest.json").write_bytes(manifest)
    with pytest.raises(CheckpointError, match="step-00000003"):
        load_checkpoint(path)


@pytest.mark.parametrize("step", ["x", None, [1]])
def test_a_manifest_without_a_step_is_a_damaged_checkpoint(step, tmp_path):
    path = save_checkpoint(tmp_path, 3, {}, {}).wait()
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"step": step}))
    with pytest.raises(CheckpointError, match="step-00000003"):
        load_checkpoint(path)


@pytest.mark.parametrize("change", [{"model": []}, {"task": None}, {"task": {"name": ["x"]}}], ids=str)
def test_a_damaged_configuration_names_its_file(change, tmp_path):
    config = {"version": 1, "task": {"name": "rule110"}, "model": {}, "train": {}}
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert "config.json" in refused("eval", tmp_path)


def test_tables_say_what_they_lack(tmp_path):
    path = tmp_path / "t.csv"
    for text, why in (
        ("a,b\n1,2\n", "without c"),
        ("a,c\n", "without a row"),
        ("", "without a, c"),
        ("a,c\n1\n", "rows"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=why):
            read_table(path, "a", "c")
    for data in (b"a,c\n\xff,1\n", b"a,c\nx,1\n"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="t.csv: expected a"):
            read_csv(path, "a", "c")


def test_a_log_of_something_else_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("name,value\nx,1\n")
    with pytest.raises(ValueError, match="metrics.csv: expected a log with a column step"):
        CsvLog(tmp_path / "metrics.csv", ["step", "loss"], step=4)


@pytest.mark.parametrize(
    "text", ["", "a,b\n1,2\n", "figure,preset,run\nfig2a,tiny,x\n"], ids=["empty", "foreign", "bare"]
)
def test_plot_of_a_foreign_table(text, tmp_path):
    (tmp_path / "results.csv").write_text(text)
    assert "results.csv" in refused("plot", "fig2a", "--preset", "tiny", "--out", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"results.csv"}


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n"], ids=["empty", "foreign"])
def test_plot_of_a_foreign_throughput(text, tmp_path):
    (tmp_path / "train.csv").write_text(text)
    assert "train.csv" in refused("plot", "fig6", "--preset", "tiny", "--out", tmp_path)


def test_names_do_not_lead_out_of_their_folder():
    assert "figure: expected one of" in refused("sweep", "../presets/rule110")


def test_an_image_has_a_format(tmp_path):
    assert "image: expected" in refused("plot", "fig2a", "--out", tmp_path, "--image", tmp_path / "i")


def test_task_options_that_are_no_numbers():
    assert "num_pairs: expected an integer" in refused("data", "mqar", "--task-option", "num_pairs=null")


def test_settings_of_another_version_are_refused():
    with pytest.raises(ValueError, match="task: expected settings of rule110, got speed"):
        build_task(Rule110().to_dict() | {"speed": 3})
    with pytest.raises(ValueError, match="values: expected hidden_size, layers"):
        HybridConfig.from_dict({"window": 3})
