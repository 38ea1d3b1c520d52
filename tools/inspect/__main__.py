"""`python -m tools.inspect surprise MODEL TEXT_FILE` and `python -m tools.inspect memory STATE`.

What a model's memories did with a text, token by token, and what they hold, layer by layer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.command import positive_int, run_command
from tools.inspect.run_memory import run_memory
from tools.inspect.run_surprise import run_surprise
from tools.inspect.spans import span


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(prog="python -m tools.inspect", description="Look into what memories do and hold.")
    commands = result.add_subparsers(required=True, metavar="COMMAND")
    _add_surprise(commands.add_parser(
        "surprise",
        help="what a model memorises of a text",
        description="Read a text from its beginning and show, for each token and layer, how surprising it was to the "
        "memory, how far it moved the memory's weights, its gates, and how much the memory answered; with --answer, "
        "also which sentences' writes that answer rests on.",
    ))  # fmt: skip
    _add_memory(commands.add_parser(
        "memory",
        help="what a memory holds",
        description="Norms, singular values and distance from the learned start of the memories of a session, an "
        "exported model or a checkpoint (whose memories are at their start), by layer and head.",
    ))  # fmt: skip
    return result


def _add_surprise(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=Path, help="folder made by `python -m tools.export`")
    command.add_argument("text", type=Path, metavar="TEXT_FILE", help="the text, UTF-8")
    command.add_argument("--output", type=Path, metavar="PAGE", help="HTML page to write; it needs nothing beside it")
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="file for the numbers of every token, layer and head"
    )
    command.add_argument(
        "--max-tokens", type=positive_int, default=4096, metavar="N", help="of the text to read (default %(default)s)"
    )
    command.add_argument(
        "--answer", default="", metavar="TEXT", help="read behind the text: whose likelihood is explained"
    )
    command.add_argument("--query", default="", metavar="TEXT", help="read between the text and --answer")
    command.add_argument(
        "--span",
        type=span,
        nargs="+",
        metavar="START:END",
        help="tokens, as the page numbers them, whose influence on --answer to measure (default: each sentence)",
    )
    command.add_argument(
        "--batch-size", type=positive_int, default=8, metavar="N", help="spans at a time (default %(default)s)"
    )
    _add_device(command)
    command.set_defaults(command=run_surprise)


def _add_memory(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "state",
        type=Path,
        help="a session of `tools.generate --save-memory`, a folder made by `python -m tools.export`, a checkpoint, or "
        "a run's folder for its newest whole one",
    )
    command.add_argument("--model", type=Path, help="the exported model that a session belongs to")
    command.add_argument("--output", type=Path, metavar="PAGE", help="HTML page to write; it needs nothing beside it")
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="file for all numbers, every singular value included"
    )
    _add_device(command)
    command.set_defaults(command=run_memory)


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default cpu)")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = parser().parse_args(argv)
    return run_command(lambda: arguments.command(arguments))


if __name__ == "__main__":
    sys.exit(main())
