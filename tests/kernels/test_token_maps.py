"""What goes piece by piece on a CPU is the plain expression, with its gradients, whatever the pieces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from kernels import token_maps
from kernels.token_maps import causal_convolution, head_norm, in_pieces, unit_silu

BATCH, TOKENS, HEADS, DIM, WIDTH = 2, 13, 3, 4, 4


def plain_convolution(padded: Tensor, weight: Tensor) -> Tensor:
    return sum(padded[:, offset : offset + TOKENS] * weight[offset] for offset in range(WIDTH))


def plain_unit_silu(x: Tensor) -> Tensor:
    heads = silu(x).unflatten(-1, (HEADS, DIM))
    return heads / (heads.square().sum(-1, keepdim=True) + 1e-6).sqrt()


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "convolution": (causal_convolution, plain_convolution, [(BATCH, TOKENS + WIDTH - 1, DIM), (WIDTH, DIM)]),
    "unit_silu": (lambda x: unit_silu(x, HEADS), plain_unit_silu, [(BATCH, TOKENS, HEADS * DIM)]),
    "head_norm": (
        lambda x, weight: head_norm(x, weight, 1e-2),
        lambda x, weight: rms_norm(x, x.shape[-1:], None, 1e-2) * weight,
        [(BATCH, TOKENS, HEADS, DIM), (HEADS, DIM)],
    ),
}


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of all inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    # Of another layout than y's: what follows may give such a gradient.
    gradient = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(*y.shape[:-2], *y.shape[:-3:-1]).mT
    return [y, *torch.autograd.grad(y, inputs, gradient)]


@pytest.mark.parametrize("tokens_in_a_piece", [1, 5, 100])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_expression(case: str, tokens_in_a_piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    function, plain, shapes = CASES[case]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs[0][:, 2:4] = 0  # a norm of nothing
    monkeypatch.setattr(token_maps, "PIECE_NUMBERS", tokens_in_a_piece * inputs[0][:, 0].numel())
    for got, wanted in zip(results(function, inputs), results(plain, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_bf16_stays_as_near_as_its_rounding(case: str) -> None:
    torch.manual_seed(1)
    function, plain, shapes = CASES[case]
    inputs = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    found, exact = results(function, inputs), results(plain, [x.double() for x in inputs])
    for got, wanted in zip(found, exact, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), wanted, rtol=3e-2, atol=3e-2)


def test_other_devices_and_mixed_precisions_take_the_plain_expressions() -> None:
    x = torch.zeros(2)
    assert in_pieces(x, x)
    assert not in_pieces(x, x.double())
    assert not in_pieces(x.to("meta"))
