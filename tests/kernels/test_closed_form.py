"""Gradients in closed form are there where create_graph=True asks for a graph; to go back through them is an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.cross_entropy import linear_cross_entropy
from kernels.memory import neural_memory
from kernels.token_maps import causal_convolution, head_norm, unit_silu
from tests.kernels.memory_cases import leaves, make_inputs, make_weights

TARGETS = torch.tensor([3, 0, 2])


def memory(*tensors: Tensor, backend: str = "dual") -> Tensor:
    # A whole chunk, whose end the open one goes on from.
    return neural_memory(*tensors[:6], tensors[6:], chunk_size=2, step_bound=1.5, backend=backend)[0]


def checkpointed_memory(*tensors: Tensor) -> Tensor:
    return checkpoint(memory, *tensors, use_reentrant=False)


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "memory": (memory, [*make_inputs(3), *make_weights(2)]),
    "memory, checkpointed": (checkpointed_memory, [*make_inputs(3), *make_weights(2)]),
    "convolution": (causal_convolution, drawn((2, 6, 4), (3, 4))),
    "unit_silu": (lambda x: unit_silu(x, 2), drawn((2, 3, 8))),
    "head_norm": (lambda x, weight: head_norm(x, weight, 1e-2), drawn((2, 3, 2, 4), (2, 4))),
    "cross-entropy": (lambda x, weight: linear_cross_entropy(x, weight, TARGETS), drawn((3, 4), (5, 4))),
}

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "whose gradient is a constant": lambda y: y.sum(),
    "whose gradient depends on the inputs": lambda y: y.square().sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_a_graph_of_the_gradients_changes_none_of_them(case: str, loss: str) -> None:
    function, inputs = CASES[case]
    plain, kept = (
        torch.autograd.grad(LOSSES[loss](function(*sources)), sources, create_graph=create_graph)
        for create_graph, sources in ((False, leaves(inputs)), (True, leaves(inputs)))
    )
    for name, (got, wanted) in enumerate(zip(kept, plain, strict=True)):
        assert torch.equal(got, wanted), name
        assert got.requires_grad, f"{name} is a constant"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_a_second_derivative_is_an_error_in_whatever_it_is_taken(case: str, loss: str) -> None:
    function, inputs = CASES[case]
    sources = leaves(inputs)
    gradients = torch.autograd.grad(LOSSES[loss](function(*sources)), sources, create_graph=True)
    # Beside something that has one: were the gradients constants, this alone would be the second derivative.
    penalties = [sum(x.square().sum() for x in (gradient, *sources)) for gradient in gradients]
    for penalty in penalties:
        for source in sources:
            with pytest.raises(RuntimeError, match="second derivative was asked for"):
                torch.autograd.grad(penalty, source, retain_graph=True)
        with pytest.raises(RuntimeError, match="second derivative was asked for"):
            penalty.backward(retain_graph=True)


def test_the_reference_has_the_second_derivatives_that_the_error_promises() -> None:
    tensors = leaves([*make_inputs(3, rows=1), *make_weights(1)])
    first = torch.autograd.grad(memory(*tensors, backend="reference").sum(), tensors, create_graph=True)
    directions = drawn(*(x.shape for x in tensors))
    slope = sum((x * d).sum() for x, d in zip(first, directions, strict=True))
    second = torch.autograd.grad(slope, tensors)
    # Of the closed form: as its first derivatives change along the directions.
    step, sides = 1e-5, []
    for sign in (1, -1):
        moved = leaves([x.detach() + sign * step * d for x, d in zip(tensors, directions, strict=True)])
        sides.append(torch.autograd.grad(memory(*moved).sum(), moved))
    for found, after, before in zip(second, *sides, strict=True):
        torch.testing.assert_close(found, (after - before) / (2 * step), rtol=1e-6, atol=1e-7)
