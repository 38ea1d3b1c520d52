"""The demo's text: the source of Python's standard library on this machine, or the user's own."""

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import UserError

# Third-party packages, and files that are tables or generated rather than written.
LEFT_OUT = (
    "site-packages/*",
    "dist-packages/*",
    "*/site-packages/*",
    "test/*",
    "*/test/*",
    "*/tests/*",
    "idlelib/*",
    "lib2to3/*",
    "encodings/*",
    "config-*/*",
    "pydoc_data/*",
    "_sysconfigdata*.py",
)
DOCUMENT_BYTES = 16384


@dataclass(frozen=True)
class Corpus:
    """A name for the closing table, and the options that hand the text to `tools.tokenizer` and `tools.shards`."""

    name: str
    options: tuple[str, ...]


def standard_library() -> Corpus:
    """The .py files of Python's standard library. Raises UserError where there are none (a zipped Python)."""
    folder = Path(sysconfig.get_path("stdlib"))
    if not any(folder.glob("*.py")):
        raise UserError(f"{folder}: holds no .py files of the standard library; give text of your own with --data PATH")
    options = ("--input", str(folder), "--glob", "*.py", "--exclude", *LEFT_OUT, "--invalid-utf8", "skip")
    return Corpus(f"Python's standard library ({folder})", options)


def own_text(path: Path, folder: Path) -> Corpus:
    """The user's file or folder. A single text file is cut at line ends into documents below `folder`, so that some of
    it can be held out. Raises UserError for what is not there."""
    if not path.exists():
        raise UserError(f"--data {path}: there is no such file or folder")
    if path.is_dir() or path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        return Corpus(str(path), ("--input", str(path), "--invalid-utf8", "skip"))
    cut = folder / "corpus.jsonl"
    documents = cut_at_lines(path.read_text(encoding="utf-8", errors="replace"), DOCUMENT_BYTES)
    cut.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return Corpus(str(path), ("--input", str(cut)))


def cut_at_lines(text: str, size: int) -> list[str]:
    """`text` in pieces of whole lines that end at the first line end after `size` characters."""
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
