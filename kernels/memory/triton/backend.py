"""The kernels as a backend of groups of chunks, and which problems they take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.memory.chunk import GroupTokens, GroupTrace
from kernels.memory.chunk_gradient import GroupGradients
from kernels.memory.gates import GroupGates
from kernels.memory.options import MemoryOptions
from kernels.memory.problem import Problem
from kernels.memory.triton import group, group_gradient
from kernels.memory.triton.launch import INTERPRETED, MIN_TILE, padded, precision_of

DIMS = (16, 32, 64, 128)
MAX_CHUNK = 128  # more tokens than that do not fit the registers
# Tokens by dimensions of a deep memory: with more, a thread spills over 1 KB. Blackwell and Hopper, and other GPUs.
MAX_TILE, MAX_TILE_ELSEWHERE = 128 * 64, 64 * 64
FIRST_CAPABILITY, HOPPER = (8, 0), (9, 0)


class TritonKernels:
    """A group by the kernels of this package."""

    name = "triton"
    takes_bf16 = True

    # Triton launches on the current device, which need not be the tensors'.
    @staticmethod
    def write(
        tokens: GroupTokens,
        gates: GroupGates,
        learned: Sequence[Tensor | None],
        state: Sequence[Tensor],
        options: MemoryOptions,
        with_end: bool,
    ) -> GroupTrace:
        """All chunks' states and writes."""
        with torch.cuda.device_of(tokens.k):
            return group.write_group(tokens, gates, learned, state, options, with_end)

    @staticmethod
    def read(
        q: Tensor,
        gates: GroupGates,
        learned: Sequence[Tensor | None],
        trace: GroupTrace,
        options: MemoryOptions,
    ) -> Tensor:
        """The read-out y [n, N, M, D]."""
        with torch.cuda.device_of(q):
            return group.read_group(q, gates, learned, trace, options)[-1]

    @staticmethod
    def gradients(
        tokens: GroupTokens,
        learned: Sequence[Tensor | None],
        state: Sequence[Tensor],
        options: MemoryOptions,
        d_y: Tensor,
        d_end: Sequence[Tensor] | None,
    ) -> GroupGradients:
        """Recomputes a group and goes back through it."""
        with torch.cuda.device_of(tokens.k):
            return group_gradient.group_gradients(tokens, learned, state, options, d_y, d_end)


def refusal(problem: Problem) -> str | None:
    """Why the kernels do not take a problem on its device; None if they do."""
    if problem.device.type != "cuda" and not INTERPRETED:
        return f"the tensors are on {problem.device.type}, the kernels run on a GPU"
    reason = refusal_of_shape(problem, MAX_TILE)
    if reason is not None or problem.device.type != "cuda":
        return reason
    if precision_of(problem.dtype) == "ieee":
        return "fp32 products are exact unless torch.set_float32_matmul_precision('high'); the kernels' are tf32"
    # A GPU of AMD's has a capability of its own count.
    capability = torch.cuda.get_device_capability(problem.device) if torch.version.hip is None else FIRST_CAPABILITY
    if capability < FIRST_CAPABILITY:
        return f"the GPU has compute capability {capability}, the kernels need {FIRST_CAPABILITY} or later"
    return refusal_of_shape(problem, MAX_TILE_ELSEWHERE) if capability < HOPPER else None


def refusal_of_shape(problem: Problem, max_tile: int) -> str | None:
    """Why the kernels do not take a problem on a GPU with registers for `max_tile`; None if they do."""
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
    # fp32 takes twice the room, in registers for deep memories and in AMD's shared memory for linear ones; so do the
    # states of deep memories of wide heads, of which a thread has more blocks.
    is_small = max_tile < MAX_TILE
    is_wide = problem.dtype == torch.float32 and is_small
    tile = dim * padded(options.chunk_size) * (2 if is_wide else 1)
    tile_with_states = tile * (2 if is_small and dim > 64 else 1)
    if (depth == 2 and tile_with_states > max_tile) or (is_wide and tile > 2 * max_tile):
        return f"chunks of {options.chunk_size} tokens of {dim} dimensions do not fit the kernels' registers"
    return None
