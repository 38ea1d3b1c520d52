"""`python -m launch stop`: end a run with a checkpoint, and do not start it again."""

import argparse
import os
import signal
import subprocess
from pathlib import Path

from launch.attempts import Ledger, ask_to_stop
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
    if pid is not None:
        with writable(folder):
            ask_to_stop(folder)
        os.kill(pid, signal.SIGTERM)
        say(f"asked process {pid} to save and end")
        return 0
    return _stop_job(folder)


def _stop_job(folder: Path) -> int:
    job = SubmittedJob.read(folder)
    state = None if job is None else queue_state(job.job)
    if job is None or state is None:
        raise UserError(f"{folder}: no launch of this run is active")
    with writable(folder):
        ask_to_stop(folder)
    if state == "RUNNING":  # the script hands it on; it is not requeued then
        command = ["scancel", "--batch", "--signal=USR1", job.job]
    else:
        command = ["scancel", job.job]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{' '.join(command)}: {result.stderr.strip()}")
    say(f"asked job {job.job} to save and end" if state == "RUNNING" else f"cancelled job {job.job} ({state.lower()})")
    return 0
