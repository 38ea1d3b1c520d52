"""The two ways in which a store fails, told apart by what may be done about them."""

from pretrain.errors import UserError


class DamagedError(UserError):
    """A file is missing, or is not what the manifest says: reading it again gives the same."""


class UnreachableError(UserError):
    """A file could not be read, which says nothing about it: no access, no network, no answer in time."""
