"""`python -m launch attempt`: what a job script asks before and behind each attempt. No torch, no Slurm command: it
runs in a container too.
"""

import argparse
import os
import signal
from dataclasses import replace
from pathlib import Path

from launch.attempts import Attempt, Decision, Ledger, decide, resume_arguments, told_to_stop
from launch.jobs import SubmittedJob
from launch.local import say
from launch.room import explain_unwritten, written_before
from launch.task import first_failure, read_exits
from pretrain.errors import UserError
from pretrain.exit_codes import EXIT_PREEMPTED

EXIT_REFUSED = 1
KILLED_BY_REQUEST = 128 + signal.SIGUSR1
"""The exit code of a rank, or of srun, that the request to stop met before it could take one."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "attempt", help="what a job script asks before and behind each attempt", description=__doc__, allow_abbrev=False
    )
    parts = parser.add_subparsers(required=True, metavar="begin|end")
    begins = parts.add_parser("begin", allow_abbrev=False, help="prints the attempt's number and options of training")
    begins.add_argument("--job", required=True, metavar="ID", help="the job's number")
    begins.add_argument("--nodes", required=True, metavar="LIST", help="its nodes, as Slurm writes them")
    ends = parts.add_parser("end", allow_abbrev=False, help="prints `again SECONDS` or `end EXIT_CODE`")
    ends.add_argument("--attempt", type=int, required=True, metavar="N", help="its number")
    ends.add_argument("--exit-code", type=int, required=True, metavar="N", help="srun's")
    for part in (begins, ends):
        part.add_argument("--run", type=Path, required=True, metavar="FOLDER", dest="folder", help="the run's folder")
        part.add_argument("--max-restarts", type=int, required=True, metavar="N", help="crashes in a row; see slurm")
    begins.set_defaults(run=begin)
    ends.set_defaults(run=end)


def begin(options: argparse.Namespace) -> int:
    """Write that an attempt begins and print its number, and what training gets beside its own arguments; 1 where there
    is to be none. Raises UserError where the run's folder cannot be written.
    """
    ledger = Ledger(options.folder)
    if told_to_stop(options.folder, options.job):
        say("no attempt: `launch stop` has ended this job; launch the run anew to go on")
        return EXIT_REFUSED

    write_attempt = ledger.beginning(options.job, [options.nodes])

    def write() -> Attempt:
        _be_known(options.folder, options.job)
        return write_attempt()

    attempt = written_before(write, ledger.path, tries=options.max_restarts, say=say)
    before = ledger.read(options.job)[:-1]
    if before and before[-1].exit_code is None:  # Slurm started the job again without asking, or nobody could answer
        decision = _decided(options, before)
        if not decision.again:
            say(f"no attempt: {decision.reason}")
            ledger.write(replace(ledger.ended(attempt, EXIT_REFUSED), reason=f"not begun: {decision.reason}"))
            return EXIT_REFUSED
    print(attempt.attempt, *resume_arguments((), before, options.folder))
    return 0


def _be_known(folder: Path, job: str) -> None:
    """Let `status` and `stop` find a job whose script was handed to sbatch by hand. Raises OSError."""
    known = SubmittedJob.read(folder)
    if known is None or known.job != job:
        name = os.environ.get("SLURM_JOB_NAME") or (known.name if known else folder.absolute().name)
        SubmittedJob.now(job, name).write(folder)


def end(options: argparse.Namespace) -> int:
    """Write how the attempt ended and print what comes next. A folder that cannot be written to is told, and changes
    nothing: the next attempt finds this one without an end, and counts it as a crash; and where that one cannot be
    written down either, it does not begin (see written_before), so that no job is requeued without end.
    """
    ledger = Ledger(options.folder)
    attempts = [found for found in ledger.read() if found.attempt == options.attempt]
    if not attempts:
        raise UserError(f"{ledger.path}: has no attempt {options.attempt}")
    job = ledger.read(attempts[0].job)
    ended = how_it_ended(ledger, attempts[0], options.exit_code)
    decision = _decided(options, [*(found for found in job if found.attempt < ended.attempt), ended])
    try:
        ledger.write(replace(ended, reason=decision.reason, again=decision.again))
    except OSError as error:
        say(f"the attempt's end cannot be written: {explain_unwritten(error, ledger.path)}; make room there")
    try:
        ledger.tell_of_crash(ended)
    except OSError as error:
        say(f"the crash cannot be told in the run's log: {explain_unwritten(error, ledger.run_folder)}")
    say(f"attempt {ended.attempt} ended with {ended.exit_code}: {decision.reason}")
    if ended.failure is not None:
        say(f"first to fail: {ended.failure}")
    print(f"again {decision.wait_seconds:.0f}" if decision.again else f"end {ended.exit_code}")
    return 0


def how_it_ended(ledger: Ledger, attempt: Attempt, exit_code: int) -> Attempt:
    """An attempt's end, by what its ranks left rather than by srun's exit code, which is the largest of all: that of a
    rank which srun killed, say, behind the one that failed.
    """
    exits = read_exits(ledger.run_folder, attempt.attempt)
    failed = first_failure(exits)
    if failed is not None and failed.exit_code != KILLED_BY_REQUEST:
        return ledger.ended(attempt, failed.exit_code, rank=failed.rank, error=failed.error, step=failed.step)
    if KILLED_BY_REQUEST in (exit_code, failed and failed.exit_code) or any(
        left.exit_code == EXIT_PREEMPTED for left in exits
    ):
        return ledger.ended(attempt, EXIT_PREEMPTED)
    return ledger.ended(attempt, exit_code)


def _decided(options: argparse.Namespace, attempts: list[Attempt]) -> Decision:
    stop = told_to_stop(options.folder, attempts[-1].job)
    return decide(attempts, max_restarts=options.max_restarts, again_when_stopped=True, told_to_stop=stop)
