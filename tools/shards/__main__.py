"""The command `python -m tools.shards build | verify | stats | index`."""

import argparse
import json
import os
import sys
from pathlib import Path

from pretrain.data.format import DTYPES, NO_SEPARATOR, PARTS, Manifest
from pretrain.errors import UserError
from tools.command import count, duration, positive_int, run_command
from tools.documents import add_document_arguments, location, reader_from_arguments
from tools.shards.build import DEFAULT_SHARD_TOKENS, DEFAULT_VALIDATION_FRACTION, build
from tools.shards.check import describe_set, sets_at, verify_set
from tools.shards.index import KNOWN_SUFFIXES, index_tars


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
        "of its text; EOS ends each. The same input, tokenizer and options give the same files, byte for byte. A build "
        "that was killed goes on with the same command, without encoding again what is in finished shards.",
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
    command.add_argument(
        "--deduplicate",
        action="store_true",
        help="of documents with the same text, keep the first alone (takes some 120 bytes of memory a document)",
    )
    command.add_argument(
        "--workers",
        type=positive_int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that encode; any number gives the same files (default: one for each core, here %(default)s)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace the shards in the output folder")
    command.set_defaults(command=_build_command)
    command = commands.add_parser(
        "verify",
        help="check shards for damage",
        description="Read a set, or the sets train and validation in a folder, and name everything that is damaged.",
    )
    command.add_argument("folder", type=location, help="a folder or a URL (http(s)://, s3://, gs://)")
    command.set_defaults(command=_verify_command)
    command = commands.add_parser("stats", help="show the numbers of shards", description="Show the numbers of shards.")
    command.add_argument("folder", type=location, help="a folder or a URL (http(s)://, s3://, gs://)")
    command.add_argument("--json", action="store_true", help="as JSON, a list with an object for each set")
    command.set_defaults(command=_stats_command)
    _add_index_command(commands)
    return parser


def _add_index_command(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "index",
        help="make a set of existing WebDataset tars of tokens",
        description="Write index and manifest beside all *.tar of a folder, which stay as they are. Each member of one "
        "suffix is a document: .npy (one-dimensional integers), or raw little-endian numbers such as .u16, .u32, "
        ".tokens.",
    )
    command.add_argument("folder", type=Path, help="the folder of the tars")
    command.add_argument(
        "--tokenizer", type=Path, required=True, metavar="FILE.model", help="the model that made the tokens"
    )
    command.add_argument(
        "--suffix", help=f"members that hold tokens (default: the one of {', '.join(KNOWN_SUFFIXES)} that is there)"
    )
    command.add_argument("--dtype", choices=DTYPES, help="of raw numbers, where the suffix does not say it")
    command.add_argument("--part", choices=PARTS, default=PARTS[0], help="what the set is (default: %(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace the index and manifest that are there")
    command.set_defaults(command=_index_command)


def _build_command(arguments: argparse.Namespace) -> None:
    reader = reader_from_arguments(arguments)
    built = build(
        reader,
        arguments.tokenizer,
        arguments.output,
        shard_tokens=arguments.shard_tokens,
        validation_fraction=arguments.validation_fraction,
        deduplicate=arguments.deduplicate,
        overwrite=arguments.overwrite,
        workers=arguments.workers,
    )
    for part, manifest in built.manifests.items():
        print(_summary(arguments.output / part, manifest))
    left_out = {
        "empty documents": reader.skipped.empty,
        "texts that are not UTF-8": reader.skipped.invalid_utf8,
        "documents whose text was there before": built.duplicates,
    }
    if any(left_out.values()):
        print("left out: " + ", ".join(f"{number} {what}" for what, number in left_out.items() if number))
    print(f"{duration(built.seconds)}, {count(built.tokens / built.seconds)} tokens/s")


def _verify_command(arguments: argparse.Namespace) -> None:
    problems = []
    for folder in sets_at(arguments.folder):
        found = verify_set(folder)
        problems += found
        print(f"{folder}: {f'{len(found)} problems' if found else 'whole'}")
    if problems:
        raise UserError("\n".join(problems))


def _stats_command(arguments: argparse.Namespace) -> None:
    sets = [describe_set(folder) for folder in sets_at(arguments.folder)]
    if arguments.json:
        print(json.dumps(sets, indent=1))
        return
    for numbers in sets:
        for name, value in numbers.items():
            text = ", ".join(f"{key} {entry}" for key, entry in value.items()) if isinstance(value, dict) else value
            print(f"{name.replace('_', ' '):27} {f'{text:.3f}' if isinstance(text, float) else text}")
        print()


def _index_command(arguments: argparse.Namespace) -> None:
    manifest = index_tars(
        arguments.folder,
        arguments.tokenizer,
        suffix=arguments.suffix,
        dtype=arguments.dtype,
        part=arguments.part,
        overwrite=arguments.overwrite,
    )
    print(_summary(arguments.folder, manifest))
    if manifest.separator == NO_SEPARATOR:
        print("not all documents end with EOS: nothing tells the model where those end that do not")


def _summary(folder: Path, manifest: Manifest) -> str:
    return (
        f"{folder}: {manifest.documents} documents, {manifest.tokens} tokens in {len(manifest.shards)} shards, "
        f"{manifest.text_bytes / manifest.tokens:.2f} bytes a token"
    )


if __name__ == "__main__":
    sys.exit(main())
