"""`python -m tools.demo`: from source text to a trained, killed, resumed, exported and measured model on a CPU.

Everything runs through the commands that a user would type, and each is printed before it runs.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sentencepiece import SentencePieceProcessor

from pretrain import command_line
from pretrain.config import Recipe, load_recipe
from pretrain.data import ShardSet
from pretrain.errors import UserError
from tools.demo.bigram import bits_per_byte, fit_bigram
from tools.demo.corpus import Text, find_text, write_corpus
from tools.demo.training import (
    Kill,
    Replay,
    compare_replay,
    launch_command,
    newest_checkpoint,
    step_losses,
    train_killed,
)

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "demo.yaml"
MARKER = ".demo"
VOCABULARY = 1024
VALIDATION_FRACTION = 0.1
PROCESSES = 2
PROMPT_TOKENS = 48


@dataclass
class Demo:
    """What the steps share, and what they found out for the closing table."""

    folder: Path
    overrides: list[str]
    console: Console
    rows: list[tuple[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A heading, and the time that the step took."""
        self.console.rule(f"[bold]{len(self.seconds) + 1}. {title}", align="left")
        started = time.monotonic()
        yield
        self.seconds[title] = time.monotonic() - started

    def show(self, command: Sequence[str]) -> None:
        """Print a command as a user would type it."""
        words = ["python" if word == sys.executable else word for word in command]
        self.console.print(f"$ {shlex.join(words)}", style="cyan", highlight=False, markup=False, soft_wrap=True)

    def command(self, *arguments: str) -> None:
        """Run `python -m arguments`. Raises UserError when it fails."""
        command = [sys.executable, "-m", *arguments]
        self.show(command)
        result = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
        if result.returncode != 0:
            raise UserError(f"python -m {arguments[0]} ended with status {result.returncode}; its message is above")

    def row(self, name: str, value: str) -> None:
        """A row of the closing table."""
        self.rows.append((name, value))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo: 0 when the resume was exact and the model beats the bigram model, 1 when not, 2 for an error."""
    options = parse_arguments(argv)
    demo = Demo(options.folder, options.overrides, Console(highlight=False))
    try:
        return run(demo, options.data)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what follows `--` overrides the recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo",
        description="The whole way on a CPU: tokenizer, shards, MAC pretraining on two processes, a SIGKILL half-way, "
        "the resume, export, held-out bits per byte against a bigram model, a sample. Minutes on two cores.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data", type=Path, help="your own text, a file or folder (default: the source of Python's standard library)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/demo"), help="where everything goes; a demo there is replaced"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="-- --section.field value", help=f"changes to {RECIPE.name}, after --"
    )
    return parser.parse_args(argv)


def prepare_folder(folder: Path) -> None:
    """An empty folder for the demo; one that an earlier demo made is replaced. Raises UserError for any other."""
    if folder.exists():
        if not (folder / MARKER).is_file():
            raise UserError(f"--folder {folder}: exists and was not made by the demo; name another, or remove it")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


def run(demo: Demo, data: Path | None) -> int:
    """All steps, top to bottom."""
    started = time.monotonic()
    shards = demo.folder / "shards"
    overrides = [
        *("--folder", str(demo.folder / "run")),
        *("--data.train", str(shards / "train"), "--data.validation", str(shards / "validation")),
        *demo.overrides,
    ]
    recipe = load_recipe(RECIPE, command_line.parse([str(RECIPE), *overrides]).overrides)
    text = find_text(data)
    # Only now: a mistake in the options must not cost an earlier demo.
    prepare_folder(demo.folder)
    train, validation = prepare_data(demo, text, shards)
    kill, replay = train_with_a_kill(demo, recipe, overrides)
    checkpoint = newest_checkpoint(recipe.folder)
    if checkpoint is None:
        raise UserError(f"{recipe.folder}: the training left no checkpoint")
    model = demo.folder / "model"
    with demo.step("Export"):
        demo.command("tools.export", str(checkpoint), "--output", str(model))
    ours, baseline = measure(demo, model, train, validation)
    with demo.step("A sample: the beginning of a held-out document, continued"):
        prompt = demo.folder / "prompt.txt"
        prompt.write_text(beginning(validation), encoding="utf-8")
        demo.command("tools.generate", str(model), "--prompt-file", str(prompt), "--max-new-tokens", "120")
    close(demo, kill, replay, ours, baseline, time.monotonic() - started)
    return 0 if ours < baseline and 0 < replay.steps == replay.equal else 1


def prepare_data(demo: Demo, text: Text, shards: Path) -> tuple[ShardSet, ShardSet]:
    """Tokenizer and shards; the training and the held-out set."""
    tokenizer = demo.folder / "tokenizer.model"
    with demo.step("Text"):
        corpus = write_corpus(text, demo.folder / "corpus.jsonl")
        demo.console.print(f"{corpus.documents} documents, {corpus.bytes / 1e6:.2f} MB of {corpus.name}: {corpus.path}")
    with demo.step("Tokenizer"):
        demo.command(
            *("tools.tokenizer", "train", "--input", str(corpus.path)),
            *("--vocab-size", str(VOCABULARY), "--output", str(tokenizer)),
        )
    with demo.step("Shards"):
        demo.command(
            *("tools.shards", "build", "--input", str(corpus.path), "--tokenizer", str(tokenizer)),
            *("--output", str(shards), "--validation-fraction", str(VALIDATION_FRACTION)),
        )
    train, validation = ShardSet.open(shards / "train"), ShardSet.open(shards / "validation")
    demo.row("text", corpus.name)
    for name, part in (("training set", train), ("held-out set", validation)):
        demo.row(name, f"{part.documents:,} documents, {part.text_bytes / 1e6:.2f} MB, {part.tokens:,} tokens")
    return train, validation


def beginning(shards: ShardSet) -> str:
    """The text of a set's first tokens."""
    tokens = shards.read(0)[:PROMPT_TOKENS]
    return SentencePieceProcessor(model_file=str(shards.tokenizer.path)).decode(tokens.tolist())


def train_with_a_kill(demo: Demo, recipe: Recipe, overrides: Sequence[str]) -> tuple[Kill, Replay]:
    """Train to the middle, SIGKILL, resume to the end."""
    command = launch_command(RECIPE, PROCESSES, overrides)
    half = recipe.batches(PROCESSES).steps // 2
    with demo.step(f"Pretraining on {PROCESSES} processes, until SIGKILL half-way"):
        demo.show(command)
        kill = train_killed(command, recipe.folder, half)
        demo.console.print(
            f"killed {kill.processes} processes with SIGKILL after step {kill.step}; "
            f"the newest checkpoint is that of step {kill.checkpoint_step}",
            style="bold red",
        )
    with demo.step("The same command again: resume and finish"):
        demo.show(command)
        if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode != 0:
            raise UserError(f"the resumed training failed; its logs are in {recipe.folder / 'logs'}")
    losses = step_losses(recipe.folder)
    return kill, compare_replay(losses)


def measure(demo: Demo, model: Path, train: ShardSet, validation: ShardSet) -> tuple[float, float]:
    """Held-out bits per byte of the exported model and of a bigram model of the same training tokens."""
    report = demo.folder / "evaluation.json"
    with demo.step("Held-out bits per byte"):
        demo.command("tools.evaluate", str(model), "--shards", str(validation.folder), "--json", str(report))
        ours = float(json.loads(report.read_text(encoding="utf-8"))["bits_per_byte"])
        bigram = fit_bigram(train)
        baseline = bits_per_byte(bigram, validation)
        smoothing = bigram.smoothing
        demo.console.print(
            f"a bigram model of the {train.tokens:,} training tokens (absolute discount {smoothing.discount:g}, "
            f"base: {smoothing.base}) needs {baseline:.4f} bits per byte, this model {ours:.4f}"
        )
    return ours, baseline


def close(demo: Demo, kill: Kill, replay: Replay, ours: float, baseline: float, seconds: float) -> None:
    """The closing table and what to look at next."""
    run_folder = demo.folder / "run"
    demo.row("killed", f"after step {kill.step}, {kill.processes} processes; resumed from step {kill.checkpoint_step}")
    demo.row("resumed exactly", f"{replay.equal} of {replay.steps} steps that ran twice gave bitwise the same loss")
    demo.row("held-out, this model", f"{ours:.4f} bits per byte")
    demo.row("held-out, bigram", f"{baseline:.4f} bits per byte")
    demo.row("better than the bigram", "yes" if ours < baseline else "NO")
    for title, spent in demo.seconds.items():
        demo.row(f"time: {title}", f"{spent:.0f} s")
    demo.row("time: all", f"{seconds:.0f} s")
    table = Table(title="Mnemosyne demo", show_header=False, title_justify="left")
    for row in demo.rows:
        table.add_row(*row)
    demo.console.print(table)
    demo.console.print(f"curves: tensorboard --logdir {run_folder / 'tensorboard'}", soft_wrap=True)
    demo.console.print(f"model:  {demo.folder / 'model'}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
