"""Rows of a benchmark as a table: the same cells on the terminal, in markdown and on a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tools.bench.cases import Row
from tools.trials.tables import NOTHING, Table

NOT_KNOWN = "n/a"


class Column(NamedTuple):
    """A column: its header, the key of its value, and how that is written."""

    header: str
    key: str
    text: Callable[[Any], str] = str

    def cell(self, row: Row) -> str:
        """The value's text; `n/a` for one that is not known."""
        value = row.get(self.key)
        return NOT_KNOWN if value is None else self.text(value)


@dataclass(frozen=True)
class Presentation:
    """How one kind of record is shown."""

    title: str
    """Of its section."""

    case: tuple[Column, ...]
    """What was measured. A column that says the same in all rows goes into the note."""

    found: tuple[Column, ...]
    """What came out; a case without a measurement has its outcome in the first of them."""

    note: str
    """What the numbers mean."""

    prepare: Callable[[Sequence[Row]], list[Row]] = list
    """What is made of the record's rows for the table."""

    def table(self, rows: Sequence[Row]) -> Table:
        """The record's rows as text cells."""
        rows = self.prepare(rows)
        same = [column for column in self.case if len({column.cell(row) for row in rows}) == 1]
        case = [column for column in self.case if column not in same or len(rows) == 1] or [self.case[0]]
        body = tuple((*(column.cell(row) for column in case), *self._found(row)) for row in rows)
        constant = ", ".join(f"{column.header} {column.cell(rows[0])}" for column in same if column not in case)
        note = f"{constant}. {self.note}" if constant else self.note
        return Table(tuple(column.header for column in (*case, *self.found)), body, note)

    def _found(self, row: Row) -> tuple[str, ...]:
        if "outcome" in row:
            return (row["outcome"], *(NOTHING,) * (len(self.found) - 1))
        return tuple(column.cell(row) for column in self.found)


def terminal(table: Table) -> str:
    """The table with aligned columns, the first to the left and the others to the right, and its note."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(table.header))]
    texts = []
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        texts.append("  ".join(cells).rstrip())
    texts.insert(1, "-" * max(map(len, texts)))
    return "\n".join([*texts, "", table.note])


def whole(value: float) -> str:
    """A whole number with commas."""
    return f"{value:,.0f}"


def digits(value: float) -> str:
    """Three significant digits (all of a larger whole number), never in powers of ten."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    text = f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def milliseconds(value: float) -> str:
    """Seconds as milliseconds."""
    return digits(value * 1e3)


def megabytes(value: float) -> str:
    """Bytes as megabytes."""
    return digits(value / 1e6)


def percent(value: float) -> str:
    """A share, with one decimal."""
    return f"{100 * value:.1f} %"


def times(value: float) -> str:
    """A ratio."""
    return f"{digits(value)} x"


TIMES = (
    Column("forward ms", "forward_s", milliseconds),
    Column("backward ms", "backward_s", milliseconds),
    Column("us a token", "us_per_token", digits),
)
"""What `clock.forward_and_backward` times, and the two together a token."""

RATES = (
    Column("TFLOP/s", "tflops", digits),
    Column("of peak", "of_peak", percent),
    Column("of roofline", "of_roofline", percent),
)
"""What `roofline.rates` makes of it."""

PEAK = Column("peak MB over inputs", "peak_bytes", megabytes)
"""The growth of memory in a forward and backward."""

HEADS = (Column("batch", "batch"), Column("heads", "heads"), Column("head width", "head_dim"))
"""Sizes of attention and memories."""

MEMORIES = (Column("depth", "depth"), Column("expansion", "expansion"), Column("chunk", "chunk_size"))
"""Sizes of memories alone."""
