"""Files that the command writes: found to be writable before the work, and complete or not there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tools.command import writing

DIGITS = 7
"""Significant digits of numbers in JSON: what fp32 has."""


def require_writable(paths: Iterable[Path | None]) -> None:
    """Raises UserError for a file that can't be written; None is no file."""
    for path in paths:
        if path is not None:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                open(path, "a").close()


def write_text(path: Path, text: str) -> None:
    """Raises UserError where it can't."""
    with writing(path):
        path.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Raises UserError where it can't."""
    write_text(path, json.dumps(content, allow_nan=False) + "\n")


def numbers(values: np.ndarray) -> Any:
    """An array as nested lists with 7 significant digits; null for what is no finite number."""
    if values.ndim:
        return [numbers(part) for part in values]
    value = float(values)
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
