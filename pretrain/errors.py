"""The ways in which a rank ends that are no crash."""

import errno
import re

# For launch/, to which a rank is a process with an exit code.
from parallel.watchdog import EXIT_HUNG as EXIT_HUNG
from parallel.watchdog import STACKS_SIGNAL as STACKS_SIGNAL
from pretrain.console import NO_ROOM as NO_ROOM
from pretrain.console import outlive_full_disks as outlive_full_disks

_OF_THE_PATH = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
"""Errors of a path that was given, which stay until another one is, or its owner lets the run in."""


class UserError(ValueError):
    """Wrong input: a recipe, an option, data, or a checkpoint. The message names the field or file, and the fix."""


class MachineError(UserError):
    """A disk or file system fails, whatever was asked of it: starting again may mend it."""


_AT_STEP = "the run was at step "
_STEP = re.compile(rf"^{_AT_STEP}(\d+)$|hangs: .*?\bstep (\d+)\b.* is not done after ")


def note_step(error: BaseException, step: int) -> None:
    """Let an error say, below its traceback, which step the run was at."""
    error.add_note(f"{_AT_STEP}{step}")


def noted_step(line: str) -> int | None:
    """The step of a line of a rank's log that `note_step`, or the watchdog, wrote there; None for any other line."""
    found = _STEP.search(line.strip())
    return None if found is None else int(found[1] or found[2])


def file_error(failure: OSError, message: str) -> UserError:
    """The error to raise for a file that cannot be read or written: a MachineError, unless it is its path's fault."""
    return UserError(message) if failure.errno in _OF_THE_PATH else MachineError(message)
