"""Tables of benchmarks: cells, units, outcomes, and columns that say the same in every row."""

from __future__ import annotations

import pytest

from tools.bench.tables import Column, Presentation, digits, megabytes, milliseconds, percent, terminal, times, whole

SHOWN = Presentation(
    title="Speed",
    case=(Column("tokens", "length", whole), Column("heads", "heads")),
    found=(Column("ms", "seconds", milliseconds), Column("MFU", "mfu", percent)),
    note="Fastest of three.",
)


def test_a_table_has_a_row_for_each_case() -> None:
    table = SHOWN.table([
        {"length": 4096, "heads": 4, "seconds": 0.25, "mfu": 0.5},
        {"length": 32768, "heads": 8, "seconds": 2.0, "mfu": None},
    ])  # fmt: skip
    assert table.header == ("tokens", "heads", "ms", "MFU")
    assert table.rows == (("4,096", "4", "250", "50.0 %"), ("32,768", "8", "2,000", "n/a"))


def test_what_is_the_same_everywhere_goes_into_the_note() -> None:
    rows = [{"length": 1, "heads": 4, "seconds": 1, "mfu": 1}, {"length": 2, "heads": 4, "seconds": 1, "mfu": 1}]
    table = SHOWN.table(rows)
    assert table.header == ("tokens", "ms", "MFU")
    assert table.note == "heads 4. Fastest of three."
    same = SHOWN.table(rows[:1] * 2)
    assert same.header == ("tokens", "ms", "MFU"), "the first column stays, so that rows have a name"


def test_a_case_without_a_measurement_shows_its_outcome() -> None:
    table = SHOWN.table([{"length": 1, "heads": 4, "outcome": "out of memory", "why": "..."}])
    assert table.rows == (("1", "4", "out of memory", "–"),)


def test_the_terminal_shows_aligned_columns() -> None:
    table = SHOWN.table([{"length": 1, "heads": 4, "seconds": 0.1, "mfu": 1.0}])
    lines = terminal(table).splitlines()
    assert lines[0] == "tokens  heads   ms      MFU"
    assert lines[2] == "1           4  100  100.0 %"
    assert lines[-1] == "Fastest of three."


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (digits(0), "0"),
        (digits(0.012345), "0.0123"),
        (digits(12.345), "12.3"),
        (digits(999.4), "999"),
        (digits(123456), "123,456"),
        (digits(-0.5), "-0.5"),
        (digits(0.00001234), "0.0000123"),
        (megabytes(1_500_000), "1.5"),
        (times(0.125), "0.125 x"),
    ],
)
def test_numbers_have_three_digits(text, shown) -> None:
    assert text == shown
