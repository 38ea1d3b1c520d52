"""Trains and inspects tokenizers: `python -m tools.tokenizer train | inspect | encode | decode`.

A tokenizer is a SentencePiece .model file: byte-pair encoding with byte fallback, digits apart, no normalisation, no
dummy prefix, white space kept, so that every text comes back exactly. Control ids: 0 <unk> (never produced, as every
byte has a token), 1 <s> (BOS, not used in training), 2 </s> (EOS, ends every document), 3 <pad>; 4 to 259 are the
bytes. The same input and options give the same file, byte for byte.
"""

import argparse
import io
import os
import re
import sys
from pathlib import Path

import sentencepiece

from pretrain.errors import UserError
from tools.command import count, positive_int, run_command, writing
from tools.documents import DocumentReader, add_document_arguments, reader_from_arguments
from tools.encoding import SPACE_SYMBOL, Tokenizer

DEFAULT_LIMIT_BYTES = 500_000_000
# Bounds the trainer's longest sentence; a document is one sentence so that pieces with newlines can be learned.
SENTENCE_CHARACTERS = 1 << 20

TRAINER_OPTIONS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    # A space before every text would have to be taken away again, and a document could not be encoded in pieces.
    "add_dummy_prefix": False,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": 3,
    # Longer sentences would be left out silently.
    "max_sentence_length": 1 << 30,
    # The number is recorded in the model, which must not depend on the machine.
    "num_threads": 1,
    "minloglevel": 2,
}


def train(reader: DocumentReader, vocab_size: int, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> bytes:
    """Trains a tokenizer of `vocab_size` pieces on the first `limit_bytes` of text; returns the model file's bytes.

    Raises UserError for an empty corpus, or one that is too small or too varied for `vocab_size`.
    """
    sentences: list[str] = []
    size = 0
    for document in reader:
        # The trainer drops a whole sentence for either character; both are encoded by byte fallback.
        text = document.text.replace(SPACE_SYMBOL, "").replace("\0", "")
        sentences += [text[at : at + SENTENCE_CHARACTERS] for at in range(0, len(text), SENTENCE_CHARACTERS)]
        size += len(document.text.encode())
        if size >= limit_bytes:
            print(f"training on the first {count(size)} bytes of text; --limit-bytes takes more", file=sys.stderr)
            break
    if not any(sentence.strip() for sentence in sentences):
        raise UserError(f"{', '.join(map(str, reader.inputs))}: no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, vocab_size=vocab_size, **TRAINER_OPTIONS
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from None
    return model.getvalue()


def _training_error(message: str, vocab_size: int) -> UserError:
    if largest := re.search(r"value <= (\d+)", message):
        return UserError(
            f"--vocab-size {vocab_size}: too large for this text, which gives at most {largest[1]} pieces; "
            f"use --vocab-size {largest[1]} or less, or more text"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"--vocab-size {vocab_size}: too small for the control tokens, the 256 bytes and this text's characters; "
            f"use at least {smallest[1]}"
        )
    return UserError(f"SentencePiece could not train a tokenizer: {message}")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: arguments.command(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tokenizer", description="Train and inspect lossless SentencePiece tokenizers."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("train", help="train a tokenizer on text", description="Train a tokenizer on text.")
    add_document_arguments(command)
    command.add_argument(
        "--vocab-size", type=positive_int, required=True, metavar="N", help="number of tokens, all included"
    )
    command.add_argument("--output", type=Path, required=True, metavar="FILE.model", help="the file to write")
    command.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    command.add_argument(
        "--limit-bytes",
        type=positive_int,
        default=DEFAULT_LIMIT_BYTES,
        metavar="N",
        help="train on the first N bytes of text; takes about 5 bytes of memory each (default: %(default)s)",
    )
    command.set_defaults(command=_train_command)
    command = commands.add_parser(
        "inspect", help="show a tokenizer's numbers", description="Show a tokenizer's numbers."
    )
    command.add_argument("model", type=Path)
    command.set_defaults(command=_inspect_command)
    command = commands.add_parser("encode", help="text to tokens", description="Print the tokens of a text.")
    command.add_argument("model", type=Path)
    command.add_argument("text", nargs="?", help="the text (default: standard input)")
    command.add_argument("--pieces", action="store_true", help="a line for each token, with its spelling")
    command.set_defaults(command=_encode_command)
    command = commands.add_parser("decode", help="tokens to text", description="Print the text of tokens.")
    command.add_argument("model", type=Path)
    command.add_argument("tokens", nargs="+", type=int)
    command.set_defaults(command=_decode_command)
    return parser


def _train_command(arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    if output.exists() and not arguments.overwrite:
        raise UserError(f"{output}: exists already; choose another --output, or replace it with --overwrite")
    reader = reader_from_arguments(arguments)
    model = train(reader, arguments.vocab_size, arguments.limit_bytes)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(model)
            temporary.replace(output)
        finally:
            temporary.unlink(missing_ok=True)
    if reader.skipped.invalid_utf8:
        print(f"left out {reader.skipped.invalid_utf8} texts that are not UTF-8")
    tokenizer = Tokenizer.open(output)
    print(f"{output}: {tokenizer.vocab_size} tokens, sha256 {tokenizer.sha256}")


def _inspect_command(arguments: argparse.Namespace) -> None:
    tokenizer = Tokenizer.open(arguments.model)
    lengths = tokenizer.token_bytes()
    longest = sorted(range(tokenizer.vocab_size), key=lambda token: (-int(lengths[token]), token))[:10]
    rows = {
        "tokens": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "unk, bos, eos, pad": f"{tokenizer.unk_id}, {tokenizer.bos_id}, {tokenizer.eos_id}, {tokenizer.pad_id}",
        "mean bytes a token": f"{lengths[lengths > 0].mean():.2f}",
        "longest": " ".join(repr(tokenizer.piece(token)) for token in longest),
    }
    for name, value in rows.items():
        print(f"{name:20} {value}")


def _encode_command(arguments: argparse.Namespace) -> None:
    tokenizer = Tokenizer.open(arguments.model)
    text = arguments.text
    if text is None:
        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 at offset {error.start}") from None
    tokens = tokenizer.encode(text)
    if arguments.pieces:
        for token in tokens:
            print(f"{token:6d}  {tokenizer.piece(token)!r}")
    else:
        print(*tokens)


def _decode_command(arguments: argparse.Namespace) -> None:
    print(Tokenizer.open(arguments.model).decode(arguments.tokens))


if __name__ == "__main__":
    sys.exit(main())
