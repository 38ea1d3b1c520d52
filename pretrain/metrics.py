"""What a run writes while it goes: run.jsonl events, TensorBoard curves, and a line of progress. Rank 0 alone
writes.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter

from pretrain.errors import NO_ROOM, MachineError, UserError, file_error, note_step
from pretrain.fence_watch import FenceWatch

EVENTS_FILE = "run.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_WRITERS = 60.0
"""Until curves are tried again behind a full disk."""
_SHOWN_AS_TEXT = {
    "save": ("run/last_checkpoint", "checkpoint"),
    "save_failed": ("run/last_error", "message"),
    "error": ("run/last_error", "message"),
}
"""Events that TensorBoard shows as a text of this name, and the field that it is."""
_WAITING_BYTES = 1 << 20
"""Of events that wait for room on the disk."""


class RunLog:
    """The run's logs. On other ranks than 0 every method does nothing; each rank keeps `step`.

    Args:
        folder: the run's folder.
        start_step: where the run goes on: TensorBoard drops what an earlier attempt wrote beyond it.
        watch: where another copy of the run has taken the folder over, nothing more is written there; the ranks end at
            their next step (see StopRequests).

    Raises UserError when the folder cannot be written to, MachineError where that is its disk's fault.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        is_main: bool,
        start_step: int,
        total_steps: int,
        watch: FenceWatch | None = None,
    ) -> None:
        self._name, self._total_steps, self._main = name, total_steps, is_main
        self.step = start_step
        """The one that the run is at, or was when it ended: errors name it."""
        _ThreadErrors.hook(self)
        self._watch = watch
        self._width, self._shown = 0, -math.inf
        if not is_main:
            return
        path = folder / EVENTS_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            cut = _ends_inside_a_line(path)
            self._earlier_attempts, self._last_failure = _attempts_in(path)
            self._step = start_step
            # What cannot be written stays in the buffer.
            self._events = open(path, "a", encoding="utf-8", buffering=_WAITING_BYTES)  # noqa: SIM115  (closed in close())
            self._waits = False
            if cut:  # a killed run's last line must not swallow the first of this one
                self._events.write("\n")
            self._board_folder, self._try_again_at = folder / TENSORBOARD_FOLDER, -math.inf
            self._told_of_lost_points = False
            self._board: SummaryWriter | None = SummaryWriter(str(self._board_folder), purge_step=start_step + 1)
        except OSError as error:
            message = f"folder {folder}: {error.strerror or error}; give a --folder that can be written"
            raise file_error(error, message) from error

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event to run.jsonl: its kind, the time, and its fields. Floats are written in full.

        Where the disk is full, as it may be while a checkpoint is written, the event waits in memory for the next one.

        Raises MachineError when it cannot be written, or too many wait.
        """
        if not self._writes:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with _explained(self._events.name):
            self._events.write(json.dumps({"event": kind, "time": now, **fields}) + "\n")
            try:
                self._events.flush()
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                if not self._waits:
                    print(f"{self._events.name}: {error.strerror}; events wait for room", file=sys.stderr, flush=True)
                self._waits = True
            else:
                self._waits = False
        self._step = fields.get("step", self._step)
        if kind in _SHOWN_AS_TEXT:
            name, field = _SHOWN_AS_TEXT[kind]
            self._text(self._step, name, str(fields[field]))

    @property
    def _writes(self) -> bool:
        return self._main and (self._watch is None or self._watch.newer_copy() is None)

    def restarted(self, step: int) -> None:
        """Add a point to the curve of how often the run went on, or began anew, behind an earlier attempt, and what
        that ended with.
        """
        if self._main:
            self.scalars(step, {"run/restarts": float(self._earlier_attempts)})
            if self._last_failure is not None:
                self._text(step, "run/last_error", self._last_failure)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add a point to each curve; None (not known on this device) adds none.

        Where the disk is full, points are lost until there is room again.

        Raises MachineError when the points, or earlier ones, cannot be written for another reason.
        """
        if not self._writes:
            return
        with self._without_room_lost(step):
            for name, value in values.items() if self._has_board(step) else ():
                if value is not None:
                    self._board.add_scalar(name, value, step)

    def _text(self, step: int, name: str, text: str) -> None:
        """As a point of `scalars`, under TensorBoard's texts."""
        if self._writes:
            with self._without_room_lost(step):
                if self._has_board(step):
                    self._board.add_text(name, text, step)

    def _has_board(self, step: int) -> bool:
        if self._board is None and time.monotonic() >= self._try_again_at:
            self._board = SummaryWriter(str(self._board_folder), purge_step=step)
        return self._board is not None

    @contextmanager
    def _without_room_lost(self, step: int | None = None) -> Iterator[None]:
        """A full disk inside drops the writer of curves, whose thread it ends, and says so once."""
        with _explained(str(self._board_folder)):
            try:
                yield
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                self._board, self._try_again_at = None, time.monotonic() + SECONDS_BETWEEN_WRITERS
                if not self._told_of_lost_points:
                    where = "" if step is None else f" from about step {step} on"
                    print(
                        f"{self._board_folder}: {error.strerror}; points of curves{where} are lost until there is room",
                        file=sys.stderr,
                        flush=True,
                    )
                self._told_of_lost_points = True

    def layers(self, step: int, stats: Sequence[Mapping[str, float]]) -> None:
        """Add each layer's statistics: curves `memory/<statistic>/layer<number>`, and an event where there are any."""
        self.scalars(
            step, {f"memory/{key}/layer{n:02d}": v for n, layer in enumerate(stats) for key, v in layer.items()}
        )
        if any(stats):
            self.event("memory", step=step, layers=[dict(layer) for layer in stats])

    def progress(
        self,
        step: int,
        loss: float,
        rate: float,
        tokens_per_second: float,
        seconds_left: float,
        *,
        phase: str | None = None,
    ) -> None:
        """Show where the run stands: one line written over on a terminal, a line every few seconds elsewhere.

        Args:
            seconds_left: of the phase, where one is named.
        """
        if not self._main:
            return
        terminal, now = sys.stdout.isatty(), time.monotonic()
        if not terminal and now - self._shown < SECONDS_BETWEEN_LINES and step < self._total_steps:
            return
        self._shown = now
        title, end = (self._name, "left") if phase is None else (f"{self._name} {phase}", "left of the phase")
        line = (
            f"{title}  step {step}/{self._total_steps} ({100 * step / self._total_steps:.1f} %)  loss {loss:.4f}  "
            f"lr {rate:.2e}  {tokens_per_second:,.0f} tokens/s  {duration(seconds_left)} {end}"
        )
        if terminal:
            print(f"\r{line.ljust(self._width)}", end="", flush=True)
            self._width = len(line)
        else:
            print(line, flush=True)

    def expect(self, total_steps: int) -> None:
        """From now on the run is to end at this step."""
        self._total_steps = total_steps

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self._main:
            print(f"\n{text}" if self._width else text, flush=True)
            self._width = 0

    def close(self) -> None:
        """Write out what is buffered and close the files. Raises MachineError when it cannot be written."""
        if not self._main:
            return
        try:
            with self._without_room_lost():
                if self._board is not None:
                    self._board.close()
        finally:
            with _explained(self._events.name):
                self._events.close()


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, of all its attempts, in the order in which they were written; none where it has not begun.

    What a killed attempt left of a line is no event. Raises UserError when the file cannot be read.
    """
    path = folder / EVENTS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


@contextmanager
def _explained(place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(f"{place}: {error.strerror or error}; make room and resume") from error


class _ThreadErrors:
    """Called with an exception that ended a thread: hands it on with the step that the run was at, unless it is an
    OSError of TensorBoard's writer.
    """

    def __init__(self, others: Callable[[threading.ExceptHookArgs], Any], log: RunLog) -> None:
        self._others, self._log = others, log

    @classmethod
    def hook(cls, log: RunLog) -> None:
        """From now on it is called, for this run."""
        before = threading.excepthook
        threading.excepthook = cls(before._others if isinstance(before, cls) else before, log)

    def __call__(self, arguments: threading.ExceptHookArgs) -> None:
        # The writer keeps the error and raises it from the next call, in the thread that can explain it.
        writers = type(arguments.thread).__module__ == EventFileWriter.__module__
        if not (writers and isinstance(arguments.exc_value, OSError)):
            if arguments.exc_value is not None:
                note_step(arguments.exc_value, self._log.step)
            self._others(arguments)


def _ends_inside_a_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _attempts_in(path: Path) -> tuple[int, str | None]:
    """How often a run began or went on, by its events, and the message of its last error or crash; None where it was
    begun again since, or had none.
    """
    attempts, last = 0, b""
    if path.exists():
        with open(path, "rb") as file:
            for line in file:
                if line.startswith((b'{"event": "start"', b'{"event": "resume"')):
                    attempts, last = attempts + 1, b""
                elif line.startswith((b'{"event": "error"', b'{"event": "crash"')):
                    last = line
    try:
        return attempts, str(json.loads(last)["message"]) if last else None
    except (ValueError, KeyError):  # a killed process left but a part of it
        return attempts, None


class Stopwatch:
    """Seconds spent in steps since the last reading, and on average; evaluations and checkpoints are left out."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._seconds = self._all_seconds = 0.0
        self._steps = self._all_steps = 0

    def start(self) -> None:
        """A step begins."""
        self._since = time.perf_counter()

    def stop(self, steps: int = 1) -> None:
        """The step is over (0 steps: only the time counts)."""
        if self._since is None:
            raise RuntimeError("the stopwatch was not started")
        self._seconds += time.perf_counter() - self._since
        self._steps += steps
        self._since = None

    def lap(self) -> float:
        """Mean seconds of a step since the last lap; starts the next lap."""
        self._all_seconds, self._all_steps = self._all_seconds + self._seconds, self._all_steps + self._steps
        mean = self._seconds / max(self._steps, 1)
        self._seconds, self._steps = 0.0, 0
        return mean

    @property
    def mean(self) -> float:
        """Mean seconds of a step over all laps."""
        return self._all_seconds / max(self._all_steps, 1)


def duration(seconds: float) -> str:
    """Seconds as people read them: 42s, 12m 05s, 3h 20m, 2d 04h."""
    whole = max(0, math.ceil(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {whole % 60:02d}s" if minutes else f"{whole}s"
