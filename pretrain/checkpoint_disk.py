"""What goes wrong with checkpoints on disks, and what is done about it there."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pretrain.durable import finished_file


class TooLargeError(OSError):
    """There is less room than is to be written."""


def explain(failure: OSError | SafetensorError, folder: Path) -> str:
    """An error in writing into a folder, as messages say it."""
    text = str(failure)
    place = getattr(failure, "filename", None) or folder
    if getattr(failure, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        try:
            there = next(parent for parent in folder.absolute().parents if parent.exists())
            room = f"{shutil.disk_usage(there).free / 1e6:.1f} MB free"
        except OSError as second:  # of the disk that failed: the ranks stay in step
            room = f"how much is free cannot be found out: {second.strerror}"
        if isinstance(failure, TooLargeError):
            room += f", {failure.strerror}"
        return f"no space left for {place} ({room}); free some, lower checkpoint.keep, or move `folder`"
    return f"{place}: {getattr(failure, 'strerror', None) or text}"


def move(source: Path, target: Path, files: Mapping[str, dict[str, str | int]]) -> None:
    """Bring finished files to another disk. Raises OSError."""
    for name, entry in files.items():
        shutil.copyfile(source / name, target / name)
        if finished_file(target / name) != entry:
            raise OSError(errno.EIO, f"is not what {source / name} was when it was written", str(target / name))
    shutil.rmtree(source, ignore_errors=True)  # what stays is in the way of the next one, which says so


def free_name(path: Path) -> str:
    """The name of a path, or a longer one where there is something under it that could not be removed."""
    while path.exists():
        path = path.with_name(path.name + "+")
    return path.name


@contextmanager
def alarmed(what: str, report: Callable[[str], None]) -> Iterator[None]:
    """An error of the disk in the block ends the block, and is told."""
    try:
        yield
    except OSError as failure:
        report(f"{what}: {failure}; the next save tries it again")


def remove(checkpoint: Path, report: Callable[[str], None]) -> None:
    """Take a checkpoint away at once, so that a death here leaves no half of one. Raises OSError where it stays."""
    hidden = checkpoint.with_name(free_name(checkpoint.with_name(f".removed-{checkpoint.name}")))
    checkpoint.rename(hidden)
    with alarmed(f"{checkpoint.name} is removed, but not all of it: {hidden}", report):
        shutil.rmtree(hidden)
