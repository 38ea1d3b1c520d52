"""An engine that was destroyed leaves the memory of its tensors to the next."""

from __future__ import annotations

import json

import pytest

from tests.distributed_helper import run_ranks

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def measured() -> dict[int, dict[str, int]]:
    """By stage; in a process of its own, whose tensors are the engines' alone, each in a world that was not there for
    the one before.
    """
    words = ["tests/parallel/engine_memory_worker.py", *map(str, STAGES)]
    (output,) = run_ranks(words, ranks=1, timeout=300, fresh=True).outputs
    return {row["stage"]: row for row in json.loads(output.splitlines()[-1])}


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_of_a_destroyed_engine_is_left(measured: dict[int, dict[str, int]], stage: int) -> None:
    row = measured[stage]
    assert row["held"] > 3 * row["size"], "weights and both moments"
    assert row["left"] < row["size"] / 10
