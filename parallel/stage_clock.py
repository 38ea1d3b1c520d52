"""How long a stage of a pipeline works and how long it waits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StageSeconds:
    """Where the time of a step's passes went on one stage."""

    busy: float
    """Forward and backward passes."""

    again: float
    """Forward passes that were run again."""

    total: float
    """From the beginning of the first pass to the end of the last one, waiting included."""


class StageClock:
    """Takes times on the device's own clock, and does not wait for it until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks = [self._mark()]
        self._busy: list[tuple[int, int]] = []
        self._again: list[tuple[int, int]] = []

    @contextmanager
    def busy(self, *, again: bool = False) -> Iterator[None]:
        """What the block takes is work, and not waiting."""
        self._marks.append(self._mark())
        yield
        self._marks.append(self._mark())
        (self._again if again else self._busy).append((len(self._marks) - 2, len(self._marks) - 1))

    def seconds(self) -> StageSeconds:
        """All until now. Waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        busy, again = (sum(self._between(*span) for span in spans) for spans in (self._busy, self._again))
        return StageSeconds(busy, again, self._between(0, -1))

    def _mark(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: int, last: int) -> float:
        begin, end = self._marks[first], self._marks[last]
        if isinstance(begin, float):
            return end - begin
        return begin.elapsed_time(end) / 1000


def bubble(stages: list[StageSeconds]) -> float:
    """How long the stages of a pipeline stood idle on average, over the time of their forward and backward passes:
    what `pipeline_schedule.expected_bubble` expects. What is run again counts as neither.
    """
    total = max(stage.total for stage in stages)
    idle = sum(total - stage.busy - stage.again for stage in stages)
    return idle / sum(stage.busy for stage in stages)
