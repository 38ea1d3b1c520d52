"""What the committed comparison with titans-pytorch must show; tools/bench/RESULTS.md says what it does not."""

from __future__ import annotations

import pytest

from tools.bench.record import RECORDS, RIVAL, read_record
from tools.bench.rival import LAYER, MEMORY


@pytest.mark.parametrize(
    ("implementation", "times_its_seconds", "of_its_memory"),
    [(MEMORY, 1.5, 1 / 8), (LAYER, 1.5, 1 / 7)],  # of its memory what is reached; 1/8 is aimed at
)
def test_the_committed_record_keeps_the_bounds_beside_the_other_implementation(
    implementation: str, times_its_seconds: float, of_its_memory: float
) -> None:
    record = read_record(RECORDS / "against-cpu.json")
    assert not record["uncommitted_changes"] and record["versions"][RIVAL] == "0.5.5"
    rows = [row for row in record["results"] if row["rival_chunk_size"] == row["chunk_size"] == 64]
    (row,) = [row for row in rows if row["implementation"] == implementation and row["length"] == 4096]
    assert row["heads"] == 4 and row["head_dim"] == 64
    assert 1 / row["speed_over_rival"] <= times_its_seconds
    assert row["memory_over_rival"] <= of_its_memory
