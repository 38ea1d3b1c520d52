"""`python -m launch local`: all ranks of a run on this machine."""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from launch.attempts import Attempt, Ledger, decide, resume_arguments, told_to_stop
from launch.jobs import local_job
from launch.processes import POLL_SECONDS, Outcome, RankCommand, SignalRelay, run_ranks
from launch.room import explain_unwritten, written_before
from pretrain.errors import UserError, file_error
from pretrain.exit_codes import EXIT_DONE, EXIT_PREEMPTED

HELP = """\
Start one training process for each rank on this machine and wait for them.

Rank 0 is shown here; every rank writes to <run folder>/logs/rankN.log. When a rank fails, its last lines are
printed, the others are ended and its exit code is passed on; when the job hangs (parallel.step_timeout_seconds),
every rank's stacks. SIGTERM makes the run save a checkpoint and end with exit code 75, Ctrl-C ends it as it is; either
reaches every rank. With --restarts a run that crashed or hung is started again, after 10 s, 20 s, 40 s ... (10 minutes
at most), unless it fails at the same step with the same error twice in a row."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "local",
        help="run all ranks on this machine",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="example: python -m launch local --nproc 2 launch/recipes/demo.yaml --optimizer.lr 0.001",
    )
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes to start, one a rank (default 1)")
    parser.add_argument("--port", type=int, default=None, help="port for the ranks to meet on (default: a free one)")
    parser.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="time between SIGTERM and SIGKILL, at most 10 where a rank has failed (default 30)",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="start again after so many crashes in a row without a new checkpoint (default 0)",
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe; this command's own options go before it")
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="for python -m pretrain: --section.field value, --resume, --dry-run",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check the options and the recipe once, then launch; returns the exit status. Raises UserError."""
    from pretrain import command_line  # late: other subcommands need no torch
    from pretrain.phases import load_phases

    check_options(options)
    training = command_line.parse([options.recipe, *options.arguments])
    phases = load_phases(training.recipe, training.overrides)
    phases.require_fit(options.nproc)
    argv = [sys.executable, "-m", "pretrain", options.recipe]
    if training.dry_run:  # rank 0 alone speaks, and it starts no group
        environment = rank_environment(0, options.nproc, options.port or free_port())
        return subprocess.run([*argv, *options.arguments], env=environment).returncode
    return launch_with_restarts(argv, phases.run.folder, options)


def launch_with_restarts(argv: Sequence[str], folder: Path, options: argparse.Namespace) -> int:
    """Run `argv` with the options' arguments until it is done, has to be mended, was stopped, or crashed too often;
    returns the exit status. Raises UserError for a folder that cannot be written.
    """
    prepare_log(folder / "logs" / "rank0.log")
    ledger, job = Ledger(folder), local_job()
    while True:
        arguments = resume_arguments(options.arguments, ledger.read(job), folder)
        begin = ledger.beginning(job, [socket.gethostname()])
        attempt = written_before(begin, ledger.path, tries=options.restarts, say=say)
        outcome = launch_local(
            [*argv, *arguments],
            options.nproc,
            folder / "logs",
            port=options.port,
            grace_seconds=options.grace,
            holds_stop_signals=True,
        )
        with SignalRelay() as relay:
            ended = ledger.ended(attempt, outcome.status, rank=outcome.rank, error=outcome.error, step=outcome.step)
            decision = decide(
                [*ledger.read(job)[:-1], ended],
                max_restarts=options.restarts,
                again_when_stopped=False,
                told_to_stop=outcome.interrupted or told_to_stop(folder, job),
            )
            ended = replace(ended, reason=decision.reason, again=decision.again)
            _write(ledger, ended, is_crash=not outcome.interrupted)
            if not decision.again:
                if options.restarts and ended.crashed:
                    say(f"not started again: {decision.reason}")
                return outcome.status
            say(f"starting again in {decision.wait_seconds:g} s: {decision.reason}")
            if _signalled_within(decision.wait_seconds, relay) or told_to_stop(folder, job):
                say("not started again: stopped while it waited")
                _write(ledger, replace(ended, reason="stopped for good while it waited, as was asked", again=False))
                return outcome.status


def _signalled_within(seconds: float, relay: SignalRelay) -> bool:
    """Whether a signal comes that would go to the ranks if there were any; returns then, else after so many seconds."""
    until = time.monotonic() + seconds
    while (number := relay.take()) is None and time.monotonic() < until:
        time.sleep(min(POLL_SECONDS, seconds))
    return number is not None


def _write(ledger: Ledger, ended: Attempt, *, is_crash: bool = False) -> None:
    """Write an attempt's end, and into the run's log what it crashed of. What the run itself said of a full disk is
    what matters.
    """
    try:
        ledger.write(ended)
        if is_crash:
            ledger.tell_of_crash(ended)
    except OSError as error:
        say(f"the attempt's end cannot be written: {explain_unwritten(error, ledger.path)}; make room there")


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """What the launcher writes of a run goes into its folder. Raises UserError where it cannot, MachineError where that
    is the disk's fault.
    """
    try:
        yield
    except OSError as error:
        place = error.filename or folder
        raise file_error(
            error, f"{place}: {error.strerror or error}; make room, or give a --folder to write to"
        ) from error


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that cannot work, before anything is started. Raises UserError."""
    if options.nproc < 1:
        raise UserError(f"--nproc {options.nproc}: at least one process is needed")
    if options.port is not None and not 1 <= options.port <= 65535:
        raise UserError(f"--port {options.port}: choose a port from 1 to 65535, or leave the option out for a free one")
    if options.restarts < 0:
        raise UserError(f"--restarts {options.restarts}: give a number of restarts, 0 or more")
    if options.grace < 0:
        raise UserError(f"--grace {options.grace:g}: give a number of seconds, 0 or more")
    for name in ("--nproc", "--port", "--grace", "--restarts"):
        if any(argument == name or argument.startswith(f"{name}=") for argument in options.arguments):
            raise UserError(
                f"{name} stands after the recipe, where options are training's: write it before {options.recipe}"
            )


def launch_local(
    argv: Sequence[str],
    nproc: int,
    log_folder: Path,
    *,
    port: int | None = None,
    grace_seconds: float = 30.0,
    holds_stop_signals: bool = False,
) -> Outcome:
    """Run `argv` once for each of `nproc` ranks, and say how they ended (see run_ranks and RankCommand).

    Raises UserError for a log folder that cannot be written.
    """
    port = port or free_port()
    commands = [
        RankCommand(
            rank=rank,
            argv=argv,
            environment=rank_environment(rank, nproc, port),
            log=log_folder / f"rank{rank}.log",
            holds_stop_signals=holds_stop_signals,
        )
        for rank in range(nproc)
    ]
    for command in commands:
        prepare_log(command.log)
    say(f"{nproc} {'process' if nproc == 1 else 'processes'} on this machine, port {port}, logs in {log_folder}")
    started = time.monotonic()
    outcome = run_ranks(commands, terminal=sys.stdout.buffer, say=say, grace_seconds=grace_seconds)
    words = {EXIT_DONE: "done", EXIT_PREEMPTED: "stopped on request"}.get(
        outcome.status, f"ended with status {outcome.status}"
    )
    say(f"{words} after {time.monotonic() - started:.0f} s")
    return outcome


def prepare_log(path: Path) -> None:
    """Make sure that a rank's log can be written, before anything is started. Raises UserError where it cannot,
    MachineError where that is the disk's fault.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise file_error(
            error,
            f"folder {path.parent.parent}: {error.filename}: {error.strerror}; give a --folder that can be written",
        ) from error


def rank_environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    """This process's environment with what torch.distributed reads, and no more threads in all than there are cores."""
    environment = dict(os.environ)
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    environment.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(nproc),
        LOCAL_WORLD_SIZE=str(nproc),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        PYTHONUNBUFFERED="1",  # a rank that is killed leaves its last lines in the log
    )
    return environment


def free_port() -> int:
    """A TCP port that is free on the loopback interface now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(line: str) -> None:
    """One line of the launcher's own, on stderr, apart from the training's output."""
    print(f"launch: {line}", file=sys.stderr, flush=True)
