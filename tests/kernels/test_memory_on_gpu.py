"""The memory's kernels on a GPU: chosen where they are asked for, and right beside the dual form in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.memory import neural_memory
from kernels.memory.choice import choose
from kernels.memory.options import MemoryOptions
from kernels.memory.problem import Problem

pytest.importorskip("triton")

from kernels.memory.triton.backend import HOPPER
from kernels.memory.triton.selftest import TOLERANCE
from tests.kernels.memory_cases import GATES
from tests.kernels.triton.interpreted import Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def results_and_gradients(
    case: Case, tokens: list[Tensor], weights: list[Tensor], backend: str
) -> list[tuple[str, Tensor]]:
    """Output, state and gradients of a fixed projection of both, by name."""
    tokens, weights = ([x.detach().requires_grad_() for x in tensors] for tensors in (tokens, weights))
    y, end = neural_memory(*tokens, weights, backend=backend, **case.call_options)
    layers = range(1, len(weights) + 1)
    found = [("y", y), *zip([f"W_{n}" for n in layers], end.weights, strict=True)]
    found += zip([f"S_{n}" for n in layers], end.momentum, strict=True)
    generator = torch.Generator("cuda").manual_seed(1)
    slopes = [torch.randn(x.shape, generator=generator, device="cuda").bfloat16() for _, x in found]
    gradients = torch.autograd.grad(
        [x for _, x in found],
        [*tokens, *weights],
        [slope.to(x.dtype) for slope, (_, x) in zip(slopes, found, strict=True)],
    )
    names = [f"gradient of {name}" for name in ("q", "k", "v", *GATES, *(f"W_0 of layer {n}" for n in layers))]
    return [*found, *zip(names, gradients, strict=True)]


@pytest.mark.parametrize("chunk_size", [16, 64, 128])
@pytest.mark.parametrize("dims", [(64, 64), (64, 128, 64)], ids=["depth 1", "depth 2"])
def test_the_kernels_are_chosen_and_equal_the_dual_form_in_float64(dims: tuple[int, ...], chunk_size: int) -> None:
    if chunk_size == 128 and len(dims) == 3 and torch.version.hip is None:
        capability = torch.cuda.get_device_capability()
        if capability < HOPPER:
            pytest.skip(f"compute capability {capability} has no registers for such chunks")
    # Two whole chunks and a part of one.
    case = Case(dims, chunk_size, 5 * chunk_size // 2, heads=2, rows=2, options={"step_bound": 5.0})
    q, k, v, alpha, eta, theta = (x.cuda() for x in case.inputs(case.num_tokens, 0))
    tokens = [q.bfloat16(), k.bfloat16(), v.bfloat16(), alpha, 0.9 * eta, theta]
    weights = [w.cuda() for w in case.weights(1)]
    chosen = choose(Problem.of(*tokens[:3], weights, MemoryOptions(**case.call_options)), "triton")
    assert chosen.backend.name == "triton", chosen.reason
    found = results_and_gradients(case, tokens, weights, "triton")
    exact = results_and_gradients(case, [x.double() for x in tokens], [w.double() for w in weights], "dual")
    for (name, mine), (_, theirs) in zip(found, exact, strict=True):
        distance = float((mine.double() - theirs).norm() / theirs.norm())
        assert distance <= TOLERANCE["bf16"], f"{name} is off by {distance:.1e} of its norm"
