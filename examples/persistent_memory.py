"""A memory that outlives the program: read documents once, sleep, save what was learnt; load it later and ask.

    python examples/persistent_memory.py [--out FOLDER] [--seed S] [--steps N]

A tiny hybrid learns to remember tables of names and numbers. It then reads some documents it has never seen and sleeps;
the fast weights, and nothing else, are written to a file. A new session that never saw the documents loads the file and
answers questions on them. With a pretrained model the same five lines are those of `remember` and `ask`; the model then
comes from `sleep_ops.adapters`.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from sleep_ops import HybridConfig, SleepHybridModel, SleepSession
from sleep_ops.training.optim import build_optimizers

NAMES, NUMBERS, FACTS = 64, 32, 8
WINDOW = 2 * FACTS  # a document fills one window, and is evicted before any question


def documents(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(documents `[count, 2 FACTS]`: name, number, name, number, ...; a question, one of the names; the answer)."""
    names = torch.rand(count, NAMES, generator=generator).argsort(1)[:, :FACTS]
    numbers = torch.randint(NAMES, NAMES + NUMBERS, (count, FACTS), generator=generator)
    asked = torch.randint(FACTS, (count, 1), generator=generator)
    pages = torch.stack([names, numbers], dim=2).flatten(1)
    return pages, names.gather(1, asked), numbers.gather(1, asked)


def train(model: SleepHybridModel, steps: int, generator: torch.Generator) -> None:
    """Teaches the model to read a document, sleep, and answer from what it kept."""
    optimizers = build_optimizers(model, lr_muon=5e-3, lr_adamw=3e-3)
    for _ in track(range(steps), description="learning to remember"):
        pages, questions, answers = documents(64, generator)
        labels = torch.cat([torch.full_like(pages, -100), answers], dim=1)
        model(torch.cat([pages, questions], dim=1), labels=labels, return_state=False).loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()


def remember(model: SleepHybridModel, pages: Tensor, path: Path) -> None:
    """Reads documents `[B, T]` once and saves what is left of them after sleep."""
    session = SleepSession(model)
    session.read(pages)
    session.sleep()  # a window that isn't full yet sleeps now
    session.save(path, memory_only=True)


def ask(model: SleepHybridModel, path: Path, questions: Tensor) -> Tensor:
    """The answers `[B, 1]` of a session that knows the documents from the file alone."""
    return SleepSession.load(path, model).generate(questions, max_new_tokens=1)


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/memory"), help="folder of the memory file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    options = parser.parse_args(arguments)
    console, generator = Console(), torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    config = HybridConfig(
        vocab_size=NAMES + NUMBERS, hidden_size=64, layers=("gdn", "attn", "gdn"), window=WINDOW, passes=2, num_heads=2
    )
    model = SleepHybridModel(config)
    train(model, options.steps, generator)

    pages, questions, answers = documents(200, generator)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "memory.safetensors"
    remember(model.eval(), pages, path)
    right = (ask(model, path, questions) == answers).double().mean().item()
    size = path.stat().st_size / len(pages) / 1024
    console.print(f"{len(pages)} documents remembered in {path}, {size:.1f} KiB each")
    console.print(f"asked one question on each, later, by a session that never saw them: {right:.1%} answered right")
    console.print(f"by guessing a number: {1 / NUMBERS:.1%}")
    return right


if __name__ == "__main__":
    main()
