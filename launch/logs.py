"""`python -m launch logs`: what a rank wrote."""

import argparse
import sys
import time
from pathlib import Path

from launch.attempts import Ledger
from launch.processes import POLL_SECONDS, LogFollower
from launch.run_events import LOGS_FOLDER
from launch.runs import find_run
from pretrain.errors import UserError


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "logs", help="what a rank wrote", description="Show the end of a rank's log.", allow_abbrev=False
    )
    parser.add_argument("name", metavar="FOLDER|NAME", help="the run")
    parser.add_argument(
        "--rank", type=int, metavar="N", help="the rank (default: the one that failed, if one has, else 0)"
    )
    parser.add_argument("--lines", type=int, default=40, metavar="N", help="how many of the last lines (default 40)")
    parser.add_argument("--follow", action="store_true", help="go on as it grows, until Ctrl-C")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the log's last lines, and what comes; returns 0. Raises UserError for a run or rank that is not there."""
    folder = find_run(options.name)
    rank = failed_rank(folder) if options.rank is None else options.rank
    path = folder / LOGS_FOLDER / f"rank{rank}.log"
    if not path.is_file():
        ranks = sorted(int(log.stem.removeprefix("rank")) for log in path.parent.glob("rank*.log"))
        raise UserError(f"{path}: no such log; there are those of {len(ranks)} ranks, the last {ranks[-1:] or 'none'}")
    print(f"--- {path}", flush=True)
    start = start_of_last_lines(path, options.lines)
    try:
        follower = LogFollower(path, start, sys.stdout.buffer)
        follower.copy()
        while options.follow:
            time.sleep(POLL_SECONDS)
            follower.copy()
        follower.close()
    except KeyboardInterrupt:
        return 0  # how a person ends it
    return 0


def failed_rank(folder: Path) -> int:
    """The rank that failed first in the newest attempt; 0 where none did."""
    attempts = Ledger(folder).read()
    return 0 if not attempts or attempts[-1].rank is None else attempts[-1].rank


def start_of_last_lines(path: Path, count: int) -> int:
    """The byte that a file's last `count` lines begin at."""
    with open(path, "rb") as file:
        end = file.seek(0, 2)
        size = min(end, max(count, 1) * 4096)
        file.seek(end - size)
        lines = file.read().splitlines(keepends=True)
    return end - sum(len(line) for line in lines[len(lines) - min(count, len(lines)) :])
