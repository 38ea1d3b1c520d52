"""Runs on a test cluster, and what became of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pretrain.checkpoints import list_checkpoints, problems
from tests.distributed_helper import ROOT
from tests.slurm.cluster import Cluster
from tests.training_cases import events, losses, pretrain, rank_process, write_synthetic_recipe

REFERENCE = "reference"


@dataclass(frozen=True)
class Loss:
    """What a run's interruptions cost."""

    run: str
    """Its name."""
    attempts: int
    steps: int
    """Trained again, or in vain."""
    seconds: float
    """The longest from the last step before an interruption to the first one behind it."""


class Lab:
    """A cluster and a folder for runs that all train the same small model.

    Args:
        steps: of each run.
        every: of them there is a checkpoint.
    """

    def __init__(self, cluster: Cluster, folder: Path, *, steps: int, every: int = 20) -> None:
        self.cluster, self.folder, self.steps = cluster, folder, steps
        self._fields = {"checkpoint": {"every_tokens": 128 * every, "keep": 3}, "evaluation": {"every_tokens": None}}

    def recipe(self, name: str, **sections: Any) -> Path:
        """The recipe of a run in a folder of its own."""
        return write_synthetic_recipe(self.folder / name, steps=self.steps, **{**self._fields, **sections})

    def reference(self) -> dict[int, float]:
        """The losses of a run that nobody touches, on two processes of this machine."""
        folder = self.folder / REFERENCE
        if not events(folder, "done"):
            pretrain(self.recipe(folder.name), ranks=2, timeout=600)
        return losses(folder)

    def submit(self, name: str, *options: str, environment: dict[str, str] | None = None, **sections: Any) -> str:
        """Submit a run by `python -m launch slurm`, on two nodes unless told otherwise; the job's number."""
        nodes = () if "--nodes" in options else ("--nodes", "2")
        command = [sys.executable, "-m", "launch", "slurm", *nodes, *options, str(self.recipe(name, **sections))]
        result = self.launch(command[3:], environment=environment)
        assert result.returncode == 0, result.stderr
        return json.loads((self.folder / name / "launch" / "job.json").read_text())["job"]

    def launch(self, words: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """`python -m launch` with these words."""
        known = {**self.cluster.environment, "PYTHONPATH": str(ROOT), **(environment or {})}
        return subprocess.run(
            [sys.executable, "-m", "launch", *words], cwd=ROOT, env=known, capture_output=True, text=True
        )

    def status(self, name: str) -> dict[str, Any]:
        """A run's, as `python -m launch status --json` has it."""
        result = self.launch(["status", "--json", str(self.folder / name)])
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def job_state(self, job: str) -> str | None:
        """As squeue says it; None where the job has ended."""
        result = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%T"], env=self.cluster.environment, capture_output=True, text=True
        )
        if result.returncode and "Invalid job id" not in result.stderr:
            return "UNKNOWN"  # the controller is away
        return result.stdout.strip() or None

    def nodes_of(self, job: str) -> list[str]:
        """The nodes that a job runs on, its batch host first."""
        listed = self.cluster.command("squeue", "-h", "-j", job, "-o", "%N").strip()
        return self.cluster.command("scontrol", "show", "hostnames", listed).split()

    def rank_process(self, name: str, rank: int) -> int:
        """The number of the newest process that is this rank of a run."""
        return rank_process(self.folder / name, rank)

    def step(self, name: str) -> int:
        """The last step that a run wrote."""
        return max(losses(self.folder / name), default=0)

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 900) -> None:
        """Wait until a condition holds. Raises AssertionError with all logs where it does not in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not after {seconds:g} s: {what}\n{self.report()}"
            time.sleep(0.05)

    def wait_step(self, name: str, step: int) -> None:
        """Wait until a run has taken a step."""
        self.wait_for(lambda: self.step(name) >= step, f"step {step} of {name}")

    def wait_end(self, name: str, job: str, seconds: float = 900) -> None:
        """Wait until a job has left the queue."""
        self.wait_for(lambda: self.job_state(job) is None, f"the end of {name}", seconds)

    def attempts(self, name: str) -> list[dict[str, Any]]:
        """The attempts of a run, as its ledger has them last."""
        path = self.folder / name / "launch" / "attempts.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return list({line["attempt"]: line for line in lines}.values())

    def assert_done_like(self, name: str, expected: dict[int, float]) -> None:
        """The run is done, step by step as one that nobody touched, bit for bit, and all its checkpoints are whole."""
        folder = self.folder / name
        assert events(folder, "done"), self.report()
        assert losses(folder) == expected, self.report()
        for checkpoint in list_checkpoints(folder / "checkpoints"):
            assert problems(checkpoint) == []

    def cost(self, name: str) -> Loss:
        """What the interruptions of a run cost."""
        lost, longest, last, since, first = 0, 0.0, None, None, None
        for event in events(self.folder / name):
            at = datetime.fromisoformat(event["time"]).timestamp()
            if event["event"] in ("start", "resume") and last is not None:
                since, first = last[1], event["step"] + 1
                lost += max(last[0] - event["step"], 0)
            elif event["event"] == "step":
                if event["step"] == first and since is not None:
                    longest, since = max(longest, at - since), None
                last = (event["step"], at)
        return Loss(name, len(self.attempts(name)), lost, longest)

    def report(self) -> str:
        """All logs, for an assertion's message."""
        paths = sorted(path for path in self.folder.glob("*/logs/*.log") if not path.parts[-3].startswith(REFERENCE))
        texts = [f"--- {path}\n{path.read_text(errors='replace')[-6000:]}" for path in paths]
        return "\n".join([*texts, self.cluster.logs()])
