"""Finds a rank that hangs: when a piece of work takes longer than it may, every thread's stack is printed and the
process ends, so that the launcher ends the job.

A rank that waits for another in a collective is as late as the one that it waits for, so all ranks of a job print their
stacks at about the same time: the one to look at is the one whose main thread is in no collective.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

EXIT_HUNG = 124
"""The exit code of a rank that the watchdog ended: that of timeout(1)."""

LINGER_SECONDS = 2.0
"""Between printing the stacks and the end: a launcher ends all ranks with the first; the others print theirs now."""

LAST_RESORT_SECONDS = 5.0
"""After this much longer the stacks are printed, and the process ended (with code 1), without Python: for a thread that
hangs holding the interpreter's lock."""

STACKS_SIGNAL = signal.SIGUSR2
"""Makes a rank print its stacks, whatever it is doing, and go on (see `show_stacks_when_asked`)."""

_STDERR = 2  # by number: a hanging thread may hold the lock of the stream


def show_stacks_when_asked() -> None:
    """From now on `STACKS_SIGNAL` shows this process's stacks, instead of ending it."""
    faulthandler.register(STACKS_SIGNAL, file=_STDERR, all_threads=True)


class Watchdog(AbstractContextManager["Watchdog"]):
    """Watches this process, inside a `with` block, from the first `feed` on.

    Args:
        seconds: the longest that a piece of work may take.
        rank, ranks: as they are named in the message.
        field: of the recipe, that `seconds` come from.
    """

    def __init__(self, seconds: float, *, rank: int, ranks: int, field: str = "parallel.step_timeout_seconds") -> None:
        self._seconds, self._field = seconds, field
        self._who = f"rank {rank} of {ranks}"
        self._doing = ""
        self._deadline = float("inf")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.rest()
        self._ended.set()
        self._thread.join()

    def feed(self, doing: str) -> None:
        """A piece of work begins, and the one before is done.

        Args:
            doing: what it is, for the message: "step 12".
        """
        self._doing, self._deadline = doing, time.monotonic() + self._seconds
        faulthandler.dump_traceback_later(self._seconds + LAST_RESORT_SECONDS, file=_STDERR, exit=True)

    def rest(self) -> None:
        """What comes now may take as long as it likes, until the next `feed`."""
        self._deadline = float("inf")
        faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def resting(self, then: str) -> Iterator[None]:
        """What is done inside may take as long as it likes, or is watched by another; behind it a piece of work begins.

        Args:
            then: what that is, as `feed` takes it.
        """
        self.rest()
        yield
        self.feed(then)

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, max(0.0, self._deadline - time.monotonic()))):
            if time.monotonic() >= self._deadline:
                self._end_process()

    def _end_process(self) -> None:
        message = (
            f"{self._who} hangs: {self._doing} is not done after {self._seconds:g} s "
            f"({self._field}); where its threads are:\n"
        )
        os.write(_STDERR, message.encode())
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        # A launcher that asks for stacks now would get the same again.
        faulthandler.register(STACKS_SIGNAL, file=os.open(os.devnull, os.O_WRONLY))
        time.sleep(LINGER_SECONDS)
        os._exit(EXIT_HUNG)
