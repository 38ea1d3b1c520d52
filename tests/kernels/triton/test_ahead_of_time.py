"""Every kernel, compiled for GPUs that are not here: within their registers and shared memory, and on tensor cores."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels can't be compiled", allow_module_level=True)

from kernels.memory.triton import end_gradient, read, read_gradient, write, write_gradient  # noqa: E402
from tests.kernels.triton.ahead_of_time import SHARED_MEMORY, TARGETS, Report, compile_for  # noqa: E402

NUMBERS = {"num_chunks", "num_states", "num_memories", "M", "C"}
ROUNDED = {"k", "v", "hidden", "gradients", "gradients1", "gradients2", "keys"}  # stored in bf16 for bf16 tokens


class Shape(NamedTuple):
    """A production shape; `spills` is the most a thread may spill, in bytes."""

    dim: int
    width: int
    chunk: int
    precision: str = "bf16"
    num_warps: int = 8


def kernel_cases(shape: Shape) -> dict[str, tuple]:
    """Kernel and constants of every launch for a shape, by name."""
    dim, width, chunk, precision, _ = shape
    common = {"D": dim, "CP": chunk, "L2": True, "PRECISION": precision}
    hidden = {**common, "H": width, "HB": 64, "ACTIVATION": "silu", "BOUND": True}
    tiles = {"IB": 64, "OB": 64, "CP": chunk, "PRECISION": precision}
    first = {**tiles, "IN": dim, "OUT": width, "ACTIVATION": "none"}
    second = {**tiles, "IN": width, "OUT": dim, "ACTIVATION": "silu"}
    reads = {"INIT": True}
    return {
        "write_one_layer": (write.write_one_layer, {**common, "OB": 64, "INIT": True, "BOUND": True}),
        "write_two_layers": (write.write_two_layers, {**hidden, "INIT": True, "KEEP": True}),
        "read_layer 1": (read.read_layer, {**first, **reads}),
        "read_layer 2": (read.read_layer, {**second, **reads}),
        "read_inputs_gradient 1": (read_gradient.read_inputs_gradient, {**first, **reads}),
        "read_inputs_gradient 2": (read_gradient.read_inputs_gradient, {**second, **reads}),
        "read_states_gradient 1": (read_gradient.read_states_gradient, first),
        "read_states_gradient 2": (read_gradient.read_states_gradient, second),
        "write_one_layer_gradient": (write_gradient.write_one_layer_gradient, {**common, "OB": 64}),
        "write_two_layers_gradient": (write_gradient.write_two_layers_gradient, hidden),
        "end_inputs_gradient": (
            end_gradient.end_inputs_gradient,
            {**{name: value for name, value in first.items() if name != "ACTIVATION"}, "OUTPUTS": 1},
        ),
        "end_products 1": (end_gradient.end_products, {**first, "INIT": True}),
        "end_products 2": (end_gradient.end_products, {**second, "INIT": True}),
    }


def compile_case(name: str, shape: Shape, target: str) -> Report:
    """A kernel as the launches compile it."""
    kernel, constants = kernel_cases(shape)[name]
    rounded = ROUNDED | ({"x"} if constants.get("ACTIVATION") == "none" else set())
    types = {}
    for argument in kernel.arg_names:
        if argument in NUMBERS:
            types[argument] = "i32"
        elif argument in ("bound", "act_scale"):
            types[argument] = "fp32"
        else:
            types[argument] = "*bf16" if shape.precision == "bf16" and argument in rounded else "*fp32"
    return compile_for(target, kernel, types, constants, num_warps=shape.num_warps, num_stages=1)


DEFAULT = Shape(dim=64, width=128, chunk=64)  # the models' default
NAMES = list(kernel_cases(DEFAULT))
SPILLS = 0


def check(report: Report, target: str, spills: int) -> None:
    assert report.tensor_core_instructions > 0, "without them the kernel's results are dead code"
    assert report.shared <= SHARED_MEMORY[target]
    assert report.spills <= spills, report._replace(ttgir="")
    assert not report.odd_layouts, report.odd_layouts


@pytest.mark.parametrize("name", NAMES)
def test_kernels_fit_hopper(name: str) -> None:
    check(compile_case(name, DEFAULT, "sm_90"), "sm_90", SPILLS)


@pytest.mark.slow
@pytest.mark.parametrize("target", [target for target in TARGETS if target != "sm_90"])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_fit_other_gpus(name: str, target: str) -> None:
    check(compile_case(name, DEFAULT, target), target, SPILLS)
