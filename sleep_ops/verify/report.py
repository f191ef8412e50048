"""report.md: the machine, how each step ended, and of each step the figures that tell most, from its own files."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

from sleep_ops.files import write_atomically
from sleep_ops.verify.run import FAILED, LEFT_OUT, PASSED, STOPPED, Outcome, Verification
from sleep_ops.verify.steps import Step

FILE = "report.md"
LAST_LINES = 25  # of a failed step's log
NOTES = re.compile(r"is not timed|no row|^stopped after|WRONG|is refused|is timed up to|rows are not emulated")
BOTH = "forward+backward"
Row = dict[str, str]


def write(verification: Verification) -> Path:
    """Writes the report of what is known so far; its path."""
    path = verification.place.out / FILE
    write_atomically(path, "\n".join(lines(verification)).encode())
    return path


def lines(verification: Verification) -> list[str]:
    out, outcomes, settings = verification.place.out, verification.outcomes, verification.settings
    known = [(step, outcomes[step.name]) for step in verification.steps if step.name in outcomes]
    text = [
        "# sleep-ops verify",
        "",
        f"On {settings['device']}, torch {settings['torch']}, triton {settings['triton'] or 'missing'}; "
        f"code {settings['code']}. {summary(verification)}",
        "",
        *table(
            ["step", "what it does", "outcome", "s"],
            [[step.name, step.purpose, x.outcome, f"{x.seconds:.0f}" if x.limit else ""] for step, x in known],
        ),
    ]
    for step, outcome in known:
        if outcome.outcome != LEFT_OUT:
            purpose = step.purpose[0].upper() + step.purpose[1:]
            text += ["", f"## {step.name}", "", purpose if purpose.endswith("?") else f"{purpose}.", ""]
            text += _section(step, outcome, out)
    left: dict[str, list[str]] = {}
    for step, outcome in known:
        if outcome.outcome == LEFT_OUT:
            left.setdefault(outcome.why, []).append(step.name)
    if left:
        text += ["", "## Left out", "", *(f"- {', '.join(names)}: {why}." for why, names in left.items())]
    return [*text, ""]


def summary(verification: Verification) -> str:
    """How many steps ended how, in a sentence."""
    counts = [
        (sum(x.outcome == kind for x in verification.outcomes.values()), kind)
        for kind in (PASSED, FAILED, STOPPED, LEFT_OUT)
    ]
    return f"Steps: {', '.join(f'{n} {kind}' for n, kind in counts if n)}."


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines]


def _section(step: Step, outcome: Outcome, out: Path) -> list[str]:
    log = out / f"{step.name}.log"
    said = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    text = []
    if outcome.outcome != PASSED:
        text += [f"**{outcome.outcome.capitalize()}**: {outcome.why}. The end of [{log.name}]({log.name}):", ""]
        text += ["```", *said[-LAST_LINES:], "```", ""]
    tell = SECTIONS.get(step.name.partition("-")[0])
    rows = _read(out, step)
    if tell is not None and (rows or not step.files):
        text += tell(rows, said)
    if outcome.outcome == PASSED and (notes := _notes(said)):
        text += ["", *(f"- {note}" for note in notes)]
    plots = [name for name in step.files if name.endswith(".png") and (out / name).exists()]
    text += [line for name in plots for line in ("", f"![{step.name}]({name})")]
    tables = [name for name in step.files if name.endswith(".csv") and (out / name).exists()]
    return [*text, "", "Files: " + ", ".join(f"[{name}]({name})" for name in (*tables, log.name)) + "."]


def _notes(said: list[str]) -> list[str]:
    """What was not measured and why, once for all the cases of which it was said."""
    cases: dict[str, list[str]] = {}
    for line in said:
        if NOTES.search(line):
            case, colon, rest = line.strip().partition(": ")
            cases.setdefault(rest if colon else case, []).append(case if colon else "")
    return [f"{rest} ({', '.join(dict.fromkeys(names))})" if any(names) else rest for rest, names in cases.items()]


def _read(out: Path, step: Step) -> list[Row]:
    path = next((out / name for name in step.files if name.endswith(".csv")), None)
    if path is None or not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _ms(text: str) -> str:
    return f"{float(text):.4g}" if text else ""


def _where(rows: list[Row]) -> str:
    device, threads = rows[0]["device"], rows[0]["threads"]
    return f"{device}, {threads} thread{'s' if threads != '1' else ''}" if device.startswith("cpu") else device


def _machine(rows: list[Row], said: list[str]) -> list[str]:
    cells = [[row["item"], row["found"], f"without it: {row['without']}" if row["without"] else ""] for row in rows]
    return table(["", "found", ""], cells)


def _checks(rows: list[Row], said: list[str]) -> list[str]:
    """A line for each operator and way of computing it: the result nearest to its bound."""
    done = [row for row in rows if row["error"]]
    bad = [row for row in rows if row["verdict"].startswith("WRONG")]
    skipped = sum(row["verdict"] == "left out for time" for row in rows)
    cases = {(row["operator"], row["case"], row["impl"], row["dtype"]) for row in done}
    text = [f"{len(cases)} cases, {len(done)} results and gradients, {len(bad)} of them wrong"]
    text[0] += f"; {skipped} cases left out for time." if skipped else "."
    text += ["An error is a norm over that of the float64 result. Triton on a CPU is its interpreter.", ""]
    for row in bad:
        named = "{operator}, {case}, {impl} {dtype}, {result}: {verdict}, error {error}, allowed {allowed}, same bits "
        text.append("- " + named.format(**row) + row["same_bits"])
    text += [""] if bad else []
    groups: dict[tuple, list[Row]] = {}
    for row in done:
        groups.setdefault((row["operator"], row["impl"], row["dtype"]), []).append(row)
    cells = []
    for (operator, impl, dtype), members in groups.items():
        worst = max(members, key=lambda row: float(row["error"]) / float(row["allowed"]))
        same = {"True": "yes", "": "run once"}.get(min(row["same_bits"] for row in members), "NO")
        place = f"{worst['result']} of {worst['case']}"
        errors = [f"{float(worst[name]):.1e}" for name in ("error", "allowed")]
        cells.append([operator, impl, dtype, str(len({row["case"] for row in members})), place, *errors, same])
    head = ["operator", "by", "dtype", "cases", "nearest to its bound", "error", "allowed", "same bits twice"]
    return text + table(head, cells)


def _tune(rows: list[Row], said: list[str]) -> list[str]:
    """The row in use, which is tried first, and the fastest."""
    timed = sorted((row for row in rows if row["ms_median"]), key=lambda row: float(row["ms_median"]))
    best = list({_launch(row): row for row in reversed(timed)}.items())[::-1][:5]
    text = [
        f"{len(rows)} candidates on {rows[0]['device']}, {len(timed)} of them right and timed; forward and backward."
    ]
    cells = [[launch, _ms(row["ms_median"]), row["varied"]] for launch, row in best]
    if rows[0]["ms_median"]:
        cells.append([f"{_launch(rows[0])} (in use)", _ms(rows[0]["ms_median"]), ""])
    return [*text, "", *table(["tokens of a chunk; value columns, warps, stages", "ms", "found varying"], cells)]


def _launch(row: Row) -> str:
    names = ("prepare", "scan", "reverse", "grad", "single_chunk_forward", "single_chunk_backward")
    return f"{row['tokens']}; " + ", ".join(f"{name} {row[name]}" for name in names if row[name])


def _launches(rows: list[Row], said: list[str]) -> list[str]:
    text = [
        f"On {rows[0]['device']}: the share of each launch in its call, forward and backward as one CUDA graph.",
        "",
    ]
    cells = [
        [row["case"], row["direction"], row["kernel"], row["grid"], _ms(row["ms_median"]), f"{float(row['share']):.0%}"]
        for row in rows
    ]
    for name, row in {row["case"]: row for row in rows}.items():
        total = sum(float(x["share"]) for x in rows if x["case"] == name)
        cells.append([name, "", "the call", "", _ms(row["call_ms"]), f"{total:.0%} in these launches"])
    return text + table(["case", "direction", "kernel", "grid", "ms", "of the call"], cells)


def _kernels(rows: list[Row], said: list[str]) -> list[str]:
    """Forward and backward of each case and provider, as a CUDA graph where there is one."""
    found = {}
    for row in rows:
        found.setdefault((row["case"], row["provider"]), {})[row["mode"]] = row
    text = [f"Measured on {_where(rows)}."]
    if any(row["floor_fraction"] for row in rows):
        text[0] += " The last column is a prediction, the least time of an H100 by bytes and products, over the time."
    cells = []
    for (case, provider), modes in found.items():
        row = modes.get(f"{BOTH}-graph") or modes.get(BOTH)
        if row is None:
            continue
        times = [_ms(modes[mode]["ms_median"]) if mode in modes else "" for mode in ("forward", "backward", BOTH)]
        graph = _ms(row["ms_median"]) if row["mode"] == f"{BOTH}-graph" else ""
        floor = f"{float(row['floor_fraction']):.0%}" if row["floor_fraction"] else ""
        cells.append([case, row["dtype"], provider, *times, graph, floor])
    head = ["case", "dtype", "by", "forward ms", "backward ms", "both ms", "both as a CUDA graph", "of the floor"]
    return [*text, "", *table(*_without_empty(head, cells))]


def _passes(rows: list[Row], said: list[str]) -> list[str]:
    numbers = list(dict.fromkeys(row["passes"] for row in rows))
    text = [f"Forward and backward in ms, measured on {_where(rows)}, {rows[0]['dtype']}, against N.", ""]
    found = {
        (row["case"], row["provider"], row["passes"]): _ms(row["ms_median"]) for row in rows if row["mode"] == BOTH
    }
    lines = dict.fromkeys(key[:2] for key in found)
    cells = [[*line, *(found.get((*line, n), "") for n in numbers)] for line in lines]
    return text + table(["case", "by", *(f"N = {n}" for n in numbers)], cells)


def _train(rows: list[Row], said: list[str]) -> list[str]:
    names = ["preset", "provider", "mode", "checkpointing", "window", "passes"]
    cells = [
        [*(row[name] for name in names), _ms(row["ms_median"]), f"{float(row['tokens_per_second']):,.0f}"]
        + [f"{float(row['peak_mib']):,.0f}" if row["peak_mib"] else ""]
        for row in rows
    ]
    head = ["preset", "by", "mode", "checkpointing", "L", "N", "ms", "tokens/s", "peak MiB"]
    return [f"Measured on {_where(rows)}, {rows[0]['precision']}.", "", *table(*_without_empty(head, cells))]


def _graph(rows: list[Row], said: list[str]) -> list[str]:
    same = sum(row["same_bits"] == "True" for row in rows)
    worst = max(abs(float(row["eager"]) - float(row["graph"])) / abs(float(row["eager"])) for row in rows)
    return [f"{same} of {len(rows)} losses are the same bits; at most {worst:.1e} of themselves apart."]


def _rule110(rows: list[Row], said: list[str]) -> list[str]:
    points = [row for row in rows if row["exact"]]
    text = [f"{rows[-1]['step']} steps, {float(rows[-1]['tokens']) / 1e6:.2f}M tokens; the plot has every step."]
    text += [f"Who always says the commoner bit gets {float(rows[-1]['chance']):.1%} of the strings right.", ""]
    cells = [[row["step"], f"{float(row['loss']):.4f}", f"{float(row['exact']):.1%}"] for row in points]
    return text + table(["step", "loss", "exact on strings that training never shows"], cells)


def _last_line(rows: list[Row], said: list[str]) -> list[str]:
    """What pytest or compute-sanitizer ends with."""
    telling = [line.strip(" =") for line in said if re.search(r"\d+ (passed|failed|errors?)", line)]
    return telling[-1:]


SECTIONS: dict[str, Callable[[list[Row], list[str]], list[str]]] = {
    "machine": _machine,
    "checks": _checks,
    "tune": _tune,
    "launches": _launches,
    "kernels": _kernels,
    "passes": _passes,
    "train": _train,
    "graph": _graph,
    "rule110": _rule110,
    "memcheck": _last_line,
    "racecheck": _last_line,
    "emulated": _last_line,
}


def _without_empty(head: list[str], cells: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns in which anything stands."""
    kept = [i for i in range(len(head)) if any(row[i] for row in cells)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in cells]
