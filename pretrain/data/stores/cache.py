"""Files of remote stores on the node's own disk, bounded, shared by its processes.

    CACHE/lock              held while room is made
    CACHE/objects/SHA256    a file under the hash of its content, which was checked before it got its name
    CACHE/objects/SHA256.partial    one that is being fetched, at its full size from the start

Locks are flock, which end with the process that holds them, however it ends. Who reads a file shares its lock; who
removes one must have its lock alone, so no file is removed while it is read. Who fetches a file holds the lock of its
partial one; others wait for it, and take over where it died.
"""

import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.data.format import FileEntry
from pretrain.data.stores.config import default_cache_folder
from pretrain.data.stores.errors import other_hash
from pretrain.durable import file_sha256
from pretrain.errors import UserError

PARTIAL = ".partial"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
Fetch = Callable[[], Iterable[bytes]]

log = logging.getLogger(__name__)


class NoRoomError(Exception):
    """A file cannot be kept; says why, and what to do."""


class Cache:
    """A cache folder. Safe for threads and processes."""

    def __init__(self, folder: Path | None, limit: int) -> None:
        """`folder`: None for the user's own among temporary files; `limit`: bytes of all files together.

        Raises UserError for a folder that cannot be used.
        """
        self.folder = default_cache_folder() if folder is None else folder
        self.limit = limit
        self._objects = self.folder / "objects"
        try:
            self._objects.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder is None:
                self.folder.chmod(0o700)  # fails where another user was first to take the name
            with self._locked():
                pass
        except OSError as error:
            raise UserError(
                f"data.cache_folder {self.folder}: cannot be used: {error.strerror or error}; give a folder on the "
                "node's own disk that can be written and locked"
            ) from error

    def open(self, entry: FileEntry, fetch: Fetch, *, place: str, bounded: bool = True) -> int:
        """A descriptor of the file with the content of `entry`, its lock shared; fetched where it is not there.

        Args:
            fetch: begins the file anew, in pieces.
            place: what messages call it.
            bounded: whether the file must fit beside those in use; else it is kept all the same.

        Raises NoRoomError, DamagedError after a second file of the wrong hash, and what `fetch` raises.
        """
        while True:
            descriptor = self._open_kept(entry)
            if descriptor is None:
                descriptor = self._fetched(entry, fetch, place, bounded)
            if descriptor is not None:
                return descriptor

    def path(self, entry: FileEntry) -> Path:
        """Where the file is while a descriptor of it is open."""
        return self._objects / entry.sha256

    def discard_damaged(self, entry: FileEntry) -> None:
        """Removes the file if it is there and no longer has its sha256; who has it open goes on reading it."""
        path = self.path(entry)
        try:
            found = file_sha256(path)
        except (FileNotFoundError, PermissionError):  # who then opens it is told
            return
        except OSError as error:
            found = f"none ({error.strerror})"
        if found != entry.sha256:
            log.warning("%s: expected sha256 %s, found %s: removed, and fetched again", path, entry.sha256, found)
            path.unlink(missing_ok=True)

    def _open_kept(self, entry: FileEntry) -> int | None:
        path = self.path(entry)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise NoRoomError(
                f"the cache {self.folder} holds a file that cannot be read: {path}: {error.strerror}; give each user a "
                "data.cache_folder of their own"
            ) from error
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        found = os.fstat(descriptor)
        if found.st_nlink and found.st_size == entry.bytes:
            os.utime(descriptor)  # the time of last use
            return descriptor
        os.close(descriptor)
        if found.st_nlink:
            log.warning("%s: expected %d bytes, found %d: removed, and fetched again", path, entry.bytes, found.st_size)
            path.unlink(missing_ok=True)
        return None

    def _fetched(self, entry: FileEntry, fetch: Fetch, place: str, bounded: bool) -> int | None:
        """Fetches the file, or waits for the process that does; None: look again."""
        path = self.path(entry)
        partial = path.with_name(path.name + PARTIAL)
        try:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise NoRoomError(_cannot_write(self.folder, error)) from error
        try:
            if not _locked_alone(descriptor):
                fcntl.flock(descriptor, fcntl.LOCK_SH)  # granted when the other is done, or dead
            elif _is_at(descriptor, partial) and path.exists():
                partial.unlink()
            elif _is_at(descriptor, partial):
                self._fill(descriptor, partial, entry, fetch, place, bounded)
                # From alone to shared: who waits goes on. Somebody could remove the file just here.
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                if _is_at(descriptor, path):
                    return descriptor
        except OSError as error:
            os.close(descriptor)
            raise NoRoomError(_cannot_write(self.folder, error)) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _fill(self, descriptor: int, partial: Path, entry: FileEntry, fetch: Fetch, place: str, bounded: bool) -> None:
        """Makes room, fetches, checks, and gives the file its name."""
        try:
            with self._locked():
                os.ftruncate(descriptor, 0)
                self._make_room(entry.bytes, descriptor, place, bounded)
            _write_checked(descriptor, entry, fetch, place)
            os.fsync(descriptor)
            partial.rename(self.path(entry))
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _make_room(self, size: int, descriptor: int, place: str, bounded: bool) -> None:
        """Removes files out of use, those used longest ago first, and takes `size` bytes of the disk for a file."""
        files = sorted(self._files(), key=lambda item: item[1].st_mtime)
        used = sum(status.st_size for _, status in files)
        for path, status in [*files, (None, None)]:
            if used + size <= self.limit or (path is None and not bounded):
                try:
                    if size:
                        os.posix_fallocate(descriptor, 0, size)
                    return
                except OSError as error:
                    if path is None or error.errno not in NO_SPACE:
                        raise
            if path is not None and _removed(path):
                used -= status.st_size
        raise NoRoomError(
            f"{place}: {size} bytes do not fit into the cache {self.folder}, where {used} of {self.limit} are in use; "
            "raise data.cache_gigabytes"
        )

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for item in os.scandir(self._objects):
            try:
                yield Path(item.path), item.stat()
            except FileNotFoundError:
                continue

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / "lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _write_checked(descriptor: int, entry: FileEntry, fetch: Fetch, place: str) -> None:
    """Writes what `fetch` gives; a second time where its hash is wrong, since that may have happened on the way."""
    for attempt in range(2):
        digest = hashlib.sha256()
        offset = 0
        for piece in fetch():
            digest.update(piece)
            offset += _written(descriptor, piece, offset)
        if digest.hexdigest() == entry.sha256:
            return
        log.warning(
            "%s: expected sha256 %s, found %s%s",
            place,
            entry.sha256,
            digest.hexdigest(),
            "" if attempt else ": fetched again",
        )
    raise other_hash(place, entry.sha256, digest.hexdigest())


def _written(descriptor: int, piece: bytes, offset: int) -> int:
    view = memoryview(piece)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
    return done


def _removed(path: Path) -> bool:
    """Removes a file unless somebody reads or fetches it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        alone = _locked_alone(descriptor)
        if alone:
            path.unlink(missing_ok=True)
        return alone
    finally:
        os.close(descriptor)


def _locked_alone(descriptor: int) -> bool:
    """Takes a file's lock alone, unless another holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _cannot_write(folder: Path, error: OSError) -> str:
    why = "its disk is full" if error.errno in NO_SPACE else error.strerror or str(error)
    return f"the cache {folder} cannot be written: {why}; free space, or give another data.cache_folder"
