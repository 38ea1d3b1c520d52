"""One run in a folder at a time: two would remove each other's checkpoints."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from parallel.process import World
from pretrain.agreement import agreed
from pretrain.checkpoints import loud
from pretrain.errors import UserError

LOCK_FILE = ".lock"


@contextmanager
def alone_in(folder: Path, world: World) -> Iterator[None]:
    """Hold a run's folder for this run; every rank enters it. The lock ends with rank 0's process, however that ends.

    Raises SharedUserError when another run holds the folder, or when it cannot be written.
    """
    with ExitStack() as stack:
        with agreed():
            if world.is_main:
                stack.enter_context(locked(folder, busy="another run is training in it", place="a --folder"))
        yield


@contextmanager
def locked(folder: Path, *, busy: str, place: str) -> Iterator[None]:
    """Hold a folder, made if it is not there, against other processes; the lock ends with this one, however it ends.

    Args:
        busy: what is wrong when another process holds it, as the message says it.
        place: what names another folder: "a --folder".

    Raises UserError when another process holds the folder, or when it cannot be written.
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
            raise UserError(f"folder {folder}: {busy}; wait for its end, or give {place} of its own") from error
        except OSError as error:  # a file system without locks is no reason not to train
            loud(f"folder {folder} cannot be locked ({error.strerror}): nothing keeps a second run out of it")
        yield
