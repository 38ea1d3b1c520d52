"""The real kernels on a GPU: every case that they take, against the plain formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels.attention import Prefix, attention, choice
from kernels.attention.inputs import AttentionInputs, prepare
from kernels.attention.problem import Problem
from kernels.attention.reference import attention_reference
from kernels.attention.selftest import TOLERANCE, exact_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
HEADS = 4


def draw(
    rows: int, length: int, total: int, width: int, dtype: torch.dtype, window: int | None, extras: tuple[bool, ...]
) -> AttentionInputs:
    has_prefix, has_context, has_documents = extras
    generator = torch.Generator("cuda").manual_seed(length)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(*shape, HEADS, width, generator=generator, device="cuda").to(dtype)
        return x.requires_grad_()

    prefix = Prefix(normal(rows, length), normal(16), normal(16)) if has_prefix else None
    context = (normal(rows, total), normal(rows, total)) if has_context else None
    own = torch.arange(total - length, total, device="cuda").expand(rows, -1)
    documents = own // 190 * 190 if has_documents else None
    reset = torch.arange(rows, device="cuda") * ((total - length) // 2) if total > length else None
    keys = normal(rows, total), normal(rows, total)
    return prepare(normal(rows, length), *keys, window, prefix, context, reset, documents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("backend", ["flash", "varlen", "flex", "sdpa"])
def test_the_kernels_equal_the_formula(backend: str, width: int, dtype: torch.dtype) -> None:
    taken, reasons = 0, set()
    for (length, total), window, *extras in itertools.product(
        [(700, 700), (300, 811), (1, 500)], [None, 256], *[(False, True)] * 3
    ):
        inputs = draw(2, length, total, width, dtype, window, tuple(extras))
        try:
            chosen = choice.choose(inputs, backend).backend
        except ValueError as error:
            assert "self-test" not in str(error), f"{Problem.of(inputs)}: {error}"
            reasons.add(str(error))
            continue
        taken += 1
        exact = exact_inputs(inputs)
        found, expected = chosen.run(inputs), attention_reference(exact)
        slope = torch.randn_like(expected)
        results = zip(
            (found, *torch.autograd.grad(found, inputs.tensors(), slope.to(dtype))),
            (expected, *torch.autograd.grad(expected, exact.tensors(), slope)),
            strict=True,
        )
        for got, wanted in results:
            distance = (got.float() - wanted).norm() / wanted.norm()
            assert distance <= TOLERANCE[dtype], f"{Problem.of(inputs)}: {distance}"
    if not taken:
        pytest.skip(f"{backend} takes nothing here: {'; '.join(sorted(reasons))}")


@pytest.mark.parametrize("window", [None, 300])
def test_decoding_without_gradient_equals_the_formula(window: int | None) -> None:
    inputs = draw(2, 1, 4000, 64, torch.bfloat16, window, (False, False, False))
    with torch.no_grad():
        found, expected = choice.choose(inputs, "auto").backend.run(inputs), attention_reference(exact_inputs(inputs))
    assert (found.float() - expected).norm() <= TOLERANCE[torch.bfloat16] * expected.norm()


def test_long_rows_take_memory_linear_in_their_length() -> None:
    def peak(length: int) -> int:
        inputs = draw(1, length, length, 64, torch.bfloat16, 512, (True, False, True))
        run = choice.choose(inputs, "auto").backend.run
        run(inputs).sum().backward()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(inputs).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(65_536) < 2.5 * peak(32_768)


def test_a_million_tokens_in_a_window_run() -> None:
    q = torch.randn(1, 2**20, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    attention(q, q, q, window=1024).sum().backward()
    assert q.grad.isfinite().all()
