"""Documents from files: txt and other text, jsonl, jsonl.gz, parquet, and folders of them.

Files are read in a fixed order (inputs as given, a folder's files by path), and text is taken as it stands: no newline
translation, no normalisation, no stripping. What cannot be read as intended is an error that names the file and place.
"""

import argparse
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from pretrain.errors import UserError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
KNOWN_SUFFIXES = (".txt", ".md", *JSONL_SUFFIXES, ".parquet")
# Formats that would only be noticed as invalid UTF-8, or not at all.
UNREADABLE_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".model", ".npy", ".npz", ".arrow")


@dataclass(frozen=True)
class Document:
    """A text, where it came from, and how many of the inputs' bytes were read up to its end."""

    text: str
    source: str
    bytes_read: int


@dataclass
class Skipped:
    """Counts of what a reader left out, for the report."""

    empty: int = 0
    invalid_utf8: int = 0


@dataclass(frozen=True)
class DocumentOptions:
    """How files become documents."""

    globs: tuple[str, ...] = ()
    """Which files of a folder are read: patterns for the name, or for the path inside the folder if they have a slash.
    None: the known suffixes."""
    excludes: tuple[str, ...] = ()
    """Files of a folder that are left out, patterns as for globs."""
    text_field: str = "text"
    """The field of a jsonl record, or the column of a parquet file, that holds the text."""
    separator: str | None = None
    """Text that ends a document inside a text file; none: a text file is one document."""
    invalid_utf8: Literal["error", "skip"] = "error"
    """What to do with a text file or jsonl line that is not UTF-8."""


@dataclass
class DocumentReader:
    """Iterates over the documents of `inputs`; may be iterated again. Empty documents are left out and counted.

    Raises UserError: at construction for an input that is missing or matches no file, while reading for one that
    cannot be read as intended.
    """

    inputs: list[Path]
    options: DocumentOptions = field(default_factory=DocumentOptions)
    skipped: Skipped = field(default_factory=Skipped)

    def __post_init__(self) -> None:
        self.files = [file for path in self.inputs for file in find_files(path, self.options)]
        self.bytes_total = sum(path.stat().st_size for path in self.files)

    def __iter__(self) -> Iterator[Document]:
        self.skipped.empty = self.skipped.invalid_utf8 = 0
        before = 0
        for path in self.files:
            for document in self._read_file(path, before):
                if document.text:
                    yield document
                else:
                    self.skipped.empty += 1
            before += path.stat().st_size

    def _read_file(self, path: Path, before: int) -> Iterator[Document]:
        try:
            if path.name.endswith(JSONL_SUFFIXES):
                yield from self._read_jsonl(path, before)
            elif path.name.endswith(".parquet"):
                yield from self._read_parquet(path, before)
            else:
                yield from self._read_text(path, before)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error

    def _read_text(self, path: Path, before: int) -> Iterator[Document]:
        data = path.read_bytes()
        text = self._decode(data, str(path))
        if text is None:
            return
        parts = text.split(self.options.separator) if self.options.separator else [text]
        # The empty piece after a last separator is no document.
        parts = parts[:-1] if len(parts) > 1 and not parts[-1].strip() else parts
        for number, part in enumerate(parts, 1):
            source = str(path) if len(parts) == 1 else f"{path}, document {number}"
            yield Document(part, source, before + len(data) * number // len(parts))

    def _read_jsonl(self, path: Path, before: int) -> Iterator[Document]:
        with open(path, "rb") as raw:
            lines = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
            try:
                for number, line in enumerate(lines, 1):
                    source = f"{path}, line {number}"
                    text = self._decode(line, source)
                    if text is not None and not text.isspace():
                        yield Document(self._field(text, source), source, before + raw.tell())
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{path}: damaged gzip file: {error}; fetch it again") from None

    def _field(self, line: str, source: str) -> str:
        name = self.options.text_field
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{source}: is not JSON: {error}") from None
        if not isinstance(record, dict) or name not in record:
            found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{source}: has no field {name!r} (found: {found}); choose one with --text-field")
        return _checked_text(record[name], f"{source}, field {name!r}")

    def _read_parquet(self, path: Path, before: int) -> Iterator[Document]:
        import pyarrow
        from pyarrow import parquet

        name = self.options.text_field
        size = path.stat().st_size
        try:
            with parquet.ParquetFile(path) as file:
                if name not in file.schema_arrow.names:
                    found = ", ".join(file.schema_arrow.names)
                    raise UserError(f"{path}: has no column {name!r} (found: {found}); choose one with --text-field")
                number, rows = 0, file.metadata.num_rows
                for batch in file.iter_batches(columns=[name], batch_size=1024):
                    for value in batch.column(0).to_pylist():
                        number += 1
                        source = f"{path}, row {number}"
                        text = _checked_text(value, f"{source}, column {name!r}")
                        yield Document(text, source, before + size * number // rows)
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: is not a parquet file that can be read: {error}") from None

    def _decode(self, data: bytes, source: str) -> str | None:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.options.invalid_utf8 == "skip":
                self.skipped.invalid_utf8 += 1
                return None
            raise UserError(
                f"{source}: is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; convert or exclude "
                "it, or leave such documents out with --invalid-utf8 skip"
            ) from None


def find_files(path: Path, options: DocumentOptions) -> list[Path]:
    """The files of one input in their order; raises UserError when there is none."""
    if path.is_file():
        if path.name.endswith(UNREADABLE_SUFFIXES) and not path.name.endswith(JSONL_SUFFIXES):
            raise UserError(f"{path}: cannot be read; inputs are text, .jsonl, .jsonl.gz, .parquet, or folders of them")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give an existing path to --input")
    files = [Path(folder, name) for folder, _, names in os.walk(path, onerror=_unreadable_folder) for name in names]
    found = sorted(
        (file for file in files if _selected(file.relative_to(path), options)),
        key=lambda file: file.relative_to(path).parts,
    )
    if strange := [file for file in found if not file.is_file()]:
        raise UserError(f"{strange[0]}: is no file that can be read, or a link to nothing; leave it out with --exclude")
    if not found:
        wanted = options.globs or tuple(f"*{suffix}" for suffix in KNOWN_SUFFIXES)
        raise UserError(f"{path}: holds no file that matches {', '.join(wanted)}; choose others with --glob")
    return found


def _unreadable_folder(error: OSError) -> None:
    # os.walk leaves out what it cannot list unless it is stopped here.
    raise UserError(f"{error.filename}: cannot be listed: {error.strerror}") from error


def _selected(path: Path, options: DocumentOptions) -> bool:
    def matches(pattern: str) -> bool:
        return fnmatch(path.as_posix() if "/" in pattern else path.name, pattern)

    if any(map(matches, options.excludes)):
        return False
    return any(map(matches, options.globs)) if options.globs else path.name.endswith(KNOWN_SUFFIXES)


def _checked_text(value: object, source: str) -> str:
    """`value` as text; null counts as empty. A lone surrogate, which JSON can spell, has no UTF-8 form."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{source}: is {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{source}: holds the lone surrogate U+{ord(value[error.start]):04X}, which is not text"
        ) from None
    return value


def add_document_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds --input (`required` or not) and the options of `DocumentOptions` to a command."""
    group = parser.add_argument_group("documents")
    group.add_argument(
        "--input",
        nargs="+",
        required=required,
        type=Path,
        metavar="PATH",
        help="text files, .jsonl, .jsonl.gz, .parquet, or folders (read recursively, in the order of their paths)",
    )
    group.add_argument(
        "--glob",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help=f'files of a folder to read, such as "*.py" (default: *{", *".join(KNOWN_SUFFIXES)})',
    )
    group.add_argument(
        "--exclude",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help='files of a folder to leave out, such as "*/test/*" (with a slash: matched to the path in the folder)',
    )
    group.add_argument(
        "--text-field", default="text", metavar="NAME", help="jsonl field or parquet column (default: text)"
    )
    group.add_argument(
        "--separator",
        type=_unescaped,
        metavar="TEXT",
        help=r'text that divides a text file into documents, such as "<|endoftext|>" or "\n\n\n" (default: none)',
    )
    group.add_argument(
        "--invalid-utf8",
        choices=("error", "skip"),
        default="error",
        help="a text file or jsonl line that is not UTF-8: stop, or leave it out and count it (default: error)",
    )


def changed_document_options(arguments: argparse.Namespace) -> list[str]:
    """The options of `add_document_arguments`, --input apart, that were given another value than their default."""
    parser = argparse.ArgumentParser()
    add_document_arguments(parser, required=False)
    defaults = vars(parser.parse_args([]))
    return [
        f"--{name.replace('_', '-')}"
        for name, value in defaults.items()
        if getattr(arguments, name) != value and name != "input"
    ]


def reader_from_arguments(arguments: argparse.Namespace) -> DocumentReader:
    """The reader that the options of `add_document_arguments` describe."""
    options = DocumentOptions(
        globs=tuple(arguments.glob),
        excludes=tuple(arguments.exclude),
        text_field=arguments.text_field,
        separator=arguments.separator,
        invalid_utf8=arguments.invalid_utf8,
    )
    return DocumentReader(arguments.input, options)


def _unescaped(text: str) -> str:
    value = text.replace("\\n", "\n").replace("\\t", "\t")
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value
