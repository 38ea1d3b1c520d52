"""What each token did to a memory, in norms: against the per-token recurrence with autograd, float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernels.memory import MemoryState, neural_memory
from kernels.memory.options import MemoryOptions
from kernels.memory.reference import neural_memory_reference
from kernels.memory.token_norms import TokenNorms, token_norms
from tests.kernels.memory_cases import make_inputs, make_weights, relative_error
from tests.kernels.token_norms_oracle import by_the_token, norm

OPTIONS = list(itertools.product((1, 2, 3), ("init", "zero"), (None, 1.5), ("silu", "softmax")))


def assert_norms_equal(found: TokenNorms, expected: TokenNorms, tolerance: float) -> None:
    for name, a, b in zip(TokenNorms._fields, found, expected, strict=True):
        assert a.shape == b.shape and relative_error(a, b) < tolerance, name


@pytest.mark.parametrize(("depth", "forget_to", "bound", "activation"), OPTIONS)
@pytest.mark.parametrize("objective", ["l2", "dot"])
def test_norms_are_those_of_the_recurrence(
    depth: int, forget_to: str, bound: float | None, activation: str, objective: str
) -> None:
    options = MemoryOptions(4, activation, forget_to, objective, bound, 0.7)
    inputs, weights = make_inputs(11), make_weights(depth)
    assert_norms_equal(token_norms(*inputs[1:], weights, None, options), by_the_token(inputs, weights, options), 1e-7)


def test_the_oracle_is_the_recurrence() -> None:
    """Its changes add up to the weights that the reference ends with, where they all point one way."""
    options = MemoryOptions(1, forget_to="zero", objective="dot")
    inputs, weights = make_inputs(6), make_weights(1)
    inputs[1], inputs[2] = (x[:, :1].abs().expand_as(x).contiguous() for x in inputs[1:3])  # one key, one value
    inputs[3], weights = torch.zeros_like(inputs[3]), [torch.zeros_like(weights[0])]
    plain = {"chunk_size": 1, "forget_to": "zero", "objective": "dot"}
    _, end = neural_memory_reference(*inputs, weights, None, **plain)
    assert relative_error(by_the_token(inputs, weights, options).change.sum(1), norm(end.weights)) < 1e-12


@pytest.mark.parametrize("cuts", [(3,), (4, 8), (1, 2, 9), (5, 6)])
def test_norms_do_not_depend_on_where_a_sequence_is_cut(cuts: tuple[int, ...]) -> None:
    options = MemoryOptions(4, step_bound=1.5)
    inputs, weights = make_inputs(11), make_weights(2)
    state, parts, edges = None, [], (0, *cuts, 11)
    for first, last in itertools.pairwise(edges):
        piece = [x[:, first:last] for x in inputs]
        parts.append(token_norms(*piece[1:], weights, state, options))
        _, state = neural_memory(*piece, weights, state, chunk_size=4, step_bound=1.5)
    whole = token_norms(*inputs[1:], weights, None, options)
    assert_norms_equal(TokenNorms(*(torch.cat(x, 1) for x in zip(*parts, strict=True))), whole, 1e-9)


def test_surprise_is_the_one_that_the_memory_returns_in_training() -> None:
    inputs, weights = make_inputs(70, dtype=torch.float32), make_weights(2, dtype=torch.float32)
    state = MemoryState.initial(weights, 2)
    _, _, surprise = neural_memory(*inputs, weights, state, chunk_size=16, step_bound=4.0, return_surprise=True)
    found = token_norms(*inputs[1:], weights, state, MemoryOptions(16, step_bound=4.0))
    assert torch.equal(found.surprise, surprise)


def test_fp32_norms_are_near_the_float64_oracles() -> None:
    options = MemoryOptions(16, step_bound=4.0)
    single = token_norms(*make_inputs(40, dtype=torch.float32)[1:], make_weights(2, dtype=torch.float32), None, options)
    rounded = [x.double() for x in make_inputs(40, dtype=torch.float32)]
    weights = [w.double() for w in make_weights(2, dtype=torch.float32)]
    assert_norms_equal(TokenNorms(*(x.double() for x in single)), by_the_token(rounded, weights, options), 1e-4)


def test_a_token_with_no_step_and_closed_gates_changes_nothing() -> None:
    _, *inputs = make_inputs(9)
    inputs[2][:], inputs[3][:], inputs[4][:] = 0.0, 0.0, 0.0
    found = token_norms(*inputs, make_weights(2), None, MemoryOptions(4))
    assert not found.change.any() and not found.momentum.any() and (found.surprise > 0).all()
