"""What Slurm says of a run's job."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from launch.attempts import LAUNCH_FOLDER

JOB_FILE = "job.json"


@dataclass(frozen=True)
class SubmittedJob:
    """The last job that was submitted for a run."""

    job: str
    """Its number."""
    name: str
    submitted: str
    """ISO 8601, UTC."""

    @classmethod
    def read(cls, folder: Path) -> "SubmittedJob | None":
        """That of a run's folder; None where none was submitted."""
        path = folder / LAUNCH_FOLDER / JOB_FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def queue_state(job: str) -> str | None:
    """A job's state as squeue says it (PENDING, RUNNING, COMPLETING ...); None where it has ended, or there is no
    Slurm; UNKNOWN where Slurm does not answer.
    """
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", f"--job={job}", "--format=%T"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode and "Invalid job id" not in result.stderr:  # said of jobs that have ended a while ago
        return "UNKNOWN"
    return result.stdout.strip() or None
