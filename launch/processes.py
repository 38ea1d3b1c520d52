"""Ranks as processes of one machine: start, follow, end together.

Every rank writes to a log file of its own; the file of the rank to show is copied to the terminal as it grows. So no
output is lost when the launcher dies, and a rank never blocks on a full pipe. All ranks share one process group, which
launch/guard.py holds.
"""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import BinaryIO

from pretrain.errors import EXIT_HUNG, NO_ROOM, STACKS_SIGNAL, noted_step
from pretrain.exit_codes import EXIT_DONE, EXIT_PREEMPTED

POLL_SECONDS = 0.05
TAIL_LINES = 40
STACK_LINES = 120
"""Shown of a rank of a job that hangs: the stacks of its threads."""
TAIL_BYTES = 65536
FAILURE_GRACE_SECONDS = 10.0
"""The longest that the other ranks have to end when one has failed: what they wait for will not come."""
STACKS_SECONDS = 1.0
"""For the ranks of a job that hangs to print their stacks when they are asked to."""
STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1}
"""What asks a rank to save and end."""

_ERROR = re.compile(r"^\s*[\w.]*(?:Error|Exception|Interrupt)\b|^error: |: .* is not done after ")


@dataclass(frozen=True)
class Outcome:
    """How a launch ended."""

    status: int
    """As a shell shows it: 0 done, 75 stopped on request, else that of the rank that failed first."""

    rank: int | None = None
    """The one that failed first."""

    error: str | None = None
    """What its log says went wrong, in a line."""

    step: int | None = None
    """That the rank was at, where its log says so."""

    interrupted: bool = False
    """Whether the launcher got a signal for it."""


@dataclass(frozen=True)
class RankCommand:
    """One rank's process: what to run, with which environment, and where its output goes."""

    rank: int
    argv: Sequence[str]
    environment: dict[str, str]
    log: Path
    holds_stop_signals: bool = False
    """Start it with SIGTERM and SIGUSR1 blocked: what comes before it listens to them waits until it does."""

    @property
    def ranks(self) -> int:
        """How many there are in the whole job."""
        return int(self.environment["WORLD_SIZE"])


@dataclass
class RankProcess:
    """A started rank; `log_start` is where this launch's output begins in a log that may hold earlier ones."""

    command: RankCommand
    popen: subprocess.Popen[bytes]
    log_start: int

    @property
    def rank(self) -> int:
        """The rank's number in the whole job."""
        return self.command.rank

    def last_lines(self, count: int = TAIL_LINES) -> list[str]:
        """The last lines that this launch of the rank wrote; undecodable bytes are replaced."""
        with self.command.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self.log_start, size - TAIL_BYTES))
            return log.read().decode("utf-8", errors="replace").splitlines()[-count:]


def exit_status(returncode: int) -> int:
    """What a shell would show for a process's return code: 128 + n for one that died of signal n."""
    return returncode if returncode >= 0 else 128 - returncode


def describe_exit(returncode: int) -> str:
    """A return code in words."""
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    return f"exit code {returncode}"


@dataclass
class ProcessGroup(AbstractContextManager["ProcessGroup"]):
    """The ranks of this machine in one process group. Leaving the context ends whatever still runs."""

    ranks: list[RankProcess] = field(default_factory=list)
    guard: subprocess.Popen[str] | None = None

    def __enter__(self) -> "ProcessGroup":
        self.guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        if self.guard.stdout is None or self.guard.stdout.readline() != "ready\n":
            raise RuntimeError("the guard of the process group did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        for rank in self.ranks:
            rank.popen.wait()

    def start(self, command: RankCommand) -> RankProcess:
        """Start a rank. Its log is appended to, so that the logs of a resumed run tell the whole story."""
        if self.guard is None:
            raise RuntimeError("start() outside of the context")
        command.log.parent.mkdir(parents=True, exist_ok=True)
        with command.log.open("ab") as log:
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            log.write(f"--- rank {command.rank} started {started}: {' '.join(command.argv)}\n".encode())
            log.flush()
            # A child begins with the mask of the thread that starts it.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS if command.holds_stop_signals else ())
            try:
                popen = subprocess.Popen(
                    list(command.argv),
                    env=command.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    process_group=self.guard.pid,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            rank = RankProcess(command, popen, log.tell())
        self.ranks.append(rank)
        return rank

    def running(self) -> list[RankProcess]:
        """The ranks that have not ended."""
        return [rank for rank in self.ranks if rank.popen.poll() is None]

    def failed(self) -> list[RankProcess]:
        """The ranks that ended neither done nor stopped on request. Of several, the one whose log fell silent first
        comes first: it is the likely cause, the others lost their peer."""
        failures = [rank for rank in self.ranks if rank.popen.poll() not in (None, EXIT_DONE, EXIT_PREEMPTED)]
        return sorted(failures, key=lambda rank: rank.command.log.stat().st_mtime_ns)

    def send(self, number: int) -> None:
        """Send a signal to the ranks themselves, not to their helpers: a rank that saves a checkpoint on SIGTERM still
        needs its data workers to end in order."""
        for rank in self.running():
            rank.popen.send_signal(number)

    def kill(self) -> None:
        """Kill the ranks and everything that they started, and the guard with them."""
        if self.guard is None:
            return
        os.killpg(self.guard.pid, signal.SIGKILL)  # the guard is not reaped yet, so the group exists and is ours
        self.guard.communicate()
        self.guard = None


class SignalRelay(AbstractContextManager["SignalRelay"]):
    """Notes SIGINT, SIGTERM, SIGUSR1 and SIGHUP while ranks run, so that the loop can hand them on instead of dying. A
    SIGHUP that is ignored stays so: that is what nohup is for.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self._pending: list[int] = []
        self._before: dict[int, object] = {}

    def __enter__(self) -> "SignalRelay":
        for number in self.SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._pending.append(number)

    def take(self) -> int | None:
        """The oldest signal not handed on yet, or None."""
        return self._pending.pop(0) if self._pending else None


class LogFollower:
    """Copies what is appended to a log file to a stream."""

    def __init__(self, path: Path, start: int, stream: BinaryIO) -> None:
        self._file = path.open("rb")
        self._file.seek(start)
        self._stream = stream

    def copy(self) -> None:
        """Copy all that was appended since the last call; what finds no room on the stream's disk is left out, and is
        no reason to end the ranks.
        """
        while chunk := self._file.read(65536):
            try:
                self._stream.write(chunk)
                self._stream.flush()
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise

    def close(self) -> None:
        """Copy the rest and close the log."""
        self.copy()
        self._file.close()


def run_ranks(
    commands: Sequence[RankCommand],
    *,
    terminal: BinaryIO,
    say: Callable[[str], None],
    grace_seconds: float,
) -> Outcome:
    """Run all ranks to their end, and say how they ended.

    The first command's log is shown on `terminal`; `say` gets the launcher's own lines. 0 when every rank ended with
    0. When one fails, its last lines are said first (of one that found the job hanging, those of all ranks, with their
    stacks), the others get SIGTERM, after `grace_seconds`, but 10 at the most, SIGKILL, and its exit status is
    the launch's. SIGINT, SIGTERM, SIGUSR1 and SIGHUP are handed on to the ranks (SIGHUP as SIGTERM), with the same
    grace. SIGINT after any of them kills at once: a person does not want to wait; others are one request with the
    first, and leave the ranks the time to save.
    """
    # The relay goes in first: a signal between the start of a rank and the loop must not kill the launcher.
    with SignalRelay() as relay, ProcessGroup() as group:
        for command in commands:
            group.start(command)
        follower = LogFollower(commands[0].log, group.ranks[0].log_start, terminal)
        watch = _Watch(group, say, grace_seconds)
        try:
            while group.running() and not watch.overdue():
                watch.look_for_failure()  # before what others print of it is shown
                follower.copy()
                watch.hand_on(relay.take())
                time.sleep(POLL_SECONDS)
        finally:
            group.kill()
            follower.close()
        watch.look_for_failure()  # the ranks may all have ended between two looks
        return watch.outcome()


@dataclass
class _Watch:
    """What went wrong so far, and until when the ranks may end by themselves."""

    group: ProcessGroup
    say: Callable[[str], None]
    grace_seconds: float
    cause: RankProcess | None = None
    interrupted: bool = False
    deadline: float = float("inf")
    started: float = field(default_factory=time.monotonic)

    def hand_on(self, number: int | None) -> None:
        """Hand a signal to the ranks; Ctrl-C behind another means that the user will not wait."""
        if number is None:
            return
        name = signal.Signals(number).name
        if self.interrupted:
            if number == signal.SIGINT:
                self.say(f"{name} again")
                self.deadline = time.monotonic()
            return
        self.interrupted = True
        limit = f"; they have {self.grace_seconds:g} s to end" if math.isfinite(self.grace_seconds) else ""
        self.say(f"{name}: handing it on to the ranks{limit}")
        self.group.send(signal.SIGTERM if number == signal.SIGHUP else number)
        self.deadline = time.monotonic() + self.grace_seconds

    def look_for_failure(self) -> None:
        """At the first failing rank: report it, and ask the others to end. Ranks that were told to end do not fail."""
        if self.cause is not None or self.interrupted:
            return
        failures = self.group.failed()
        if not failures:
            return
        self.cause = failures[0]
        seconds = time.monotonic() - self.started
        if self.cause.popen.returncode == EXIT_HUNG:
            self.group.send(STACKS_SIGNAL)
            time.sleep(STACKS_SECONDS)
            _report_stacks(self.cause, self.group.ranks, seconds, self.say)
        else:
            _report(failures, seconds, self.say)
        self.group.send(signal.SIGTERM)
        self.deadline = time.monotonic() + min(self.grace_seconds, FAILURE_GRACE_SECONDS)

    def overdue(self) -> bool:
        """Whether the grace time is over; says whom it ends."""
        if time.monotonic() < self.deadline:
            return False
        late = ", ".join(str(rank.rank) for rank in self.group.running())
        self.say(f"killing rank {late}: still running after the grace time")
        return True

    def outcome(self) -> Outcome:
        """How the launch ended, once every rank has: as the cause, or as the first that did not end as it should."""
        codes = [rank.popen.wait() for rank in self.group.ranks]
        as_asked = (EXIT_DONE, EXIT_PREEMPTED)
        first = self.cause or next((r for r in self.group.ranks if r.popen.returncode not in as_asked), None)
        if first is None:
            return Outcome(max(codes), interrupted=self.interrupted)
        if self.cause is None:
            self.say(f"rank {first.rank}: {describe_exit(first.popen.returncode)} ({first.command.log})")
        lines = first.last_lines(STACK_LINES)
        return Outcome(
            exit_status(first.popen.returncode), first.rank, last_error(lines), last_step(lines), self.interrupted
        )


def last_error(lines: Sequence[str]) -> str | None:
    """The line of a log that says what went wrong: the last that names an exception or an error, or that a rank hangs.
    None where there is none.
    """
    return next((line.strip() for line in reversed(lines) if _ERROR.search(line)), None)


def last_step(lines: Sequence[str]) -> int | None:
    """The step at which the rank of a log failed or hung, by the last line that names one; None where none does."""
    return next((step for line in reversed(lines) if (step := noted_step(line)) is not None), None)


def _report(failures: list[RankProcess], seconds: float, say: Callable[[str], None]) -> None:
    first, others = failures[0], failures[1:]
    total = first.command.ranks
    say(
        f"rank {first.rank} of {total} failed after {seconds:.0f} s: {describe_exit(first.popen.returncode)}. "
        f"Its last lines (all of them: {first.command.log}):"
    )
    for line in first.last_lines() or ["(it wrote nothing)"]:
        say(f"  [rank {first.rank}] {line}")
    for rank in others:
        say(f"rank {rank.rank} ended too: {describe_exit(rank.popen.returncode)} ({rank.command.log})")
    if total > len(failures):
        say("ending the other ranks")


def _report_stacks(first: RankProcess, ranks: list[RankProcess], seconds: float, say: Callable[[str], None]) -> None:
    """Where every rank was when one was found hanging: it may be another that it waits for."""
    say(
        f"rank {first.rank} of {first.command.ranks} found the job hanging after {seconds:.0f} s: "
        f"{describe_exit(first.popen.returncode)}. The last lines of every rank (look for one that waits for no other):"
    )
    for rank in ranks:
        for line in rank.last_lines(STACK_LINES) or ["(it wrote nothing)"]:
            say(f"  [rank {rank.rank}] {line}")
    say("ending all ranks")
