"""Which layouts are compared with one process: all of the table, and the few of them that every change is tested by.

A trial is a small model trained for a few steps, in the table ten, fp32, from one seed, on the same rows in every
layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tests.model_cases import CASES

TENSOR, PIPELINE, SEQUENCE, DATA, STAGES = (1, 2), (1, 2, 4), (1, 2), (1, 2), (0, 1, 2, 3)
MOST_RANKS = 8
VARIANTS = ("mac", "mag", "mal", "lmm", "transformer-window")
MODES = ("whole", "segments", "streams")
"""Rows at once; by segments with the exact gradient; by segments with a truncated gradient, from state to state."""


@dataclass(frozen=True)
class Trial:
    """On the command line its fields' text, joined by commas."""

    case: str
    """Of tests.model_cases."""
    mode: str = "whole"
    stage: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence: int = 1
    data: int = 1
    layers: int = 2
    """Of the model."""
    steps: int = 10
    sharded: int = 0
    """1: norms are divided over tensor ranks."""

    def __str__(self) -> str:
        return ",".join(map(str, vars(self).values()))

    @classmethod
    def parse(cls, text: str) -> Trial:
        case, mode, *numbers = text.split(",")
        return cls(case, mode, *map(int, numbers))

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.sequence * self.data

    @property
    def alone(self) -> Trial:
        """The same training on one process."""
        return Trial(self.case, self.mode, layers=self.layers, steps=self.steps)

    @property
    def is_admitted(self) -> bool:
        """Whether recipes that ask for it are let pass."""
        is_mac = CASES[self.case]["variant"] == "mac"
        return (self.pipeline == 1 or self.stage < 2) and not (is_mac and self.sequence > 1)


def table() -> Iterator[Trial]:
    """All layouts of more than one rank, for each variant; rows by segments and streams with one stage."""
    for tensor, pipeline, sequence, data, stage in itertools.product(TENSOR, PIPELINE, SEQUENCE, DATA, STAGES):
        for case, mode in itertools.product(VARIANTS, MODES if stage == 1 else MODES[:1]):
            trial = Trial(case, mode, stage, tensor, pipeline, sequence, data, layers=max(2, pipeline))
            if 1 < trial.ranks <= MOST_RANKS and trial.is_admitted:
                yield trial


COVERING = [
    replace(trial, steps=4)
    for trial in (
        *(Trial(case, mode, tensor=2) for case, mode in zip(VARIANTS, itertools.cycle(MODES))),
        Trial("mac", "streams", 3, tensor=2),
        Trial("mal", "whole", 2, tensor=2),
        Trial("lmm", "segments", 0, tensor=2),
        Trial("mac", "whole", tensor=2, sharded=1),
        Trial("mal", "whole", 0, tensor=2, sharded=1),
        Trial("lmm", "whole", 0, pipeline=2),
        Trial("mac", "segments", 0, pipeline=2),
        Trial("mag", "streams", 3, tensor=2, data=2, sharded=1),
        Trial("mal", "streams", pipeline=2, data=2),
        Trial("mag", "segments", pipeline=4, layers=4),
        Trial("mac", "streams", pipeline=2, tensor=2),
        Trial("mal", "segments", pipeline=2, tensor=2, sharded=1),
        *(Trial(case, mode, sequence=2) for case, mode in zip(VARIANTS[1:], itertools.cycle(MODES))),
        Trial("mag", "streams", 3, sequence=2),
        Trial("mal", "segments", 2, sequence=2, data=2),
        Trial("mag", "streams", 3, sequence=2, tensor=2),
        Trial("lmm", "segments", 0, sequence=2, tensor=2, sharded=1),
        Trial("mag", "streams", pipeline=2, sequence=2),
        Trial("mal", "whole", sequence=4),
    )
]
COVERING.append(Trial("mag", "whole", 2, tensor=2, sharded=1))
"""Every axis, mode, variant and stage at least once, in pairs of those that meet; fewer steps than in the table, but
for the last one, which the table does not have.
"""
IN_BF16 = [
    Trial("mag", "bf16", tensor=2, steps=4),
    Trial("mag", "bf16", pipeline=2, data=2, steps=4),
    Trial("mag", "bf16", 3, sequence=2, steps=4),
    Trial("mag", "bf16", 3, tensor=2, steps=4, sharded=1),
]
"""Rows at once, in bf16: what differs is rounding, which is not that of one process."""
