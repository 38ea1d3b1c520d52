"""One run in a folder at a time: two would remove each other's checkpoints.

On file systems whose locks hold across nodes, the copy of a Slurm job that runs on behind a cut network keeps the lock.
The job's next copy is let in all the same: the fence, which it takes then, keeps the older one from changing anything.
It takes the lock as soon as that has ended; until then a run that somebody else starts there is refused as well, by the
lock of the older copy.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from parallel.process import World
from pretrain.agreement import agreed
from pretrain.checkpoints import loud
from pretrain.errors import UserError
from pretrain.fence import held_by_older_copy

LOCK_FILE = ".lock"
SECONDS_BETWEEN_TRIES = 5.0
"""At a lock that an older copy of the run holds."""


@contextmanager
def alone_in(folder: Path, world: World) -> Iterator[None]:
    """Hold a run's folder for this run; every rank enters it. The lock ends with rank 0's process, however that ends.

    Raises SharedUserError when another run holds the folder, or when it cannot be written.
    """
    with ExitStack() as stack:
        with agreed():
            if world.is_main:
                try:
                    stack.enter_context(locked(folder, busy="another run is training in it", place="a --folder"))
                except BusyError:
                    if not held_by_older_copy(folder):
                        raise
                    loud(f"folder {folder} is held by an older copy of this job, which is fenced off now")
                    stack.enter_context(_locked_later(folder))
        yield


@contextmanager
def _locked_later(folder: Path) -> Iterator[None]:
    """Hold a folder as soon as the process that does so now has ended."""
    ended = threading.Event()
    with open(folder / LOCK_FILE, "a") as file:

        def take() -> None:
            while not ended.wait(SECONDS_BETWEEN_TRIES):
                with suppress(OSError):  # held still, or out of reach for now
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return

        thread = threading.Thread(target=take, name="folder lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class BusyError(UserError):
    """Another process holds the folder."""


@contextmanager
def locked(folder: Path, *, busy: str, place: str) -> Iterator[None]:
    """Hold a folder, made if it is not there, against other processes; the lock ends with this one, however it ends.

    Args:
        busy: what is wrong when another process holds it, as the message says it.
        place: what names another folder: "a --folder".

    Raises BusyError when another process holds the folder, UserError when it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_FILE, "a")  # noqa: SIM115  (closed below, which ends the lock)
    except OSError as error:
        raise UserError(f"folder {folder}: {error.strerror or error}; give {place} that can be written") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(f"folder {folder}: {busy}; wait for its end, or give {place} of its own") from error
        except OSError as error:  # a file system without locks is no reason not to train
            loud(f"folder {folder} cannot be locked ({error.strerror}): nothing keeps a second run out of it")
        yield
