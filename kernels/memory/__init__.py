"""The neural memory of Titans (arXiv 2501.00663): for each batch row and head a small network, written to at test time.

`neural_memory` is what models call; `neural_memory_reference` is its oracle, the per-token recurrence with autograd.
The mathematics is in README.md beside this file.
"""

from kernels.memory.interface import explain_backend, memory_read, neural_memory
from kernels.memory.reference import neural_memory_reference
from kernels.memory.state import MemoryState

__all__ = ["MemoryState", "explain_backend", "memory_read", "neural_memory", "neural_memory_reference"]
