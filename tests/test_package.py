"""What an installation must and must not contain, and which way the imports point."""

import ast
import graphlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_IGNORED = ("--cached", "--others", "--exclude-standard")  # what is in the checkout, added to git or not yet

# Who may import from whom: each from those before it, and "tasks" and "adapters" not from one another.
ROOMS = [
    ("kernels",),
    ("checks",),
    ("reference", "ragged", "validation", "files", "streams", "parameters"),
    ("tokenizer",),
    ("ops",),
    ("layers",),
    ("model",),
    ("adapters", "tasks"),
    ("training",),
    ("bench",),
    ("experiments",),
    ("verify",),
    ("cli",),
    ("__main__",),
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the product by name."""
    found = {}
    for folder, package in ((ROOT / "sleep_ops", "sleep_ops"), (ROOT / "kernels", "sleep_ops.kernels")):
        for path in folder.rglob("*.py"):
            if package != "sleep_ops" or "kernels" not in path.relative_to(folder).parts:
                parts = (package, *path.relative_to(folder).with_suffix("").parts)
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(name: str) -> set[str]:
    """The product's modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {x if x in MODULES else node.module for x in inside}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {x for x in found if x in MODULES and x != name}


def room(name: str) -> str:
    return [*name.split("."), "package"][1]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "sleep_ops"])
def test_imports_point_one_way(name):
    for target in imported(name) - {"sleep_ops"}:  # which hands out names of operators, layers and the model
        same = room(target) == room(name)
        assert same or RANK[room(target)] < RANK[room(name)], f"{name} imports {target}"
    assert "sleep_ops" not in imported(name) or RANK[room(name)] > RANK["model"]


def test_no_module_imports_itself_through_others():
    graph = graphlib.TopologicalSorter({name: imported(name) for name in MODULES if name != "sleep_ops"})
    graph.prepare()  # CycleError names the modules


def run(code: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_product_never_imports_what_it_is_compared_with():
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not {n.split(".")[0] for n in names} & {"fla", "flash_qla", "tilelang"}, path


@pytest.mark.slow
def test_no_top_level_module_called_kernels(tmp_path):
    """Hugging Face's package of that name is what programs get, from the repository root too."""
    pytest.importorskip("kernels", reason="Hugging Face's kernels package is not installed")
    code = "import sleep_ops, sleep_ops.kernels.chunk_scan, kernels; print(kernels.__file__)"
    for folder in (ROOT, tmp_path):
        assert "site-packages" in Path(run(code, folder)).parts


def test_an_editable_install_maps_nothing_but_the_package():
    finders = [m for folder in sys.path for m in Path(folder).glob("__editable___sleep_ops*_finder.py")]
    links = [m for folder in sys.path for m in Path(folder).glob("__editable__*sleep_ops*.pth")]
    if not finders and not links:
        pytest.skip("not installed in editable mode")
    assert finders, f"the checkout itself is on the path, and with it its folder kernels: {links}"
    (mapping,) = re.findall(r"^MAPPING.*= (\{.*\})$", finders[0].read_text(), flags=re.MULTILINE)
    assert {name.split(".")[0] for name in ast.literal_eval(mapping)} == {"sleep_ops"}


@pytest.mark.slow
def test_transformers_sees_the_same_from_the_repository_root(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    code = "import sleep_ops; from transformers import Qwen3Config, Qwen3ForCausalLM\n"
    code += "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run(code, ROOT).splitlines()[-1] == run(code, tmp_path).splitlines()[-1]


def test_the_wheel_has_the_kernels_inside_the_package(tmp_path):
    source = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files", *NOT_IGNORED], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if name.split("/")[0] in ("kernels", "sleep_ops", "setup.py", "README.md", "pyproject.toml", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} == {"sleep_ops", wheel.name.split("-py3")[0] + ".dist-info"}
    shipped = {n for n in names if n.endswith(".py")}
    assert {f"sleep_ops/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")} <= shipped
    assert "sleep_ops/py.typed" in names  # type checkers read the annotations
    packages = {f"sleep_ops/{p.relative_to(ROOT / 'sleep_ops')}" for p in (ROOT / "sleep_ops").rglob("*.py")}
    assert packages <= shipped


def test_the_reference_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None\n"
    code += "import torch; from sleep_ops import gated_delta_rule\n"
    code += "x = torch.randn(1, 5, 2, 4); g = -torch.rand(1, 5, 2)\n"
    code += "for impl in ('reference', 'torch', 'auto'): out = gated_delta_rule(x, x, x, g, -g, impl=impl)\n"
    code += "print(out.output.shape[1])"
    assert run(code, ROOT) == "5"


@pytest.mark.parametrize("command", ["", "bench passes", "finetune", "plan", "demo", "recall"])
def test_help_needs_no_pytorch(command):
    """But for `train TASK`, whose options are the task's."""
    code = "import sys; sys.modules['torch'] = None\n"
    code += f"from sleep_ops.cli import app; app([*{command.split()}, '--help'])"
    assert "Usage" in run(code, ROOT)


def test_public_names_are_those_of_the_package():
    import sleep_ops

    assert set(sleep_ops.__all__) <= set(dir(sleep_ops))
    assert all(getattr(sleep_ops, name).__name__ == name for name in sleep_ops.__all__)
    assert not hasattr(sleep_ops, "nothing")
