"""What computes a group of chunks: PyTorch here, Triton's kernels in triton/; they differ in speed, not in meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kernels.memory import chunk, chunk_gradient
from kernels.memory.chunk import GroupTokens, GroupTrace
from kernels.memory.chunk_gradient import GroupGradients
from kernels.memory.gates import GroupGates
from kernels.memory.options import MemoryOptions


class GroupBackend(Protocol):
    """The functions of a group, with the arguments and layouts of chunk.py and chunk_gradient.py."""

    name: str
    takes_bf16: bool  # bf16 queries, keys and values as they are, not in fp32

    def write(
        self,
        tokens: GroupTokens,
        gates: GroupGates,
        learned: Sequence[Tensor | None],
        state: Sequence[Tensor],
        options: MemoryOptions,
        with_end: bool,
    ) -> GroupTrace:
        """All chunks' states and writes; see `chunk.write_group`."""
        ...

    def read(
        self,
        q: Tensor,
        gates: GroupGates,
        learned: Sequence[Tensor | None],
        trace: GroupTrace,
        options: MemoryOptions,
    ) -> Tensor:
        """The read-out y [n, N, M, D]."""
        ...

    def gradients(
        self,
        tokens: GroupTokens,
        learned: Sequence[Tensor | None],
        state: Sequence[Tensor],
        options: MemoryOptions,
        d_y: Tensor,
        d_end: Sequence[Tensor] | None,
    ) -> GroupGradients:
        """Recomputes a group and goes back through it; see `chunk_gradient.group_gradients`."""
        ...


class DualForm:
    """The dual form in PyTorch: every shape, device and dtype."""

    name = "dual"
    takes_bf16 = False
    write = staticmethod(chunk.write_group)
    gradients = staticmethod(chunk_gradient.group_gradients)

    @staticmethod
    def read(
        q: Tensor,
        gates: GroupGates,
        learned: Sequence[Tensor | None],
        trace: GroupTrace,
        options: MemoryOptions,
    ) -> Tensor:
        """The read-out y [n, N, M, D]."""
        return chunk.read_group(q, gates, trace, options)[-1].outputs.view_as(q)
