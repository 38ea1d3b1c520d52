"""The self-test, and what follows from it, in Triton's interpreter; `test_interpreted.py` runs these."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from kernels.memory import choice, neural_memory
from kernels.memory.options import MemoryOptions
from kernels.memory.problem import Problem
from kernels.memory.triton import selftest
from kernels.memory.triton.backend import TritonKernels
from tests.kernels.triton.interpreted import Case

# Small, because the interpreter is slow: one memory, two chunks.
DEEP, LINEAR = (16, 16, 16), (16, 16)


def problem(dims: tuple[int, ...] = DEEP, **options) -> Problem:
    options = MemoryOptions(**{"chunk_size": 4, "step_bound": 1.5, **options})
    return Problem(torch.device("cpu"), torch.float32, dims, options, "none")


@pytest.fixture(autouse=True)
def small_and_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(selftest, "MEMORIES", 1)
    monkeypatch.setattr(selftest, "CHUNKS", 2)
    monkeypatch.setattr(selftest, "REQUIRED", True)
    choice._kernels_unless_they_fail.cache_clear()
    yield
    choice._kernels_unless_they_fail.cache_clear()


@pytest.mark.parametrize("dims", [LINEAR, pytest.param(DEEP, marks=pytest.mark.slow)])
def test_right_kernels_pass(dims: tuple[int, ...]) -> None:
    chosen = choice.choose(problem(dims), "triton")
    assert chosen.backend.name == "triton" and "agree" in chosen.reason


@pytest.mark.slow
@pytest.mark.parametrize("dims", [LINEAR, DEEP])
@pytest.mark.parametrize(
    "options",
    [
        {"step_bound": None, "forget_to": "zero", "chunk_size": 1},
        {"activation": "gelu", "objective": "dot", "chunk_size": 20, "activation_scale": 0.3},
        {"chunk_size": 64},
    ],
)
def test_right_kernels_pass_with_other_options(dims: tuple[int, ...], options: dict) -> None:
    assert selftest.failure(problem(dims, **options)) is None


# What a compiler's fault would do: a function that kernels are made of, slightly wrong.
@triton.jit
def wrong_error(outputs, v, L2: tl.constexpr):
    return 2.1 * (outputs - v)


@triton.jit
def wrong_square(matrix, rows, num_rows, columns, num_columns, row_stride, column_stride):
    at = rows[:, None] * row_stride + columns[None, :] * column_stride
    return 1.1 * tl.load(matrix + at, mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :], other=0.0)


@triton.jit
def wrong_gate(gate, rows, num_rows):
    return tl.load(gate + rows, mask=rows + 1 < num_rows, other=0.0)


@triton.jit
def wrong_dot(left, right, PRECISION: tl.constexpr):
    return tl.dot(left, right, input_precision="ieee") * 1.01


FAULTS = {
    # module of triton/, function, what replaces it, widths, the first result that shows it, the kernel blamed
    "write": ("write", "inner_error", wrong_error, LINEAR, "the state of layer 1 after its writes", "write_one_layer"),
    "read": ("read", "load_square", wrong_square, LINEAR, "the read-out", "read_layer"),
    "write's gradient": ("write_gradient", "dot", wrong_dot, LINEAR, "gradient of v", "write_one_layer_gradient"),
    "keys": ("end_gradient", "load_gate", wrong_gate, LINEAR, "gradient of k", "end_inputs_gradient"),
}
SLOW_FAULTS = {
    "read's inputs": ("read_gradient", "load_square", wrong_square, LINEAR, "gradient of q", "read_inputs_gradient"),
    "write, deep": ("write", "dot", wrong_dot, DEEP, "the state of layer 1 after its writes", "write_two_layers"),
    "write's gradient, deep": ("write_gradient", "dot", wrong_dot, DEEP, "of v", "write_two_layers_gradient"),
}


@pytest.mark.parametrize("fault", [*FAULTS, *(pytest.param(fault, marks=pytest.mark.slow) for fault in SLOW_FAULTS)])
def test_wrong_kernels_are_named_and_the_dual_form_goes_on(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module, function, wrong, dims, result, kernel = {**FAULTS, **SLOW_FAULTS}[fault]
    monkeypatch.setattr(f"kernels.memory.triton.{module}.{function}", wrong)
    case = Case(dims, 4, 6, options={"step_bound": 1.5})
    arguments = *case.inputs(case.num_tokens, 0), case.weights(1)
    with caplog.at_level(logging.WARNING):
        y, _ = neural_memory(*arguments, backend="triton", **case.call_options)
        neural_memory(*arguments, backend="triton", **case.call_options)
    assert torch.equal(y, neural_memory(*arguments, backend="dual", **case.call_options)[0])
    (record,) = [record for record in caplog.records if "Triton kernels" in record.message]  # once, not at each call
    for part in (result, kernel, " x ".join(map(str, dims)), "chunk 4"):
        assert part in record.message


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no kernel image"),
        ValueError("no kernel image"),
        AssertionError("no kernel image"),
        subprocess.CalledProcessError(1, "no kernel image"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_kernel_that_does_not_run_is_a_failure(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(TritonKernels, "write", staticmethod(broken))
    chosen = choice.choose(problem(), "triton")
    assert chosen.backend.name == "dual"
    assert type(error).__name__ in chosen.reason and "no kernel image" in chosen.reason


def test_a_result_that_is_not_a_number_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    read = TritonKernels.read
    monkeypatch.setattr(TritonKernels, "read", staticmethod(lambda *arguments: read(*arguments) * float("nan")))
    assert "the read-out" in selftest.failure(problem(LINEAR))
