"""Attempts of a launch are written down before they start, also where the disk is full at that moment."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from launch import attempts
from pretrain.errors import MachineError, file_error

MOST_WAITS = 3
"""For room ahead of an attempt: 70 s in all, as a job script hears of no signal meanwhile."""

T = TypeVar("T")


def explain_unwritten(error: OSError, path: Path) -> str:
    """Why a file of a run's folder was not written: it, the error, its disk, and what is free there."""
    place = Path(error.filename or path)
    return f"{place}: {error.strerror or error} ({_disk_of(place)})"


def _disk_of(path: Path) -> str:
    there = path.absolute()
    try:
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        while not os.path.ismount(there):
            there = there.parent
    except OSError as error:  # of the disk that failed
        return f"its disk cannot be asked: {error.strerror or error}"
    return f"on the disk of {there}, {free / 1e6:.1f} MB free"


def written_before(begin: Callable[[], T], path: Path, *, tries: int, say: Callable[[str], None]) -> T:
    """What `begin` gives, which writes below `path`. Where a disk is full or fails it is called again, behind longer
    and longer waits: `tries` times, but MOST_WAITS at most. An attempt that is not written down must not start, as
    nobody could count it then.

    Raises UserError where it cannot be written, MachineError where that is the disk's fault.
    """
    waits = [attempts.FIRST_WAIT_SECONDS * 2**number for number in range(min(tries, MOST_WAITS))]
    while True:
        try:
            return begin()
        except OSError as error:
            message = f"{explain_unwritten(error, path)}; make room, or give a --folder to write to"
            failure = file_error(error, f"{message}, and launch again")
            if not waits or not isinstance(failure, MachineError):
                raise failure from error
        say(f"{message}; the attempt waits for it: another try in {waits[0]:g} s")
        time.sleep(waits.pop(0))
