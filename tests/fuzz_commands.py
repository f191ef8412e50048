"""Random arguments of the command line, valid, odd and bad ones: what it does must be whole, or refused in one message.

    python tests/fuzz_commands.py [--seconds 600] [--first 0] [--only COMMAND]

One case a seed, run in this process in a folder of its own. Exit code 0 has to leave the promised files, whole ones; 1
and 2 have to come with one error, no traceback and no partial file, and 2 with nothing written at all. Arguments that
can't be right must not be accepted. Commands that draw random numbers are run twice and must write the same.
"""

import contextlib
import csv
import functools
import json
import os
import random
import re
import shutil
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import get_args

from safetensors.torch import load
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))

from fuzz import search

from sleep_ops import cli
from sleep_ops.tasks import TASKS

ENTRIES = ("recall", "data", "train", "eval", "plot", "sweep", "bench", "finetune", "refused")
TIMES = ("seconds", "tokens_per_second", "mfu", "ms", "time", "memory")  # in columns that differ from run to run
COUNTS = (["1", "2", "3"], ["0", "-1", "x", "1.5", "", "nan", "1e3"])
DEVICES = (["cpu"], ["abacus", "cuda", "cuda:99", "", "cpu:x", "cuda:-1"])
SEEDS = (["0", "7", "4294967296"], ["-1", "x", "1.5"])
ODD_SEEDS = ["9223372036854775807", "9223372036854775808", "18446744073709551616"]
TEXTS = ["", "x", "nope", "None", "[]", "1,2", "../..", "-"]
OUTS = (["out", "a/b/out", "a b/ö", "there"], ["file", "file/below", "link/below", "n" * 300])

# command: {option: (good values, bad ones, others)}
OPTIONS: dict[str, dict[str, tuple]] = {
    "recall": {
        "loads": (
            ["0.25", "0.5,1", "0.5,0.75,1,1.5"],
            ["", "0", "-1", "nan", "inf", "1,0.5", "0.5,0.5", "a,b", "0.5,", "1e-9", "1e300", "1e9"],
            [" 0.5 , 1"],
        ),
        "passes": (["1", "1,3,7", "2,1000"], ["", "0", "-1", "2,1", "1,1", "x", "1.5", "1,"], ["9" * 30]),
        "key-dim": (["1", "4", "7"], ["0", "-3", "x", "2.5"]),
        "value-dim": (["1", "3"], ["0", "-3", "x"]),
        "codewords": (["2", "9"], ["1", "0", "-1", "x", "1000000000000000"]),
        "memories": (["2", "3"], ["1", "0", "-4"]),
        "beta": (["0.5", "1.99", "1"], ["0", "2", "nan", "inf", "-0.5"]),
        "decay": (["0", "0.5", "1"], ["-0.1", "1.1", "nan"]),
        "seed": (*SEEDS, ODD_SEEDS),
        "device": DEVICES,
        "out": OUTS,
    },
    "eval": {
        "passes": (["1", "1,3", "2"], ["0", "-1", "x", "", "1.5", "nan", "1,", "inf"]),
        "samples": (["1", "7"], ["0", "-1", "x"]),
        "batch": (["1", "3", "99"], ["0", "-1", "x"]),
        "seed": (*SEEDS, ODD_SEEDS),
        "device": DEVICES,
        "out": (["e.csv", "a/e.csv", "noext"], ["there", "file/e.csv", "link/e.csv", "n" * 300]),
    },
    "plot": {
        "preset": (["tiny", "paper"], ["huge", ""]),
        "image": (["i.png", "b/i.pdf", "i.svg"], ["there", "file/i.png"], ["i.xyz", "i", ""]),
    },
    "bench passes": {
        "passes": (["1", "1,2"], ["0", "-1", "x", "", "1,1", "1.5"]),
        "case": (["mid", "windows"], ["", "nope", "mid,"]),
        "providers": (["ours", "ours-chained", "layer"], ["", "nope", "ours,"], ["fla"]),
        "batch": COUNTS,
        "heads": COUNTS,
        "head-dim": (["4", "1"], COUNTS[1]),
        "window": (["1", "3", "99"], COUNTS[1]),
        "dtype": (["float32", "bfloat16"], ["int8", "", "float64"], ["float16"]),
        "max-chained": COUNTS,
        "seconds": (["0.001", "9"], ["0", "-1", "nan", "inf", "x"]),
        "seed": (*SEEDS, ODD_SEEDS),
        "device": DEVICES,
        "out": OUTS,
    },
    "bench train": {
        "preset": (["tiny"], ["", "nope", "tiny,"]),
        "passes": (["1", "2"], ["0", "x", "", "1,1"]),
        "window": (["3", "8"], ["0", "-1", "x", ""], ["100000"]),
        "checkpointing": (["off", "on"], ["", "maybe", "on,"]),
        "precision": (["float32", "auto"], ["fp4", ""], ["bf16"]),
        "seconds": (["0.001"], ["0", "-1", "nan"]),
        "seed": SEEDS,
        "device": DEVICES,
        "out": OUTS,
    },
    "sweep": {
        "set": (
            ["train.steps=2", "model.passes=2"][:1],
            ["train.steps=x", "train.nope=1", "nope", "=1", "task.t=3", "train.steps=0", "model.layers=mamba", ".=1"],
            ["train.steps=null", "train.steps=[]", "model.layers=[]", "train.lr_muon={}", "task.bits=null", "a.b.c=1"],
        ),
        "grid": (
            ["task.t=[1]", "task.t=[1,2]"],
            ["task.t=[]", "task.nope=[1]", "nope", "task.t=[-1]"],
            ["task.t=3", 'task.t=["x"]', "task.t=null", "task.t=[1,1]", "task.t=[null]", "task.t={}"],
        ),
        "preset": (["tiny"], ["huge", ""]),
        "baselines": (["depth", "full"], ["nope", ","], [""]),
        "seed": SEEDS,
        "seeds": (["0-1", "3"], ["3-1", "1,1", "x", "", "-1", "0-99999999999", "1-", "0,"]),
        "jobs": ([], ["0", "-1", "x"]),
        "device": DEVICES,
        "out": OUTS,
    },
    "finetune": {
        "passes": (["1", "2"], ["0", "x", "", "1.5"], ["inf"]),
        "window": (["2", "5"], ["0", "-1", "x"], ["100000"]),
        "eviction": (["hard", "sliding"], ["soft", ""]),
        "loop": (["all", "1:2"], ["", "1", "2:1", "0:9", "x:y", "-1:2"]),
        "sleep-kind": (["refine", "replay"], ["nope", ""]),
        "insert": ([], ["x", "", "99", "-1", "1,1"]),
        "warm-steps": (["0", "1"], ["-1", "x"]),
        "micro-batch": (["1"], ["0", "-1"]),
        "task-option": ([], ["nope=1", "nope", "=1"], ["t=null", "boundary=3"]),
        "warmup": (["0", "0.5"], ["-1", "2", "nan"]),
        "until": (["1"], ["0", "-1"]),
        "seed": SEEDS,
        "device": DEVICES,
        "out": OUTS,
    },
}
REFUSED: list[list[str]] = [
    ["demo", "--passes", "0"], ["demo", "--passes", "1,1"], ["demo", "--passes", "x"], ["demo", "--steps", "0"],
    ["demo", "--steps", "-5"], ["demo", "--device", "abacus"], ["demo", "--out", "file"], ["demo", "--seed", "-1"],
    ["verify", "--budget", "0"], ["verify", "--budget", "nan"], ["verify", "--budget", "inf"],
    ["verify", "--budget", "-3"], ["verify", "--device", "abacus"], ["verify", "--out", "file"],
    ["bench", "tune", "--device", "cpu"], ["bench", "tune", "--chunks", "7"], ["bench", "tune", "--kernels", ""],
    ["bench", "launches", "--device", "cpu"], ["bench", "launches", "--case", "nope"], ["bench", "nope"],
    ["bench", "kernels", "--case", ""], ["bench", "kernels", "--sweep", "nope"], ["bench", "kernels", "--passes", "0"],
    ["bench", "kernels", "--dtype", "int8"], ["bench", "kernels", "--providers", "nope"], ["nope"], ["train", "nope"],
    ["bench", "kernels", "--repeats", "0"], ["bench", "kernels", "--seconds", "nan", "--case", "depo"], ["eval"],
    ["sweep", "fig4"], ["sweep", "fig5", "--model", "nowhere"], ["sweep", "fig4", "--model", "file"], ["data"],
    ["sweep", "fig6", "--set", "nope=1"], ["sweep", "fig6", "--baselines", "depth"], ["sweep", "fig2a", "--model", "x"],
    ["plot"], ["plot", "nope"], ["plot", ""], ["plot", "../fig2a"], ["sweep", ""], ["sweep", "../presets/rule110"],
    ["plot", "fig6", "--out", "there"], ["plot", "fig2a", "--out", "nowhere"], ["finetune"], ["--nope"],
    ["recall", "x"], ["finetune", "nowhere", "--task", "rule110", "--passes", "2"], ["finetune", "there"],
    ["finetune", "there", "--task", "rule110", "--passes", "2"], ["finetune", "there", "--task", "x", "--passes", "2"],
    ["finetune", "there", "--task", "text", "--passes", "2"], ["finetune", "file", "--task", "mqar", "--passes", "2"],
    ["finetune", "there", "--task", "text", "--passes", "2", "--data", "nowhere"],
    ["finetune", "there", "--task", "text", "--passes", "2", "--data", "file"],
]  # fmt: skip
TINY = "--width 8 --heads 2 --layers attn-gdn --batch 4 --steps 2 --device cpu --eval-every 0 --eval-samples 3".split()
TASK_SIZES = {
    "rule110": "--t 1 --strings 1 --bits 5",
    "depo": "",
    "mqar": "",
    "word-problem": "",
    "variable-tracking": "",
}
TRAIN_VALUES = {
    "layers": ["gdn", "attn", "attn-gdn", "jet-gdn", "swa-gdn", "", "-", "mamba", "gdn-"],
    "loop": ["all", "0:1", "1:1", "1:0", "0:9", "", ":", "x"],
    "passes": ["1", "2", "inf", "0", "x", "-1", ""],
    "baseline": ["depth", "loop", "repeat", "state", "full", "", "nope"],
    "eviction": ["hard", "sliding", "", "soft"],
    "sleep_kind": ["refine", "replay", ""],
    "sleep_on": ["every", "unlabelled", "x"],
    "conv_boundary": ["snapshot", "zero", ""],
    "rule": ["delta", "hebbian", "x"],
    "precision": ["auto", "float32", "bf16", "fp4"],
    "passes_schedule": ["fixed", "random", "curriculum", ""],
    "parallel": ["ddp", "fsdp", "x"],
    "trainable": ["all", "fast_weights", ""],
    "device": ["cpu", "abacus", "cuda"],
    "preset": ["paper", "small", "tiny", "", "huge"],
}
NUMBERS = ["0", "1", "2", "3", "5", "0.5", "-1", "nan", "inf", "1e-3", "x", "1.5"]
JSON_VALUES = ["0", "1", "2", "3", "6", "-1", "1.5", "x", "null", "true", "[]", "{}", '""', "NaN", "[1,2]", '"zero"']
LONG = ("steps", "batch", "eval_samples", "width", "checkpoint_every", "seq_len")  # not by large numbers: time


def draw(seed: int) -> dict:
    """The command of one case; bad: whether it has to be refused."""
    r = random.Random(seed)
    entry = r.choice([*ENTRIES, "data", "train", "recall"])
    case = {"entry": entry, "arguments": [], "bad": False, "twice": r.random() < 0.25, "damage": ""}
    given, bad = _DRAWS[entry](r, case)
    return case | {"arguments": given, "bad": bad or case["bad"]}


def _options(r: random.Random, command: str) -> tuple[list[str], bool]:
    given, refuse = [], False
    spoilt = r.random() < 0.5
    for name, (good, bad, *odd) in OPTIONS[command].items():
        pick = r.random()
        if spoilt and pick < 0.15:
            values = bad + (odd[0] if odd else [])
            value = r.choice(values)
            given += [f"--{name}={value}"]
            refuse |= value in bad
        elif good and pick < 0.6:
            given += [f"--{name}={r.choice(good)}"]
    return given, refuse


def _draw_recall(r: random.Random, case: dict) -> tuple[list[str], bool]:
    base = "--loads=0.5,1 --passes=1,2 --key-dim=4 --value-dim=3 --codewords=8 --memories=2 --device=cpu --out=out"
    given, bad = _options(r, "recall")
    return ["recall", *base.split(), *given], bad


def _draw_data(r: random.Random, case: dict) -> tuple[list[str], bool]:
    task = r.choice([name for name in TASKS if name not in ("text",)] * 3 + ["text", "nope", ""])
    given, bad = [], task in ("nope", "")
    if task in TASKS and r.random() < 0.7:
        known = [f.name for f in fields(TASKS[task])]
        for _ in range(r.randint(1, 2)):
            given += ["--task-option", f"{r.choice(known)}={r.choice(JSON_VALUES)}"]
    elif r.random() < 0.3:
        given += ["--task-option", r.choice(["nope=1", "nope", "=1", ""])]
        bad = True
    count = r.choice(["1", "2", "2", "2", "0", "-1", "x"])
    split = r.choice(["train", "eval", "eval", "train", "nope"])
    where = r.choice([None, "d.jsonl", "a/d.jsonl", "there", "file/d"])
    bad = bad or count in ("0", "-1", "x") or where in ("there", "file/d")
    given += [f"--count={count}", f"--split={split}"] + ([f"--out={where}"] if where else [])
    if r.random() < 0.3:
        given += [f"--seed={r.choice(SEEDS[0] + SEEDS[1] + ODD_SEEDS)}"]
    return ["data", task, *given], bad


def _draw_train(r: random.Random, case: dict) -> tuple[list[str], bool]:
    from sleep_ops.cli.options import Fields
    from sleep_ops.cli.train import MODEL_FIELDS
    from sleep_ops.model.config import HybridConfig
    from sleep_ops.training import TrainConfig

    task = r.choice(["rule110", "rule110", *TASK_SIZES])
    name = task.replace("-", "_")
    options = Fields(HybridConfig, MODEL_FIELDS).parameters() | Fields(TrainConfig).parameters()
    flags = [name for name, (annotation, _) in options.items() if bool in get_args(get_args(annotation)[0])]
    given = ["--preset=tiny", *TINY, *TASK_SIZES[task].split()]
    for option in r.sample(sorted([*options, "baseline"]), r.choice([0, 1, 2, 3])):
        flag = f"--{option.replace('_', '-')}"
        if option in flags:
            given += [r.choice([flag, f"--no-{flag[2:]}"])]
        else:
            given += [f"{flag}={r.choice(TRAIN_VALUES.get(option, NUMBERS))}"]
    if r.random() < 0.3:
        own = [f.name for f in fields(TASKS[name]) if f.name not in options]
        given += [f"--{r.choice(own).replace('_', '-')}={r.choice(NUMBERS)}"]
    if r.random() < 0.2:
        given += [f"--until={r.choice(['1', '2', '9', '0', '-1', 'x'])}"]
    out = r.choice([*OUTS[0], *OUTS[0], *OUTS[1]])
    case["again"] = r.random() < 0.3
    return ["train", task, *given, f"--out={out}"], out in OUTS[1]


DAMAGES = ("", "", "no config", "cut config", "list config", "odd config", "cut model", "no manifest", "odd manifest",
           "no checkpoints")  # fmt: skip


def _draw_eval(r: random.Random, case: dict) -> tuple[list[str], bool]:
    given, bad = _options(r, "eval")
    case["damage"] = r.choice(DAMAGES)
    run = r.choice(["run"] * 6 + ["nowhere", "file", "there"])
    return ["eval", run, "--samples=4", "--device=cpu", *given], bad or run != "run"


TABLES = ("", "empty", "header", "cut", "garbage", "column", "text", "binary", "no run", "extra")


def _draw_plot(r: random.Random, case: dict) -> tuple[list[str], bool]:
    given, bad = _options(r, "plot")
    case["damage"] = r.choice(TABLES)
    return ["plot", r.choice(["fig2a", "fig2a", "fig2a", "fig2b", "fig6"]), "--out=sweep", *given], bad


def _draw_sweep(r: random.Random, case: dict) -> tuple[list[str], bool]:
    given, bad = _options(r, "sweep")
    sets = "train.steps=1 train.batch_size=2 train.eval_samples=2 train.eval_every=0 model.hidden_size=8 task.bits=10"
    base = [f"--set={x}" for x in sets.split()] + ["--grid=task.t=[1]", "--grid=model.passes=[1]"]
    return ["sweep", "fig2a", "--preset=tiny", "--device=cpu", "--out=out", *base, "--jobs=1", *given], bad


def _draw_bench(r: random.Random, case: dict) -> tuple[list[str], bool]:
    command = r.choice(["bench passes", "bench passes", "bench train"])
    given, bad = _options(r, command)
    if command == "bench passes":
        base = "--tokens=6 --batch=1 --heads=1 --head-dim=4 --window=3 --repeats=1 --passes=1 --case=mid"
    else:
        base = "--preset=tiny --passes=1 --repeats=1 --batch=1 --checkpointing=off"
    return [*command.split(), *base.split(), "--providers=ours", "--device=cpu", "--out=out", *given], bad


def _draw_finetune(r: random.Random, case: dict) -> tuple[list[str], bool]:
    given, bad = _options(r, "finetune")
    base = "--t=1 --strings=1 --bits=4 --passes=2 --steps=1 --batch=2 --eval-samples=2 --eval-every=0 --device=cpu"
    return ["finetune", "checkpoint", "--task=rule110", *base.split(), "--out=out", *given], bad


def _draw_refused(r: random.Random, case: dict) -> tuple[list[str], bool]:
    return r.choice(REFUSED), True


_DRAWS = {name: globals()[f"_draw_{name}"] for name in ENTRIES}


class _Folders:
    """What commands start from, made when first asked for."""

    def __init__(self):
        self._root = tempfile.TemporaryDirectory(prefix="fuzz-commands-")
        self.root = Path(self._root.name)

    @functools.cached_property
    def run(self) -> Path:
        _run(["train", "rule110", "--preset=tiny", *TINY, "--t=1", "--strings=1", "--bits=5", f"--out={self.root}/run"])
        return self.root / "run"

    @functools.cached_property
    def sweep(self) -> Path:
        base, _ = _draw_sweep(random.Random(0), {})
        _run([*base[:13], f"--out={self.root}/sweep"])
        return self.root / "sweep"

    @functools.cached_property
    def checkpoint(self) -> Path:
        from hf_models import build

        sizes = dict(hidden_size=16, intermediate_size=24, linear_key_head_dim=4, linear_value_head_dim=4)
        build("qwen3_5", **sizes).save_pretrained(self.root / "checkpoint")
        return self.root / "checkpoint"


@functools.cache
def _folders() -> _Folders:
    return _Folders()


def _run(arguments: list[str]):
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    if result.exit_code != 0 and "/fuzz-commands-" in arguments[-1]:
        raise AssertionError(f"{arguments}: {result.output}")
    return result


def _damage(folder: Path, how: str) -> None:
    config, table = folder / "config.json", folder / "results.csv"
    checkpoints = sorted(folder.glob("checkpoints/step-*"))
    if how == "no config":
        config.unlink()
    elif how == "cut config":
        config.write_text(config.read_text()[:40])
    elif how == "list config":
        config.write_text("[1, 2]")
    elif how == "odd config":
        found = json.loads(config.read_text())
        found["model"] = {k: "x" if k == "layers" else v for k, v in found["model"].items()}
        config.write_text(json.dumps(found))
    elif how == "cut model":
        for path in checkpoints:
            (file,) = path.glob("*.safetensors")
            file.write_bytes(file.read_bytes()[:-7])
    elif how == "no manifest":
        for path in checkpoints:
            (path / "manifest.json").unlink()
    elif how == "odd manifest":
        for path in checkpoints:
            (path / "manifest.json").write_text("[]")
    elif how == "no checkpoints":
        shutil.rmtree(folder / "checkpoints")
    elif how == "empty":
        table.write_text("")
    elif how == "header":
        table.write_text(table.read_text().splitlines()[0] + "\n")
    elif how == "cut":
        table.write_text(table.read_text()[:-9])
    elif how == "garbage":
        table.write_text("a,b\n1\n2,3,4\n")
    elif how == "column":
        table.write_text(table.read_text().replace("task.t", "other", 1))
    elif how == "text":
        lines = table.read_text().splitlines()
        rows = [line.split(",") for line in lines[1:]]
        place = lines[0].split(",").index("exact")
        table.write_text("\n".join([lines[0], *(",".join([*x[:place], "high", *x[place + 1 :]]) for x in rows)]))
    elif how == "binary":
        table.write_bytes(bytes(range(256)))
    elif how == "no run":
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
    elif how == "extra":
        table.write_text(table.read_text().replace("\n", ",more,and,more\n"))


def _set_up(place: Path, case: dict) -> None:
    (place / "file").write_text("mine")
    (place / "there").mkdir()
    (place / "link").symlink_to("nowhere")
    made = {"eval": "run", "plot": "sweep", "finetune": "checkpoint"}.get(case["entry"])
    if made is not None:
        shutil.copytree(getattr(_folders(), made), place / made)
        if case["damage"]:
            _damage(place / made, case["damage"])


def _contents(folder: Path) -> dict[str, object]:
    """Every path under a folder, with a file's bytes or where a link leads."""
    paths = [p for p in sorted(folder.rglob("*")) if p.name != ".lock"]
    return {
        str(p.relative_to(folder)): p.readlink() if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in paths
    }


def _told(output: str) -> str:
    """What is wrong with the message of a refused call."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", output)
    if "Traceback" in text:
        return "a traceback"
    own = re.findall(r"(?:^|it/s\])(?:error|failed) (.*)$", text, re.MULTILINE)  # after a progress bar, perhaps
    usage = len(re.findall(r"^(?:Error: |.*─ Error ─)", text, re.MULTILINE))
    nothing = text.count("nothing was timed")
    if len(own) + usage + nothing != 1 and "Usage:" not in text:
        return f"{len(own) + usage} errors told: {text.strip()[-200:]!r}"
    if own and (not own[0].strip() or "Errno" in own[0]):
        return f"the message {own[0]!r}"
    return ""


def _promised(case: dict, place: Path) -> str:
    """What is missing, or not whole, of the files a command promises."""
    options = dict(a[2:].split("=", 1) for a in case["arguments"] if a.startswith("--") and "=" in a)
    out = place / options.get("out", "out")
    names = {
        "recall": ["recall.csv", "recall.png"],
        "train": ["config.json", "metrics.csv"],
        "sweep": ["results.csv", "curves.csv", "fig2a.png"],
        "finetune": ["model/config.json"] if "until" not in options and options.get("warm-steps") != "1" else [],
    }.get(case["entry"], [])
    if case["entry"] == "bench":
        names = [f"{case['arguments'][1]}.csv", f"{case['arguments'][1]}.png"]
    if case["entry"] in ("data", "eval"):
        names = [""] if "out" in options else []
    if case["entry"] == "plot":
        figure = "train.png" if case["arguments"][1] == "fig6" else f"{case['arguments'][1]}.png"
        out, names = place / options.get("image", f"{options['out']}/{figure}"), [""]
    for name in names:
        path = out / name if name else out
        if not path.is_file() or not path.stat().st_size:
            return f"{path.relative_to(place)} is missing or empty"
        if path.suffix == ".png" and not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
            return f"{path.name} is no whole image"
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            if not rows or any(None in row or None in row.values() for row in rows):
                return f"{path.name} has no rows, or ragged ones"
        if path.suffix == ".jsonl":
            count = len([json.loads(line) for line in path.read_text().splitlines()])
            if str(count) != options["count"]:
                return f"{count} lines"
    return ""


def _lasting(contents: dict[str, object]) -> dict[str, object]:
    """Files that a second run writes alike, without the columns that measure time."""
    kept = {}
    for name, data in contents.items():
        if name.endswith(".csv") and isinstance(data, bytes):
            rows = csv.DictReader(re.sub(r"\r", "", data.decode(errors="replace")).splitlines())
            kept[name] = [{k: v for k, v in row.items() if not any(t in str(k) for t in TIMES)} for row in rows]
        elif name.endswith(".jsonl"):
            kept[name] = data
        elif name.endswith(".safetensors"):  # the order of its header is no one's promise
            kept[name] = {name: (x.dtype, x.tolist()) for name, x in load(data).items()}
    return kept


def _call(case: dict, place: Path) -> tuple[str, int, dict]:
    """(What is wrong with a case run in the folder `place`, its exit code, what it wrote)."""
    _set_up(place, case)
    before = _contents(place)
    with _inside(place):
        result = _run(case["arguments"])
        after, code = _contents(place), result.exit_code
        again = _run(case["arguments"]) if code == 0 and case.get("again") else None
    wrote = {name: x for name, x in after.items() if before.get(name, ...) != x}
    gone = [name for name in before if name not in after]
    why = ""
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        why = f"{type(error).__name__}: {str(error)[:150]} (a traceback)"
    elif partial := [p for p in after if re.search(r"partial|/\.[^/]+-\w{6,}$|\.tmp", p)]:
        why = f"exit code {code} leaves {partial}"
    elif code == 0:
        why = "accepted" if case["bad"] and not case["damage"] else _promised(case, place)
        if not why and again is not None and again.exit_code:
            why = f"again: exit code {again.exit_code} {again.output[-200:]!r}"
    elif code not in (1, 2):
        why = f"exit code {code}"
    elif code == 2 and (wrote or gone):
        why = f"refused, but changed {[*wrote, *gone]}: {result.output[-200:]!r}"
    else:
        why = _told(result.output)
    return why, code, wrote


@contextlib.contextmanager
def _inside(place: Path):
    before = os.getcwd()
    os.chdir(place)
    try:
        yield
    finally:
        os.chdir(before)


def fault(seed: int) -> str:
    """What is wrong with a case, empty for nothing."""
    case = draw(seed)
    left = []
    for _ in range(2 if case["twice"] else 1):
        with tempfile.TemporaryDirectory() as folder:
            why, code, wrote = _call(case, Path(folder))
        if why:
            return why
        left.append((code, _lasting(wrote)))
    if len(left) == 2 and case["entry"] != "bench" and left[0] != left[1]:
        names = [n for n in left[0][1] if left[0][1][n] != left[1][1].get(n)]
        return f"twice: exit codes {left[0][0]}, {left[1][0]}, differing files {names}"
    return ""


if __name__ == "__main__":
    search(draw, fault, __doc__.splitlines()[0], ENTRIES)
