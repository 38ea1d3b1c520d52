"""Files that must be on the disk and the same when they are read again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def file_sha256(path: Path) -> str:
    """The sha256 of a file as hexadecimal text. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Brings a file's bytes, or a folder's list of names, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finished_file(path: Path) -> dict[str, str | int]:
    """Bring a file of a checkpoint that is being written to the disk; what the manifest says of it. Raises OSError."""
    # safetensors writes for the owner alone, and the one who exports may be another.
    path.chmod(path.parent.stat().st_mode & 0o666)
    sync(path)
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}


def write_durable(path: Path, text: str) -> None:
    """Write a text and bring it to the disk. Raises OSError."""
    path.write_text(text, encoding="utf-8")
    sync(path)
