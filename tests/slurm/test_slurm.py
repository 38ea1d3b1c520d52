"""On a Slurm cluster of this machine: a job that is stopped goes on by itself, and ends as one that never was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, reason_to_skip
from tests.slurm.lab import Lab
from tests.training_cases import events


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := reason_to_skip():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster"), nodes=2) as started:
        yield started


@pytest.mark.slow
def test_a_preempted_job_requeues_itself_and_ends_as_one_that_was_not(cluster: Cluster, tmp_path: Path) -> None:
    lab = Lab(cluster, tmp_path, steps=60)
    job = lab.submit("run")
    assert len(lab.nodes_of(job)) == 2
    refused = lab.launch(["slurm", "--nodes", "2", str(tmp_path / "run.yaml")])
    assert refused.returncode == 2 and f"job {job} is" in refused.stderr
    lab.wait_step("run", 5)
    cluster.command("scancel", "--batch", "--signal=USR1", job)
    lab.wait_for(lambda: lab.job_state(job) == "PENDING", "the requeue")
    expected = lab.reference()  # while Slurm lets the job wait
    lab.wait_end("run", job)
    lab.assert_done_like("run", expected)
    assert lab.cost("run").steps == 0
    assert [event["signal"] for event in events(tmp_path / "run", "preempt")] == ["SIGUSR1"]
    assert [(a["job"], a["exit_code"], a["reason"]) for a in lab.attempts("run")] == [
        (job, 75, "stopped on request, and saved"),
        (job, 0, "done"),
    ]
    status = json.loads(lab.launch(["status", "--json", str(tmp_path / "run")]).stdout)
    assert (status["state"], status["step"], status["restarts"], status["tokens"]) == ("done", 60, 1, 60 * 128)
