"""One run in a folder at a time: two would remove each other's checkpoints.

On file systems whose locks hold across nodes, the copy of a Slurm job that runs on behind a cut network keeps the lock.
The job's next copy is let in all the same: the fence, which it takes then, keeps the older one from changing anything.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from parallel.process import World
from pretrain.agreement import agreed
from pretrain.checkpoints import loud
from pretrain.errors import UserError
from pretrain.fence import held_by_older_copy

LOCK_FILE = ".lock"


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
        yield


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
