"""Every kernel, compiled for GPUs that are not here: within their registers and shared memory, and on tensor cores."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels can't be compiled", allow_module_level=True)

from kernels.memory.options import MemoryOptions
from kernels.memory.problem import Problem
from kernels.memory.triton import selftest
from kernels.memory.triton.backend import MAX_TILE, MAX_TILE_ELSEWHERE, TritonKernels, refusal_of_shape
from tests.kernels.triton.ahead_of_time import (
    SHARED_MEMORY,
    TARGETS,
    Launch,
    compile_for,
    recorded_launches,
)


class Shape(NamedTuple):
    """A memory: `expansion` is the hidden width over the head's, 0 for a linear memory."""

    dim: int
    expansion: int
    chunk: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"head {self.dim}, expansion {self.expansion}, chunk {self.chunk}, {str(self.dtype).split('.')[1]}"


DEFAULT, LINEAR = Shape(64, 2, 64), Shape(64, 0, 64)  # the models' default, and the smallest memory
GRID = [
    Shape(dim, expansion, chunk, dtype)
    for dim in (64, 128)
    for expansion in (0, 1, 2, 4)
    for chunk in (32, 64, 128)
    for dtype in (torch.bfloat16, torch.float32)
]
GRID += [Shape(128, 2, 16, torch.bfloat16), Shape(128, 2, 16, torch.float32)]  # the narrowest that older GPUs refuse

# Spilled bytes of a thread. Only the reverse recurrence may spill at the models' shape on Hopper.
HOT_SPILLS = {"write_two_layers_gradient": 256}
MAX_SPILLS = 1024


def problem_of(shape: Shape) -> Problem:
    dims = (shape.dim, shape.expansion * shape.dim, shape.dim) if shape.expansion else (shape.dim, shape.dim)
    options = MemoryOptions(chunk_size=shape.chunk, step_bound=5.0)
    return Problem(torch.device("cpu"), shape.dtype, dims, options, "tf32")


def launches_of(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Everything that is launched for a memory, forward and backward, with the products of fp32 tokens in tf32."""
    precisions = {torch.bfloat16: "bf16", torch.float32: "tf32"}
    monkeypatch.setattr("kernels.memory.triton.launch.precision_of", precisions.get)
    problem = problem_of(shape)
    group = selftest.random_group(problem, 2, shape.chunk, shape.chunk)
    with recorded_launches() as found:
        list(selftest.results(TritonKernels(), problem.options, len(problem.dims) - 1, group))
    return found


def assert_fits(launch: Launch, target: str, spills: int) -> None:
    report = compile_for(target, launch)
    said = f"{launch.name} on {target}: {report._replace(ttgir='')}"
    assert report.tensor_core_instructions > 0, f"{said}; without them the kernel's results are dead code"
    assert report.shared <= SHARED_MEMORY[target], said
    assert report.spills <= spills, said
    # NVIDIA's compiler has got such tiles wrong; AMD's makes them of whatever is not its products' own shape.
    assert target == "gfx942" or not report.odd_layouts, (said, report.odd_layouts)


def test_every_kernel_is_launched_for_the_shapes_that_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {launch.kernel.__name__ for shape in (DEFAULT, LINEAR) for launch in launches_of(shape, monkeypatch)}
    assert names == {
        "write_one_layer", "write_two_layers", "read_layer", "read_inputs_gradient", "read_states_gradient",
        "write_one_layer_gradient", "write_two_layers_gradient", "end_inputs_gradient", "end_products",
    }  # fmt: skip


def test_an_open_chunk_launches_the_kernels_of_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, problem = set(launches_of(DEFAULT, monkeypatch)), problem_of(DEFAULT)
    group = selftest.random_group(problem, 1, 16, 1)  # 16 and 1: what Triton would compile for
    with recorded_launches() as found:
        list(selftest.results(TritonKernels(), problem.options, 2, group))
    assert set(found) == whole


def test_the_checks_fail_where_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = next(x for x in launches_of(LINEAR, monkeypatch) if x.kernel.__name__ == "end_products")
    report = compile_for("sm_90", launch)
    assert report.tensor_core_instructions > 0 and report.shared > 0 and 32 < report.registers <= 255
    odd = "%x = ttg.local_alloc %y : (tensor<64x64xf32, #linear>) -> !ttg.memdesc"
    assert report._replace(ttgir=odd).odd_layouts == [odd]
    assert not report._replace(ttgir=odd.replace("64x64", "64x1")).odd_layouts
    operand = "%x = ttg.convert_layout %y : tensor<64x1xf32, #linear> -> tensor<64x1xf32, #ttg.dot_op<{opIdx = 0}>>"
    assert report._replace(ttgir=operand).odd_layouts == [operand]


@pytest.mark.parametrize("shape", [DEFAULT, LINEAR], ids=str)
def test_kernels_fit_hopper(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    for launch in launches_of(shape, monkeypatch):
        assert_fits(launch, "sm_90", HOT_SPILLS.get(launch.kernel.__name__, 0))


def test_the_recurrence_of_wide_heads_fits_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the shapes that are taken the one with the least to spare; the whole grid is slow."""
    launches = launches_of(Shape(128, 1, 32, torch.float32), monkeypatch)
    assert_fits(next(x for x in launches if x.kernel.__name__ == "write_two_layers_gradient"), "sm_90", MAX_SPILLS)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", GRID, ids=str)
def test_kernels_fit_every_gpu_at_every_shape_that_is_taken(
    shape: Shape, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    max_tile = MAX_TILE if target in ("sm_90", "sm_100") else MAX_TILE_ELSEWHERE
    if refusal_of_shape(problem_of(shape), max_tile) is not None:
        pytest.skip("not taken")
    for launch in launches_of(shape, monkeypatch):
        assert_fits(launch, target, MAX_SPILLS)
