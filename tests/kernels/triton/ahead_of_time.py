"""Compiles Triton kernels for GPUs that are not there, and reads what the assembler says of them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TENSOR_CORES = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "v_mfma_")
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


class Launch(NamedTuple):
    """A kernel as it was launched: what of a launch its binary depends on."""

    kernel: JITFunction
    types: tuple[str, ...]  # of the run-time arguments, as in "*fp32" or "i32"
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]  # num_warps, num_stages

    @property
    def name(self) -> str:
        """The kernel with what tells its launches apart."""
        said = dict(self.constants)
        marks = [f"{said['IN']} to {said['OUT']}"] if "IN" in said else []
        marks += ["for the gradient"] if said.get("KEEP") else []
        return ", ".join([self.kernel.__name__, *marks])


class Report(NamedTuple):
    """What one kernel takes on one target; registers and spilled bytes are a thread's."""

    registers: int
    spills: int
    shared: int
    tensor_core_instructions: int
    ttgir: str

    @property
    def odd_layouts(self) -> list[str]:
        """Lines where a tile of a `#linear` layout feeds a product: what Hopper's compiler has got wrong.

        A single row or column in shared memory feeds none, since products have 16 terms or more. For sm_100 there are
        columns of factors that go through it: they are loaded back to registers, and scale there what a product takes.
        """
        stored, single = re.compile(r"local_alloc|local_store"), re.compile(r"tensor<(\d+x1|1x\d+)x")
        return [
            line
            for line in self.ttgir.splitlines()
            if "#linear" in line and ("dot_op" in line or stored.search(line) and not single.search(line))
        ]


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Kernels launched inside are not run, but listed, each once."""
    found: list[Launch] = []

    def record(kernel: JITFunction, *arguments: Any, grid: tuple, warmup: bool, **rest: Any) -> None:
        kinds = tuple(
            TYPES[x.dtype] if isinstance(x, torch.Tensor) else {int: "i32", float: "fp32"}[type(x)] for x in arguments
        )
        options = tuple((name, rest.pop(name)) for name in ("num_warps", "num_stages"))
        launch = Launch(kernel, kinds, tuple(sorted(rest.items())), options)
        if launch not in found:
            found.append(launch)

    run: Callable = JITFunction.run
    JITFunction.run = record
    try:
        yield found
    finally:
        JITFunction.run = run


def _assemble(ptx: str, name: str) -> tuple[int, int]:
    """Registers and spilled bytes, from ptxas."""
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    target = re.search(r"\.target (\w+)", ptx).group(1)
    assembler = binaries / ("ptxas-blackwell" if name == "sm_100" else "ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", "--gpu-name", target, file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def number(pattern: str) -> int:
        return int(re.search(pattern, said).group(1))

    return number(r"Used (\d+) registers"), max(number(r"(\d+) bytes spill stores"), number(r"(\d+) bytes spill loads"))


def compile_for(target: str, launch: Launch) -> Report:
    """Compiles a kernel for one of TARGETS as Triton would at a launch; pointers are 16-byte aligned."""
    names, constants = launch.kernel.arg_names, dict(launch.constants)
    types = iter(launch.types)
    signature = {name: "constexpr" if name in constants else next(types) for name in names}
    pointers = [index for index, name in enumerate(names) if signature[name].startswith("*")]
    source = ASTSource(
        fn=launch.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in pointers},
    )
    compiled = triton.compile(source, target=TARGETS[target], options=dict(launch.options))
    if target == "gfx942":
        code = compiled.asm["amdgcn"]

        def field(pattern: str) -> int:
            return int(re.search(pattern, code).group(1))

        registers, spills = field(r"\.vgpr_count:\s+(\d+)"), 4 * field(r"\.vgpr_spill_count:\s+(\d+)")
    else:
        code = compiled.asm["ptx"]
        registers, spills = _assemble(code, target)
    instructions = sum(code.count(mark) for mark in TENSOR_CORES)
    return Report(registers, spills, compiled.metadata.shared, instructions, compiled.asm["ttgir"])
