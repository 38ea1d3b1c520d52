"""`python -m launch task`: one rank of a Slurm job, started by srun.

It takes the rank's place from Slurm's variables, keeps its log, hands signals on, and leaves a record of how it ended
for the decision behind the attempt.
"""

import argparse
import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.attempts import LAUNCH_FOLDER
from launch.local import prepare_log, say
from launch.processes import RankCommand, run_ranks
from launch.run_events import LOGS_FOLDER
from pretrain.errors import UserError
from pretrain.exit_codes import EXIT_DONE, EXIT_FENCED_OFF, EXIT_PREEMPTED, EXIT_USER_ERROR

EXITS_FOLDER = "exits"
GRACE_SECONDS = float("inf")
"""How long a rank may take to save when it is asked to stop: Slurm's limit ends it, and the watchdog one that hangs."""
_VARIABLES = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class RankExit:
    """How a rank of an attempt ended."""

    attempt: int
    rank: int
    host: str
    time: float
    """Seconds since the epoch, by its node's clock."""
    exit_code: int
    error: str | None
    step: int | None = None
    """That it was at, where its log says so."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "task", help="one rank of a Slurm job (job scripts call it by srun)", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", dest="folder", help="the run's folder")
    parser.add_argument("--attempt", type=int, required=True, metavar="N", help="its number, from `attempt begin`")
    parser.add_argument("training", nargs=argparse.REMAINDER, metavar="RECIPE.yaml ...", help="for python -m pretrain")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run this task's rank to its end; returns its exit status. Raises UserError outside of a Slurm job step."""
    environment = environment_of_task(dict(os.environ))
    rank = int(environment["RANK"])
    command = RankCommand(
        rank=rank,
        argv=[sys.executable, "-m", "pretrain", *options.training],
        environment=environment,
        log=options.folder / LOGS_FOLDER / f"rank{rank}.log",
        holds_stop_signals=True,
    )
    prepare_log(command.log)
    with open(os.devnull, "wb") as nowhere:
        shown = sys.stdout.buffer if rank == 0 else nowhere
        outcome = run_ranks([command], terminal=shown, say=say, grace_seconds=GRACE_SECONDS)
    left = RankExit(
        options.attempt, rank, socket.gethostname(), time.time(), outcome.status, outcome.error, outcome.step
    )
    write_exit(options.folder, left)
    return outcome.status


def environment_of_task(environment: dict[str, str]) -> dict[str, str]:
    """A task's environment with what torch.distributed reads, from what Slurm and the job script set.

    Raises UserError where one of these is missing.
    """
    missing = [name for name in _VARIABLES if name not in environment]
    if missing:
        raise UserError(
            f"launch task: {', '.join(missing)} not set: it is started by srun in the script that `python -m launch "
            "slurm` writes"
        )
    here = environment.get("SLURM_NTASKS_PER_NODE", environment["SLURM_NTASKS"])
    environment.setdefault("OMP_NUM_THREADS", environment.get("SLURM_CPUS_PER_TASK", "1"))
    return environment | {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_WORLD_SIZE": here,
        "PYTHONUNBUFFERED": "1",  # a rank that is killed leaves its last lines in the log
    }


def write_exit(folder: Path, left: RankExit) -> None:
    """Leave the record of a rank's end. A disk that is full is told, and changes nothing: the rank has ended."""
    path = folder / LAUNCH_FOLDER / EXITS_FOLDER / f"rank{left.rank}.json"
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(left)), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        say(f"rank {left.rank}: its end cannot be written down: {error}")


def read_exits(folder: Path, attempt: int) -> list[RankExit]:
    """The ends of an attempt's ranks that their tasks saw, first to last."""
    found = []
    for path in (folder / LAUNCH_FOLDER / EXITS_FOLDER).glob("rank*.json"):
        try:
            left = RankExit(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            say(f"{path} cannot be read and is left out: {error}")
            continue
        if left.attempt == attempt:
            found.append(left)
    return sorted(found, key=lambda left: left.time)


def first_failure(exits: list[RankExit]) -> RankExit | None:
    """The rank that tells what went wrong: one that says what has to be mended, or that the run is another copy's;
    else the first that ended neither done nor stopped on request.
    """
    failed = [left for left in exits if left.exit_code not in (EXIT_DONE, EXIT_PREEMPTED)]
    told = [left for left in failed if left.exit_code in (EXIT_USER_ERROR, EXIT_FENCED_OFF)]
    return next(iter([*told, *failed]), None)
