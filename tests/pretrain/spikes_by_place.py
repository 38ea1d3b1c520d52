"""Spikes that hang on the place in the data, for tests: the loss of chosen steps' rows is many times what it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from parallel.loss_module import LossModule
from pretrain.data import Loader

FACTOR = 30.0
ROWS = 4
"""Of a step."""


class Killed(Exception):
    """Stands for SIGKILL in tests that run in this process: nothing is written behind it."""


@dataclass
class Place:
    """Where a run has been in its data."""

    spoiled: frozenset[int]
    dies_at: int | None
    now: int = -1
    seen: list[int] = field(default_factory=list)
    """Steps' worth of data that were handed out, by number from 0."""


@contextmanager
def spikes_at(*places: int, dies_at: int | None = None) -> Iterator[Place]:
    """Inside the block every step that trains on the data of these steps (from 0) has its loss, and so its gradient,
    multiplied; `dies_at`: the run dies where it is to take that step's data.
    """
    place = Place(frozenset(places), dies_at)
    take, forward = Loader.__next__, LossModule.forward

    def next_step(loader: Loader) -> Any:
        place.now = loader._position // ROWS
        if place.now == place.dies_at:
            raise Killed
        place.seen.append(place.now)
        return take(loader)

    def spoiled(module: LossModule, *given: Any, **named: Any) -> Any:
        loss, *others = forward(module, *given, **named)
        if place.now in place.spoiled and loss.dim() == 0 and torch.is_grad_enabled():  # no stage's activations
            loss = loss * FACTOR
        return loss, *others

    with patch.object(Loader, "__next__", next_step), patch.object(LossModule, "forward", spoiled):
        yield place


def numbers(places: Iterable[int]) -> list[int]:
    """Of the steps that have the data of these places while none was gone back to: from 1."""
    return [place + 1 for place in places]
