"""Documents from files: txt and other text, jsonl, jsonl.gz, jsonl.zst, parquet, folders of them, and URLs.

Files are read in a fixed order (inputs as given, a folder's files by path), and text is taken as it stands: no newline
translation, no normalisation, no stripping. What cannot be read as intended is an error that names the file and place.
"""

import argparse
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from pretrain.data.stores import parse_location
from pretrain.errors import UserError
from tools.command import changed_options
from tools.inputs import JSONL_SUFFIXES, KNOWN_SUFFIXES, InputFile, find_files


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

    inputs: list[Path | str]
    """Files, folders, and URLs as text."""

    options: DocumentOptions = field(default_factory=DocumentOptions)
    skipped: Skipped = field(default_factory=Skipped)

    def __post_init__(self) -> None:
        options = self.options
        self.files = [file for path in self.inputs for file in find_files(path, options.globs, options.excludes)]
        self.bytes_total = sum(file.bytes for file in self.files)

    def __iter__(self) -> Iterator[Document]:
        self.skipped.empty = self.skipped.invalid_utf8 = 0
        before = 0
        for file in self.files:
            with file.local() as path:
                for document in self._read_file(file, path, before):
                    if document.text:
                        yield document
                    else:
                        self.skipped.empty += 1
            before += file.bytes

    def _read_file(self, file: InputFile, path: Path, before: int) -> Iterator[Document]:
        try:
            if file.name.endswith(JSONL_SUFFIXES):
                yield from self._read_jsonl(file, path, before)
            elif file.name.endswith(".parquet"):
                yield from self._read_parquet(file, path, before)
            else:
                yield from self._read_text(file, path, before)
        except OSError as error:
            raise UserError(f"{file.location}: cannot be read: {error.strerror or error}") from error

    def _read_text(self, file: InputFile, path: Path, before: int) -> Iterator[Document]:
        data = path.read_bytes()
        text = self._decode(data, str(file.location))
        if text is None:
            return
        parts = text.split(self.options.separator) if self.options.separator else [text]
        # The empty piece after a last separator is no document.
        parts = parts[:-1] if len(parts) > 1 and not parts[-1].strip() else parts
        for number, part in enumerate(parts, 1):
            source = str(file.location) if len(parts) == 1 else f"{file.location}, document {number}"
            yield Document(part, source, before + len(data) * number // len(parts))

    def _read_jsonl(self, file: InputFile, path: Path, before: int) -> Iterator[Document]:
        with open(path, "rb") as raw:
            try:
                for number, line in enumerate(_unpacked(file, raw), 1):
                    source = f"{file.location}, line {number}"
                    text = self._decode(line, source)
                    if text is not None and not text.isspace():
                        yield Document(self._field(text, source), source, before + raw.tell())
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{file.location}: damaged gzip file: {error}; fetch it again") from None
            except OSError as error:
                if not file.name.endswith(".zst") or error.errno is not None:
                    raise
                raise UserError(f"{file.location}: damaged zstd file: {error}; fetch it again") from None

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

    def _read_parquet(self, file: InputFile, path: Path, before: int) -> Iterator[Document]:
        import pyarrow
        from pyarrow import parquet

        name = self.options.text_field
        where = file.location
        try:
            with parquet.ParquetFile(path) as table:
                if name not in table.schema_arrow.names:
                    found = ", ".join(table.schema_arrow.names)
                    raise UserError(f"{where}: has no column {name!r} (found: {found}); choose one with --text-field")
                number, rows = 0, table.metadata.num_rows
                for batch in table.iter_batches(columns=[name], batch_size=1024):
                    for value in batch.column(0).to_pylist():
                        number += 1
                        source = f"{where}, row {number}"
                        text = _checked_text(value, f"{source}, column {name!r}")
                        yield Document(text, source, before + file.bytes * number // rows)
        except pyarrow.ArrowException as error:
            raise UserError(f"{where}: is not a parquet file that can be read: {error}") from None

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


def _unpacked(file: InputFile, raw: BinaryIO) -> BinaryIO:
    """The file's lines, out of gzip or zstd by its name. Raises UserError for one of no bytes, which neither writes."""
    if not file.bytes and file.name.endswith((".gz", ".zst")):
        raise UserError(f"{file.location}: damaged: is empty, which no compressed file is; fetch it again")
    if file.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if file.name.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20)
    return raw


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
        type=location,
        metavar="PATH",
        help="text files, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, folders (read recursively, in the order of their "
        "paths), or URLs: http(s):// of files, s3:// and gs:// also of folders, with credentials from the environment",
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
    changed = changed_options(lambda parser: add_document_arguments(parser, required=False), arguments)
    return [option for option in changed if option != "--input"]


def location(text: str) -> Path | str:
    """An argparse type: a path, or a URL."""
    try:
        return parse_location(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
