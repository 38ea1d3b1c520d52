"""Files of results: found to be writable before the work, then written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain.durable import sync
from tools.command import writing


def require_writable(*paths: Path | None) -> None:
    """Raises UserError where a file cannot be written: before the work, not after it; None is no file.

    What is there stays as it is, and no file is left behind; folders are made.
    """
    for path in paths:
        if path is not None:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.is_dir():
                    raise IsADirectoryError("it is a folder")
                if path.exists() and not os.access(path, os.W_OK):
                    raise PermissionError("it may not be changed")
                if is_special(path):
                    continue
                probe = _beside(path, "probe")
                probe.touch()
                probe.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to instead of `path`, whose place it takes when the block has ended well.

    Raises:
        UserError: it cannot be written.
    """
    if is_special(path):
        with writing(path):
            yield path
        return
    partial = _beside(path, "partial")
    with writing(path):
        try:
            yield partial
            sync(partial)
            os.replace(partial, path.resolve())
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Raises UserError where it can't."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, *, indent: int | None = None) -> None:
    """JSON of any strict reader: null stands for numbers that are not finite. Raises UserError where it can't."""
    write_text(path, json.dumps(_finite(content), indent=indent, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def is_special(path: Path) -> bool:
    """A pipe or a device, such as /dev/stdout: no file can take its place."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _beside(path: Path, kind: str) -> Path:
    """In the folder of the file itself, where `path` is a link; the suffix, which may say a format, stays."""
    real = path.resolve()
    return real.with_name(f".{real.stem}.{os.getpid()}.{kind}{real.suffix}")
