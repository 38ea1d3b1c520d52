"""The attempts of a launch: what each came to, and whether there is to be another.

A launch is one `python -m launch local`, or one Slurm job through all its requeues. Each attempt writes two lines to
<run folder>/launch/attempts.jsonl: one when it starts, one when it has ended. An attempt without the second was lost
with its node; the next one writes it.
"""

import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from launch.run_events import EVENTS_FILE, Progress, events_size, has_checkpoint_since, read_events
from pretrain.errors import EXIT_HUNG
from pretrain.exit_codes import EXIT_DONE, EXIT_FENCED_OFF, EXIT_MACHINE_ERROR, EXIT_PREEMPTED, EXIT_USER_ERROR

LAUNCH_FOLDER = "launch"
ATTEMPTS_FILE = "attempts.jsonl"
STOP_FILE = "stop"
"""The launches that were asked to stop and must not start another attempt, a line each."""

FIRST_WAIT_SECONDS = 10.0
LONGEST_WAIT_SECONDS = 600.0
_OF_A_DISK = re.compile(
    "no space left|disk quota exceeded|input/output error|stale file handle|read-only file system", re.IGNORECASE
)
"""In the text of an exception that nobody explained: errors of a disk or a file system."""
MOST_STOPS_IN_VAIN = 20
"""In a row, of attempts that were stopped without a new checkpoint, as ahead of their first step, or done and waiting
for their store: they would go on for ever."""


@dataclass(frozen=True)
class Attempt:
    """One attempt, as its lines say it; times are ISO 8601 in UTC."""

    attempt: int
    """From 1, over all launches of the run."""

    job: str
    """The launch: a Slurm job's number, or `local-<host>-<process id>-<the process's start>` (see process_start)."""

    nodes: tuple[str, ...]
    """Hosts."""

    started: str
    events_from: int
    """Bytes of run.jsonl that were there before it."""

    ended: str | None = None
    exit_code: int | None = None
    """None where nobody saw its end."""

    reason: str | None = None
    """What was decided behind it, and why."""

    again: bool = False
    """Whether its launch was to start another one, after a wait."""

    step: int | None = None
    """That the rank which failed first was at; where it could not tell (SIGKILL), the last that its events name."""

    saved: bool = False
    """Whether it wrote a checkpoint."""

    rank: int | None = None
    """The one that failed first."""

    error: str | None = None
    """What went wrong, in a line."""

    @property
    def crashed(self) -> bool:
        """Whether it ended, or was lost, in a way that nobody asked for and starting again may mend."""
        known = (EXIT_DONE, EXIT_USER_ERROR, EXIT_PREEMPTED, EXIT_FENCED_OFF)
        return self.ended is not None and self.exit_code not in known

    @property
    def failure(self) -> str | None:
        """What went wrong, in words; None where it did not fail."""
        if self.ended is None or self.exit_code in (EXIT_DONE, EXIT_PREEMPTED):
            return None
        code = "nobody saw its end" if self.exit_code is None else f"exit code {self.exit_code}"
        if self.exit_code is not None and self.exit_code - 128 in set(signal.Signals):  # as shells say it
            code = f"killed by {signal.Signals(self.exit_code - 128).name}"
        return ("" if self.rank is None else f"rank {self.rank}: ") + (self.error or code)


@dataclass(frozen=True)
class Decision:
    """Whether a launch starts another attempt, after how long, and why."""

    again: bool
    reason: str
    wait_seconds: float = 0.0


def decide(attempts: Sequence[Attempt], *, max_restarts: int, again_when_stopped: bool, told_to_stop: bool) -> Decision:
    """What comes after the last of a launch's attempts, which has ended.

    Args:
        max_restarts: how many crashes in a row without a new checkpoint are started again after.
        again_when_stopped: whether a run that stopped on request is started again.
        told_to_stop: whether somebody wants the launch to end.
    """
    last = attempts[-1]
    final = {
        EXIT_DONE: "done",
        EXIT_USER_ERROR: "something has to be mended first, see the message; starting again would change nothing",
        EXIT_FENCED_OFF: "another copy of the run has taken its folder over",
    }
    if last.exit_code in final:
        return Decision(False, final[last.exit_code])
    if told_to_stop:
        return Decision(False, "stopped for good, as was asked")
    if last.exit_code == EXIT_PREEMPTED:
        in_vain = list(
            takewhile(lambda attempt: attempt.exit_code == EXIT_PREEMPTED and not attempt.saved, attempts[::-1])
        )
        if len(in_vain) >= MOST_STOPS_IN_VAIN:
            return Decision(
                False,
                f"stopped on request {len(in_vain)} times in a row without a new checkpoint; does the time limit leave "
                "room for starting up and for a checkpoint ahead of its signal, or for the uploads of a run that is "
                "done (checkpoint.upload)?",
            )
        return Decision(again_when_stopped, f"stopped on request{', and saved' if last.saved else ''}")
    kinds = {EXIT_HUNG: "the job hung", None: "the attempt was lost", EXIT_MACHINE_ERROR: "a disk is full or fails"}
    kind = kinds.get(last.exit_code, "a crash")
    if len(attempts) > 1 and same_failure(attempts[-2], last):
        return Decision(
            False,
            f"{kind} with the same error at the same step ({last.step}) twice in a row: {last.error}; starting again "
            "would meet it again",
        )
    crashes = crashes_in_a_row(attempts)
    if crashes > max_restarts:
        return Decision(
            False, f"{kind}, number {crashes} in a row without a new checkpoint; {max_restarts} are started again after"
        )
    wait = min(FIRST_WAIT_SECONDS * 2 ** (crashes - 1), LONGEST_WAIT_SECONDS)
    return Decision(True, f"{kind}, number {crashes} of {max_restarts} without a new checkpoint", wait)


def same_failure(first: Attempt, second: Attempt) -> bool:
    """Whether two attempts crashed at the same step with the same error, numbers in its text apart (ports, process
    numbers, addresses): by the training's own fault, which starting again repeats. An attempt whose error nobody knows
    is like no other, and a disk that is full or fails may be mended meanwhile.
    """
    if not (first.crashed and second.crashed) or first.error is None or second.error is None:
        return False
    if second.exit_code == EXIT_MACHINE_ERROR or _OF_A_DISK.search(second.error):
        return False
    return first.step == second.step and _without_numbers(first.error) == _without_numbers(second.error)


def _without_numbers(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+|\d+", "#", text)


def crashes_in_a_row(attempts: Sequence[Attempt]) -> int:
    """How many of the last attempts crashed, back to the last one that wrote a checkpoint before it did."""
    count = 0
    for attempt in reversed(attempts):
        if not attempt.crashed:
            break
        count += 1
        if attempt.saved:
            break
    return count


@dataclass(frozen=True)
class Ledger:
    """The attempts of a run, in its folder."""

    run_folder: Path

    @property
    def path(self) -> Path:
        """The file."""
        return self.run_folder / LAUNCH_FOLDER / ATTEMPTS_FILE

    def read(self, job: str | None = None) -> list[Attempt]:
        """All attempts, or those of one launch, oldest first."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        attempts: dict[int, Attempt] = {}
        for line in lines:
            try:
                fields = json.loads(line)
                found = Attempt(**{**fields, "nodes": tuple(fields["nodes"])})
            except (ValueError, TypeError, KeyError):  # cut by a kill or a full disk
                continue
            attempts[found.attempt] = found
        return [found for found in attempts.values() if job is None or found.job == job]

    def begin(self, job: str, nodes: Sequence[str]) -> Attempt:
        """Write that an attempt starts. Those of the same launch whose end is missing were lost. Raises OSError."""
        return self.beginning(job, nodes)()

    def beginning(self, job: str, nodes: Sequence[str]) -> Callable[[], Attempt]:
        """`begin`, to be called again where it raises OSError. A line may be there whose write failed, in fsync say:
        the attempt's number, and which ones were lost, are decided once, and the writing alone is repeated.
        """
        before: list[Attempt] | None = None
        lost: list[Attempt] = []
        started: Attempt | None = None

        def write() -> Attempt:
            nonlocal before, started
            if before is None:
                known = self.read()
                open_ones = [self.ended(found, None) for found in known if found.job == job and found.ended is None]
                lost.extend(replace(found, reason="lost: nobody saw its end") for found in open_ones)
                before = known
            while lost:
                self.write(lost[0])
                self.tell_of_crash(lost[0])
                lost.pop(0)
            if started is None:  # behind the events of those that were lost, which are none of its own
                number = max((found.attempt for found in before), default=0) + 1
                started = Attempt(number, job, tuple(nodes), _now(), events_size(self.run_folder))
            self.write(started)
            return started

        return write

    def ended(
        self,
        attempt: Attempt,
        exit_code: int | None,
        *,
        rank: int | None = None,
        error: str | None = None,
        step: int | None = None,
    ) -> Attempt:
        """An attempt with its end, which is not written yet.

        Args:
            rank, error, step: of the rank that failed first, where the launcher saw it; else the error is run.jsonl's,
                of rank 0, which may have lost its peer, and the step, where that rank did not tell it, too.
        """
        progress = Progress.of(read_events(self.run_folder, attempt.events_from))
        return replace(
            attempt,
            ended=_now(),
            exit_code=exit_code,
            step=progress.step if step is None else step,
            saved=progress.saved,
            rank=rank,
            error=progress.error if rank is None else error,
        )

    def write(self, attempt: Attempt) -> None:
        """Write a line. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.path, json.dumps(asdict(attempt)))

    def tell_of_crash(self, ended: Attempt) -> None:
        """Write the event `crash` of an attempt into the run's own log, if it crashed, if that log is not a newer
        attempt's by now, and if the event is not there yet. Raises OSError.
        """
        if not ended.crashed or any(found.attempt > ended.attempt for found in self.read()):
            return
        fields = {"attempt": ended.attempt, "job": ended.job, "rank": ended.rank, "exit_code": ended.exit_code}
        step = {} if ended.step is None else {"step": ended.step}
        event = {"event": "crash", "time": ended.ended, **step, **fields, "message": ended.failure}
        if event not in read_events(self.run_folder, ended.events_from):
            append_line(self.run_folder / EVENTS_FILE, json.dumps(event))


def append_line(path: Path, line: str) -> None:
    """Append a line to a file of lines, and bring it to the disk. Raises OSError."""
    with open(path, "ab+") as file:
        if file.tell() and _last_byte(file) != b"\n":  # a kill or a full disk cut the one before
            line = "\n" + line
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def ask_to_stop(run_folder: Path, job: str) -> None:
    """Let a launch of the run, a job or one on this machine, start no further attempt. Raises OSError."""
    path = run_folder / LAUNCH_FOLDER / STOP_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{job}\n")


def told_to_stop(run_folder: Path, job: str) -> bool:
    """Whether `ask_to_stop` was called for this launch."""
    try:
        return job in (run_folder / LAUNCH_FOLDER / STOP_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return False


def resume_arguments(arguments: Sequence[str], attempts: Sequence[Attempt], run_folder: Path) -> list[str]:
    """The arguments of training for a launch's next attempt: where one before wrote a checkpoint, that is what to go on
    from, and not what --resume said at first; the last of two --resume holds.

    Args:
        attempts: the launch's before it. One that was killed right behind a save has not told of it: the checkpoint
            itself counts too.
    """
    saved = any(attempt.saved for attempt in attempts) or (
        bool(attempts) and has_checkpoint_since(run_folder, datetime.fromisoformat(attempts[0].started))
    )
    return [*arguments, *(("--resume", "auto") if saved else ())]
