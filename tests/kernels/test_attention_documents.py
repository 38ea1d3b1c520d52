"""Document boundaries: attention equals attention document by document, in float64, and builds no mask of all pairs."""

import itertools

import pytest
import torch

from kernels.attention import sdpa
from tests.kernels.attention_cases import (
    attention_by_document,
    draw_inputs,
    first_visible_keys,
    run_attention,
    with_gradients,
)
from tools.bench.live_tensors import LiveTensors


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize(("length", "total"), [(1, 1), (1, 9), (13, 13), (13, 16), (40, 40), (37, 41)])
@pytest.mark.parametrize("window", [None, 1, 4, 15])
def test_it_equals_a_loop_over_documents(
    length: int, total: int, window: int | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa, "_QUERY_BLOCK", 8)
    for has_prefix, has_context in itertools.product((False, True), repeat=2):
        tensors = draw_inputs(length, total, has_prefix, has_context, torch.float64)
        out = run_attention(tensors, window=window, first_visible=first_visible_keys(length, total), backend=backend)
        got = with_gradients(out, tensors)
        expected = with_gradients(attention_by_document(tensors, window), tensors)
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_decoding_a_token_at_a_time_equals_the_whole_row() -> None:
    tensors = draw_inputs(20, 20, True, True, torch.float64)
    bounds = first_visible_keys(20, 20)
    for window, backend in itertools.product((None, 6), ("sdpa", "math")):
        whole = run_attention(tensors, window=window, first_visible=bounds, backend=backend)
        for index in range(20):
            seen = {name: x if x.dim() == 3 else x[:, : index + 1] for name, x in tensors.items()}
            seen |= {name: tensors[name][:, index : index + 1] for name in ("q", "plain_q")}
            token = run_attention(seen, window=window, first_visible=bounds[:, index : index + 1], backend=backend)
            torch.testing.assert_close(token[:, 0], whole[:, index], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("window", [None, 4])
def test_the_later_of_a_reset_and_a_document_holds(window: int | None, backend: str) -> None:
    tensors = draw_inputs(9, 16, True, False, torch.float64)
    bounds, reset = first_visible_keys(9, 16), torch.tensor([5, 3])
    both = run_attention(tensors, window=window, first_valid=reset, first_visible=bounds, backend=backend)
    one = run_attention(tensors, window=window, first_visible=bounds.maximum(reset[:, None]), backend=backend)
    assert torch.equal(both, one)
    constant = reset[:, None].expand(-1, 9).contiguous()
    torch.testing.assert_close(
        run_attention(tensors, window=window, first_valid=reset, backend=backend),
        run_attention(tensors, window=window, first_visible=constant, backend=backend),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_a_beginning_beyond_the_query_or_before_the_keys_is_pulled_in(backend: str) -> None:
    tensors = draw_inputs(6, 9, False, False, torch.float64)
    own = torch.arange(3, 9).expand(2, -1)
    for given, meant in ((own + 2, own), (own * 0 - 5, own * 0)):
        got, expected = (
            run_attention(tensors, window=4, first_visible=bound, backend=backend) for bound in (given, meant)
        )
        assert torch.equal(got, expected)
        assert got.isfinite().all()


def _peak_bytes(length: int, window: int | None) -> int:
    """Peak of the bytes made by forward and backward, two rows of documents with prefix and second stream."""
    tensors = draw_inputs(length, length, True, True, torch.float32)
    bounds = first_visible_keys(length, length)
    with LiveTensors() as meter:
        run_attention(tensors, window=window, first_visible=bounds, backend="sdpa").sum().backward()
    assert meter.peak_bytes > sum(tensor.nbytes for tensor in tensors.values()), "the meter missed the gradients"
    return meter.peak_bytes


def test_full_attention_keeps_no_mask_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "_QUERY_BLOCK", 64)
    short, long = _peak_bytes(2048, None), _peak_bytes(4096, None)
    assert long < 2.2 * short
    assert long < 2 * 4096 * 4096, "the masks of two rows would take that in bytes"


@pytest.mark.parametrize("window", [32, 300])
def test_windowed_memory_is_linear_in_the_length(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "_QUERY_BLOCK", 64)
    assert _peak_bytes(4096, window) < 2.2 * _peak_bytes(2048, window)
