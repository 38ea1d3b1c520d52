"""Runs as processes: some at a time, each a training and then its probes, with one CPU thread.

The processes of a run are a group of their own (see launch.processes), which ends with this process, however it ends.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from launch.processes import ProcessGroup, RankCommand, RankProcess, SignalRelay, describe_exit
from pretrain.metrics import read_events
from tools.trials.outcome import THREADS, divergence, make_result
from tools.trials.results import Result, write_result
from tools.trials.runs import RECIPE_FILE, Run, read_trial_file

POLL_SECONDS = 0.1
LAST_LINES = 12
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGHUP came; all processes of the runs are ended."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(frozen=True)
class Ended:
    """A run that ended: with its result (also where it diverged), or as a failure, with its log's last lines."""

    run: Run
    seconds: float
    result: Result | None = None
    failure: str = ""
    log: Path | None = None
    last_lines: tuple[str, ...] = ()


@dataclass
class Job:
    """A run under way."""

    run: Run
    stack: ExitStack
    started: float = field(default_factory=time.monotonic)
    phase: Literal["training", "probing"] = "training"
    group: ProcessGroup | None = None
    process: RankProcess | None = None
    events_before: int = 0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def start(self) -> None:
        """Starts the training, or the probes where the training is done."""
        self.run.prepare()
        self.group = self.stack.enter_context(ProcessGroup())
        if self.run.is_trained():
            self._probe()
            return
        self.events_before = len(read_events(self.run.folder))
        self._spawn("training", ["-m", "pretrain", str(self.run.folder / RECIPE_FILE)])

    def advance(self) -> Ended | None:
        """How the run ended, if it has; starts the probes after the training."""
        if self.process is None:
            raise RuntimeError("the job was not started")
        code = self.process.popen.poll()
        if code is None:
            return None
        if code == 0 and self.phase == "training":
            self._probe()
            return None
        if code == 0:
            return Ended(self.run, self.seconds, self.run.result())
        if self.phase == "training":
            diverged = divergence(read_events(self.run.folder)[self.events_before :])
            if diverged is not None:
                result = make_result(self.run.folder, read_trial_file(self.run.folder), {}, failed=diverged)
                write_result(self.run.folder, result)
                return Ended(self.run, self.seconds, result)
        lines = tuple(self.process.last_lines()[-LAST_LINES:])
        return Ended(
            self.run, self.seconds, None, f"{self.phase}: {describe_exit(code)}", self.process.command.log, lines
        )

    def _probe(self) -> None:
        self._spawn("probing", ["-m", "tools.trials.probe", str(self.run.folder)])

    def _spawn(self, phase: Literal["training", "probing"], arguments: Sequence[str]) -> None:
        if self.group is None:
            raise RuntimeError("the job was not started")
        self.phase = phase
        log = self.run.folder / "logs" / f"{phase}.log"
        self.process = self.group.start(RankCommand(0, [sys.executable, *arguments], child_environment(), log))


def child_environment() -> dict[str, str]:
    """This process's environment for a run: one thread, and no launcher's variables, as it is a group of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment |= {f"{library}_NUM_THREADS": str(THREADS) for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}
    return environment | {"PYTHONUNBUFFERED": "1"}


def run_all(
    runs: Sequence[Run], workers: int, watch: Callable[[Sequence[Job], Iterable[Run]], None]
) -> Iterator[Ended]:
    """Runs all, `workers` at a time, in their order; yields each as it ends.

    Args:
        watch: is called some times a second with the jobs under way and the runs that wait.

    Raises:
        Interrupted: at a signal, after every process was ended.
        UserError: a file cannot be written or read; every process was ended.
    """
    waiting = deque(runs)
    jobs: list[Job] = []
    with SignalRelay() as relay, ExitStack() as everything:
        while waiting or jobs:
            if (number := relay.take()) is not None:
                raise Interrupted(number)
            while waiting and len(jobs) < workers:
                job = Job(waiting.popleft(), everything.enter_context(ExitStack()))
                jobs.append(job)
                job.start()
            for job in list(jobs):
                if (ended := job.advance()) is not None:
                    job.stack.close()
                    jobs.remove(job)
                    yield ended
            watch(jobs, waiting)
            time.sleep(POLL_SECONDS)
