"""In which order a stage of a pipeline runs its passes: one forward one backward (1F1B), for passes that hand a state
on, too.

A pass is one micro-batch, or one segment of one. Segments of a sequence hand their state on inside each stage, and
gradients flow back through a stretch of them: its backward passes go from the last to the first, and begin when all its
forward passes are done. For stretches of one pass this is 1F1B as PipeDream-flush and Megatron-LM know it (Narayanan et
al. 2021, arXiv 2104.04473, section 2.2); for longer ones the warm-up is longer by the stretch, and the bubble stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Step = tuple[Literal["forward", "backward"], int]
"""What a stage does next, and with which pass."""


@dataclass(frozen=True)
class Pass:
    """What one stage runs at a time."""

    sequence: int
    """The micro-batch it belongs to."""

    segment: int
    """Its place in it."""

    begins_stretch: bool
    """No gradient flows to the pass before."""

    ends_stretch: bool
    """No gradient comes from the pass behind."""


def plan_passes(sequences: int, segments: int, truncate_every: int | None) -> list[Pass]:
    """The passes of a step in the order in which they go forward.

    Args:
        sequences: micro-batches, of so many `segments` each (1: they are run whole).
        truncate_every: gradients stop behind every so many segments; None: nowhere within a sequence.
    """
    stretch = segments if truncate_every is None else truncate_every
    return [
        Pass(sequence, segment, segment % stretch == 0, (segment + 1) % stretch == 0 or segment == segments - 1)
        for sequence in range(sequences)
        for segment in range(segments)
    ]


def backward_order(passes: Sequence[Pass]) -> list[int]:
    """The numbers of the passes as they go backward: stretch by stretch, each from its last pass to its first."""
    order: list[int] = []
    stretch: list[int] = []
    for number, one in enumerate(passes):
        stretch.append(number)
        if one.ends_stretch:
            order += reversed(stretch)
            stretch = []
    return order


def steps_of_stage(passes: Sequence[Pass], stages: int, stage: int) -> Iterator[Step]:
    """What stage number `stage` does, in order.

    As many forward passes as the longest stretch has, and one for each stage behind this one, come before the first
    backward pass; then the two take turns. No stage waits for what another does later in this order, so neighbours that
    send without waiting never lock each other.
    """
    backward = backward_order(passes)
    longest, length = 0, 0
    for one in passes:
        length = 1 if one.begins_stretch else length + 1
        longest = max(longest, length)
    forward = 0
    for done, number in enumerate(backward):
        ready = min(len(passes), longest + stages - 1 - stage + done)
        while forward < ready:
            yield "forward", forward
            forward += 1
        yield "backward", number


def expected_bubble(stages: int, passes: int) -> float:
    """How long a stage stands idle in a step, over the time of its forward and backward passes, where all passes take
    as long: filling and draining cost one forward and one backward pass for every other stage.
    """
    return (stages - 1) / passes
