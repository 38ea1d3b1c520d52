"""The two ways in which a store fails, told apart by what may be done about them."""

import errno

from pretrain.errors import UserError

DAMAGE = (errno.ENOENT, errno.EIO, errno.ESTALE)
"""Numbers of errors that say of a file that it is gone, or its disk broken, not that this process alone cannot read it.
"""


class DamagedError(UserError):
    """A file is missing, or is not what the manifest says: reading it again gives the same."""

    def __init__(self, message: str, found: str) -> None:
        super().__init__(message)
        self.found = found
        """What is there instead of it, in words."""


class UnreachableError(UserError):
    """A file could not be read, which says nothing about it: no access, no network, no answer in time."""


def missing(place: str, expected_bytes: int | None, why: str = "") -> DamagedError:
    """A file, called `place`, that is not there."""
    size = "" if expected_bytes is None else f": expected {expected_bytes} bytes"
    return DamagedError(f"{place}: missing{why and f' ({why})'}{size}; restore the file", "none")


def unreadable(place: str, expected_bytes: int, error: OSError) -> UserError:
    """A local file that cannot be read: DamagedError where that is the file's fault, else UnreachableError."""
    why = error.strerror or str(error)
    if error.errno == errno.ENOENT:
        return missing(place, expected_bytes, why)
    if error.errno in DAMAGE:
        return DamagedError(f"{place}: cannot be read: {why}; restore the file", f"none ({why})")
    return UnreachableError(f"{place}: cannot be read: {why}; mend that and start again")


def other_size(place: str, expected: int, found: int) -> DamagedError:
    """A file of another size, in bytes."""
    return DamagedError(
        f"{place}: damaged: expected {expected} bytes, found {found}; restore the file", f"{found} bytes"
    )


def other_hash(place: str, expected: str, found: str) -> DamagedError:
    """A file of another sha256."""
    return DamagedError(
        f"{place}: damaged: expected sha256 {expected}, found {found}; restore the file", f"sha256 {found}"
    )
