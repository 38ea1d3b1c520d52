"""Which backend computes a call of `attention`, and why not the others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from kernels.attention import flash, flex, varlen
from kernels.attention.inputs import AttentionInputs
from kernels.attention.problem import Problem
from kernels.attention.reference import attention_reference
from kernels.attention.sdpa import attention_sdpa
from kernels.attention.selftest import failure


@dataclass(frozen=True)
class Backend:
    """A way to compute attention."""

    name: str
    run: Callable[[AttentionInputs], Tensor]
    kernels: ModuleType | None = None
    """What it refuses, for kernels that don't take everything and that are tested before use."""


_FUSED = tuple(Backend(kernels.name, kernels.run, kernels) for kernels in (flash, varlen, flex))
ORDER = (*_FUSED, Backend("sdpa", attention_sdpa), Backend("math", attention_reference))
"""From the first that is tried. What takes everything ends the search, so "math" is for those who ask for it."""
BACKENDS = ("auto", *(backend.name for backend in ORDER))
"""What `attention` can be told to run on."""


class Choice(NamedTuple):
    """A backend and the reason for it, for people."""

    backend: Backend
    reason: str
    refused: tuple[tuple[str, str], ...]
    """The backends before it in the order, and why they were passed over."""


def choose(inputs: AttentionInputs, backend: str) -> Choice:
    """The backend for a call.

    Raises:
        ValueError: an unknown name, or a backend was asked for that can't compute this; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: choose one of {', '.join(BACKENDS)}")
    problem = Problem.of(inputs)
    if backend != "auto":
        asked = next(candidate for candidate in ORDER if candidate.name == backend)
        if (reason := _refusal(asked, problem, inputs)) is not None:
            raise ValueError(
                f"attention backend {backend!r} does not take this attention: {reason}; choose 'auto', or another of "
                f"{', '.join(name for name in BACKENDS[1:] if name != backend)}"
            )
        return Choice(asked, "asked for", ())
    refused = []
    for candidate in ORDER:
        reason = _disadvantage(candidate, problem) or _refusal(candidate, problem, inputs)
        if reason is None:
            return Choice(candidate, "the first that takes this", tuple(refused))
        refused.append((candidate.name, reason))
    raise AssertionError("math takes everything")


def _disadvantage(backend: Backend, problem: Problem) -> str | None:
    """Why a backend, though it may take a problem, is not one to try for it; None if it is."""
    # Before anything is imported or compiled for its test, which takes time and memory.
    if backend.kernels is not None and problem.device.type != "cuda":
        return f"the tensors are on {problem.device.type}, its kernels are for a GPU"
    return None


def _refusal(backend: Backend, problem: Problem, inputs: AttentionInputs) -> str | None:
    if backend.kernels is None:
        return None
    return _standing_refusal(backend, problem) or backend.kernels.misfit(inputs)


@functools.cache
def _standing_refusal(backend: Backend, problem: Problem) -> str | None:
    """What does not depend on a call's lengths and values: asked once for each problem and device of a process."""
    return backend.kernels.refusal(problem) or failure(backend.name, backend.run, problem)
