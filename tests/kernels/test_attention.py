"""Attention against the plain formula in float64, and its memory against the length."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from kernels.attention import Prefix, attention
from kernels.attention.inputs import prepare
from kernels.attention.sdpa import attention_sdpa
from tests.kernels.attention_cases import BATCH, HEADS, WIDTH, draw_inputs, run_attention, with_gradients


@pytest.mark.parametrize(("length", "total"), [(1, 1), (13, 13), (13, 16), (1, 9), (4, 17)])
@pytest.mark.parametrize("window", [None, 1, 4, 30])
def test_outputs_and_gradients_equal_the_formula(length: int, total: int, window: int | None) -> None:
    for has_prefix, has_context, has_reset in itertools.product((False, True), repeat=3):
        tensors = draw_inputs(length, total, has_prefix, has_context, torch.float64)
        first_valid = torch.tensor([0, (total - length) // 2 + 1]) if has_reset else None
        results = {}
        for backend in ("sdpa", "math"):
            out = run_attention(tensors, window=window, first_valid=first_valid, backend=backend)
            results[backend] = with_gradients(out, tensors)
        for got, expected in zip(results["sdpa"], results["math"], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_the_formula_equals_an_explicit_loop() -> None:
    tensors = draw_inputs(5, 8, True, True, torch.float64)
    first_valid, window = torch.tensor([0, 2]), 4
    out = run_attention(tensors, window=window, first_valid=first_valid, backend="math")
    for row, i, head in itertools.product(range(BATCH), range(5), range(HEADS)):
        seen = [j for j in range(8) if 0 <= 3 + i - j < window and j >= first_valid[row]]
        scores, values = [], []
        for keys, vals in (("k", "v"), ("context_k", "context_v")):
            scores += [tensors["q"][row, i, head] @ tensors[keys][row, j, head] for j in seen]
            values += [tensors[vals][row, j, head] for j in seen]
        scores += [tensors["plain_q"][row, i, head] @ tensors["prefix_k"][n, head] for n in range(3)]
        values += [tensors["prefix_v"][n, head] for n in range(3)]
        weights = (torch.stack(scores) * WIDTH**-0.5).softmax(0)
        torch.testing.assert_close(out[row, i, head], weights @ torch.stack(values), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 5])
def test_bf16_stays_within_its_rounding_even_with_a_heavy_prefix(window: int | None) -> None:
    tensors = draw_inputs(16, 16, True, True, torch.bfloat16)
    with torch.no_grad():
        tensors["prefix_k"].mul_(6)
    exact = {name: tensor.detach().double() for name, tensor in tensors.items()}
    got = run_attention(tensors, window=window, backend="sdpa")
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), run_attention(exact, window=window, backend="math"), rtol=0.02, atol=0.03)


def test_a_reset_beyond_the_first_query_counts_as_the_first_query() -> None:
    tensors = draw_inputs(3, 5, False, False, torch.float64)
    for backend in ("sdpa", "math"):
        late, exact = (
            run_attention(tensors, window=4, first_valid=torch.tensor([0, index]), backend=backend) for index in (99, 2)
        )
        assert torch.equal(late, exact)
        assert late.isfinite().all()


def _saved_bytes(length: int) -> int:
    """Bytes of distinct storage that a windowed call with prefix keeps for its backward."""
    tensors = draw_inputs(length, length, True, True, torch.float32)
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run_attention(tensors, window=32, backend="sdpa")
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def test_windowed_memory_is_linear_in_the_length() -> None:
    assert _saved_bytes(8192) < 2.2 * _saved_bytes(4096)
    assert _saved_bytes(8192) < 8192 * 8192 // 2, "one mask of all pairs would take twice that"


def test_full_causal_attention_with_a_prefix_builds_no_mask() -> None:
    tensors = draw_inputs(4096, 4096, True, False, torch.float32)
    prefix = Prefix(tensors["plain_q"], tensors["prefix_k"], tensors["prefix_v"])
    largest = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.untyped_storage().nbytes())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        attention_sdpa(prepare(tensors["q"], tensors["k"], tensors["v"], None, prefix, None, None))
    assert largest < 4096 * 4096


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"backend": "fast"}, "backend"),
        ({"window": 0}, "window"),
        ({"k": torch.zeros(1, 2, 2, 4)}, "k is"),
        ({"v": torch.zeros(1, 3, 2, 5)}, "v are"),
        ({"first_valid": torch.zeros(2, dtype=torch.int64)}, "first_valid"),
        ({"first_visible": torch.zeros(1, 2, dtype=torch.int64)}, "first_visible"),
        ({"first_visible": torch.zeros(1, 3, dtype=torch.int32)}, "first_visible is torch.int32"),
        ({"context": (torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 2, 4))}, "context values"),
        ({"prefix": Prefix(torch.zeros(1, 3, 2, 4), torch.zeros(1, 1, 4), torch.zeros(1, 2, 4))}, "prefix.k"),
    ],
)
def test_a_wrong_argument_is_named(change: dict, named: str) -> None:
    arguments = {name: torch.zeros(1, 3, 2, 4) for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match=named):
        attention(**{**arguments, **change})
