"""The dual form against the per-token recurrence with autograd, float64: outputs, final state and every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels.memory import MemoryState, neural_memory, neural_memory_reference
from kernels.memory.gates import GatesForGradient, GroupGates, decay_matrices
from tests.kernels.memory_cases import GATES, HEADS, leaves, make_inputs, make_weights, relative_error

NAMES = ("q", "k", "v", *GATES)
OPTIONS = list(itertools.product((1, 2, 3, 4), ("silu", "gelu", "softmax"), ("init", "zero"), (None, 1.5)))


def outputs_and_gradients(
    function, inputs: list[Tensor], weights: list[Tensor], state: MemoryState | None, *, used=None, **options
):
    """All results, and the gradients of a fixed random projection of them, for one implementation.

    Args:
        used: indices of the results that are projected, in the order of y, weights, momentum, open tokens; None: all.
    """
    inputs, weights = leaves(inputs), leaves(weights)
    state_leaves: list[Tensor] = []
    if state is not None:

        def leaf(x: Tensor) -> Tensor:
            state_leaves.append(x.detach().clone().requires_grad_())
            return state_leaves[-1]

        state = state.map(leaf)
    y, end = function(*inputs, weights, state, **options)
    results = [y, *end.weights, *end.momentum, end.k, end.v, end.alpha, end.eta, end.theta]
    generator = torch.Generator().manual_seed(7)
    # Drawn in float64 whatever the results are, so that results of another dtype have the same projection.
    parts = [(x, torch.randn(x.shape, generator=generator, dtype=torch.float64)) for x in results if x.numel()]
    parts = [part for index, part in enumerate(parts) if used is None or index in used]
    loss = sum((x * projection.to(x.dtype)).sum() for x, projection in parts)
    sources = [*inputs, *weights, *state_leaves]
    gradients = torch.autograd.grad(loss, sources, allow_unused=True)
    return [x.detach() for x in results], [
        torch.zeros_like(x) if g is None else g for x, g in zip(sources, gradients, strict=False)
    ]


def assert_equal_to_oracle(inputs, weights, state, **options) -> None:
    expected = outputs_and_gradients(neural_memory_reference, inputs, weights, state, **options)
    found = outputs_and_gradients(neural_memory, inputs, weights, state, **options)
    for kind, these, those in zip(("result", "gradient"), found, expected, strict=True):
        for index, (a, b) in enumerate(zip(these, those, strict=True)):
            assert a.shape == b.shape, f"{kind} {index}: {a.shape} {b.shape}"
            if b.numel():
                assert relative_error(a, b) < 1e-9, f"{kind} {index} of {options}"


def incoming_state(depth: int, num_tokens: int, **options) -> MemoryState:
    """A state in use: `num_tokens` after the beginning, with momentum and, for most lengths, an open chunk."""
    return neural_memory_reference(*make_inputs(num_tokens, seed=5), make_weights(depth, seed=6), **options)[1]


@pytest.mark.parametrize(("depth", "activation", "forget_to", "step_bound"), OPTIONS)
def test_equals_oracle_for_every_option(depth: int, activation: str, forget_to: str, step_bound: float | None) -> None:
    options = {
        "chunk_size": 4,
        "activation": activation,
        "forget_to": forget_to,
        "step_bound": step_bound,
        "activation_scale": 1.3,
    }
    state = incoming_state(depth, 6, **options)
    assert_equal_to_oracle(make_inputs(11), make_weights(depth), state, **options)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("num_tokens", "chunk_size"), [(12, 4), (13, 4), (3, 8), (1, 1), (9, 1), (1, 4), (5, 5)])
def test_equals_oracle_for_every_chunking(num_tokens: int, chunk_size: int, with_state: bool) -> None:
    options = {"chunk_size": chunk_size, "step_bound": 2.0}
    state = incoming_state(2, 7, **options) if with_state else None
    assert_equal_to_oracle(make_inputs(num_tokens), make_weights(2), state, **options)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("used", [[0], [1, 2, 3, 4], [2], [3]], ids=["y", "end", "weights of W_2", "momentum of W_1"])
def test_equals_oracle_where_the_loss_uses_a_part_of_the_results(used: list[int], with_state: bool) -> None:
    # Whole chunks: in the last one, too, something or nothing comes from the state behind it.
    options = {"chunk_size": 4, "step_bound": 2.0}
    state = incoming_state(2, 8, **options) if with_state else None
    assert_equal_to_oracle(make_inputs(12), make_weights(2), state, used=used, **options)


def test_equals_oracle_across_groups_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.memory.dual.GROUP_TOKENS", 8)
    options = {"chunk_size": 4, "step_bound": 2.0}
    assert_equal_to_oracle(make_inputs(27), make_weights(2), incoming_state(2, 7, **options), **options)
    assert_equal_to_oracle(make_inputs(24), make_weights(3), None, **options)


@pytest.mark.parametrize("depth", [1, 2])
def test_equals_oracle_with_dot_objective(depth: int) -> None:
    options = {"chunk_size": 4, "objective": "dot"}
    assert_equal_to_oracle(make_inputs(11), make_weights(depth), incoming_state(depth, 6, **options), **options)


@pytest.mark.parametrize("step_bound", [None, 2.0])
def test_gates_at_their_ends_are_exact(step_bound: float | None) -> None:
    inputs = make_inputs(14)
    alpha, eta, theta = inputs[3:]
    alpha[:, 2] = alpha[:, 7:9] = 1.0
    alpha[:, 4] = 0.0
    eta[:, 3] = eta[:, 7] = 0.0
    eta[:, 5] = eta[0, 9] = 1.0
    theta[:, 5] = theta[:, 10] = 0.0
    assert_equal_to_oracle(inputs, make_weights(2), None, chunk_size=6, step_bound=step_bound)
    inputs[3], inputs[4] = torch.ones_like(alpha), torch.zeros_like(eta)
    assert_equal_to_oracle(inputs, make_weights(2), None, chunk_size=6, step_bound=step_bound)


@pytest.mark.parametrize("step_bound", [None, 0.7])
def test_gradcheck(step_bound: float | None) -> None:
    inputs, weights = make_inputs(4), make_weights(2, width=3)
    state = neural_memory(*make_inputs(4, seed=3), weights, chunk_size=3)[1]
    flat: list[Tensor] = []
    state.map(lambda x: flat.append(x) or x)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors[8:])
        given = state.map(lambda _: next(rest))
        y, end = neural_memory(*tensors[:6], tensors[6:8], given, chunk_size=3, step_bound=step_bound)
        return y, *end.weights, *end.momentum, end.k

    assert torch.autograd.gradcheck(function, leaves([*inputs, *weights, *flat]))


def products_by_definition(alpha: Tensor, eta: Tensor) -> GroupGates:
    """P, the last row of H, a, e and p for gates [C], entry by entry; differentiable."""
    keep, size = 1 - alpha, alpha.shape[0]

    def between(gate: Tensor) -> Tensor:
        # The product of no gates is 1; above the diagonal stands 0.
        rows = [[gate[i + 1 : t + 1].prod() * (i <= t) for i in range(size)] for t in range(size)]
        return torch.stack([torch.stack(row) for row in rows])

    decays, momenta = between(keep), between(eta)
    a, e = (torch.stack([gate[: t + 1].prod() for t in range(size)]) for gate in (keep, eta))
    return GroupGates(decays @ momenta, momenta[-1], a, e, decays @ e)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_products_of_gates_and_their_gradients_are_those_of_the_definition(size: int) -> None:
    alpha, eta = torch.rand(2, 1, 1, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    alpha[..., 2::3], eta[..., 3::4], eta[..., 1::5] = 1.0, 0.0, 1.0
    found, sources = GatesForGradient.of(alpha, eta), leaves([alpha, eta])
    expected = products_by_definition(*(x.flatten() for x in sources))
    generator = torch.Generator().manual_seed(9)
    projections = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in expected]
    for name, these, those in zip(GroupGates._fields, found.gates, expected, strict=True):
        assert torch.allclose(these.view(those.shape), those, rtol=1e-12, atol=0), name
    gradients = torch.autograd.grad(sum((x * y).sum() for x, y in zip(expected, projections, strict=True)), sources)
    d_gates = GroupGates(*(x.view(y.shape) for x, y in zip(projections, found.gates, strict=True)))
    for these, those in zip(found.gradients(d_gates), gradients, strict=True):
        assert torch.allclose(these, those, rtol=1e-11, atol=1e-14)


def test_products_of_gates_keep_their_precision_over_strong_decay() -> None:
    gate = torch.full((256,), 1e-6)
    gate[128:] = 0.999
    assert decay_matrices(gate)[128, 255].item() == pytest.approx(0.999**127, rel=1e-5)


def test_surprise_is_the_norm_of_the_inner_gradient() -> None:
    inputs, weights = make_inputs(5, rows=1), make_weights(3)
    _, _, surprise = neural_memory(*inputs, weights, chunk_size=8, return_surprise=True)
    for token, head in itertools.product(range(5), range(HEADS)):
        w0 = leaves([w[head] for w in weights])
        x = inputs[1][0, token, head]
        for layer, w in enumerate(w0):
            x = x @ w
            x = torch.nn.functional.silu(x) if layer < len(w0) - 1 else x
        gradient = torch.autograd.grad((x - inputs[2][0, token, head]).square().sum(), w0)
        expected = torch.cat([g.flatten() for g in gradient]).norm()
        assert surprise[0, token, head].item() == pytest.approx(expected.item(), rel=1e-12)
