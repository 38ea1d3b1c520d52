"""What `python -m tools.trials run` says while it goes: a line for each run that ended, and what is left."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence

from pretrain.metrics import read_events
from tools.command import duration
from tools.trials.runner import Ended, Job
from tools.trials.runs import Run
from tools.trials.tables import value_text

LIVE_SECONDS = 1.0
START_SECONDS = 10.0
"""Of a run beside its training: two starts, and the probes. It is added where only the training's seconds are known."""


class Clock:
    """How long what is left will take: as long as the same trial took with another seed, or in proportion to work."""

    def __init__(self, workers: int, earlier: Iterable[tuple[Run, float]]) -> None:
        """`earlier`: runs that are done, and their seconds of training."""
        self._workers = workers
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._all_seconds = self._all_work = 0.0
        self._jobs: Sequence[Job] = ()
        self._waiting: tuple[Run, ...] = ()
        for run, seconds in earlier:
            self._note(run, seconds + START_SECONDS)

    def add(self, ended: Ended) -> None:
        """A run ended; failures say nothing of how long a run takes."""
        if ended.result is not None and ended.result.failed is None:
            self._note(ended.run, ended.seconds)

    def see(self, jobs: Sequence[Job], waiting: Iterable[Run]) -> None:
        """What is under way, and what waits."""
        self._jobs, self._waiting = tuple(jobs), tuple(waiting)

    def describe(self) -> str:
        """What is under way, for the live line."""
        under_way = ", ".join(f"{job.run.name} {_place(job)}" for job in self._jobs)
        return f"{self.left(len(self._jobs) + len(self._waiting))}: {under_way}"

    def left(self, number: int) -> str:
        """`number` of runs that have not ended, and how long they will take."""
        if number == 0:
            return "none left"
        seconds = [self._expected(run) for run in self._waiting]
        seconds += [max(self._expected(job.run) - job.seconds, 0.0) for job in self._jobs if not _has_ended(job)]
        if math.isnan(sum(seconds)):
            return f"{number} left"
        return f"{number} left, about {duration(max(sum(seconds) / self._workers, *seconds, 0.0))}"

    def _note(self, run: Run, seconds: float) -> None:
        self._seconds[run.path].append(seconds)
        self._all_seconds += seconds
        self._all_work += run.work

    def _expected(self, run: Run) -> float:
        """Seconds of a run; NaN where none has ended yet."""
        if same := self._seconds.get(run.path):
            return sum(same) / len(same)
        return run.work * self._all_seconds / self._all_work if self._all_work else math.nan


class LiveLine:
    """A line on a terminal that is written over; nothing elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = -math.inf

    @property
    def due(self) -> bool:
        """Whether it is time for a new one."""
        return self._terminal and time.monotonic() - self._shown >= LIVE_SECONDS

    def show(self, text: str) -> None:
        """Shows as much of the text as the terminal has room for."""
        self._shown = time.monotonic()
        room = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:room]}\x1b[K", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Removes the line."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _has_ended(job: Job) -> bool:
    return job.process is not None and job.process.popen.poll() is not None


def _place(job: Job) -> str:
    """How far a job is."""
    if job.phase == "probing":
        return "is probed"
    steps = [event["step"] for event in read_events(job.run.folder)[job.events_before :] if event["event"] == "step"]
    return f"step {steps[-1]} of {job.run.steps}" if steps else "starts"


def describe_ended(ended: Ended) -> str:
    """How a run ended, in a line; a failure with the last lines of its log."""
    head = f"{ended.run.name}  "
    minutes = f"{ended.seconds / 60:.1f} min"
    if ended.result is None:
        lines = "".join(f"\n  | {line}" for line in ended.last_lines)
        return f"{head}FAILED after {minutes}, {ended.failure}. Its last lines ({ended.log}):{lines}\n{head}failed"
    if ended.result.failed is not None:
        return f"{head}diverged after {minutes}: {ended.result.failed}"
    metric = ended.run.study.config.metric
    probes = (
        f"{name} {value_text(value, metric)}"
        for name, probe in ended.result.probes.items()
        if (value := getattr(probe, metric)) is not None
    )
    return f"{head}{', '.join(probes)}  {minutes}"
