"""Rotary phases: exact far out, and logits that depend on distances only."""

import dataclasses
import math
from fractions import Fraction

import pytest
import torch

from model.rope import Rotary, rotary_phases, rotate

FAR = 2**31 + 12_345


def test_phases_are_exact_at_two_to_the_31() -> None:
    positions = torch.tensor([[0, 1, 2**21, FAR]])
    rotary = rotary_phases(positions, 8, 10_000.0, torch.float32)
    assert rotary.cos.dtype == torch.float32
    turn = Fraction(*math.tau.as_integer_ratio())
    for t, position in enumerate(positions[0].tolist()):
        for i in range(4):
            frequency = Fraction(10_000.0 ** (-2 * i / 8))
            angle = float((position * frequency) % turn)
            # tau itself is rounded: the error grows with the number of whole turns taken off.
            bound = 1e-6 + float(position * frequency / turn) * 3e-16
            assert abs(rotary.cos[0, t, i] - math.cos(angle)) < bound
            assert abs(rotary.sin[0, t, i] - math.sin(angle)) < bound


def test_scores_depend_on_the_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 2, 8, generator=generator) for _ in range(2))

    def score(at: int, distance: int) -> torch.Tensor:
        phases = (rotary_phases(torch.tensor([[at + shift]]), 8, 10_000.0, q.dtype) for shift in (distance, 0))
        return (rotate(q, next(phases)) * rotate(k, next(phases))).sum(-1)

    for distance in (0, 1, 700):
        torch.testing.assert_close(score(FAR, distance), score(3, distance), rtol=1e-5, atol=2e-6)


def test_a_rotation_keeps_lengths_and_dtype() -> None:
    x = torch.randn(2, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    rotary = rotary_phases(torch.arange(6).view(2, 3) * 1000, 8, 10_000.0, x.dtype)
    torch.testing.assert_close(rotate(x, rotary).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), rotary).dtype == torch.bfloat16
    still = Rotary(torch.ones(1, 3, 4), torch.zeros(1, 3, 4))
    assert torch.equal(rotate(x, still), x)


@torch.no_grad()
@pytest.mark.parametrize("far", [2**21, FAR])
def test_logits_far_out_equal_those_near_the_start(case, far, small_model, draw_tokens) -> None:
    model, tokens = small_model(case, torch.float32), draw_tokens(2, 20)
    start = model.initial_state(2)
    shifted = dataclasses.replace(start, position=torch.tensor([far, 3]))
    near, out = model(tokens, start), model(tokens, shifted)
    torch.testing.assert_close(out.logits, near.logits, rtol=1e-4, atol=1e-4)
    assert out.state.position.tolist() == [far + 20, 23]
