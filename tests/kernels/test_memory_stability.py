"""From initialisation the memory neither blows up nor breaks over 65,536 tokens, whatever the keys ."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kernels.memory import neural_memory

NUM_TOKENS = 65_536
PIECE = 8_192
# The model's own start: c = 0.12, alpha = 0.005, and a momentum of 0.9.
ALPHA, ETA, STEP = 0.005, 0.9, 0.12


def unit_norm_weights(depth: int, dim: int, width: int) -> list[Tensor]:
    """The `unit` parametrisation: hidden weights N(0, 1), the last layer zero."""
    dims = [dim, *[width] * (depth - 1), dim]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(1, i, o, generator=generator) for i, o in zip(dims, dims[1:], strict=False)]
    weights[-1].zero_()
    return weights


def default_bound(chunk_size: int) -> float:
    """The models' default: 1.25 times the harmonic number of the chunk."""
    return 1.25 * sum(1 / n for n in range(1, chunk_size + 1))


def keys_of_three_kinds(num_tokens: int, dim: int, generator: torch.Generator) -> Tensor:
    """[3, T, 1, dim] unit keys; row 0 random, row 1 nearly alike, row 2 all equal."""
    random, noise = normalize(torch.randn(2, num_tokens, dim, generator=generator), dim=-1)
    one = normalize(torch.ones(dim), dim=-1)
    return torch.stack([random, normalize(one + 0.1 * noise, dim=-1), one.expand(num_tokens, dim)]).unsqueeze(2)


def run(depth: int, chunk_size: int, *, dim: int, width: int, step_bound: float | None, num_tokens: int = NUM_TOKENS):
    """Largest output and largest norm of each layer's weights, by row, over the run."""
    generator = torch.Generator().manual_seed(1)
    weights = unit_norm_weights(depth, dim, width)
    gates = [torch.full((3, PIECE, 1), value) for value in (ALPHA, ETA, STEP * (1 - ETA))]
    state, largest, norms = None, 0.0, torch.zeros(depth, 3)
    for _ in range(0, num_tokens, PIECE):
        k = keys_of_three_kinds(PIECE, dim, generator)
        q, v = normalize(torch.randn(2, 3, PIECE, 1, dim, generator=generator), dim=-1)
        y, state = neural_memory(
            q, k, v, *gates, weights, state,
            chunk_size=chunk_size, step_bound=step_bound, activation_scale=(0.3557 * width) ** -0.5,
        )  # fmt: skip
        # maximum keeps a NaN, which max() of Python would drop.
        largest = float(torch.maximum(torch.tensor(largest), y.abs().max()))
        norms = torch.maximum(norms, torch.stack([w.flatten(1).norm(dim=1) for w in state.weights]))
    return largest, norms, weights


def assert_stable(depth: int, chunk_size: int, *, dim: int, width: int) -> None:
    largest, norms, weights = run(depth, chunk_size, dim=dim, width=width, step_bound=default_bound(chunk_size))
    # Values have unit norm: a read-out beyond 10 is a runaway. A layer that starts at zero is held against the norm of
    # an orthogonal map, sqrt(dim), which would carry a unit feature to a unit value.
    assert largest < 10
    starts = torch.tensor([max(float(w.norm()), dim**0.5) for w in weights])
    assert bool((norms < 10 * starts.unsqueeze(1)).all()), norms


@pytest.mark.parametrize(
    ("depth", "chunk_size"),
    [
        *itertools.product((1, 2), (16, 64, 256)),
        *itertools.product((3, 4), (64,)),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in itertools.product((3, 4), (16, 256))),
    ],
)
def test_no_runaway_from_initialisation(depth: int, chunk_size: int) -> None:
    assert_stable(depth, chunk_size, dim=16, width=32)


def run_over_gates(depth: int, chunk_size: int, step_bound: float, num_tokens: int = 1_024) -> float:
    """Largest output over 112 rows: equal to random keys, momentum 0 to 0.99, hardly any forgetting, large steps."""
    dim, width = 16, 32
    spread, eta, alpha, step = torch.tensor(
        list(itertools.product((0, 0.03, 0.1, 0.3, 0.6, 1.0, 3.0), (0.0, 0.5, 0.9, 0.99), (0.0002, 0.005), (0.5, 1.0)))
    ).T
    rows = len(eta)
    generator = torch.Generator().manual_seed(3)
    noise, q, v = normalize(torch.randn(3, rows, num_tokens, 1, dim, generator=generator), dim=-1)
    k = normalize(normalize(torch.ones(dim), dim=-1) + spread.view(-1, 1, 1, 1) * noise, dim=-1)
    gates = [x.view(-1, 1, 1).expand(rows, num_tokens, 1) for x in (alpha, eta, step * (1 - eta))]
    y, _ = neural_memory(
        q, k, v, *gates, unit_norm_weights(depth, dim, width),
        chunk_size=chunk_size, step_bound=step_bound, activation_scale=(0.3557 * width) ** -0.5,
    )  # fmt: skip
    return float(y.abs().max())


@pytest.mark.parametrize("chunk_size", [16, 64, 256])
@pytest.mark.parametrize("depth", [1, 2])
def test_no_runaway_whatever_the_gates_learn(depth: int, chunk_size: int) -> None:
    assert run_over_gates(depth, chunk_size, step_bound=default_bound(chunk_size)) < 2


def test_the_bound_must_exceed_the_harmonic_number_of_the_chunk() -> None:
    """H(16) = 3.4, H(64) = 4.7: a bound of 4 holds the shorter chunk only."""
    assert run_over_gates(1, 16, step_bound=4.0) < 2
    assert not run_over_gates(1, 64, step_bound=4.0, num_tokens=3_072) < 100


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [16, 64, 256])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_no_runaway_from_initialisation_at_production_width(depth: int, chunk_size: int) -> None:
    assert_stable(depth, chunk_size, dim=64, width=256)


def test_without_the_step_bound_equal_keys_run_away() -> None:
    """What the bound is for; and the proof that the tests above can fail."""
    largest, _, _ = run(2, 256, dim=16, width=32, step_bound=None, num_tokens=2 * PIECE)
    assert not largest < 1e3


def test_forgetting_to_zero_kills_a_deep_memory_and_to_init_does_not() -> None:
    """Why `init` is the default: towards zero, a memory of depth 2 decays to W = 0, where all its gradients vanish."""
    generator = torch.Generator().manual_seed(2)
    dim, width, num_tokens = 16, 32, 8_192
    weights = [torch.randn(1, i, o, generator=generator) / i**0.5 for i, o in ((dim, width), (width, dim))]
    q, k, v = normalize(torch.randn(3, 1, num_tokens, 1, dim, generator=generator), dim=-1)
    gates = [torch.full((1, num_tokens, 1), value) for value in (ALPHA, 0.0, 0.002)]
    norms = {}
    for forget_to in ("init", "zero"):
        _, state = neural_memory(q, k, v, *gates, weights, chunk_size=64, forget_to=forget_to)
        norms[forget_to] = float(state.weights[0].norm() / weights[0].norm())
    assert norms["zero"] < 1e-3
    assert 0.8 < norms["init"] < 1.2
