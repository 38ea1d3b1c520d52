"""Files that documents are read from: paths, folders, and URLs (http, S3, GCS), which are fetched one at a time."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from pretrain.data.stores import StoreConfig
from pretrain.errors import UserError
from tools.command import writing

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
KNOWN_SUFFIXES = (".txt", ".md", *JSONL_SUFFIXES, ".parquet")
# Formats that would only be noticed as invalid UTF-8, or not at all.
UNREADABLE_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".model", ".npy", ".npz", ".arrow")


@dataclass(frozen=True)
class InputFile:
    """A file to read documents from."""

    location: Path | str
    """Its path, or its URL as text."""

    bytes: int
    changed: int | None
    """When it was last changed, in ns; None for a URL."""

    @property
    def name(self) -> str:
        """The last part of its path."""
        return str(self.location).rpartition("/")[2]

    @contextmanager
    def local(self) -> Iterator[Path]:
        """The file on this machine; of a URL a copy, for as long as the context lasts. Raises UserError."""
        if isinstance(self.location, Path):
            yield self.location
            return
        with tempfile.TemporaryDirectory(prefix="mnemosyne-input-") as folder:
            path = Path(folder) / "copy"
            self._fetch(path)
            yield path

    def _fetch(self, path: Path) -> None:
        from pretrain.data.stores.remote import Objects  # loads the client, which local files have no use for

        parent, _, name = str(self.location).rpartition("/")
        pieces = Objects(parent, StoreConfig()).pieces(name, self.bytes)
        with writing(path), open(path, "wb") as file:
            file.writelines(pieces)


def find_files(location: Path | str, globs: tuple[str, ...], excludes: tuple[str, ...]) -> list[InputFile]:
    """The files of one input in their order; raises UserError when there is none.

    `globs` and `excludes`: see `tools.documents.DocumentOptions`.
    """
    if isinstance(location, str):
        return _remote_files(location, globs, excludes)
    if location.is_file():
        _require_readable(location)
        return [_local_file(location)]
    if not location.is_dir():
        raise UserError(f"{location}: no such file or folder; give an existing path to --input")
    paths = [Path(folder, name) for folder, _, names in os.walk(location, onerror=_unreadable_folder) for name in names]
    found = sorted(
        (path for path in paths if _selected(path.relative_to(location), globs, excludes)),
        key=lambda path: path.relative_to(location).parts,
    )
    if strange := [path for path in found if not path.is_file()]:
        raise UserError(f"{strange[0]}: is no file that can be read, or a link to nothing; leave it out with --exclude")
    return _require_some([_local_file(path) for path in found], location, globs)


def _remote_files(url: str, globs: tuple[str, ...], excludes: tuple[str, ...]) -> list[InputFile]:
    from pretrain.data.stores.remote import Objects

    if url.endswith(KNOWN_SUFFIXES):
        parent, _, name = url.rpartition("/")
        size = Objects(parent, StoreConfig()).size(name)
        if size is None:
            raise UserError(f"{url}: no such file; give an existing URL to --input")
        return [InputFile(url, size, None)]
    if url.startswith("http"):
        raise UserError(
            f"{url}: http has no list of a folder's files; give the URLs of files ending in {', '.join(KNOWN_SUFFIXES)}"
        )
    objects = Objects(url, StoreConfig())
    found = [
        InputFile(f"{url}/{name}", size, None)
        for name, size in sorted(objects.names(""), key=lambda item: item[0].split("/"))
        if _selected(Path(name), globs, excludes)
    ]
    return _require_some(found, url, globs)


def _local_file(path: Path) -> InputFile:
    status = path.stat()
    return InputFile(path, status.st_size, status.st_mtime_ns)


def _require_readable(path: Path) -> None:
    if path.name.endswith(UNREADABLE_SUFFIXES) and not path.name.endswith(JSONL_SUFFIXES):
        raise UserError(
            f"{path}: cannot be read; inputs are text, {', '.join(JSONL_SUFFIXES)}, .parquet, or folders of them"
        )


def _require_some(found: list[InputFile], location: Path | str, globs: tuple[str, ...]) -> list[InputFile]:
    if not found:
        wanted = globs or tuple(f"*{suffix}" for suffix in KNOWN_SUFFIXES)
        raise UserError(f"{location}: holds no file that matches {', '.join(wanted)}; choose others with --glob")
    return found


def _unreadable_folder(error: OSError) -> None:
    # os.walk leaves out what it cannot list unless it is stopped here.
    raise UserError(f"{error.filename}: cannot be listed: {error.strerror}") from error


def _selected(path: Path, globs: tuple[str, ...], excludes: tuple[str, ...]) -> bool:
    def matches(pattern: str) -> bool:
        return fnmatch(path.as_posix() if "/" in pattern else path.name, pattern)

    if any(map(matches, excludes)):
        return False
    return any(map(matches, globs)) if globs else path.name.endswith(KNOWN_SUFFIXES)
