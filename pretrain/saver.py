"""Saving beside the steps: what a checkpoint holds is copied to the host's memory, and a thread of each rank writes it
while the run goes on.

The threads of all ranks write the same checkpoint and agree on it in a process group of their own, which no other
thread uses: a full disk can't be told in a file. Steps wait for them only where the next checkpoint is due before the
last one is done. How a save ended becomes known to all ranks at the same step: each asks at its boundary whether all
threads are through, which is one small collective, and only while there is a save to wait for.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from parallel import process
from parallel.host_copies import HostCopies, SavedFile
from parallel.watchdog import Watchdog
from pretrain.checkpoint_config import CheckpointConfig
from pretrain.checkpoints import Checkpoints, SaveError, Written, loud
from pretrain.fence import FencedOffError
from pretrain.metrics import RunLog
from pretrain.priority import give_way
from pretrain.resume import TrainerState

_BROKEN, _BUSY, _DONE = -1, 0, 1
"""How far a rank's thread is with a save; the least of all ranks' tells what they do."""

_Finished = tuple[Path, float]
"""A checkpoint, and in how many seconds it was written."""
T = TypeVar("T")


@dataclass
class _Pending:
    """A save that is under way, or that nobody has looked at yet."""

    step: int
    tokens: int
    written: Future[_Finished]
    stall_seconds: float
    """For how long steps have waited for it so far."""
    alarms: list[str] = field(default_factory=list)
    """What went wrong in the checkpoints' folder, and is no failure of the save; rank 0's, complete once it is written.
    """


class SavingThreadError(RuntimeError):
    """Another rank's thread failed with an exception that no save explains; the message is its traceback."""


class Saver(AbstractContextManager["Saver"]):
    """Saves the checkpoints of a phase. Every method is called by all ranks at the same step; an error may leave the
    context of one rank alone.

    As a context manager it leaves no save behind: one that is under way is waited for, and told.

    Args:
        log: where rank 0 tells of saves and failures.
        watchdog: fed where a save is waited for.
        last_tokens: those of the checkpoint that the run goes on from; 0 where there is none.
    """

    def __init__(
        self, checkpoints: Checkpoints, config: CheckpointConfig, log: RunLog, watchdog: Watchdog, *, last_tokens: int
    ) -> None:
        self.checkpoints = checkpoints
        self.newest: Path | None = None
        """The checkpoint that was written last."""
        self._config, self._log, self._watchdog = config, log, watchdog
        self._last_tokens = last_tokens
        self._failed = self._failed_in_a_row = 0
        self._pending: _Pending | None = None
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=give_way)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.finish(must_succeed=True)
        except (SaveError, FencedOffError) as failure:
            if error is None:
                raise
            error.add_note(str(failure))
        finally:
            # A thread that waits for another rank's lost one may do so as long as that rank lives.
            self._thread.shutdown(wait=not isinstance(error, SavingThreadError))

    def save(
        self,
        state: TrainerState,
        files: Callable[[HostCopies | None], Sequence[SavedFile]],
        *,
        stays: bool,
        wait: bool,
        spare: int = 0,
    ) -> None:
        """Save the run as it stands, once the save before is done.

        Args:
            files: this rank's, to be written. It is given what the values are to be copied to, or None where they are
                written at once.
            stays: whether it is kept for good, also where the recipe does not ask for it.
            wait: until it is written; then a failure ends the run.
            spare: how many more than `checkpoint.keep` are left.

        Raises:
            SaveError: it was not written and `wait`, or `checkpoint.max_failed_saves` in a row were not.
            FencedOffError: another copy of the run has taken the folder over.
        """
        self.finish()
        every = self._config.keep_every_tokens
        stays = stays or (every is not None and state.tokens // every > self._last_tokens // every)
        start = time.perf_counter()
        beside = self._config.asynchronous
        made = files(self._copies if beside else None)
        self._copies.wait()
        alarms: list[str] = []
        write = partial(_write, self.checkpoints, state.step, made, alarms.append)
        publish = partial(_publish, self.checkpoints, alarms.append, stays=stays, spare=spare)
        is_staged = self.checkpoints.staging is not None
        written: Future[Any]
        if beside:
            written = self._thread.submit(lambda: publish(write()))
        elif not is_staged:
            written = _done(lambda: publish(write()))
        elif (staged := _done(write)).exception() is None:  # steps go on while it becomes a checkpoint
            written = self._thread.submit(publish, staged.result())
        else:
            written = staged
        self._pending = _Pending(state.step, state.tokens, written, time.perf_counter() - start, alarms)
        if wait or not (beside or is_staged):
            self.finish(must_succeed=wait)

    def look(self) -> None:
        """Between two steps: tell how the save under way ended, if all ranks are through with it. Raises as `save`, and
        where a rank's thread ended with any other exception, that one, and SavingThreadError on the other ranks.
        """
        if self.checkpoints.copies is not None:
            self.checkpoints.copies.look()
        pending = self._pending
        if pending is None:
            return
        start = time.perf_counter()
        progress = process.lowest(_progress(pending.written), self.checkpoints.world.device)
        pending.stall_seconds += time.perf_counter() - start
        if progress == _BROKEN:
            self._end_for_all(pending)
        if progress == _DONE:
            self.finish()

    def _end_for_all(self, pending: _Pending) -> NoReturn:
        """Raise what ended a rank's thread on that rank, and its traceback on the others, whose threads wait for it."""
        self._pending = None
        own = pending.written.exception() if _progress(pending.written) == _BROKEN else None
        text = None if own is None else "".join(traceback.format_exception(own))
        message = process.first_error(text)
        if own is not None:
            raise own
        raise SavingThreadError(f"the thread that writes the checkpoint of step {pending.step} failed:\n{message}")

    def finish(self, *, must_succeed: bool = False) -> None:
        """Wait for the save under way, if there is one, and tell how it ended. Raises as `save`.

        Args:
            must_succeed: whether its failure ends the run.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if not pending.written.done():
            self._watchdog.feed(f"the checkpoint of step {pending.step}")
        start = time.perf_counter()
        try:
            folder, seconds = pending.written.result()
        except SaveError as failure:
            self._sound(pending)
            self._count_failure(pending, failure, must_succeed)
            return
        self._sound(pending)
        pending.stall_seconds += time.perf_counter() - start
        self.newest, self._last_tokens, self._failed_in_a_row = folder, pending.tokens, 0
        seconds_of = {"stall_seconds": pending.stall_seconds, "write_seconds": seconds}
        self._log.event("save", step=pending.step, tokens=pending.tokens, checkpoint=str(folder), **seconds_of)
        self._draw(pending.step, {f"checkpoint/{name}": value for name, value in seconds_of.items()})
        if self.checkpoints.copies is not None:
            self.checkpoints.copies.begin()

    def _sound(self, pending: _Pending) -> None:
        for alarm in pending.alarms:
            self._log.event("save_alarm", step=pending.step, tokens=pending.tokens, message=alarm)
            loud(f"step {pending.step}: {alarm}")

    def _count_failure(self, pending: _Pending, failure: SaveError, must_succeed: bool) -> None:
        """Raises SaveError where it ends the run."""
        self._failed += 1
        self._failed_in_a_row += 1
        most = self._config.max_failed_saves
        self._log.event("save_failed", step=pending.step, tokens=pending.tokens, message=str(failure))
        self._draw(pending.step)
        if must_succeed:
            raise failure
        if self._failed_in_a_row >= most:
            raise SaveError(
                f"step {pending.step}: {failure}; {most} in a row end the run (checkpoint.max_failed_saves)"
            )
        if self.checkpoints.world.is_main:
            loud(
                f"step {pending.step}: {failure}. The run goes on; the next checkpoint that is due is tried, and "
                f"{most - self._failed_in_a_row} more that fail in a row end the run (checkpoint.max_failed_saves)"
            )

    def _draw(self, step: int, values: dict[str, float] | None = None) -> None:
        self._log.scalars(step, {**(values or {}), "checkpoint/failed_saves": float(self._failed)})


def _write(
    checkpoints: Checkpoints, step: int, files: Sequence[SavedFile], report: Callable[[str], None]
) -> tuple[Written, float]:
    """What was written, and since when."""
    start, size = time.perf_counter(), sum(file.num_bytes for file in files)
    return checkpoints.write(
        step, lambda folder: [file.write(folder) for file in files], num_bytes=size, report=report
    ), start


def _progress(written: Future[_Finished]) -> int:
    if not written.done():
        return _BUSY
    is_told = written.exception() is None or isinstance(written.exception(), SaveError | FencedOffError)
    return _DONE if is_told else _BROKEN


def _publish(
    checkpoints: Checkpoints, report: Callable[[str], None], begun: tuple[Written, float], *, stays: bool, spare: int
) -> _Finished:
    written, start = begun
    return checkpoints.publish(written, stays=stays, spare=spare, report=report), time.perf_counter() - start


def _done(action: Callable[[], T]) -> Future[T]:
    """As from a thread that is through."""
    future: Future[T] = Future()
    try:
        future.set_result(action())
    except SaveError as failure:
        future.set_exception(failure)
    return future
