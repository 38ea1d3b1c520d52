"""What `tools.bench` measures, by the command's name."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from tools.bench import attention, build, checkpoint, correctness, data, decode, layouts, long, memory, train

BENCHMARKS: Mapping[str, ModuleType] = {
    "memory": memory,
    "attention": attention,
    "train": train,
    "long": long,
    "layouts": layouts,
    "decode": decode,
    "build": build,
    "data": data,
    "checkpoint": checkpoint,
    "correctness": correctness,
}
"""In the order of reports."""
