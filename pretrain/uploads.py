"""Copies of finished checkpoints go to a store beside the steps, and come back from it where a run's folder has none.

A thread of each rank uploads a share of the files. They agree in a process group of their own, which no other thread
uses, so that a store that is slow or gone keeps no save and no step waiting.
"""

from __future__ import annotations

import itertools
import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from parallel import process
from pretrain.agreement import SharedMachineError, SharedUserError
from pretrain.checkpoint_config import CheckpointConfig
from pretrain.checkpoint_store import PARTS_AT_ONCE, CheckpointStore, StoreError
from pretrain.checkpoints import (
    MANIFEST,
    STAYS,
    Checkpoints,
    FileEntries,
    SaveError,
    checkpoint_step,
    list_checkpoints,
    loud,
    parse_manifest,
)
from pretrain.durable import finished_file
from pretrain.fence import FencedOffError
from pretrain.metrics import RunLog
from pretrain.preemption import Preempted
from pretrain.priority import give_way

GROUP_MINUTES = 7 * 24 * 60.0
"""For which ranks wait for the slowest upload of them."""
GRACE_SECONDS = 5.0
"""Between asking an upload to end and leaving it behind."""
LAST_TRIES = 3
"""At the end of a run, where the newest checkpoint could not be uploaded."""
LAST_PAUSE_SECONDS = 5.0
"""Before each of them."""
_OVERDUE, _BUSY, _DONE = -1, 0, 1
"""How far a rank is with its uploads at a run's end; the least of all ranks' tells what they do."""


class _StoppedError(Exception):
    """The run ends before an upload is done."""


@dataclass(frozen=True)
class _Outcome:
    """How an upload ended."""

    checkpoint: str | None
    """None: any."""
    seconds: float
    failure: str | None = None
    alarm: str | None = None
    """What could not be removed from the store."""


class Uploads(AbstractContextManager["Uploads"]):
    """Uploads what a run's folder holds and the store does not: what is left there when the context is entered, and
    what `begin` finds. Methods are called by all ranks at the same step, but for `holds`.

    When the context is left without an error, or on a request to stop, uploads are waited for, so long as the config
    says; without an error, as long as pieces of any rank are sent, too, and the newest checkpoint is tried again where
    it is missing. Where it still is then, all ranks raise SharedMachineError, or Preempted where they were asked to
    stop while they waited; FencedOffError where another copy of the run has taken the folder over by then.

    Args:
        checkpoints: the run's, with a group that nothing else uses.
        config: what it is asked for.
        log: where rank 0 tells of uploads and failures.
        feed: keeps the watchdog quiet while they are waited for.
        asked: the signal that asks the run to stop, the same on all ranks; see StopRequests.agreed.
        then: what follows an upload that failed, as it is told.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        store: CheckpointStore,
        config: CheckpointConfig,
        log: RunLog,
        feed: Callable[[str], None],
        asked: Callable[[], signal.Signals | None],
        *,
        then: str = "The run goes on; what is not uploaded is tried again behind the next save, and not removed before",
    ) -> None:
        self._checkpoints, self._store, self._config, self._log = checkpoints, store, config, log
        self._feed, self._agreed_signal, self._then = feed, asked, then
        self._held: set[str] = set()
        self._is_fenced_off = False
        self._missing: str | None = None
        """Why the newest checkpoint is not in the store; the same on all ranks."""
        self._asked: queue.SimpleQueue[Literal["upload", "finish", "end"]] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._taken: dict[str, float] = {}
        """Pieces that the store has taken of files of this rank, in the try that came furthest with each."""
        self._moved = time.monotonic()
        """When one more was taken than ever before: tries that begin anew and fail again are no progress."""
        # A daemon: a store that hangs must not keep the process.
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)

    def __enter__(self) -> Uploads:
        self._thread.start()
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._asked.put("finish" if kind is None else "end")
        asked, is_done = None, True
        try:
            if kind is None:
                asked, is_done = self._wait_for_all()
            else:
                self._wait(self._config.upload_wait_seconds if issubclass(kind, Preempted) else 0.0)
        finally:
            self._stop.set()
        self._wait(GRACE_SECONDS)  # after an error that is this rank's alone, it may wait for others
        if error is None or isinstance(error, Preempted):
            self.look()
        if isinstance(error, Preempted) and self._thread.is_alive() and self._checkpoints.world.is_main:
            loud(
                "whether the last checkpoint is uploaded is not known: uploads to "
                f"{self._store.location} are not done {self._config.upload_wait_seconds:g} s behind the stop "
                f"(checkpoint.upload_wait_seconds); {self._later}"
            )
        if kind is None:
            self._require_done(asked, is_done)

    def begin(self) -> None:
        """Upload what is not uploaded yet, newest first, behind what is asked for already."""
        self._asked.put("upload")

    def look(self) -> None:
        """Tell how the uploads ended that have since the last look."""
        while not self._outcomes.empty():
            outcome = self._outcomes.get()
            where: dict[str, Any] = {"seconds": outcome.seconds}
            if outcome.checkpoint is not None:
                where["step"] = checkpoint_step(Path(outcome.checkpoint))
                where["checkpoint"] = self._store.locate(outcome.checkpoint)
            if outcome.failure is None:
                self._log.event("upload", **where)
            else:
                self._log.event("upload_failed", **where, message=outcome.failure)
                loud(f"{outcome.checkpoint or 'checkpoints'} not uploaded: {outcome.failure}. {self._then}")
            if outcome.alarm is not None:
                self._log.event("upload_alarm", **where, message=outcome.alarm)
                loud(f"older copies are not removed: {outcome.alarm}; the next upload tries it again")

    def holds(self, checkpoint: str) -> bool:
        """Whether the store has this checkpoint, or as many newer ones as it keeps, as far as rank 0 knows."""
        return checkpoint in self._held

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._feed(f"uploads of checkpoints to {self._store.location}")
            self._thread.join(min(1.0, max(0.0, deadline - time.monotonic())))

    @property
    def _later(self) -> str:
        folder = self._checkpoints.folder
        return (
            f"it is whole in {folder}; start the command again to try once more, or upload it without the run by "
            f"`python -m tools.checkpoint upload {folder.parent}`"
        )

    def _wait_for_all(self) -> tuple[signal.Signals | None, bool]:
        """Wait for the uploads of all ranks, as long as the end of a run may take, or a stop once one is asked for. The
        signal that did, and whether all are through; the same on all ranks, which call it together.
        """
        asked, begun, stop_at, limit = None, time.monotonic(), math.inf, self._config.upload_end_wait_seconds
        quiet = 0.0
        while True:
            self._feed(f"uploads of checkpoints to {self._store.location}")
            self._thread.join(min(1.0, max(0.0, min(limit - quiet, stop_at - time.monotonic()))))
            if asked is None and (asked := self._agreed_signal()) is not None:
                stop_at = time.monotonic() + self._config.upload_wait_seconds
            quiet = self._quiet_seconds(begun)
            is_over = quiet >= limit or time.monotonic() >= stop_at
            own = _DONE if not self._thread.is_alive() else _OVERDUE if is_over else _BUSY
            if (progress := process.lowest(own, self._checkpoints.world.device)) != _BUSY:
                return asked, progress == _DONE

    def _quiet_seconds(self, begun: float) -> float:
        """For how long the store has taken no piece of any rank, since `begun` at most; the same on all ranks."""
        own = int(1000 * (time.monotonic() - max(begun, self._moved)))
        return process.lowest(own, self._checkpoints.world.device) / 1000

    def _require_done(self, asked: signal.Signals | None, is_done: bool) -> None:
        """Raise what a run without a copy of its end ends with."""
        if is_done and self._missing is None:
            return
        if is_done:
            failure = f"the last checkpoint is not uploaded: {self._missing}"
        else:
            limit = f"after {self._config.upload_end_wait_seconds:g} s (checkpoint.upload_end_wait_seconds)"
            limit = limit if asked is None else f"when {asked.name} asked the run to stop"
            uploads = f"uploads to {self._store.location} are not done {limit}"
            if asked is None:
                uploads = f"nothing more was taken, and {uploads}"
            failure = f"whether the last checkpoint is uploaded is not known: {uploads}"
        failure += f"; {self._later}"
        if asked is None:
            raise SharedMachineError(failure)
        self._log.event("upload_failed", message=failure)
        self._log.event("preempt", signal=asked.name, checkpoint=None)
        if self._checkpoints.world.is_main:
            loud(failure)
        raise Preempted(asked.name)

    def _run(self) -> None:
        give_way()
        try:
            while (asked := self._asked.get()) == "upload":
                self._missing = self._upload_missing()
            tries = LAST_TRIES if asked == "finish" else 0
            while self._missing is not None and tries > 0:  # what it depends on is the same on all ranks
                self._stop.wait(LAST_PAUSE_SECONDS)
                self._missing = self._upload_missing()
                tries -= 1
        except RuntimeError as error:  # of the process group: a rank is gone, or has left its upload behind
            self._missing = f"the ranks have lost each other ({error})"
            if self._checkpoints.world.is_main:
                self._tell(_Outcome(None, 0.0, f"nothing more is uploaded: the ranks have lost each other ({error})"))

    def _upload_missing(self) -> str | None:
        """Upload what rank 0 finds in the folder and not in the store; every rank's thread calls it. Why the newest is
        not there then, the same on all ranks; None where it is, or is another copy's of the run to upload.
        """
        keep = self._config.upload_keep
        newest, names, replaced = list[str](), list[str](), list[str]()

        def find() -> None:
            found = list_checkpoints(self._checkpoints.folder)
            newest.extend(path.name for path in found[:1])
            # Older ones would be removed from the store again as soon as they are there.
            old = found[len(found) if keep is None else keep :]
            replaced.extend(path.name for path in old if not (path / STAYS).exists())
            names.extend(path.name for path in found if path.name not in replaced and not self.holds(path.name))

        is_main = self._checkpoints.world.is_main
        error = self._attempt(find) if is_main else None
        if error is not None:
            self._tell(_Outcome(None, 0.0, error))
        newest, names, error = process.broadcast_object((newest, names, error), self._checkpoints.group)
        for name in names:
            failure = self._upload(name)
            if failure is not None:
                return failure if name in newest and not self._is_fenced_off else None
        self._held.update(replaced)
        return error

    def _upload(self, name: str) -> str | None:
        """Upload a checkpoint, if the store does not have it; every rank's thread calls it. Why that failed, if it did,
        the same on all ranks.
        """
        start, group, world = time.perf_counter(), self._checkpoints.group, self._checkpoints.world
        folder = self._checkpoints.folder / name
        files, error = process.broadcast_object(self._prepare(folder) if world.is_main else ([], None), group)
        if files and error is None:
            error = process.first_error(
                self._attempt(lambda: self._put(folder, files[world.rank :: world.size])), group
            )
        alarm = None
        if files and error is None and world.is_main:
            error = self._attempt(lambda: self._complete(folder))
            alarm = None if error else self._attempt(lambda: self._remove_old(name))
        error, self._is_fenced_off = process.broadcast_object((error, self._is_fenced_off), group)
        if error is None:
            self._taken.clear()
        if world.is_main and error is None:
            self._held.add(name)
        if world.is_main and (files or error):
            self._tell(_Outcome(name, time.perf_counter() - start, error, alarm))
        return error

    def _tell(self, outcome: _Outcome) -> None:
        if not self._is_fenced_off:  # then the log is another copy's, and the next save says why
            self._outcomes.put(outcome)

    def _prepare(self, folder: Path) -> tuple[list[str], str | None]:
        """The files to upload, none where the store has them all, or why they cannot be; rank 0's."""
        files: list[str] = []

        def prepare() -> None:
            text = (folder / MANIFEST).read_text(encoding="utf-8")
            if self._store.manifest(folder.name) != text:
                files.extend(sorted(parse_manifest(text)))
                self._store.withdraw(folder.name)  # what is there is of another attempt, and mixes with this one now

        return files, self._attempt(prepare)

    def _put(self, folder: Path, files: list[str]) -> None:
        for file in files:
            place, drawn = f"{folder.name}/{file}", itertools.count()

            def keep_on(place: str = place, drawn: Iterator[int] = drawn) -> None:
                self._keep_on()
                self._note(place, next(drawn) - PARTS_AT_ONCE)  # so many may be on their way still

            self._store.put(folder.name, file, folder / file, keep_on)
            self._note(place, math.inf)

    def _note(self, place: str, taken: float) -> None:
        if taken > self._taken.get(place, 0):
            self._taken[place], self._moved = taken, time.monotonic()

    def _complete(self, folder: Path) -> None:
        self._keep_on()
        if (folder / STAYS).exists():
            self._store.put(folder.name, STAYS, b"")
        if self._checkpoints.fence is not None:
            self._checkpoints.fence.check()
        self._store.put(folder.name, MANIFEST, (folder / MANIFEST).read_bytes())
        if all((checkpoint_step(Path(name)) or 0) <= (checkpoint_step(folder) or 0) for name in self._held):
            self._store.name_latest(folder.name)

    def _remove_old(self, newest: str) -> None:
        if self._config.upload_keep is not None:
            self._store.remove_old(self._config.upload_keep, newest)

    def _keep_on(self) -> None:
        if self._stop.is_set():
            raise _StoppedError("the run ends before it is done")

    def _attempt(self, action: Callable[[], None]) -> str | None:
        """Why an action failed, None where it did not."""
        try:
            action()
        except FencedOffError as fenced:
            self._is_fenced_off = True
            return str(fenced)
        except (StoreError, OSError, ValueError, _StoppedError) as error:
            return str(error)
        return None


def download_newer(
    checkpoints: Checkpoints,
    store: CheckpointStore,
    than: Path | None,
    report: Callable[[str], None],
    feed: Callable[[str], None],
    rest: Callable[[], None],
) -> Path | None:
    """The newest whole checkpoint of a store that is of a later step than `than`, downloaded into the run's folder; or
    `than`. Every rank calls it, and fetches a share of the files.

    Args:
        report: told of what is damaged.
        feed: tells the watchdog what this rank begins.
        rest: tells it that this rank waits for others, whose own watchdogs look at what they do.

    Raises:
        SharedMachineError: the store cannot be read, and there is nothing else to go on from; or the checkpoint in it
            cannot be read or written.
        SharedUserError: it has newer checkpoints, none of them whole, and there is nothing else to go on from.
    """
    names, error = process.broadcast_object(_newer(store, than) if checkpoints.world.is_main else ([], None))
    if error is not None and than is None:
        raise SharedMachineError(
            f"whether there is a checkpoint to go on from is not known: {error}; start again when the store can be "
            "read, or without checkpoint.upload"
        )
    if error is not None:
        _say(checkpoints, f"{error}: whether it has a newer checkpoint than {than} is not known; the run goes on")
    for name in names:
        found = _download(checkpoints, store, name, report, feed, rest)
        if found is not None:
            _say(checkpoints, f"{found} is downloaded from {store.location}: this folder has no newer one")
            return found
    if names and than is None:
        raise SharedUserError(
            f"no checkpoint in {store.location} is whole; restore one from a copy, or give another checkpoint.upload "
            "to start over"
        )
    return than


def _say(checkpoints: Checkpoints, message: str) -> None:
    if checkpoints.world.is_main:
        loud(message)


def _newer(store: CheckpointStore, than: Path | None) -> tuple[list[str], str | None]:
    step = -1 if than is None else checkpoint_step(than) or 0
    try:
        return [name for name in store.checkpoints() if (checkpoint_step(Path(name)) or 0) > step], None
    except StoreError as error:
        return [], str(error)


def _download(
    checkpoints: Checkpoints,
    store: CheckpointStore,
    name: str,
    report: Callable[[str], None],
    feed: Callable[[str], None],
    rest: Callable[[], None],
) -> Path | None:
    """None where it is damaged."""
    files, stays, error, is_damaged = process.broadcast_object(
        _describe(store, name) if checkpoints.world.is_main else ({}, False, None, False)
    )
    if is_damaged:
        report(f"{error}: it is not used")
        return None
    if error is not None:
        raise SharedMachineError(f"{error}; start again when the store can be read")
    world, wrong = checkpoints.world, list[str]()
    own = sorted(files)[world.rank :: world.size]

    def write(folder: Path) -> Iterator[Path]:
        fetch(folder)
        if wrong:
            raise OSError("; ".join(wrong))
        for file in own:
            feed(f"the checksum of {folder / file}")
            yield folder / file

    def fetch(folder: Path) -> None:
        for file in own:
            place = store.locate(name, file)
            try:
                store.fetch(name, file, folder / file, lambda place=place: feed(f"the download of {place}"))
            except FileNotFoundError:
                wrong.append(f"{place} is missing")
                continue
            except StoreError as failure:
                raise OSError(str(failure)) from failure
            feed(f"the checksum of {folder / file}")
            if finished_file(folder / file) != files[file]:
                wrong.append(f"{place} is altered (its size or sha256 is not the manifest's)")

    step, size = checkpoint_step(Path(name)), sum(int(files[file]["bytes"]) for file in own)
    assert step is not None, "the store lists no others"
    try:
        # With nobody to wait for, nobody would watch what follows.
        waits = rest if world.size > 1 else lambda: None
        written = checkpoints.write(step, write, num_bytes=size, report=report, waits=waits)
        feed(f"the checkpoint of step {step} out of what was downloaded")
        return checkpoints.publish(written, stays=stays, report=report)
    except SaveError as failure:
        feed(f"what follows {name}, which was not downloaded")
        damaged = [problem for part in process.gather_objects(wrong) for problem in part]
        if not damaged:
            raise SharedMachineError(f"{store.locate(name)} cannot be downloaded: {failure}") from failure
    report(f"checkpoint {store.locate(name)} is damaged and not used: {'; '.join(damaged)}")
    return None


def _describe(store: CheckpointStore, name: str) -> tuple[FileEntries, bool, str | None, bool]:
    """A copy's files, whether it stays, what is wrong with it, and whether that is damage; rank 0's."""
    try:
        return parse_manifest(store.manifest(name) or ""), store.has(name, STAYS), None, False
    except StoreError as error:
        return {}, False, str(error), False
    except ValueError as error:
        return {}, False, f"{store.locate(name, MANIFEST)} is {error}", True
