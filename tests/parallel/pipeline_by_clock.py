"""A pipeline of stages that only take time, run by arithmetic: when each pass begins and ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.pipeline_schedule import Pass, steps_of_stage


@dataclass(frozen=True)
class Simulated:
    total: float
    """From the first pass of any stage to the end of the last one."""
    bubble: float
    """Idle time of a stage, averaged, over the time of its forward and backward passes."""


def simulate(passes: Sequence[Pass], stages: int, *, forward: float, backward: float, again: float) -> Simulated:
    """Every stage takes its steps in their order, each as soon as it is free and what it needs has arrived.

    Args:
        again: what running a pass forward again takes before its backward pass, for those that do not end a stretch.
    """
    left = [list(steps_of_stage(passes, stages, stage)) for stage in range(stages)]
    free, busy, ends = [0.0] * stages, [0.0] * stages, {}
    while any(left):
        moved = False
        for stage in range(stages):
            while left[stage]:
                kind, number = left[stage][0]
                before = stage - 1 if kind == "forward" else stage + 1
                needs = (kind, number, before)
                if 0 <= before < stages and needs not in ends:
                    break
                ready = free[stage] + (again if kind == "backward" and not passes[number].ends_stretch else 0.0)
                takes = forward if kind == "forward" else backward
                free[stage] = ends[kind, number, stage] = max(ready, ends.get(needs, 0.0)) + takes
                busy[stage] += takes
                left[stage].pop(0)
                moved = True
        assert moved, f"the stages wait for each other: {[steps[:1] for steps in left]}"
    total = max(free)
    repeated = again * sum(not one.ends_stretch for one in passes)
    return Simulated(total, sum(total - repeated - work for work in busy) / sum(busy))
