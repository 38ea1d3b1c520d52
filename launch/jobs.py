"""The jobs that run attempts: Slurm's, and launchers of this machine."""

import json
import os
import shutil
import socket
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
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
    def now(cls, job: str, name: str) -> "SubmittedJob":
        """One that is submitted now."""
        return cls(job, name, datetime.now(UTC).isoformat(timespec="milliseconds"))

    @classmethod
    def read(cls, folder: Path) -> "SubmittedJob | None":
        """That of a run's folder; None where none was submitted, or its file cannot be read."""
        try:
            return cls(**json.loads((folder / LAUNCH_FOLDER / JOB_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Make it the one of a run's folder. Raises OSError."""
        path = folder / LAUNCH_FOLDER / JOB_FILE
        # `launch slurm` and the job that it submits may both write.
        temporary = path.with_name(f"{JOB_FILE}.{socket.gethostname()}-{os.getpid()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        temporary.replace(path)


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


def local_job() -> str:
    """What this process is called as a launch of this machine. Containers of a host may share its name and process
    numbers, but not the moment at which their processes started.
    """
    return f"local-{socket.gethostname()}-{os.getpid()}-{process_start(os.getpid())}"


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine's start; None where there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()[19])  # field 22
    except OSError:
        return None
