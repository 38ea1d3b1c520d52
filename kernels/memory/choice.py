"""Which backend computes a call of `neural_memory`, and why."""

from __future__ import annotations

import functools
from typing import NamedTuple

from kernels.memory.backend import DualForm, GroupBackend
from kernels.memory.problem import Problem

BACKENDS = ("auto", "dual", "triton")
"""What may be asked for; `neural_memory` knows the oracle besides."""

# Why "auto" takes no kernels: compiled and interpreted they are right, which is not to have been run.
UNPROVEN = "the kernels have not been run on a GPU yet: they compute only where backend='triton' asks for them"


class Choice(NamedTuple):
    """A backend and the reason for it, for people."""

    backend: GroupBackend
    reason: str


def choose(problem: Problem, backend: str) -> Choice:
    """The backend for a problem.

    Args:
        backend: "dual", "triton" or "auto". "triton" is the kernels; where they have failed their self-test
            (triton/selftest.py), which a warning has said, the dual form computes instead. "auto" is the dual form, as
            long as the kernels have not been run on a GPU.

    Raises:
        ValueError: an unknown name, or "triton" was asked for, and the kernels do not take this problem; the message
            says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend == "dual":
        return Choice(DualForm(), "asked for")
    if backend == "auto" and problem.device.type != "cuda":
        # Before anything of Triton is imported, which takes time and memory.
        return Choice(DualForm(), f"the tensors are on {problem.device.type}, the kernels run on a GPU")
    reason = _refusal(problem)
    if reason is not None and backend == "triton":
        raise ValueError(f"backend 'triton' does not take this memory: {reason}; use 'auto' or 'dual'")
    if backend == "auto":
        return Choice(DualForm(), reason or UNPROVEN)
    return _kernels_unless_they_fail(problem)


@functools.cache
def _refusal(problem: Problem) -> str | None:
    try:  # Triton is optional
        from kernels.memory.triton.backend import refusal
    except ImportError as error:
        return f"Triton can't be imported: {error}"
    return refusal(problem)


@functools.cache
def _kernels_unless_they_fail(problem: Problem) -> Choice:
    from kernels.memory.triton import selftest
    from kernels.memory.triton.backend import TritonKernels

    reason = selftest.failure(problem) if selftest.REQUIRED else None
    if reason is not None:
        return Choice(DualForm(), f"the kernels have failed their self-test: {reason}")
    return Choice(TritonKernels(), "asked for, and the kernels agree with the dual form here")
