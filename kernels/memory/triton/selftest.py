"""The kernels against the dual form in float64, on the device they are to run on, before they may.

Compilers for GPUs have given wrong kernels that pass every check made without that GPU.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kernels.memory.backend import DualForm, GroupBackend
from kernels.memory.chunk import GroupTokens
from kernels.memory.gates import GroupGates, group_gates
from kernels.memory.options import MemoryOptions
from kernels.memory.problem import Problem
from kernels.memory.triton.backend import TritonKernels
from kernels.memory.triton.launch import INTERPRETED, precision_of

# Largest distance of a result, relative to its norm, by what the kernels round products' terms to. Measured in the
# interpreter, with both terms of every product rounded to bf16 and all else in fp32: the worst result of memories with
# heads of 64, linear and of hidden widths 64 and 128, chunks of 64 and 128, is off by 1.1e-2 (theta's gradient), the
# others by up to 5.5e-3. tf32 rounds to 1/8 of that.
TOLERANCE = {"bf16": 4e-2, "tf32": 1e-2, "ieee": 1e-4}
MEMORIES, CHUNKS = 2, 3

REQUIRED = not INTERPRETED  # the interpreter has no compiler that could be wrong

log = logging.getLogger(__name__)


def failure(problem: Problem) -> str | None:
    """Why the kernels must not compute a problem; None when all their results agree with the dual form's.

    A failure is logged as a warning that names what went wrong.
    """
    # Activation checkpointing counts what is saved for backward while a layer runs; the trial must not be counted.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(problem.device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        reason = _first_difference(problem)
    if reason is not None:
        log.warning("the Triton kernels of the memory are off for %s: %s", describe(problem), reason)
    return reason


def describe(problem: Problem) -> str:
    """A problem in a line."""
    dims = " x ".join(map(str, problem.dims))
    return f"layers {dims}, chunk {problem.options.chunk_size}, {problem.dtype} on {problem.device}"


def _first_difference(problem: Problem) -> str | None:
    tolerance = TOLERANCE[precision_of(problem.dtype)]
    # Whole chunks, and an open chunk of which only some tokens are new.
    size, depth = problem.options.chunk_size, len(problem.dims) - 1
    for num_chunks, num_tokens, num_queries in ((CHUNKS, size, size), (1, size - size // 3, size // 2 + 1)):
        group = random_group(problem, num_chunks, num_tokens, num_queries)
        found = results(TritonKernels(), problem.options, depth, group)
        exact = results(DualForm(), problem.options, depth, [x.double() for x in group])
        for name, expected in exact:
            try:
                _, result = next(found)
            # Whatever Triton or the compiler under it throws: the dual form serves.
            except Exception as error:  # noqa: BLE001
                return f"{name}: {type(error).__name__}: {error}"
            distance = (result.double() - expected).norm() / expected.norm().clamp_min(1e-30)
            if not distance <= tolerance:  # also when it is NaN
                return f"{name} is off by {float(distance):.1e} of its norm, more than {tolerance:.0e}"
    return None


def random_group(problem: Problem, num_chunks: int, num_tokens: int, num_queries: int) -> list[Tensor]:
    """q, k, v, alpha, eta, theta, W_0 x L, states x L, dy, gradients of the end x L, of the layouts of chunk.py.

    Features are of about unit norm in every layer, and the steps such that a bound on them is felt.
    """
    generator = torch.Generator(problem.device).manual_seed(0)
    options, dims = problem.options, problem.dims

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=problem.device)

    def uniform() -> Tensor:
        return torch.rand(num_chunks, MEMORIES, num_tokens, generator=generator, device=problem.device)

    def vectors(count: int) -> Tensor:
        return normalize(normal(num_chunks, MEMORIES, count, dims[0]), dim=-1).to(problem.dtype)

    step = 0.5 if options.step_bound is not None else 1 / num_tokens
    tokens = [
        vectors(num_queries),
        vectors(num_tokens),
        vectors(num_tokens),
        0.1 * uniform(),
        0.9 * uniform(),
        step * uniform(),
    ]
    # Unit keys make hidden outputs of about 1; act(z) of such z has about 0.36 of its square left.
    scales = [1.0] if len(dims) == 2 else [1.0, 1 / (options.activation_scale * math.sqrt(0.36 * dims[1]))]
    learned, states, d_end = [], [], []
    for scale, d_in, d_out in zip(scales, dims, dims[1:], strict=False):
        learned.append(scale * normal(MEMORIES, d_in, d_out))
        moved = learned[-1] + 0.3 * scale * normal(MEMORIES, d_in, d_out)
        states.append(torch.cat([moved, 0.1 * scale * normal(MEMORIES, d_in, d_out)], dim=1))
        d_end.append(0.1 * normal(MEMORIES, 2 * d_in, d_out))
    return [*tokens, *learned, *states, normal(num_chunks, MEMORIES, num_queries, dims[0]), *d_end]


def _without_writes(state: Tensor, learned: Tensor | None, gates: GroupGates) -> Tensor:
    """A layer's state after the group, had nothing been written: beside it the writes are small."""
    weights, momentum = state.double().chunk(2, dim=1)
    for a, e, p in zip(*(gate.double()[..., -1, None, None] for gate in (gates.a, gates.e, gates.p)), strict=True):
        weights = a * weights + p * momentum + (0 if learned is None else (1 - a) * learned)
        momentum = e * momentum
    return torch.cat([weights, momentum], dim=1)


def results(
    backend: GroupBackend, options: MemoryOptions, depth: int, group: list[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """All that a backend computes of a group, by name, with the kernels that a first wrong one comes from.

    In the order in which one follows from another.
    """
    tokens, rest = GroupTokens(*group[:6]), group[6:]
    learned = rest[:depth] if options.forget_to == "init" else [None] * depth
    states, d_y, d_end = rest[depth : 2 * depth], rest[2 * depth], rest[2 * depth + 1 :]
    gates = group_gates(tokens.alpha, tokens.eta)
    trace = backend.write(tokens, gates, learned, states, options, with_end=True)
    write = "write_one_layer" if depth == 1 else "write_two_layers"
    for layer, (end, state, w0) in enumerate(zip(trace.end, states, learned, strict=True)):
        yield (
            f"the state of layer {layer + 1} after its writes ({write})",
            end.double() - _without_writes(state, w0, gates),
        )
    yield "the read-out (read_layer)", backend.read(tokens.q, gates, learned, trace, options)
    found = backend.gradients(tokens, learned, states, options, d_y, d_end)
    by_writes = f"read_states_gradient or {write}_gradient"
    sources = {
        "q": "read_inputs_gradient", "v": by_writes, "k": f"read_inputs_gradient, {by_writes} or end_inputs_gradient",
        "theta": by_writes, "alpha": "end_products", "eta": "end_products",
    }  # fmt: skip
    for name, kernel in sources.items():
        yield f"the gradient of {name} ({kernel})", getattr(found.tokens, name)
    for layer, gradient in enumerate(found.state):
        yield f"the gradient of layer {layer + 1}'s state ({by_writes})", gradient
    for layer, gradient in enumerate(found.learned):
        if gradient is not None:
            yield f"the gradient of layer {layer + 1}'s W_0 (end_products)", gradient
