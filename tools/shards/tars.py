"""The members of a tar, and whether it is whole: what Python's tarfile takes for its end may be a cut or damage."""

import tarfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pretrain.errors import UserError

END_BYTES = 2 * tarfile.BLOCKSIZE
GZIP = b"\x1f\x8b"
PIECE_BYTES = 1 << 20


class Member(NamedTuple):
    """A file in a tar: its name, and where its content is."""

    name: str
    offset: int
    bytes: int

    @property
    def suffix(self) -> str:
        """What follows the first dot of the name's last part, as webdataset divides key and field: `.npy`."""
        _, dot, suffix = self.name.rpartition("/")[2].partition(".")
        return dot + suffix


def list_members(path: Path) -> list[Member]:
    """The files in an uncompressed tar, in order.

    Raises UserError for one that cannot be read, is cut, at a member's end too, or has a damaged header.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(GZIP)) == GZIP:
                raise UserError(f"{path}: is compressed, so that no document can be read by itself; unpack it first")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = [Member(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
                end = tar.offset
            _require_end(file, end, path)
    except tarfile.TarError as error:
        raise UserError(f"{path}: is no tar, or is cut: {error}; restore the file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; restore the file") from error
    return members


def _require_end(file: BinaryIO, end: int, path: Path) -> None:
    """After the last member stand two blocks of zeros at least, and nothing but zeros."""
    file.seek(end)
    size = 0
    while piece := file.read(PIECE_BYTES):
        if piece.count(0) != len(piece):
            raise UserError(
                f"{path}: damaged: no tar header at offset {end}, where the next member should be; restore it"
            )
        size += len(piece)
    if size < END_BYTES:
        raise UserError(
            f"{path}: is cut: expected {END_BYTES} bytes of end mark at offset {end}, found {size}; restore the file"
        )
