"""The command `python -m tools.shards build | verify | stats`."""

import argparse
import json
import sys
from pathlib import Path

from pretrain.data.format import find_sets
from pretrain.errors import UserError
from tools.command import count, duration, positive_int, run_command
from tools.documents import add_document_arguments, reader_from_arguments
from tools.shards.build import DEFAULT_SHARD_TOKENS, DEFAULT_VALIDATION_FRACTION, build
from tools.shards.check import describe_set, verify_set


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: arguments.command(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.shards", description="Tokenised shards from text.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "build",
        help="make shards from text",
        description="Make OUTPUT/train and OUTPUT/validation from documents. A document goes to validation by the hash "
        "of its text; EOS ends each. The same input, tokenizer and options give the same files, byte for byte.",
    )
    add_document_arguments(command)
    command.add_argument("--tokenizer", type=Path, required=True, metavar="FILE.model", help="a SentencePiece model")
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    command.add_argument(
        "--shard-tokens",
        type=positive_int,
        default=DEFAULT_SHARD_TOKENS,
        metavar="N",
        help="tokens a shard at most; a longer document has a shard of its own (default: %(default)s)",
    )
    command.add_argument(
        "--validation-fraction",
        type=float,
        default=DEFAULT_VALIDATION_FRACTION,
        metavar="F",
        help="share of the documents held out; 0: no validation set (default: %(default)s)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace the shards in the output folder")
    command.set_defaults(command=_build_command)
    command = commands.add_parser(
        "verify",
        help="check shards for damage",
        description="Read a set, or the sets train and validation in a folder, and name everything that is damaged.",
    )
    command.add_argument("folder", type=Path)
    command.set_defaults(command=_verify_command)
    command = commands.add_parser("stats", help="show the numbers of shards", description="Show the numbers of shards.")
    command.add_argument("folder", type=Path)
    command.add_argument("--json", action="store_true", help="as JSON, a list with an object for each set")
    command.set_defaults(command=_stats_command)
    return parser


def _build_command(arguments: argparse.Namespace) -> None:
    reader = reader_from_arguments(arguments)
    built = build(
        reader,
        arguments.tokenizer,
        arguments.output,
        shard_tokens=arguments.shard_tokens,
        validation_fraction=arguments.validation_fraction,
        overwrite=arguments.overwrite,
    )
    for part, manifest in built.manifests.items():
        print(
            f"{arguments.output / part}: {manifest.documents} documents, {manifest.tokens} tokens in "
            f"{len(manifest.shards)} shards, {manifest.text_bytes / manifest.tokens:.2f} bytes a token"
        )
    if reader.skipped.empty or reader.skipped.invalid_utf8:
        print(
            f"left out: {reader.skipped.empty} empty documents, {reader.skipped.invalid_utf8} texts that are not UTF-8"
        )
    tokens = sum(manifest.tokens for manifest in built.manifests.values())
    print(f"{duration(built.seconds)}, {count(tokens / built.seconds)} tokens/s")


def _verify_command(arguments: argparse.Namespace) -> None:
    problems = []
    for folder in find_sets(arguments.folder):
        found = verify_set(folder)
        problems += found
        print(f"{folder}: {f'{len(found)} problems' if found else 'whole'}")
    if problems:
        raise UserError("\n".join(problems))


def _stats_command(arguments: argparse.Namespace) -> None:
    sets = [describe_set(folder) for folder in find_sets(arguments.folder)]
    if arguments.json:
        print(json.dumps(sets, indent=1))
        return
    for numbers in sets:
        for name, value in numbers.items():
            text = ", ".join(f"{key} {entry}" for key, entry in value.items()) if isinstance(value, dict) else value
            print(f"{name.replace('_', ' '):27} {f'{text:.3f}' if isinstance(text, float) else text}")
        print()


if __name__ == "__main__":
    sys.exit(main())
