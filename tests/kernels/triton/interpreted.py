"""The kernels in Triton's interpreter against the float64 oracle; `test_interpreted.py` runs these in a new process.

Triton reads TRITON_INTERPRET when it is first imported, so these can't run beside tests that compile kernels.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch.nn.functional import normalize

from kernels.memory import MemoryState, neural_memory, neural_memory_reference
from kernels.memory.options import MemoryOptions
from kernels.memory.problem import Problem
from kernels.memory.triton import selftest
from kernels.memory.triton.backend import TritonKernels
from kernels.memory.triton.launch import INTERPRETED
from tests.kernels.memory_cases import relative_error
from tests.kernels.test_memory_oracle import NAMES, outputs_and_gradients

HEADS = 2


def inputs_of(num_tokens: int, dim: int, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v, alpha, eta, theta in float64 for one row."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, num_tokens, HEADS)
    q, k, v = (torch.randn(*shape, dim, generator=generator, dtype=torch.float64) for _ in range(3))
    alpha, eta, theta = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return [normalize(q, dim=-1), normalize(k, dim=-1), v / dim**0.5, 0.3 * alpha, eta, 0.2 * theta]


def weights_of(dims: tuple[int, ...], seed: int = 1) -> list[torch.Tensor]:
    """W_0 of layers with these widths, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(HEADS, d_in, d_out, generator=generator, dtype=torch.float64) / d_in**0.5
        for d_in, d_out in zip(dims, dims[1:], strict=False)
    ]


def in_fp32(state: MemoryState | None) -> MemoryState | None:
    return None if state is None else state.map(lambda x: x.float())


CASES = {
    # widths, chunk, tokens, tokens before, options
    "linear": ((16, 16), 16, 40, 0, {}),
    "linear, two blocks of columns, state": ((128, 128), 5, 12, 7, {"step_bound": 1.5}),
    "linear, dot, zero": ((32, 32), 16, 33, 0, {"objective": "dot", "forget_to": "zero"}),
    "linear, dot, bound": ((16, 16), 8, 20, 3, {"objective": "dot", "step_bound": 2.0}),
    "deep": ((16, 32, 16), 16, 40, 0, {}),
    "deep, all that models use, state": ((16, 32, 16), 16, 37, 21, {"step_bound": 1.5, "activation_scale": 1.3}),
    "deep, two blocks, long chunk": ((32, 128, 32), 40, 90, 0, {"step_bound": 2.0, "activation_scale": 0.7}),
    "deep, three blocks, gelu, zero": (
        (16, 96, 16), 20, 50, 33, {"activation": "gelu", "forget_to": "zero", "step_bound": 1.5}
    ),
    "deep, gelu, init": ((16, 48, 16), 7, 15, 0, {"activation": "gelu", "activation_scale": 1.3}),
    "deep, dot": ((16, 32, 16), 16, 35, 5, {"objective": "dot", "step_bound": 1.5}),
    "deep, a token at a time": ((16, 32, 16), 1, 3, 0, {"step_bound": 1.5}),
    "deep, an open chunk goes on": ((16, 32, 16), 16, 3, 20, {"step_bound": 1.5}),
}  # fmt: skip


def test_the_interpreter_is_on() -> None:
    assert INTERPRETED, "start with TRITON_INTERPRET=1"


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_equal_the_oracle(case: str) -> None:
    dims, chunk_size, num_tokens, before, options = CASES[case]
    options = {"chunk_size": chunk_size, **options}
    inputs, weights, state = inputs_of(num_tokens, dims[0]), weights_of(dims), None
    if before:
        # A state in use: with momentum and, for most lengths, an open chunk.
        state = neural_memory_reference(*inputs_of(before, dims[0], seed=5), weights_of(dims, seed=6), **options)[1]
    expected = outputs_and_gradients(neural_memory_reference, inputs, weights, state, **options)
    found = outputs_and_gradients(
        neural_memory, [x.float() for x in inputs], [w.float() for w in weights], in_fp32(state),
        backend="triton", **options,
    )  # fmt: skip
    names = [*NAMES, *(f"W_0 of layer {layer}" for layer in range(len(weights)))]
    for kind, these, those in zip(("result", "gradient"), found, expected, strict=True):
        for index, (a, b) in enumerate(zip(these, those, strict=True)):
            label = names[index] if kind == "gradient" and index < len(names) else str(index)
            assert a.shape == b.shape, f"{kind} {label}"
            if b.numel():
                assert relative_error(a.double(), b) < 1e-5, f"{kind} {label}"


def test_equal_across_groups_of_chunks_and_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weights = [x.float() for x in inputs_of(35, 16)], [w.float() for w in weights_of((16, 32, 16))]
    options = {"chunk_size": 8, "step_bound": 1.5, "backend": "triton"}
    whole = outputs_and_gradients(neural_memory, inputs, weights, None, **options)
    again = outputs_and_gradients(neural_memory, inputs, weights, None, **options)
    monkeypatch.setattr("kernels.memory.dual.GROUP_TOKENS", 16)
    pieces = outputs_and_gradients(neural_memory, inputs, weights, None, **options)
    for kind in range(2):
        for a, b, c in zip(whole[kind], again[kind], pieces[kind], strict=True):
            assert torch.equal(a, b)
            assert not a.numel() or relative_error(c, a) < 1e-5


def test_gates_at_their_ends_are_exact() -> None:
    inputs, weights = inputs_of(20, 16), weights_of((16, 16, 16))
    alpha, eta, theta = inputs[3:]
    alpha[:, 3::5], alpha[:, 4::5], eta[:, 2::5], eta[:, 1::5], theta[:, 1::5] = 1, 0, 0, 1, 0
    options = {"chunk_size": 8, "step_bound": 2.0}
    expected = outputs_and_gradients(neural_memory_reference, inputs, weights, None, **options)
    fp32 = [x.float() for x in inputs], [w.float() for w in weights]
    found = outputs_and_gradients(neural_memory, *fp32, None, backend="triton", **options)
    for kind in range(2):
        for a, b in zip(found[kind], expected[kind], strict=True):
            # With eta = 1 the bound divides by MIN_ONE_MINUS_ETA: gradients of eta are large there in fp32 too.
            assert not b.numel() or relative_error(a.double(), b) < 1e-4


def test_bf16_tokens_keep_an_fp32_state() -> None:
    inputs = [x.bfloat16() for x in inputs_of(20, 16)]
    weights = [w.float() for w in weights_of((16, 32, 16))]
    options = {"chunk_size": 8, "step_bound": 1.5, "return_surprise": True}
    y, state, surprise = neural_memory(*inputs, weights, backend="triton", **options)
    expected_y, expected, expected_surprise = neural_memory(*inputs, weights, backend="dual", **options)
    assert y.dtype == torch.bfloat16 and all(w.dtype == torch.float32 for w in (*state.weights, *state.momentum))
    assert relative_error(y.float(), expected_y.float()) < 1e-2
    assert relative_error(surprise.float(), expected_surprise.float()) < 1e-2
    for a, b in zip((*state.weights, *state.momentum), (*expected.weights, *expected.momentum), strict=True):
        assert relative_error(a, b) < 1e-5


def problem(dims: tuple[int, ...] = (16, 32, 16), **options) -> Problem:
    options = MemoryOptions(**{"chunk_size": 8, "step_bound": 1.5, **options})
    return Problem(torch.device("cpu"), torch.float32, dims, options, "none")


@pytest.mark.parametrize("dims", [(16, 16), (16, 32, 16)])
@pytest.mark.parametrize("options", [{}, {"step_bound": None, "forget_to": "zero", "chunk_size": 1}])
def test_the_self_test_passes(dims: tuple[int, ...], options: dict) -> None:
    assert selftest.failure(problem(dims, **options)) is None


def test_the_self_test_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    right = TritonKernels.gradients

    def wrong(*arguments):
        found = right(*arguments)
        return found._replace(tokens=found.tokens._replace(v=found.tokens.v * 1.01))

    monkeypatch.setattr(TritonKernels, "gradients", staticmethod(wrong))
    with caplog.at_level(logging.WARNING):
        reason = selftest.failure(problem())
    assert "the gradient of v" in reason
    assert "16 x 32 x 16" in caplog.text and "the gradient of v" in caplog.text


def test_the_self_test_reports_a_kernel_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_, **__):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(TritonKernels, "write", staticmethod(broken))
    assert "no kernel image" in selftest.failure(problem())
