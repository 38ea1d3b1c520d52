"""Models of every kind shared by tensor ranks compute what the whole model does: losses, states, gradients of both."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed_helper import run_ranks
from tests.model_cases import CASES
from tests.parallel.tensor_worker import SHARDED

RANKS = 2
WHOLE_NORMS = ("lmm-softmax", "linear", "delta", "transformer")
"""Of which others differ from a case by what is inside heads."""
SHARDED_CASES = [case for case in CASES if case not in WHOLE_NORMS]
RUN = [*CASES, *(case + SHARDED for case in SHARDED_CASES)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("tensor") / "seen"
    run_ranks(["tests/parallel/tensor_worker.py", str(output), *RUN], ranks=RANKS, timeout=240)
    return [json.loads(output.with_name(f"seen.{rank}").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", RUN)
def test_every_rank_computes_its_part_of_the_whole(seen: list[dict[str, Any]], case: str) -> None:
    for of_rank in seen:
        for name in ("loss", "gradient", "state", "state_gradient", "logits", "scores"):
            assert of_rank[case][name] < 1e-9, (name, of_rank[case])
        assert of_rank[case]["wrong"] == 0


@pytest.mark.parametrize("case", SHARDED_CASES)
def test_sharded_norms_take_less_memory_on_every_rank(seen: list[dict[str, Any]], case: str) -> None:
    for of_rank in seen:
        whole, sharded = (of_rank[case + way]["activations"] for way in ("", SHARDED))
        assert sharded < 0.92 * whole, "of what is kept for the backward pass"


@pytest.mark.parametrize("case", CASES)
def test_all_but_norms_and_persistent_tokens_is_divided(seen: list[dict[str, Any]], case: str) -> None:
    assert all(0.5 < of_rank[case]["held"] < 0.55 for of_rank in seen)


def test_a_row_whose_state_one_rank_finds_bad_begins_anew_on_all(seen: list[dict[str, Any]]) -> None:
    assert [of_rank["bad rows"] for of_rank in seen] == [[[1], [1]]] * RANKS
