"""Which backend computes a call of `neural_memory`, and why."""

from __future__ import annotations

import functools
from typing import NamedTuple

from kernels.memory.backend import DualForm, GroupBackend
from kernels.memory.problem import Problem


class Choice(NamedTuple):
    """A backend and the reason for it, for people."""

    backend: GroupBackend
    reason: str


def choose(problem: Problem, backend: str) -> Choice:
    """The backend for a problem.

    Args:
        backend: "dual" and "triton" are orders, of which "triton" is followed where the kernels have agreed with the
            dual form (triton/selftest.py); "auto" is the dual form.

    Raises:
        ValueError: "triton" was asked for, and can't compute this; the message says why.
    """
    if backend == "dual":
        return Choice(DualForm(), "asked for")
    if backend == "auto" and problem.device.type != "cuda":
        # Before anything of Triton is imported, which takes time and memory.
        return Choice(DualForm(), f"the tensors are on {problem.device.type}, the kernels run on a GPU")
    choice = _kernels_or_dual_form(problem, forced=backend == "triton")
    if backend == "triton" and choice.backend.name != "triton":
        raise ValueError(f"backend 'triton' does not take this memory: {choice.reason}; use 'auto' or 'dual'")
    return choice


@functools.cache
def _kernels_or_dual_form(problem: Problem, forced: bool) -> Choice:
    try:  # Triton is optional
        from kernels.memory.triton.backend import TritonKernels, disadvantage, refusal
        from kernels.memory.triton.selftest import failure
    except ImportError as error:
        return Choice(DualForm(), f"Triton can't be imported: {error}")
    reason = refusal(problem)
    if reason is None and not forced:
        reason = disadvantage(problem)
    if reason is None and problem.device.type == "cuda":
        reason = failure(problem)  # an order is not followed either with kernels that are wrong here
    if reason is not None:
        return Choice(DualForm(), reason)
    return Choice(TritonKernels(), "asked for" if forced else "the kernels agree with the dual form here")
