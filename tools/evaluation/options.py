"""Options of `tools.evaluate` for benchmarks, and which of them go together."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from pretrain.errors import UserError
from tools.command import changed_options, not_negative_int, positive_int, seed
from tools.documents import location
from tools.evaluation.benchmark_files import TASKS
from tools.evaluation.needles import TASKS as NEEDLE_TASKS

Add = Callable[[argparse.ArgumentParser], object]


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of --tasks alone."""
    group = parser.add_argument_group("downstream tasks (tools/evaluation/README.md)")
    group.add_argument("--tasks", metavar="NAMES", help=f"with commas between, or all: {', '.join(TASKS)}")
    group.add_argument("--limit", type=positive_int, metavar="N", help="the first N documents of each task alone")
    group.add_argument(
        "--through",
        choices=("native", "huggingface"),
        default="native",
        help="the model here, or the export as transformers loads it (default native); both give the same numbers",
    )


def add_long_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of --ruler and --babi alone."""
    group = parser.add_argument_group("long contexts (tools/evaluation/README.md)")
    group.add_argument("--ruler", metavar="NAMES", help=f"with commas between, or all: {', '.join(NEEDLE_TASKS)}")
    group.add_argument("--babi", metavar="NAMES", help="qa1,qa2,... to qa20, or all: bAbI facts in book text")
    group.add_argument(
        "--lengths", type=_lengths, metavar="N,...", default=[4096], help="tokens with the answer (default 4096)"
    )
    group.add_argument(
        "--depths",
        type=_depths,
        metavar="PERCENT,...",
        help="where in the text (default: 0,25,50,75,100; --babi: facts all over it)",
    )
    group.add_argument(
        "--samples", type=positive_int, default=10, metavar="N", help="for each task, length and depth (default 10)"
    )
    group.add_argument(
        "--haystack",
        nargs="+",
        type=location,
        metavar="PATH",
        help="essays or books that facts are hidden in: files or folders, as for --input; no more is read than the "
        "longest prompt takes",
    )
    group.add_argument(
        "--answer-tokens", type=positive_int, metavar="N", help="most of an answer (default: --ruler 128, --babi 20)"
    )
    group.add_argument("--plot", type=_picture, metavar="FILE", help="heat map by length and depth: .png or .svg")


def add_benchmark_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of --tasks, --ruler and --babi."""
    group = parser.add_argument_group("downstream tasks and long contexts")
    group.add_argument(
        "--data",
        type=Path,
        default=Path("data/evals"),
        metavar="FOLDER",
        help="the tasks' files, NAME.jsonl or .parquet; --babi: the folder or .tar.gz of bAbI (default data/evals)",
    )
    group.add_argument(
        "--num-fewshot", type=not_negative_int, default=0, metavar="K", help="answered examples before each question"
    )
    group.add_argument(
        "--fine-tuned", action="store_true", help="the model was trained on such tasks: results are labelled so"
    )
    group.add_argument("--seed", type=seed, default=0, help="of examples and of prompts (default 0)")
    group.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="write the results as scalars there, too")


def kind_of(arguments: argparse.Namespace, add_text_arguments: Add) -> str:
    """What is to be done: "text", "tasks" or "long".

    Args:
        add_text_arguments: adds the options of --shards and --input.

    Raises:
        UserError: nothing was asked for, or several things, or an option that has no effect on it.
    """
    asked = {
        "text": arguments.shards is not None or arguments.input is not None,
        "tasks": arguments.tasks is not None,
        "long": arguments.ruler is not None or arguments.babi is not None,
    }
    chosen = [kind for kind, is_asked in asked.items() if is_asked]
    if len(chosen) != 1:
        raise UserError(
            "give either --shards or --input, a text to be scored; or --tasks; or --ruler and --babi: one of these"
        )
    kind = chosen[0]
    others = {"text": [add_text_arguments], "tasks": [add_task_arguments], "long": [add_long_arguments]}
    unused = [add for other, adds in others.items() if other != kind for add in adds]
    if kind == "text":
        unused.append(add_benchmark_arguments)
    options = [option for add in unused for option in changed_options(add, arguments)]
    if kind == "long" and arguments.babi is None:  # needles have no files, and their prompts no examples
        options += [x for x in changed_options(add_benchmark_arguments, arguments) if x in ("--data", "--num-fewshot")]
    if options:
        given = {"text": "--shards or --input", "tasks": "--tasks", "long": "--ruler or --babi"}[kind]
        raise UserError(f"{', '.join(options)} with {given}: has no effect there; drop it")
    return kind


def _lengths(text: str) -> list[int]:
    return [positive_int(part) for part in text.split(",")]


def _depths(text: str) -> tuple[float, ...]:
    depths = []
    for part in text.split(","):
        try:
            percent = float(part)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not a number") from None
        if not 0 <= percent <= 100:
            raise argparse.ArgumentTypeError(f"{part} must be from 0 to 100 percent")
        depths.append(percent / 100)
    return tuple(dict.fromkeys(depths))


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{text} must end in .png or .svg")
    return path
