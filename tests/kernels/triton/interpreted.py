"""The kernels in Triton's interpreter against the float64 oracle; `test_interpreted.py` runs these in a new process.

Triton reads TRITON_INTERPRET when it is first imported, so these can't run beside tests that compile kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import normalize

from kernels.memory import MemoryState, neural_memory, neural_memory_reference
from kernels.memory.triton.launch import INTERPRETED
from tests.kernels.memory_cases import relative_error
from tests.kernels.test_memory_oracle import NAMES, outputs_and_gradients


class Case(NamedTuple):
    """A call of the memory; `before` tokens went by already, so that there are a state in use and an open chunk."""

    dims: tuple[int, ...]
    chunk_size: int
    num_tokens: int
    before: int = 0
    heads: int = 1
    rows: int = 1
    momentum: bool = True
    end_gradient: bool = True  # the outgoing state is used, too
    options: dict[str, Any] = {}

    def inputs(self, num_tokens: int, seed: int) -> list[torch.Tensor]:
        """q, k, v, alpha, eta, theta, of values that fp32 has."""
        generator = torch.Generator().manual_seed(seed)
        shape, dim = (self.rows, num_tokens, self.heads), self.dims[0]
        q, k, v = (torch.randn(*shape, dim, generator=generator) for _ in range(3))
        alpha, eta, theta = (torch.rand(shape, generator=generator) for _ in range(3))
        return [normalize(q, dim=-1), normalize(k, dim=-1), v / dim**0.5, 0.3 * alpha, eta * self.momentum, 0.2 * theta]

    def weights(self, seed: int) -> list[torch.Tensor]:
        """W_0."""
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randn(self.heads, d_in, d_out, generator=generator) / d_in**0.5
            for d_in, d_out in zip(self.dims, self.dims[1:], strict=False)
        ]

    def state(self) -> MemoryState | None:
        """After `before` tokens of another sequence and another W_0; in fp32."""
        if not self.before:
            return None
        found = neural_memory_reference(*self.inputs(self.before, 5), self.weights(6), **self.call_options)
        return found[1]

    @property
    def call_options(self) -> dict[str, Any]:
        """Arguments of `neural_memory`."""
        return {"chunk_size": self.chunk_size, **self.options}


# Shapes are small because the interpreter takes about half a millisecond for each operation of each program.
CASES = {
    "linear, two blocks of columns, state": Case((128, 128), 5, 8, 7, options={"step_bound": 1.5}),
    "linear, dot, zero, any activation": Case(
        (32, 32), 16, 20, options={"objective": "dot", "forget_to": "zero", "activation": "softmax"}
    ),
    "linear, dot, bound, rows": Case((16, 16), 8, 20, 3, rows=2, options={"objective": "dot", "step_bound": 2.0}),
    "linear, no momentum, whole chunks, no end": Case(
        (64, 64), 16, 32, momentum=False, end_gradient=False, options={"forget_to": "zero", "step_bound": 1.0}
    ),
    "deep, all that models use, state": Case(
        (16, 32, 16), 16, 29, 21, options={"step_bound": 1.5, "activation_scale": 1.3}
    ),
    "deep, two blocks, gelu, zero": Case(
        (16, 96, 16), 8, 13, 11, options={"activation": "gelu", "forget_to": "zero", "step_bound": 1.5}
    ),
    "deep, an open chunk goes on": Case((16, 32, 16), 16, 3, 20, options={"step_bound": 1.5}),
}
MORE_CASES = {
    "linear": Case((16, 16), 16, 40, heads=3),
    "deep, heads and rows, no momentum": Case((16, 16, 16), 8, 12, heads=2, rows=2, momentum=False),
    "deep, gelu, init, no end": Case(
        (16, 48, 16), 7, 15, end_gradient=False, options={"activation": "gelu", "activation_scale": 1.3}
    ),
    "deep, dot": Case((16, 32, 16), 16, 24, 5, options={"objective": "dot", "step_bound": 1.5}),
    "deep, a token at a time": Case((16, 32, 16), 1, 3, options={"step_bound": 1.5}),
    "linear, long": Case((64, 64), 64, 150, 70, heads=2, options={"step_bound": 4.0}),
    "linear, wide, zero": Case((128, 128), 32, 80, heads=2, options={"forget_to": "zero"}),
    "deep, narrow": Case((32, 16, 32), 32, 75, 9, heads=2, options={"step_bound": 2.0, "activation_scale": 2.0}),
    "deep, two blocks, long chunk": Case(
        (32, 128, 32), 40, 90, heads=2, options={"step_bound": 2.0, "activation_scale": 0.7}
    ),
    "deep, models' shape": Case((64, 128, 64), 64, 140, 70, options={"step_bound": 5.9, "activation_scale": 0.15}),
    "deep, chunk of 128, gelu": Case((32, 64, 32), 128, 140, options={"step_bound": 6.8, "activation": "gelu"}),
    "deep, head of 128, zero": Case((128, 64, 128), 16, 40, 20, options={"forget_to": "zero", "step_bound": 4.0}),
    "deep, three rows of three heads": Case((16, 32, 16), 16, 70, 5, heads=3, rows=3, options={"step_bound": 1.5}),
}
TOLERANCE = 1e-5


def test_the_interpreter_is_on() -> None:
    assert INTERPRETED, "start with TRITON_INTERPRET=1"


def assert_equal_to_the_oracle(case: Case, inputs: list[torch.Tensor], tolerance: float = TOLERANCE) -> None:
    weights, state = case.weights(1), case.state()

    def with_all_ends(function: Callable) -> Callable:
        def call(*arguments, **options):
            y, end = function(*arguments, **options)
            return y, end if case.end_gradient else end.map(torch.Tensor.detach)

        return call

    expected = outputs_and_gradients(
        with_all_ends(neural_memory_reference), [x.double() for x in inputs], [w.double() for w in weights],
        None if state is None else state.map(torch.Tensor.double), **case.call_options,
    )  # fmt: skip
    found = outputs_and_gradients(
        with_all_ends(neural_memory), inputs, weights, state, backend="triton", **case.call_options
    )
    names = [*NAMES, *(f"W_0 of layer {layer}" for layer in range(len(weights)))]
    for kind, these, those in zip(("result", "gradient"), found, expected, strict=True):
        for index, (a, b) in enumerate(zip(these, those, strict=True)):
            label = names[index] if kind == "gradient" and index < len(names) else str(index)
            assert a.shape == b.shape and a.dtype == torch.float32, f"{kind} {label}"
            if b.numel():
                assert relative_error(a.double(), b) < tolerance, f"{kind} {label}"


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_equal_the_oracle(name: str) -> None:
    assert_equal_to_the_oracle(CASES[name], CASES[name].inputs(CASES[name].num_tokens, 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_CASES)
def test_results_and_gradients_equal_the_oracle_in_more_cases(name: str) -> None:
    assert_equal_to_the_oracle(MORE_CASES[name], MORE_CASES[name].inputs(MORE_CASES[name].num_tokens, 0))


@pytest.mark.parametrize("dims", [(16, 16), pytest.param((16, 16, 16), marks=pytest.mark.slow)])
def test_equal_across_groups_of_chunks_and_twice(dims: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(dims, 4, 10, options={"step_bound": 1.5, "backend": "triton"})
    arguments = case.inputs(case.num_tokens, 0), case.weights(1), None
    whole = outputs_and_gradients(neural_memory, *arguments, **case.call_options)
    again = outputs_and_gradients(neural_memory, *arguments, **case.call_options)
    monkeypatch.setattr("kernels.memory.dual.GROUP_TOKENS", 4)
    pieces = outputs_and_gradients(neural_memory, *arguments, **case.call_options)
    for kind in range(2):
        for a, b, c in zip(whole[kind], again[kind], pieces[kind], strict=True):
            assert torch.equal(a, b)
            assert not a.numel() or relative_error(c, a) < TOLERANCE


def test_gates_at_their_ends_are_exact() -> None:
    case = Case((16, 16, 16), 8, 12, options={"step_bound": 2.0})
    inputs = case.inputs(12, 0)
    alpha, eta, theta = inputs[3:]
    alpha[:, 3::5], alpha[:, 4::5], eta[:, 2::5], eta[:, 1::5], theta[:, 1::5] = 1, 0, 0, 1, 0
    # With eta = 1 the bound divides by MIN_ONE_MINUS_ETA: gradients of eta are large there, and rounded in fp32.
    assert_equal_to_the_oracle(case, inputs, tolerance=1e-4)


def test_bf16_tokens_keep_an_fp32_state() -> None:
    case = Case((16, 32, 16), 8, 20, options={"step_bound": 1.5, "return_surprise": True})
    inputs, weights = [x.bfloat16() for x in case.inputs(20, 0)], case.weights(1)
    y, state, surprise = neural_memory(*inputs, weights, backend="triton", **case.call_options)
    expected_y, expected, expected_surprise = neural_memory(*inputs, weights, backend="dual", **case.call_options)
    assert y.dtype == torch.bfloat16 and all(w.dtype == torch.float32 for w in (*state.weights, *state.momentum))
    assert relative_error(y.float(), expected_y.float()) < 1e-2
    assert relative_error(surprise.float(), expected_surprise.float()) < 1e-2
    for a, b in zip((*state.weights, *state.momentum), (*expected.weights, *expected.momentum), strict=True):
        assert relative_error(a, b) < TOLERANCE
