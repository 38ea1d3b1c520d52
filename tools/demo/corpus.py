"""The demo's text: the source of Python's standard library on this machine, or the user's own.

As much as the training reads once, so that the model and the bigram model that it is compared with know the same.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from pretrain.errors import UserError
from tools.documents import DocumentOptions, DocumentReader

# Not third-party packages, nor files that are tables or generated rather than written.
LEFT_OUT = (
    *("site-packages/*", "dist-packages/*", "*/site-packages/*"),
    *("test/*", "*/test/*", "*/tests/*"),
    *("idlelib/*", "lib2to3/*", "encodings/*", "pydoc_data/*", "config-*/*", "_sysconfigdata*.py"),
)
BUDGET_BYTES = 2_700_000
LOOKED_AT_BYTES = 64_000_000  # of a large corpus of the user's, only the beginning is chosen from
PIECE_CHARACTERS = 16_384


@dataclass(frozen=True)
class Corpus:
    """Where the text is from, and the jsonl file that it was put into."""

    name: str
    path: Path
    documents: int
    bytes: int


@dataclass(frozen=True)
class Text:
    """The chosen documents and what they are called."""

    name: str
    documents: list[str]


def find_text(data: Path | None) -> Text:
    """The demo's documents, read and chosen but not written. Raises UserError when there is no text."""
    if data is None:
        folder = Path(sysconfig.get_path("stdlib"))
        options = DocumentOptions(globs=("*.py",), excludes=LEFT_OUT, invalid_utf8="skip")
        name = f"Python's standard library, {folder}"
    else:
        folder, options, name = data, DocumentOptions(invalid_utf8="skip"), str(data)
    texts = (document.text for document in DocumentReader([folder], options))
    beginning = list(islice(texts, 2))
    if len(beginning) == 1:  # a single text is cut, so that some of it can be held out
        beginning = cut_at_lines(beginning[0], PIECE_CHARACTERS)
    chosen = choose(chain(beginning, texts), BUDGET_BYTES)
    if len(chosen) < 2:
        raise UserError(f"{folder}: not enough text for a demo; name a file or folder of some 100 KB with --data PATH")
    return Text(name, chosen)


def write_corpus(text: Text, path: Path) -> Corpus:
    """Writes the documents to `path` as jsonl."""
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in text.documents), encoding="utf-8")
    return Corpus(text.name, path, len(text.documents), sum(len(document.encode()) for document in text.documents))


def choose(texts: Iterable[str], budget: int) -> list[str]:
    """Texts of about `budget` bytes in all, in an order that follows from their content alone: the same files give the
    same corpus wherever they lie."""
    looked_at = 0
    known: dict[bytes, str] = {}
    for text in texts:
        known[hashlib.blake2b(text.encode(), digest_size=16).digest()] = text
        looked_at += len(text)
        if looked_at > LOOKED_AT_BYTES:
            break
    chosen: list[str] = []
    size = 0
    for digest in sorted(known):
        if size >= budget:
            break
        chosen.append(known[digest])
        size += len(known[digest].encode())
    return chosen


def cut_at_lines(text: str, size: int) -> list[str]:
    """`text` in pieces of whole lines, each ending with the first line that brings it to `size` characters."""
    pieces: list[str] = []
    current: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        current.append(line)
        length += len(line)
        if length >= size:
            pieces.append("".join(current))
            current, length = [], 0
    return [*pieces, "".join(current)] if current else pieces
