"""The kernels as a backend of groups of chunks, and which problems they take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.memory.chunk import GroupGates, GroupTrace
from kernels.memory.options import MemoryOptions
from kernels.memory.problem import Problem
from kernels.memory.triton import group, group_gradient
from kernels.memory.triton.launch import INTERPRETED, MIN_TILE, padded, precision_of

DIMS = (16, 32, 64, 128)
MAX_CHUNK = 128  # more tokens than that do not fit the registers
MAX_TILE = 128 * 64  # tokens by dimensions of a deep memory: with 128 x 128 threads spill more than 1 KB
FIRST_CAPABILITY = (8, 0)


class TritonKernels:
    """A group by the kernels of this package."""

    name = "triton"
    takes_bf16 = True
    write = staticmethod(group.write_group)
    gradients = staticmethod(group_gradient.group_gradients)

    @staticmethod
    def read(
        q: Tensor,
        gates: GroupGates,
        learned: Sequence[Tensor | None],
        trace: GroupTrace,
        options: MemoryOptions,
    ) -> Tensor:
        """The read-out y [n, N, M, D]."""
        return group.read_group(q, gates, learned, trace, options)[-1]


def refusal(problem: Problem) -> str | None:
    """Why the kernels do not take a problem on its device; None if they do."""
    if problem.device.type != "cuda" and not INTERPRETED:
        return f"the tensors are on {problem.device.type}, the kernels run on a GPU"
    reason = refusal_of_shape(problem)
    if reason is None and problem.device.type == "cuda" and precision_of(problem.dtype) == "ieee":
        return "fp32 products are exact unless torch.set_float32_matmul_precision('high'); the kernels' are tf32"
    if reason is None and problem.device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(problem.device)
        if capability < FIRST_CAPABILITY:
            return f"the GPU has compute capability {capability}, the kernels need {FIRST_CAPABILITY} or later"
    return reason


def refusal_of_shape(problem: Problem) -> str | None:
    """Why the kernels do not take a problem on any device; None if they do."""
    dim, depth, options = problem.dims[0], len(problem.dims) - 1, problem.options
    if problem.dtype not in (torch.bfloat16, torch.float32):
        return f"the tokens are {problem.dtype}, the kernels take bfloat16 and float32 alike for q, k and v"
    if depth > 2:
        return f"the memory has {depth} layers, the kernels take 1 or 2"
    if dim not in DIMS:
        return f"a head has {dim} dimensions, the kernels take {', '.join(map(str, DIMS))}"
    if depth == 2 and options.activation == "softmax":
        return "the activation is softmax, the kernels take silu and gelu"
    if depth == 2 and problem.dims[1] % MIN_TILE:
        return f"the hidden width is {problem.dims[1]}, the kernels take multiples of {MIN_TILE}"
    if options.chunk_size > MAX_CHUNK:
        return f"a chunk has {options.chunk_size} tokens, the kernels take up to {MAX_CHUNK}"
    if depth == 2 and dim * padded(options.chunk_size) > MAX_TILE:
        return f"chunks of {options.chunk_size} tokens of {dim} dimensions do not fit the kernels' registers"
    return None
