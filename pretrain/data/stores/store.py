"""What a shard set asks of the place where it lies, and the answer of a local folder."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from pretrain.data.format import FileEntry
from pretrain.data.stores.config import StoreConfig, is_remote, parse_location
from pretrain.data.stores.errors import other_hash, other_size, unreadable
from pretrain.durable import file_sha256
from pretrain.errors import UserError


class Store(ABC):
    """The files of a set. Reading is thread-safe."""

    place: str
    """The folder or URL, as messages name it."""

    max_open_files: int
    """How many files that nobody reads may stay open."""

    def locate(self, name: str) -> str:
        """A file as messages name it."""
        return f"{self.place}/{name}"

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """All of a small file; None where there is no such file. Raises OSError (local) and UserError (remote)."""

    @abstractmethod
    def check(self, entry: FileEntry, *, hashes: bool) -> None:
        """Checks presence and bytes of a file, and its sha256 if asked. Raises UserError naming what differs.

        A remote file's hash is checked when it is fetched, before any of it is used, not here.
        """

    @abstractmethod
    def bytes_here(self, entries: Sequence[FileEntry]) -> int:
        """How many bytes of the files `check` reads through for their hashes."""

    @abstractmethod
    def keep(self, entry: FileEntry) -> Path:
        """A local file with the content of `entry`, its sha256 checked, that stays until `close`. Raises UserError."""

    @abstractmethod
    def open_file(self, entry: FileEntry) -> int:
        """A descriptor of a local file with the content of `entry`, for the caller to close; while it is open, the file
        stays. Raises OSError (local), UserError, and NoRoomError where a remote file cannot be kept: then it can be
        read with `read_range`.
        """

    @abstractmethod
    def read_range(self, entry: FileEntry, start: int, size: int) -> bytes:
        """`size` bytes from `start`, straight from where the file lies. Raises UserError."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of the files that `keep` gave."""


class LocalStore(Store):
    """A folder."""

    max_open_files = 128

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = str(folder)

    def read(self, name: str) -> bytes | None:
        """See `Store.read`."""
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def check(self, entry: FileEntry, *, hashes: bool) -> None:
        """See `Store.check`."""
        path = self.folder / entry.name
        try:
            found = path.stat().st_size
        except OSError as error:
            raise unreadable(str(path), entry.bytes, error) from None
        if found != entry.bytes:
            raise other_size(str(path), entry.bytes, found)
        if not hashes:
            return
        try:
            digest = file_sha256(path)
        except OSError as error:
            raise unreadable(str(path), entry.bytes, error) from error
        if digest != entry.sha256:
            raise other_hash(str(path), entry.sha256, digest)

    def bytes_here(self, entries: Sequence[FileEntry]) -> int:
        """See `Store.bytes_here`: all."""
        return sum(entry.bytes for entry in entries)

    def keep(self, entry: FileEntry) -> Path:
        """See `Store.keep`."""
        self.check(entry, hashes=True)
        return self.folder / entry.name

    def open_file(self, entry: FileEntry) -> int:
        """See `Store.open_file`."""
        return os.open(self.folder / entry.name, os.O_RDONLY)

    def read_range(self, entry: FileEntry, start: int, size: int) -> bytes:
        """See `Store.read_range`."""
        with open(self.folder / entry.name, "rb") as file:
            file.seek(start)
            return file.read(size)

    def close(self) -> None:
        """Nothing is held."""


def open_store(location: Path | str, config: StoreConfig | None = None, *, hashes: bool = True) -> Store:
    """The store of a folder or URL.

    `hashes`: whether the sha256 of a remote file that is read by ranges is checked once, by reading it through. Raises
    UserError for a URL that cannot be read, and a cache folder that cannot be used.
    """
    try:
        location = parse_location(location)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not is_remote(location):
        return LocalStore(Path(location))
    from pretrain.data.stores.remote import RemoteStore  # loads the client, which local data has no use for

    return RemoteStore(str(location), config or StoreConfig(), hashes=hashes)
