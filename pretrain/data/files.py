"""A bounded set of open files for positioned reads from several threads."""

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from threading import Lock

from pretrain.data.stores import NoRoomError

NO_ROOM_SECONDS = 60.0


class OpenFiles:
    """Files by number, of which at most `limit` that are not in use stay open: a set of any number of shards fits the
    process's limit. Sets that are open at a time add up, so that each has to have its part.

    A descriptor in use is never closed: its number could be given to another file while a read is under way.
    """

    def __init__(self, open_file: Callable[[int], int], limit: int = 128) -> None:
        """`open_file`: gives a descriptor of a file by its number; several threads may be in it."""
        self._open_file = open_file
        self.limit = limit
        """How many files that are not in use stay open; may be changed."""
        self._lock = Lock()
        self._no_room: dict[int, tuple[float, str]] = {}  # until when room is not asked for again, and why
        self._users: dict[int, int] = {}
        self._descriptors: OrderedDict[int, int] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        """How many files are open."""
        return len(self._descriptors)

    def read(self, number: int, size: int, offset: int) -> bytes:
        """`size` bytes of file `number` from `offset`, fewer only at the file's end. Raises OSError, and what opening
        the file raises.
        """
        descriptor = self._acquire(number)
        try:
            data = os.pread(descriptor, size, offset)
            # One call returns at most 2 GiB, and may return less when a signal comes.
            while len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
                data += more
            return data
        finally:
            self._release(number)

    def read_into(self, number: int, ranges: Iterable[tuple[int, int, int]], out: memoryview) -> int | None:
        """Reads file `number` into `out`, bytes: ranges of (offset in the file, start in `out`, size).

        Returns the offset of the first range that the file ends in, None where there is none. Raises OSError.
        """
        descriptor = self._acquire(number)
        try:
            for offset, start, size in ranges:
                done = os.preadv(descriptor, [out[start : start + size]], offset)
                while done < size:  # one call reads at most 2 GiB, and may read less when a signal comes
                    more = os.preadv(descriptor, [out[start + done : start + size]], offset + done)
                    if not more:
                        return offset
                    done += more
            return None
        finally:
            self._release(number)

    def close(self) -> None:
        """Closes every file that is not in use; a later read opens it again."""
        with self._lock:
            self._evict(0)

    def _acquire(self, number: int) -> int:
        with self._lock:
            if number in self._descriptors:
                return self._used(number)
        # Opening may take minutes where it fetches the file: others go on reading meanwhile.
        descriptor = self._opened(number)
        with self._lock:
            if number in self._descriptors:  # another thread was first
                os.close(descriptor)
            else:
                self._descriptors[number], self._users[number] = descriptor, 0
            return self._used(number)

    def _used(self, number: int) -> int:
        self._descriptors.move_to_end(number)
        self._users[number] += 1
        return self._descriptors[number]

    def _opened(self, number: int) -> int:
        until, why = self._no_room.get(number, (0.0, ""))
        if time.monotonic() < until:
            raise NoRoomError(why)
        try:
            return self._open_file(number)
        except NoRoomError:
            self.close()  # files that are open and idle may be what takes the room
        try:
            return self._open_file(number)
        except NoRoomError as error:
            self._no_room[number] = (time.monotonic() + NO_ROOM_SECONDS, str(error))
            raise

    def _release(self, number: int) -> None:
        with self._lock:
            self._users[number] -= 1
            if len(self._descriptors) > self.limit:
                self._evict(self.limit)

    def _evict(self, limit: int) -> None:
        idle = [number for number in self._descriptors if not self._users[number]]
        for number in idle[: max(len(self._descriptors) - limit, 0)]:
            os.close(self._descriptors.pop(number))
            del self._users[number]
