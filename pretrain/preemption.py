"""Stopping on request: a signal to any rank ends all of them behind the same step, with a checkpoint.

SIGUSR1 is what Slurm sends ahead of a time limit, SIGTERM what preemption, launchers and `kill` send. Either is noted
and nothing more; between two steps the ranks tell each other what they noted. They do so over a group of their own,
on the host: a few bytes, which no GPU waits for, and whatever is under way in the groups of the training goes on.

Rank 0 tells there, too, when the run's folder is another copy's by now: this copy ends at once, and writes nothing.
"""

from __future__ import annotations

import signal
from types import FrameType

import torch

from parallel.process import World, lowest, side_group
from pretrain.fence import FencedOffError
from pretrain.fence_watch import FenceWatch

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""What asks a run to stop. SIGINT is not among them: Ctrl-C ends a run at once."""

_OVERTAKEN = 1000
"""What rank 0 says instead of a signal, above all of them."""

_noted: list[int] = []


class Preempted(Exception):
    """Raised on every rank alike when the run has stopped on request and all of it is on the disk."""


def listen() -> None:
    """Note `STOP_SIGNALS` from now on, also those that were held back while this process started."""
    for number in STOP_SIGNALS:
        signal.signal(number, _note)
        signal.siginterrupt(number, False)  # what waits or writes outside of Python goes on, and sees no error
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _note(number: int, frame: FrameType | None) -> None:
    if number not in _noted:
        _noted.append(number)


class StopRequests:
    """What the signals of all ranks come to, and whether the run is still this copy's. Every rank makes it and asks it
    together with the others.

    Args:
        timeout_minutes: after how long a rank that waits for a lost one gives up.
        watch: rank 0's, of the fence that this copy took.
    """

    def __init__(self, world: World, *, timeout_minutes: float, watch: FenceWatch | None = None) -> None:
        self._group = None if world.size == 1 else side_group(timeout_minutes)
        self._watch = watch

    def agreed(self) -> signal.Signals | None:
        """The signal that asks the run to stop, the same on every rank; None when no rank got one.

        Raises FencedOffError on every rank when another copy of the run has taken its folder over.
        """
        newer = None if self._watch is None else self._watch.newer_copy()
        own = _OVERTAKEN if newer is not None else _noted[0] if _noted else 0
        number = own if self._group is None else -lowest(-own, torch.device("cpu"), self._group)
        if number == _OVERTAKEN:
            raise newer or FencedOffError("another copy of this run took its folder over, as rank 0 says")
        return signal.Signals(number) if number else None
