"""Copies of a run's checkpoints behind a URL: S3 and what speaks its protocol, Google Cloud Storage, or a folder.

A checkpoint has the name and the files of its folder there. Its manifest is put behind all other files and removed
before them: what has none is no checkpoint, whatever moment an upload ended at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import obstore
from obstore import exceptions
from obstore.store import LocalStore, from_url

from pretrain.checkpoints import LATEST, MANIFEST, STAYS, checkpoint_step

PIECE_BYTES = 1 << 23
"""Of a file that is sent or fetched, between two looks at whether to go on."""
MOST_PARTS = 9_000
"""Of one file: S3 takes 10,000."""
PARTS_AT_ONCE = 4
_TIMEOUT = timedelta(seconds=60)
"""Without a byte."""
_TRIES = 4
_RETRIES: Any = {
    "max_retries": _TRIES - 1,
    "backoff": {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=5), "base": 2},
    "retry_timeout": _TIMEOUT,
}

T = TypeVar("T")


class StoreError(Exception):
    """The store does not do what it is asked for: no network, no access, no such file. The message names the URL."""


class CheckpointStore:
    """The checkpoints behind a location. Every method raises StoreError.

    Args:
        location: a folder, made when something is put there, or a URL of s3:// or gs://; credentials, region and
            endpoint come from the environment (AWS_*, GOOGLE_*).
    """

    def __init__(self, location: Path | str) -> None:
        self.location = str(location)
        try:
            if isinstance(location, Path):
                self._client: Any = LocalStore(location, mkdir=True, automatic_cleanup=True)
                return
            scheme, _, rest = location.partition("://")
            bucket, slash, path = rest.partition("/")
            options: Any = {"allow_http": True, "connect_timeout": _TIMEOUT, "timeout": "1day"}  # of a whole body
            self._client = from_url(
                f"{scheme}://{bucket}{slash}{quote(unquote(path))}",  # unquoted first: the client quotes it again
                client_options={**options, "read_timeout": _TIMEOUT},
                retry_config=_RETRIES,
            )
        except (exceptions.BaseError, ValueError, OSError) as error:
            raise StoreError(f"{location} cannot be opened: {_short(error)}") from error

    def locate(self, checkpoint: str, file: str = "") -> str:
        """A checkpoint, or a file of it, as messages name it."""
        return "/".join(filter(None, (self.location, checkpoint, file)))

    def checkpoints(self) -> list[str]:
        """Names of all that have a manifest, newest first."""
        return [name for name in self.begun() if self.has(name, MANIFEST)]

    def begun(self) -> list[str]:
        """Names of all that have any file, newest first."""
        listed = self._asked("", lambda: obstore.list_with_delimiter(self._client)["common_prefixes"])
        names = [Path(prefix.rstrip("/")) for prefix in listed]
        found = [name for name in names if checkpoint_step(name) is not None]
        return [name.name for name in sorted(found, key=lambda name: checkpoint_step(name) or 0, reverse=True)]

    def has(self, checkpoint: str, file: str) -> bool:
        """Whether there is such a file."""
        place = f"{checkpoint}/{file}"
        try:
            self._asked(place, lambda: obstore.head(self._client, place))
        except FileNotFoundError:
            return False
        return True

    def manifest(self, checkpoint: str) -> str | None:
        """The text of a checkpoint's manifest; None where there is none. Bytes that are no text are replaced."""
        place = f"{checkpoint}/{MANIFEST}"
        try:
            content = self._asked(place, lambda: bytes(obstore.get(self._client, place).bytes()))
        except FileNotFoundError:
            return None
        return content.decode(errors="replace")

    def put(self, checkpoint: str, file: str, source: Path | bytes, keep_on: Callable[[], None] = lambda: None) -> None:
        """Put a file, whole or not at all.

        Args:
            source: a file, or its content.
            keep_on: called between pieces; what it raises ends the upload.
        """
        place = f"{checkpoint}/{file}"

        def send() -> None:
            if isinstance(source, bytes):
                obstore.put(self._client, place, source)
                return
            size = source.stat().st_size
            part = max(PIECE_BYTES, -(-size // MOST_PARTS))
            if size <= part:
                keep_on()
                obstore.put(self._client, place, source.read_bytes())
                return
            pieces = _pieces(source, part, keep_on)
            obstore.put(self._client, place, pieces, chunk_size=part, max_concurrency=PARTS_AT_ONCE)

        try:
            self._asked(place, send)
        except FileNotFoundError as error:
            raise StoreError(f"{self.locate(place)} is not put: {error}") from error

    def name_latest(self, checkpoint: str) -> None:
        """Say for people which is the newest: what goes on from one looks at the checkpoints themselves."""
        self._asked(LATEST, lambda: obstore.put(self._client, LATEST, f"{checkpoint}\n".encode()))

    def fetch(self, checkpoint: str, file: str, target: Path, keep_on: Callable[[], None] = lambda: None) -> None:
        """Write a file's bytes into `target`, going on where a body was cut. Raises OSError where it cannot be written,
        FileNotFoundError where the store has none.
        """
        place = f"{checkpoint}/{file}"
        with open(target, "wb") as output:
            for tries in range(1, _TRIES + 1):
                try:
                    for piece in self._body(place, output.tell()):
                        keep_on()
                        output.write(piece)
                    return
                except StoreError:
                    if tries == _TRIES:
                        raise
                    time.sleep(tries)

    def _body(self, place: str, start: int) -> Iterator[bytes]:
        options: Any = {"range": {"offset": start}} if start else {}
        result = self._asked(place, lambda: obstore.get(self._client, place, options=options))
        stream, end = iter(result.stream(min_chunk_size=PIECE_BYTES)), result.meta["size"]
        while start < end:
            piece = self._asked(place, lambda: next(stream, None))
            if piece is None:
                raise StoreError(f"{self.locate(place)}: the body ended after {start} of {end} bytes")
            start += len(piece)
            yield bytes(piece)

    def withdraw(self, checkpoint: str) -> None:
        """Make a checkpoint none, which it may be already; its other files stay."""
        if self.has(checkpoint, MANIFEST):
            place = f"{checkpoint}/{MANIFEST}"
            self._asked(place, lambda: obstore.delete(self._client, place))

    def remove(self, checkpoint: str) -> None:
        """Remove all files of a checkpoint."""
        self.withdraw(checkpoint)

        def names() -> list[str]:
            return [item["path"] for chunk in obstore.list(self._client, f"{checkpoint}/") for item in chunk]

        left = self._asked(checkpoint, names)
        if left:
            self._asked(checkpoint, lambda: obstore.delete(self._client, left))

    def remove_old(self, keep: int, newest: str) -> None:
        """Remove all but the newest `keep`, and those that stay; and what was begun before `newest` and never ended."""
        whole = self.checkpoints()
        limit = checkpoint_step(Path(newest)) or 0
        begun = [name for name in self.begun() if name not in whole and (checkpoint_step(Path(name)) or 0) < limit]
        for name in [*(old for old in whole[keep:] if not self.has(old, STAYS)), *begun]:
            self.remove(name)

    def _asked(self, place: str, request: Callable[[], T]) -> T:
        """What `request` gives. Raises FileNotFoundError as it does."""
        try:
            return request()
        except FileNotFoundError:
            raise
        except (exceptions.BaseError, OSError, ValueError) as error:
            raise StoreError(f"{self.locate(place)}: {_short(error)}") from error


def _pieces(source: Path, size: int, keep_on: Callable[[], None]) -> Iterator[bytes]:
    with open(source, "rb") as file:
        while piece := file.read(size):
            keep_on()
            yield piece


def _short(error: Exception) -> str:
    """The first line of the client's message: the rest is its own state."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
