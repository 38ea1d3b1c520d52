"""`python -m launch stop`: end a run with a checkpoint, and do not start it again."""

import argparse
import os
import signal
import subprocess
from pathlib import Path

from launch.attempts import Attempt, Ledger, ask_to_stop
from launch.jobs import SubmittedJob, queue_state
from launch.local import say, writable
from launch.runs import find_run
from launch.status import local_process, newest_attempt
from pretrain.errors import UserError

HELP = """\
Make a run save a checkpoint and end, and do not start it again by itself. A job that waits in the queue is cancelled.
The same launch command goes on from the checkpoint."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("stop", help="save and end a run", description=HELP, allow_abbrev=False)
    parser.add_argument("name", metavar="FOLDER|NAME", help="the run")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask the run to stop; returns 0 once it was asked. Raises UserError where it does not run, or not here."""
    folder = find_run(options.name)
    attempts = Ledger(folder).read()
    attempt = newest_attempt(attempts) if attempts else None
    pid = None if attempt is None else local_process(attempt)
    if attempt is not None and pid == 0:
        raise UserError(f"{folder}: runs on another host (job {attempt.job}): run this there")
    if attempt is not None and pid is not None:
        with writable(folder):
            ask_to_stop(folder, attempt.job)
        os.kill(pid, signal.SIGTERM)
        say(f"asked process {pid} to save and end")
        return 0
    job, state = _active_job(folder, attempts)
    with writable(folder):
        ask_to_stop(folder, job)
    return _stop_job(job, state)


def _active_job(folder: Path, attempts: list[Attempt]) -> tuple[str, str]:
    """The run's Slurm job and its state: of those whose attempt has not ended and the last submitted one, the newest in
    the queue. Raises UserError where there is none, or where Slurm does not answer.
    """
    submitted = SubmittedJob.read(folder)
    open_jobs = [found.job for found in reversed(attempts) if found.ended is None and found.job.isdigit()]
    for job in dict.fromkeys([*open_jobs, *([submitted.job] if submitted else [])]):
        state = queue_state(job)
        if state == "UNKNOWN":
            raise UserError(f"{folder}: Slurm does not answer, and job {job} may run; nothing was done: try again")
        if state is not None:
            return job, state
    raise UserError(f"{folder}: no launch of this run is active")


def _stop_job(job: str, state: str) -> int:
    """Tell a job in this state; returns 0. Raises UserError where Slurm does not do it."""
    if state == "PENDING":  # it may begin meanwhile, and must not be cancelled then
        _scancel("--state=PENDING", job)
        left = queue_state(job)
        if left in ("PENDING", "UNKNOWN"):
            raise UserError(f"job {job}: Slurm did not cancel it, or does not answer; it will not start; try again")
        if left != "RUNNING":
            say(f"cancelled job {job} (pending)")
            return 0
        state = left
    if state == "RUNNING":  # the script hands it on; it is not requeued then
        _scancel("--batch", "--signal=USR1", job)
        say(f"asked job {job} to save and end")
    else:
        _scancel(job)
        say(f"cancelled job {job} ({state.lower()})")
    return 0


def _scancel(*words: str) -> None:
    result = subprocess.run(["scancel", *words], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"scancel {' '.join(words)}: {result.stderr.strip()}")
