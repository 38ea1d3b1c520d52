"""A bounded set of open files for positioned reads from several threads."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock


class OpenFiles:
    """Files by number, of which at most `limit` that are not in use stay open: any number of shards fits the process's
    limit.

    A descriptor in use is never closed: its number could be given to another file while a read is under way.
    """

    def __init__(self, paths: Sequence[str], limit: int = 128) -> None:
        self._paths = paths
        self._limit = limit
        self._lock = Lock()
        self._users: dict[int, int] = {}
        self._descriptors: OrderedDict[int, int] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        """How many files are open."""
        return len(self._descriptors)

    def read(self, number: int, size: int, offset: int) -> bytes:
        """`size` bytes of file `number` from `offset`, fewer only at the file's end; raises OSError."""
        descriptor = self._acquire(number)
        try:
            data = os.pread(descriptor, size, offset)
            # One call returns at most 2 GiB, and may return less when a signal comes.
            while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
                data += more
            return data
        finally:
            self._release(number)

    def close(self) -> None:
        """Closes every file that is not in use; a later read opens it again."""
        with self._lock:
            self._evict(0)

    def _acquire(self, number: int) -> int:
        with self._lock:
            descriptor = self._descriptors.get(number)
            if descriptor is None:
                descriptor = self._descriptors[number] = os.open(self._paths[number], os.O_RDONLY)
                self._users[number] = 0
            else:
                self._descriptors.move_to_end(number)
            self._users[number] += 1
            return descriptor

    def _release(self, number: int) -> None:
        with self._lock:
            self._users[number] -= 1
            if len(self._descriptors) > self._limit:
                self._evict(self._limit)

    def _evict(self, limit: int) -> None:
        idle = [number for number in self._descriptors if not self._users[number]]
        for number in idle[: max(len(self._descriptors) - limit, 0)]:
            os.close(self._descriptors.pop(number))
            del self._users[number]
