"""A bounded set of open files for positioned reads from several threads."""

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock


class OpenFiles:
    """Keeps at most `limit` idle file descriptors, so that a set of any number of shards fits the process's limit.

    A descriptor in use is never closed: its number could be given to another file while a read is under way.
    """

    def __init__(self, limit: int = 128) -> None:
        self._limit = limit
        self._lock = Lock()
        self._users: dict[Path, int] = {}
        self._descriptors: OrderedDict[Path, int] = OrderedDict()  # least recently used first

    @contextmanager
    def open(self, path: Path) -> Iterator[int]:
        """Yields a descriptor of `path`, open for reading; raises OSError as os.open does."""
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            self._descriptors.move_to_end(path)
            self._users[path] = self._users.get(path, 0) + 1
            descriptor = self._descriptors[path]
        try:
            yield descriptor
        finally:
            with self._lock:
                self._users[path] -= 1
                self._evict()

    def close(self) -> None:
        """Closes every descriptor that is not in use."""
        with self._lock:
            self._evict(0)

    def _evict(self, limit: int | None = None) -> None:
        limit = self._limit if limit is None else limit
        idle = [path for path in self._descriptors if not self._users[path]] if len(self._descriptors) > limit else []
        for path in idle[: len(self._descriptors) - limit]:
            os.close(self._descriptors.pop(path))
            del self._users[path]
