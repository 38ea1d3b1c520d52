"""A step on two and four stages against one process, in float64: gradients, losses, states; what a stage holds, and how
long it waits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.pipeline_schedule import expected_bubble
from tests.distributed_helper import run_ranks
from tests.parallel import pipeline_worker as work

RANKS = 4


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("pipeline") / "seen.pt"
    run_ranks(["tests/parallel/pipeline_worker.py", str(output)], ranks=RANKS, timeout=300)
    return torch.load(output)


@pytest.mark.parametrize("trial", work.TRIALS, ids=str)
def test_stages_are_one_process(seen: dict[str, Any], trial: work.Trial) -> None:
    """Gradients of all parameters, every sequence's loss, and the state of all layers behind the last one."""
    ranks = seen[str(trial)]
    first_stages = ranks[: RANKS // trial.stages]
    assert len(ranks) == RANKS and all(rank["gradients"] < 1e-10 for rank in first_stages)
    assert all(rank["losses"] < 1e-12 and rank["states"] < 1e-10 for rank in first_stages)
    assert all(rank["left"] == 0 for rank in ranks), "nothing waits after a step"


@pytest.mark.slow
def test_stages_are_in_every_variant(tmp_path: Path) -> None:
    output = tmp_path / "seen.pt"
    run_ranks(["tests/parallel/pipeline_worker.py", str(output), "every"], ranks=RANKS, timeout=1500)
    seen = torch.load(output)
    for trial in work.EVERY:
        for rank in seen[str(trial)][: RANKS // trial.stages]:
            assert rank["gradients"] < 1e-10 and rank["losses"] < 1e-12 and rank["states"] < 1e-10, trial


def test_memory_does_not_grow_with_the_number_of_segments_beyond_boundaries(seen: dict[str, Any]) -> None:
    few, many = work.NUMBERS_OF_SEGMENTS
    for rank in range(RANKS):
        (disk_few, _), (disk_many, held) = (seen[f"bytes-disk-{count}"][rank] for count in (few, many))
        assert disk_many == pytest.approx(disk_few, rel=0.01), "with the boundaries out of memory"
        assert held > disk_many / 2, "which weigh something"
        (device_few, held_few), (device_many, held_many) = (seen[f"bytes-device-{n}"][rank] for n in (few, many))
        assert device_many - device_few == pytest.approx(held_many - held_few, rel=0.01)


@pytest.mark.parametrize(("sequences", "segments"), work.SLEEPING)
def test_the_measured_bubble_is_the_expected_one(seen: dict[str, Any], sequences: int, segments: int) -> None:
    measured, expected = seen[f"bubble-{(sequences, segments)}"], expected_bubble(RANKS, sequences * segments)
    print(f"{RANKS} stages, {sequences} sequences of {segments} segments: {measured:.3f}, expected {expected:.3f}")
    assert measured == pytest.approx(expected, rel=0.2)
