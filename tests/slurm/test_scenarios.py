"""What is done to a job on a Slurm cluster of this machine leaves its losses and checkpoints as if nothing was done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, reason_to_skip
from tests.slurm.lab import Lab
from tests.slurm.scenarios import EVERY, SCENARIOS, STEPS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if reason := reason_to_skip():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield Lab(cluster, Path(tmp_path_factory.mktemp("runs")), steps=STEPS, every=EVERY)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_run_ends_as_if_nothing_had_happened(lab: Lab, name: str) -> None:
    SCENARIOS[name](lab)
