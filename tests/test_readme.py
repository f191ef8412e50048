"""Every Python block of the README and of the pages on existing models runs."""

import re
from pathlib import Path

import hf_models
import pytest
import test_jet_nemotron
import test_ouro

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "sleep_ops" / "adapters" / "pages").glob("*.md"))


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


BLOCKS = blocks(ROOT / "README.md")


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_there_are_blocks():
    assert len(BLOCKS) >= 3


def write_checkpoint(page: str, folder: Path) -> None:
    """A tiny random checkpoint of the page's family."""
    if page == "jet_nemotron":
        test_jet_nemotron.write_checkpoint(folder)
    elif page == "ouro":
        test_ouro.write_checkpoint(folder)
    else:
        hf_models.build({"attention_only": "llama"}.get(page, page), max_position_embeddings=8192).save_pretrained(
            folder
        )


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem != "README"], ids=lambda p: p.stem)
def test_page_runs(page, tmp_path, monkeypatch):
    """One block after another, on a tiny checkpoint in a folder of the name that the page loads."""
    monkeypatch.chdir(tmp_path)
    code = blocks(page)
    (name,) = set(re.findall(r"from_pretrained\(\"([^\"]*?)\"", code[0]))
    write_checkpoint(page.stem, tmp_path / name)
    scope: dict = {}
    for block in code:
        exec(compile(block, page.name, "exec"), scope)


def test_every_page_is_listed():
    listed = set(re.findall(r"\((\w+\.md)\)", (PAGES[0].parent / "README.md").read_text(encoding="utf-8")))
    assert listed == {p.name for p in PAGES} - {"README.md"}
