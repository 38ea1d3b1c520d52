"""What is done to a job on a Slurm cluster of this machine leaves its losses and checkpoints as if nothing was done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, reason_to_skip
from tests.slurm.lab import Lab
from tests.slurm.scenarios import EVERY, SCENARIOS, STEPS, run
from tests.training_cases import losses

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if reason := reason_to_skip():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield Lab(cluster, Path(tmp_path_factory.mktemp("runs")), steps=STEPS, every=EVERY)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_run_ends_as_if_nothing_had_happened(lab: Lab, name: str) -> None:
    cost = run(lab, name)
    assert losses(lab.folder / cost.run) == lab.reference() and len(lab.reference()) == STEPS
    assert lab.attempts(cost.run)[-1]["exit_code"] == 0
    assert cost.steps < 2 * EVERY, "no more than what was trained since the checkpoint that was being written"
    assert (cost.seconds > 0) == (cost.attempts > 1)
