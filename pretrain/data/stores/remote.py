"""Stores behind URLs, through obstore: http(s), S3 and what speaks its protocol, Google Cloud Storage.

Requests are tried again here and not in the client, so that every kind of failure, a body that was cut or stalls
included, is counted, told and limited alike, and a body goes on where it ended.
"""

import hashlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import obstore
from obstore import exceptions
from obstore.store import from_url

from pretrain.data.format import FileEntry
from pretrain.data.stores.cache import Cache, NoRoomError
from pretrain.data.stores.config import StoreConfig
from pretrain.data.stores.errors import DamagedError, UnreachableError, missing, other_hash, other_size
from pretrain.data.stores.store import Store
from pretrain.errors import UserError

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
PIECE_BYTES = 1 << 16
# What trying again does not mend: the request itself is refused.
REFUSED = (
    exceptions.PermissionDeniedError,
    exceptions.UnauthenticatedError,
    exceptions.InvalidPathError,
    exceptions.UnknownConfigurationKeyError,
)

log = logging.getLogger(__name__)
T = TypeVar("T")


class Objects:
    """The objects under a URL: whole, in part, and by name. Thread-safe; every failure is a UserError."""

    def __init__(self, url: str, config: StoreConfig) -> None:
        """`url`: as `parse_location` gives it; what is read lies under it."""
        self.url = url
        self._config = config
        scheme, _, rest = url.partition("://")
        # The path is unquoted here because the client quotes it again.
        host, slash, path = rest.partition("/")
        try:
            self._client = from_url(
                f"{scheme}://{host}{slash}{quote(unquote(path))}",
                client_options={
                    "allow_http": True,
                    "timeout": "1day",  # of a whole body, however long; a stall is seen by the read timeout
                    "connect_timeout": timedelta(seconds=config.store_timeout_seconds),
                    "read_timeout": timedelta(seconds=config.store_timeout_seconds),
                },
                retry_config={"max_retries": 0, "backoff": {}, "retry_timeout": timedelta(minutes=3)},
            )
        except (exceptions.BaseError, ValueError) as error:
            raise UserError(f"{url}: cannot be opened: {_short(error)}") from None

    def locate(self, name: str) -> str:
        """A file as messages name it."""
        return f"{self.url}/{name}" if name else self.url

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

        def head() -> int:
            return int(obstore.head(self._client, name)["size"])

        try:
            return self._tried(name, head)
        except FileNotFoundError:
            return None

    def read_range(self, name: str, start: int, size: int, expected: int) -> bytes:
        """`size` bytes from `start` of a file of `expected` bytes. Raises DamagedError where there are not so many."""

        def get() -> bytes:
            result = obstore.get(self._client, name, options={"range": (start, start + size)})
            self._require_size(name, expected, result.meta["size"])
            return bytes(result.bytes())

        try:
            data = self._tried(name, get)
        except FileNotFoundError:
            raise missing(self.locate(name), expected) from None
        if len(data) != size:
            place = self.locate(name)
            raise DamagedError(f"{place}: {size} bytes expected from {start}, found {len(data)}", f"{len(data)} bytes")
        return data

    def pieces(self, name: str, expected: int | None = None) -> Iterator[bytes]:
        """All of a file, piece by piece; of `expected` bytes, if that is known. A body that ends early goes on where it
        ended, by a byte range, or where the server has none by reading past what is there already. Raises DamagedError
        for a file that is missing, of another size, or replaced meanwhile.
        """
        offset, size, tag, failures, has_ranges = 0, expected, None, 0, True
        while size is None or offset < size:
            before = offset
            try:
                options: dict[str, Any] = {"range": {"offset": offset}} if offset and has_ranges else {}
                if tag is not None and not tag.startswith("W/"):  # a weak tag never matches
                    options["if_match"] = tag
                result = obstore.get(self._client, name, options=options)
                self._require_size(name, size, result.meta["size"])
                size, tag = result.meta["size"], result.meta["e_tag"]
                past = 0 if has_ranges else offset
                for piece in result.stream(min_chunk_size=PIECE_BYTES):
                    new = bytes(piece)[past:]
                    past = max(0, past - len(piece))
                    offset += len(new)
                    yield new
                if offset == size:
                    return
                raise exceptions.GenericError(f"the body ended after {offset} of {size} bytes")
            except FileNotFoundError:
                raise missing(self.locate(name), size) from None
            except exceptions.PreconditionError:
                message = f"{self.locate(name)}: was replaced while it was read; restore the file, or start again"
                raise DamagedError(message, "another file") from None
            except (exceptions.BaseError, OSError) as error:
                if isinstance(error, exceptions.NotSupportedError) and has_ranges and offset:
                    has_ranges = False
                else:
                    failures = self._failed(name, error, 1 if offset > before else failures + 1)

    def names(self, prefix: str) -> list[tuple[str, int]]:
        """Names under a prefix with their bytes, in order. Not over http, which has no listing."""

        def listed() -> list[tuple[str, int]]:
            found = [item for chunk in obstore.list(self._client, prefix or None) for item in chunk]
            return sorted((item["path"], int(item["size"])) for item in found)

        return self._tried(prefix, listed)

    def _tried(self, name: str, request: Callable[[], T]) -> T:
        """What `request` gives, tried again where that may help. Raises FileNotFoundError and UserError."""
        failures = 0
        while True:
            try:
                return request()
            except FileNotFoundError:
                raise
            except (exceptions.BaseError, OSError) as error:
                failures = self._failed(name, error, failures + 1)

    def _failed(self, name: str, error: Exception, failures: int) -> int:
        """Waits before the next try; raises UnreachableError where there is none. Returns `failures`."""
        place = self.locate(name)
        if isinstance(error, exceptions.NotSupportedError):
            raise UnreachableError(
                f"{place}: {_short(error)}; give data.cache_gigabytes room, or a server that answers byte ranges"
            ) from None
        if isinstance(error, REFUSED):
            raise UnreachableError(
                f"{place}: refused: {_short(error)}; check the URL, and the credentials in the environment"
            ) from None
        if failures > self._config.store_retries:
            raise UnreachableError(
                f"{place}: not read, tried {failures} times in a row: {_short(error)}; check the server, the "
                "network and the credentials in the environment, or raise data.store_retries or "
                "data.store_timeout_seconds"
            ) from None
        # Drawn, so that the ranks of a run do not all come back in the same moment.
        wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)) * random.uniform(0.75, 1.25)
        log.warning("%s: %s; tried again in %.1f s (%d)", place, _short(error), wait, failures)
        time.sleep(wait)
        return failures

    def _require_size(self, name: str, expected: int | None, found: int) -> None:
        if expected is not None and found != expected:
            raise other_size(self.locate(name), expected, found)


class RemoteStore(Store):
    """A shard set behind a URL, kept in a cache as far as it has room."""

    max_open_files = 16  # an open file keeps its place in the cache

    def __init__(self, url: str, config: StoreConfig, *, hashes: bool) -> None:
        """See `open_store`."""
        self.place = url
        self._objects = Objects(url, config)
        self._keeps_shards = config.cache_gigabytes > 0
        self._cache = Cache(config.cache_folder, int(config.cache_gigabytes * 1e9))
        self._hashes = hashes
        self._checking: dict[str, Lock] = {}
        self._checked: set[str] = set()
        self._lock = Lock()
        self._kept: list[int] = []

    def read(self, name: str) -> bytes | None:
        """See `Store.read`."""
        if self._objects.size(name) is None:
            return None
        return b"".join(self._objects.pieces(name))

    def check(self, entry: FileEntry, *, hashes: bool) -> None:
        """See `Store.check`; what is in the cache already is checked by its hash there."""
        place = self.locate(entry.name)
        found = self._objects.size(entry.name)
        if found is None:
            raise missing(place, entry.bytes)
        if found != entry.bytes:
            raise other_size(place, entry.bytes, found)
        if hashes:
            self._cache.discard_damaged(entry)

    def bytes_here(self, entries: Sequence[FileEntry]) -> int:
        """See `Store.bytes_here`: what the cache holds."""
        return sum(entry.bytes for entry in entries if self._cache.path(entry).exists())

    def keep(self, entry: FileEntry) -> Path:
        """See `Store.keep`. The index and its like are kept beside the shards even where the cache has no room."""
        self._cache.discard_damaged(entry)
        try:
            self._kept.append(self._cache.open(entry, self._fetch(entry), place=self.locate(entry.name), bounded=False))
        except NoRoomError as error:
            raise UserError(f"{self.locate(entry.name)}: {error}") from error
        return self._cache.path(entry)

    def open_file(self, entry: FileEntry) -> int:
        """See `Store.open_file`."""
        if not self._keeps_shards:
            raise NoRoomError("data.cache_gigabytes is 0")
        return self._cache.open(entry, self._fetch(entry), place=self.locate(entry.name))

    def read_range(self, entry: FileEntry, start: int, size: int) -> bytes:
        """See `Store.read_range`; before the first range of a file all of it is read once to check its hash, unless the
        store was opened without hashes.
        """
        with self._lock:
            checking = self._checking.setdefault(entry.name, Lock())
        with checking:
            if self._hashes and entry.name not in self._checked:
                self.check_through(entry)
                self._checked.add(entry.name)
        return self._objects.read_range(entry.name, start, size, entry.bytes)

    def check_through(self, entry: FileEntry) -> None:
        """Reads all of a file past the cache. Raises DamagedError where its bytes or sha256 are others."""
        digest = hashlib.sha256()
        for piece in self._objects.pieces(entry.name, entry.bytes):
            digest.update(piece)
        if digest.hexdigest() != entry.sha256:
            raise other_hash(self.locate(entry.name), entry.sha256, digest.hexdigest())

    def close(self) -> None:
        """See `Store.close`."""
        while self._kept:
            os.close(self._kept.pop())

    def _fetch(self, entry: FileEntry) -> Callable[[], Iterator[bytes]]:
        return lambda: self._objects.pieces(entry.name, entry.bytes)


def _short(error: Exception) -> str:
    """The first line of the client's message: the rest is its own state, and a server's page."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:300]
