"""A backend against the plain formula in fp32, on the device it is to run on, before it may.

Kernels that other projects compile, or that a compiler makes for the device at hand, have been wrong on some devices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kernels.attention.inputs import AttentionInputs, Prefix, prepare
from kernels.attention.problem import Problem
from kernels.attention.reference import attention_reference

TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-10}
"""Largest distance of a result from the formula's, relative to its norm, by the dtype of the tensors."""
QUERIES, CACHED, PREFIX, MAX_WINDOW = {"one": 1, "few": 30, "many": 300}, 70, 5, 200

log = logging.getLogger(__name__)


def failure(name: str, run: Callable[[AttentionInputs], Tensor], problem: Problem) -> str | None:
    """Why a backend must not compute a problem; None when its output and gradients agree with the formula's.

    A failure is logged as a warning that names what went wrong.
    """
    # Activation checkpointing counts what is saved for backward while a layer runs; the trial must not be counted.
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(problem.needs_gradient),
        torch.autocast(problem.device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        try:
            reason = _first_difference(run, problem)
        # Whatever a library or its compiler throws: another backend serves.
        except Exception as error:  # noqa: BLE001
            reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        reason = f"its self-test failed: {reason}"
        log.warning("attention by %s is off for %s: %s", name, describe(problem), reason)
    return reason


def describe(problem: Problem) -> str:
    """A problem in a line."""
    sees = "all tokens" if problem.window is None else f"a window of {problem.window}"
    extras = [
        "a prefix" if problem.has_prefix else "",
        "a second stream" if problem.has_context else "",
        {"none": "", "row": "rows that were reset", "query": "documents"}[problem.bound],
        "a cache" if problem.has_cache else "",
    ]
    listed = ", ".join(extra for extra in extras if extra)
    listed = f" with {listed}" if listed else ""
    return f"{sees}{listed}, heads of {problem.head_dim}, {problem.dtype} on {problem.device}"


def _first_difference(run: Callable[[AttentionInputs], Tensor], problem: Problem) -> str | None:
    inputs = random_inputs(problem)
    exact = exact_inputs(inputs)
    found, expected = run(inputs), attention_reference(exact)
    pairs = [("the output", found, expected)]
    if problem.needs_gradient:
        slope = torch.randn(expected.shape, generator=_generator(problem), device=problem.device)
        pairs += [
            (f"the gradient of {name}", mine, theirs)
            for name, mine, theirs in zip(
                _names(problem),
                torch.autograd.grad(found, inputs.tensors(), slope.to(found.dtype)),
                torch.autograd.grad(expected, exact.tensors(), slope.to(expected.dtype)),
                strict=True,
            )
        ]
    tolerance = TOLERANCE[problem.dtype]
    for name, mine, theirs in pairs:
        mine, theirs = mine.detach().to(theirs.dtype), theirs.detach()
        distance = float((mine - theirs).norm() / theirs.norm().clamp_min(1e-30))
        if not distance <= tolerance:  # also when it is NaN
            return f"{name} is off by {distance:.1e} of its norm, more than {tolerance:.0e}"
    return None


def random_inputs(problem: Problem) -> AttentionInputs:
    """A small call of the problem: one or two rows, some blocks and a part of one, a window of two blocks at most."""
    generator = _generator(problem)
    # What a compiler makes a kernel for: the heads' number and width, and whether there is one row.
    rows = 1 if problem.rows == "one" else 2
    queries, cached = QUERIES[problem.queries], (CACHED if problem.has_cache else 0)
    total = queries + cached

    def draw(*shape: int) -> Tensor:
        x = torch.randn(*shape, problem.num_heads, problem.head_dim, generator=generator, device=problem.device)
        return x.to(problem.dtype).requires_grad_(problem.needs_gradient)

    q, k, v = draw(rows, queries), draw(rows, total), draw(rows, total)
    prefix = Prefix(draw(rows, queries), draw(PREFIX), draw(PREFIX)) if problem.has_prefix else None
    context = (draw(rows, total), draw(rows, total)) if problem.has_context else None
    window = None if problem.window is None else min(problem.window, MAX_WINDOW, max(1, total - 1))
    first_valid = documents = None
    if problem.bound == "row":
        first_valid = torch.tensor([cached // 2, 0][:rows], device=problem.device)
    if problem.bound == "query":
        own = torch.arange(cached, total, device=problem.device)
        # The first document of one row begins among the cached keys; then one of a third of the queries each.
        third = -(-queries // 3)
        begins = cached + (own - cached) // third * third
        documents = torch.stack((torch.where(own < cached + third, cached // 2, begins), begins)[:rows])
    return prepare(q, k, v, window, prefix, context, first_valid, documents)


def exact_inputs(inputs: AttentionInputs) -> AttentionInputs:
    """The same numbers in fp32 or better, as leaves of their own."""

    def exact(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.detach().to(wide, copy=True).requires_grad_(x.requires_grad)

    streams = tuple((exact(keys), exact(values)) for keys, values in inputs.streams)
    prefix = None if inputs.prefix is None else Prefix(*map(exact, inputs.prefix))
    return replace(inputs, q=exact(inputs.q), streams=streams, prefix=prefix)


def _names(problem: Problem) -> list[str]:
    """Of `AttentionInputs.tensors()`."""
    context = ["the second stream's keys", "the second stream's values"] if problem.has_context else []
    prefix = ["the prefix's queries", "the prefix's keys", "the prefix's values"] if problem.has_prefix else []
    return ["the queries", "the keys", "the values", *context, *prefix]


def _generator(problem: Problem) -> torch.Generator:
    return torch.Generator(problem.device).manual_seed(0)
