"""Models whose rows are shared by sequence ranks compute what one process does: losses, scores, states, gradients."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from parallel.mesh import Group
from parallel.sequence_parallel import split_over_sequence_ranks
from tests.distributed_helper import run_ranks
from tests.model_cases import CASES, build_model

RANKS, HEADS = 4, 4
CASES_HERE = [case for case, fields in CASES.items() if fields["variant"] != "mac"]
TRIALS = [*((1, case) for case in CASES_HERE), (2, "mag"), (2, "mal"), (2, "lmm")]
"""The number of tensor ranks that heads are divided over first, and the model."""
Seen = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each rank saw, by the number of tensor ranks."""
    found = {}
    for tensor in (1, 2):
        output = tmp_path_factory.mktemp("sequence") / "seen"
        cases = [case for of_tensor, case in TRIALS if of_tensor == tensor]
        run_ranks(["tests/parallel/sequence_worker.py", str(output), str(tensor), *cases], ranks=RANKS, timeout=400)
        found[tensor] = [json.loads(output.with_name(f"seen.{rank}").read_text()) for rank in range(RANKS)]
    return found


@pytest.mark.parametrize(("tensor", "case"), TRIALS)
def test_the_ranks_together_compute_the_whole(seen: Seen, tensor: int, case: str) -> None:
    """Every other case with activation checkpointing, and, with tensor ranks, the others with sharded norms."""
    for of_rank in seen[tensor]:
        for name in ("loss", "gradient", "state", "state_gradient", "logits", "scores"):
            assert of_rank[case][name] < 1e-9, (name, of_rank[case])
        assert of_rank[case]["wrong"] == 0
        assert of_rank[case]["heads"] == HEADS / RANKS


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_exchange_is_exact_in_every_dtype_and_can_be_differentiated_twice(seen: Seen, tensor: int) -> None:
    for of_rank in seen[tensor]:
        assert len(of_rank["exchange"]) == 4 and not any(of_rank["exchange"].values())


def test_rows_that_do_not_divide_are_refused() -> None:
    model = build_model("mag")
    split_over_sequence_ranks(model, Group((0, 1), 0, None))
    with pytest.raises(ValueError, match=r"rows of 7 tokens .* parallel.sequence 2 .* multiple of 2"):
        model(torch.zeros(1, 7, dtype=torch.int64))


@pytest.mark.parametrize(
    ("case", "ranks", "message"), [("mac", 2, "a mac reads its segments one after another"), ("mal", 4, "2 heads .* 4")]
)
def test_models_that_cannot_be_shared_are_refused(case: str, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_over_sequence_ranks(build_model(case), Group(tuple(range(ranks)), 0, None))
