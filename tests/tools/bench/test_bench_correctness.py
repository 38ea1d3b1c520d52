"""The kernels' check on a device: it passes what is right and fails what is not."""

from __future__ import annotations

import pytest
import torch

from kernels.memory import interface
from tools.bench import correctness

MEMORY = {"kernel": "memory", "length": 40, "depth": 2, "expansion": 2, "chunk_size": 16, "window": None, "head_dim": 8}
ATTENTION = {**MEMORY, "kernel": "attention", "depth": None, "expansion": None, "chunk_size": None, "window": 16}
HERE = {"device": "cpu", "threads": 1}


@pytest.mark.parametrize(("case", "backend"), [(MEMORY, "dual"), (ATTENTION, "sdpa")])
def test_the_right_kernels_are_far_within_the_limit(case, backend) -> None:
    (row,) = correctness.judged([{**case, **correctness.measure(**case, backend=backend, dtype="fp32", **HERE)}])
    assert "outcome" not in row
    assert row["output_error"] < 1e-5 and row["gradient_error"] < 1e-4
    assert (row["state_error"] is None) == (case is ATTENTION)


def test_bf16_inputs_are_compared_with_the_same_rounded_ones() -> None:
    found = correctness.measure(**MEMORY, backend="dual", dtype="bf16", **HERE)
    assert 1e-5 < found["output_error"] < 1e-2 and found["limit"] == correctness.LIMITS["bf16"]


def test_a_wrong_kernel_fails(monkeypatch) -> None:
    right = interface.neural_memory_dual

    def wrong(q, k, v, alpha, *others):
        # The oracle of this length is the reference, so that only the kernel is wrong.
        return right(q, k, v, alpha * 1.1, *others)

    monkeypatch.setattr(interface, "neural_memory_dual", wrong)
    (row,) = correctness.judged([{**MEMORY, **correctness.measure(**MEMORY, backend="dual", dtype="fp32", **HERE)}])
    assert row["outcome"] == "failed" and "limit" in row["why"]


def test_what_is_not_a_number_fails() -> None:
    assert correctness._worst([torch.tensor([float("nan")])], [torch.ones(1)]) == float("inf")
    assert correctness._worst([], []) is None
    (row,) = correctness.judged([{"output_error": float("inf"), "limit": 1.0}])
    assert row["outcome"] == "failed"


@pytest.mark.parametrize("errors", [(0.5, 9.1e-06), (9.1e-06, 0.5)])
def test_the_worst_error_is_named(errors) -> None:
    found = dict(zip(("output_error", "gradient_error"), errors, strict=True))
    (row,) = correctness.judged([{**found, "state_error": None, "limit": 3e-3}])
    assert row["why"] == "an error of 5.0e-01 is beyond the limit of 3.0e-03"


def test_what_could_not_run_stays_as_it_was() -> None:
    row = {"outcome": "failed", "why": "no such kernel"}
    assert correctness.judged([row]) == [row]
