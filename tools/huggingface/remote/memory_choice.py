"""Stands in for `kernels.memory.choice` in exported models: the dual form in PyTorch alone, which takes everything."""

from __future__ import annotations

from typing import NamedTuple

from kernels.memory.backend import DualForm, GroupBackend
from kernels.memory.problem import Problem

BACKENDS = ("auto", "dual")
"""What may be asked for; `neural_memory` knows the oracle besides."""


class Choice(NamedTuple):
    """A backend and the reason for it, for people."""

    backend: GroupBackend
    reason: str


def choose(problem: Problem, backend: str) -> Choice:
    """The backend for a problem; raises ValueError for an unknown name."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    return Choice(DualForm(), "what an exported model runs on")
