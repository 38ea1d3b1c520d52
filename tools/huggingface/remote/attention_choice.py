"""Stands in for `kernels.attention.choice` in exported models: PyTorch's own kernels alone, which take everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from kernels.attention.inputs import AttentionInputs
from kernels.attention.reference import attention_reference
from kernels.attention.sdpa import attention_sdpa


class Backend(NamedTuple):
    """A way to compute attention."""

    name: str
    run: Callable[[AttentionInputs], Tensor]


ORDER = (Backend("sdpa", attention_sdpa), Backend("math", attention_reference))
"""From the first that is tried; both take everything."""
BACKENDS = ("auto", *(backend.name for backend in ORDER))
"""What `attention` can be told to run on."""


class Choice(NamedTuple):
    """A backend and the reason for it, for people."""

    backend: Backend
    reason: str
    refused: tuple[tuple[str, str], ...] = ()


def choose(inputs: AttentionInputs, backend: str) -> Choice:
    """The backend for a call; raises ValueError for an unknown name."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return Choice(ORDER[0], "what an exported model runs on")
    return Choice(next(candidate for candidate in ORDER if candidate.name == backend), "asked for")
