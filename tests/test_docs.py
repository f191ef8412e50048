"""README and pages: their Python code runs, commands and links are those that exist, the README stays short."""

import re
import shlex
from pathlib import Path

import hf_models
import pytest
import test_jet_nemotron
import test_ouro
import typer

from sleep_ops.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
FAMILIES = [page for page in PAGES if page.parent == DOCS / "models" and page.stem != "README"]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
MAX_NOT_RUN = 2


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    return FENCED.sub("", text(page))


def blocks(page: Path, language: str = "python") -> list[str]:
    """The fenced blocks of a language; `python no-run` marks one that can't run on a CPU without downloads."""
    return [code for info, code in FENCED.findall(text(page)) if info == language]


def write_checkpoint(family: str, folder: Path) -> None:
    """A tiny random checkpoint of the page's family."""
    if family == "jet_nemotron":
        test_jet_nemotron.write_checkpoint(folder)
    elif family == "ouro":
        test_ouro.write_checkpoint(folder)
    else:
        kind = {"attention_only": "llama"}.get(family, family)
        hf_models.build(kind, max_position_embeddings=8192).save_pretrained(folder)


@pytest.mark.parametrize("page", [p for p in PAGES if p in FAMILIES or blocks(p)], ids=named)
def test_page_runs(page, tmp_path, monkeypatch):
    """One block after another; a family's on a tiny checkpoint in a folder of the name that the page loads."""
    monkeypatch.chdir(tmp_path)
    code = blocks(page)
    if page in FAMILIES:
        (name,) = set(re.findall(r"from_pretrained\(\"([^\"]*?)\"", code[0]))
        write_checkpoint(page.stem, tmp_path / name)
    scope: dict = {}
    for block in code:
        exec(compile(block, named(page), "exec"), scope)


def test_there_are_blocks():
    assert len(blocks(README)) >= 2
    assert all(len(blocks(DOCS / name)) >= 5 for name in ("operators.md", "model.md"))


def test_hardly_a_block_is_not_run():
    """And no fence says Python in a way that the other tests don't see."""
    infos = [info for page in PAGES for info, _ in FENCED.findall(text(page))]
    assert set(infos) <= {"", "python", "python no-run"}
    assert infos.count("python no-run") <= MAX_NOT_RUN
    assert all(text(page).count("```") == 2 * len(FENCED.findall(text(page))) for page in PAGES)


def test_the_readme_is_short_and_begins_with_the_idea():
    lines = text(README).splitlines()
    assert len(lines) <= 150
    assert any("P S + R" in line for line in lines[:20])


@pytest.mark.parametrize("page", [*PAGES, *OTHERS[:2]], ids=named)
def test_lines_of_prose_are_short(page):
    """But for tables, and for what can't be broken: links."""
    lines = [line for line in prose(page).splitlines() if not line.startswith("|") and "](" not in line]
    assert [line for line in lines if len(line) > 100] == []


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=named)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.is_relative_to(ROOT), target
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


@pytest.mark.parametrize("folder", [DOCS, DOCS / "models"], ids=named)
def test_every_page_is_listed(folder):
    listed = set(re.findall(r"\((\w[\w-]*\.md)\)", text(folder / "README.md")))
    assert listed == {page.name for page in folder.glob("*.md")} - {"README.md"}


def commands(page: Path) -> list[str]:
    """Lines of blocks that call `sleep-ops`, and those in backticks."""
    shell = "\n".join(blocks(page, "")).replace("\\\n", " ")
    inline = re.findall(r"`(sleep-ops [^`]*)`", prose(page).replace("\n", " "))
    return re.findall(r"^sleep-ops .*$", shell, flags=re.MULTILINE) + inline


@pytest.mark.parametrize("page", [p for p in [*PAGES, ROOT / "CONTRIBUTING.md"] if commands(p)], ids=named)
def test_commands_exist(page):
    """Every command, and every option given to it; words in capitals, as TASK, stand for anything."""
    for line in commands(page):
        _, *words = shlex.split(line, comments=True)
        command = typer.main.get_command(app)
        while hasattr(command, "get_command") and words and not (words[0].isupper() or words[0] in ("...", "--help")):
            command, words = command.get_command(command.context_class(command), words[0]), words[1:]
            assert command is not None, line
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= known, f"{line}: {given - known}"
