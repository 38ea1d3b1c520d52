"""What a command of `tools.bench` makes of its options: what to measure, and how to show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tools.bench.cases import Row


def unchanged(rows: list[Row]) -> list[Row]:
    """The rows as they were measured."""
    return rows


@dataclass(frozen=True)
class Benchmark:
    """A benchmark ready to run."""

    name: str
    """The record's name, which decides about table and plot."""

    settings: dict[str, Any]
    """The options as they were decided; `device` is among them."""

    rows: Callable[[float | None], Iterator[Row]]
    """Measures, each row as soon as it is there, until the deadline by `time.monotonic()`; None for no deadline."""

    results: Callable[[list[Row]], list[Row]] = unchanged
    """What the record keeps of the rows measured so far: ratios between them, the best of several rounds."""
