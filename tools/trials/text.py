"""Book text for the studies that read some: a tokenizer, training shards and held-out shards, made once.

The documents are put into an order that follows from their content alone. Held out are the first, so many that they
hold `validation_bytes`; trained on is what follows, up to `train_bytes`; the last document of either is cut there, and
its rest is not read, so that no document is on both sides. Of a single document the beginning is held out and what
follows is trained on.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pretrain.data import ShardSet
from pretrain.errors import UserError
from tools.command import writing
from tools.demo.corpus import Text, write_corpus
from tools.documents import DocumentReader
from tools.shards.build import build
from tools.tokenizer import train as train_tokenizer
from tools.trials.results import replace_text
from tools.trials.suite import TextSizes

TEXT_FOLDER = "text"
TEXT_FILE = "text.json"
PARTS = ("train", "validation")


class BuiltText(BaseModel):
    """The content of text.json, which is written last."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    sizes: TextSizes
    """What was asked for."""

    text_sha256: str
    """Of the training and the held-out text."""

    fingerprint: str
    """Of the shards: what runs depend on."""


def shard_folders(folder: Path) -> tuple[Path, Path]:
    """Where the training and the held-out shards are, below the text's folder."""
    train, validation = (folder / "shards" / part / "train" for part in PARTS)
    return train, validation


def read_fingerprint(folder: Path, sizes: TextSizes | None) -> str | None:
    """The fingerprint of the text that was built in a folder; None where there is none. Raises UserError for one of
    other sizes, and for one that cannot be read.
    """
    built = _read(folder)
    if built is not None and built.sizes != sizes:
        raise UserError(f"{folder}: was built with other sizes than the suite's `text`; {_away(folder)}")
    return None if built is None else built.fingerprint


def prepare_text(paths: Sequence[Path], sizes: TextSizes, folder: Path, *, longest_row: int, scored_tokens: int) -> str:
    """Builds tokenizer and shards unless they are there; returns their fingerprint.

    Args:
        longest_row: tokens of the longest row of a probe; the longest held-out document must fill one.
        scored_tokens: tokens of the largest probe, which the held-out text must have.

    Raises:
        UserError: text that is missing, too little or in too short documents; a folder with another text.
    """
    parts = divide([document.text for document in DocumentReader(list(paths))], sizes)
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    fingerprint = read_fingerprint(folder, sizes)
    built = _read(folder)
    if built is not None and built.text_sha256 != digest:
        raise UserError(f"{folder}: was built from another text than {_names(paths)}; {_away(folder)}")
    known = fingerprint is not None
    if fingerprint is None:
        fingerprint = _build(parts, sizes, folder)
    _check_held_out(shard_folders(folder)[1], longest_row, scored_tokens)
    if not known:  # last, so that a text that does not do can be replaced
        made = BuiltText(sizes=sizes, text_sha256=digest, fingerprint=fingerprint)
        replace_text(folder / TEXT_FILE, made.model_dump_json(indent=1) + "\n")
    return fingerprint


def _check_held_out(folder: Path, longest_row: int, scored_tokens: int) -> None:
    """Raises UserError for held-out shards that are too short for the probes."""
    held_out = ShardSet.open(folder)
    longest = int(held_out.document_tokens.max())
    if longest < longest_row:
        raise UserError(
            f"--text: the longest held-out document has {longest:,} tokens, and a probe reads rows of {longest_row:,}: "
            "name longer documents, such as books, or raise text.validation_bytes"
        )
    if held_out.tokens < scored_tokens:
        raise UserError(
            f"text.validation_bytes: the held-out text has {held_out.tokens:,} tokens, and a probe scores "
            f"{scored_tokens:,}: raise it, or lower the probe's tokens"
        )


def divide(documents: Iterable[str], sizes: TextSizes) -> dict[str, list[str]]:
    """The texts of the two parts. Raises UserError for too little text."""
    known = {hashlib.sha256(text.encode()).digest(): text for text in documents}
    ordered = [known[digest] for digest in sorted(known)]
    held_out, rest = _take(ordered, sizes.validation_bytes)
    if len(ordered) > 1:
        rest = ordered[len(held_out) :]
    training, _ = _take(rest, sizes.train_bytes)
    have = {"train": training, "validation": held_out}
    for part, wanted in zip(PARTS, (sizes.train_bytes, sizes.validation_bytes), strict=True):
        size = sum(len(text.encode()) for text in have[part])
        if size < wanted - 3:  # the last character may take up to four bytes
            total = sum(len(text.encode()) for text in ordered)
            raise UserError(
                f"--text: {total:,} bytes in {len(ordered)} documents leave {size:,} bytes for text.{part}_bytes "
                f"{wanted:,}: name more text, or lower it"
            )
    return have


def _take(texts: Sequence[str], size: int) -> tuple[list[str], list[str]]:
    """Texts of `size` UTF-8 bytes from the first on, cut at a character, and what is left of them all."""
    taken: list[str] = []
    for number, text in enumerate(texts):
        data = text.encode()
        if len(data) >= size:
            part = data[:size].decode(errors="ignore")
            return [*taken, part], [text[len(part) :], *texts[number + 1 :]]
        taken.append(text)
        size -= len(data)
    return taken, []


def _build(parts: dict[str, list[str]], sizes: TextSizes, folder: Path) -> str:
    """Tokenizer and shards, from the beginning; returns their fingerprint."""
    tokenizer = folder / "tokenizer.model"
    with writing(folder):
        if (folder / "shards").exists():  # left by a call that was killed
            shutil.rmtree(folder / "shards")
        folder.mkdir(parents=True, exist_ok=True)
        corpora = {
            part: write_corpus(Text(part, texts), folder / f"{part}.jsonl").path for part, texts in parts.items()
        }
        tokenizer.write_bytes(train_tokenizer(DocumentReader([corpora["train"]]), sizes.vocab_size))
    fingerprints = []
    for part, output in zip(PARTS, shard_folders(folder), strict=True):
        build(DocumentReader([corpora[part]]), tokenizer, output.parent, validation_fraction=0.0)
        fingerprints.append(ShardSet.open(output).fingerprint)
    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()


def _read(folder: Path) -> BuiltText | None:
    """What was built in a folder; None where nothing was, or not to its end."""
    path = folder / TEXT_FILE
    try:
        return BuiltText.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; {_away(folder)}") from error


def _away(folder: Path) -> str:
    return f"give another --output, or remove {folder} to build it anew"


def _names(paths: Sequence[Path]) -> str:
    return " ".join(map(str, paths))
