"""A user's error that one rank meets becomes every rank's: the job ends in step, with one message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from parallel import process
from pretrain.errors import MachineError, UserError


class SharedUserError(UserError):
    """Raised on every rank alike, so that rank 0 alone prints it."""


class SharedMachineError(SharedUserError, MachineError):
    """A disk or file system failed on a rank."""


class DivergedError(SharedUserError):
    """Too many steps in a row were not finite."""


@contextmanager
def agreed(group: process.SideGroup | None = None) -> Iterator[None]:
    """Run a block that holds no collective. When any rank raises UserError in it, every rank raises the first
    one's message, as a SharedMachineError where one of the errors is the machine's.

    Args:
        group: where they meet: a side group; None: the group that trains.
    """
    caught: UserError | None = None
    try:
        yield
    except UserError as error:
        caught = error
    message = process.first_error(None if caught is None else str(caught), group)
    if message is not None:
        is_machines = any(process.gather_objects(isinstance(caught, MachineError), group))
        raise (SharedMachineError if is_machines else SharedUserError)(message) from caught
