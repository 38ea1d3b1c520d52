"""What the committed comparison with titans-pytorch must show."""

from __future__ import annotations

from typing import Any

import pytest

from tools.bench.record import RECORDS, RIVAL, read_record
from tools.bench.rival import LAYER, MEMORY

TIMES_ITS_SECONDS, OF_ITS_MEMORY, TIMES_FASTER_EXACT = 1.5, 1 / 8, 50


def rows(rival_chunk_size: int, length: int) -> dict[str, dict[str, Any]]:
    """By implementation, at 4 heads of 64 and our chunk of 64."""
    record = read_record(RECORDS / "against-cpu.json")
    assert not record["uncommitted_changes"] and record["versions"][RIVAL] == "0.5.5"
    found = [row for row in record["results"] if (row["rival_chunk_size"], row["length"]) == (rival_chunk_size, length)]
    assert all((row["heads"], row["head_dim"], row["chunk_size"]) == (4, 64, 64) for row in found)
    return {row["implementation"]: row for row in found}


@pytest.mark.parametrize("implementation", [MEMORY, LAYER])
def test_at_the_same_granularity_it_takes_about_the_time_and_an_eighth_of_the_memory(implementation: str) -> None:
    row = rows(64, 4096)[implementation]
    assert 1 / row["speed_over_rival"] <= TIMES_ITS_SECONDS
    assert row["memory_over_rival"] <= OF_ITS_MEMORY


@pytest.mark.parametrize("implementation", [MEMORY, LAYER])
def test_exact_reads_are_many_times_faster(implementation: str) -> None:
    assert rows(1, 1024)[implementation]["speed_over_rival"] >= TIMES_FASTER_EXACT
