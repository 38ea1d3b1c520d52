"""Evaluation in pieces on two ranks with different numbers of pieces, in every ZeRO stage, against one plain model."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch

from parallel.scoring import PositionSums, read_in_pieces
from tests.distributed_helper import run_ranks
from tests.model_cases import build_model
from tests.parallel import scoring_worker as work
from tests.parallel.segment_worker import Trial

TRIALS = [
    *(Trial("mac", stage) for stage in (0, 2, 3)),
    *(Trial(case, 3) for case in ("mag", "transformer")),
    Trial("lmm-softmax", 1),
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    output = tmp_path_factory.mktemp("scoring") / "seen.json"
    run_ranks(["tests/parallel/scoring_worker.py", str(output), *map(str, TRIALS)], ranks=2, timeout=200)
    return json.loads(output.read_text())


@cache
@torch.no_grad()
def expected_of(case: str) -> dict[str, Any]:
    """All ranks' rows through one model, whole where nothing is reset."""
    model = build_model(case, torch.float32)
    window = None if case == "transformer" else work.WINDOW
    positions = PositionSums(torch.device("cpu"), with_reset=window is not None)
    nats, tokens, correct = 0.0, 0, 0
    for rank in work.LENGTHS:
        for rows in work.rows_of(rank):
            output = model(rows.tokens, targets=rows.targets, with_correct=True)
            nats += float(output.loss_sum)
            tokens += int((rows.targets != -100).sum())
            correct += int(output.correct.sum())

            def read(piece, state, more):
                return model.token_losses(piece.tokens, piece.targets, state)

            for piece in read_in_pieces(rows, read, length=None, reset_window=window):
                positions.add(piece.start, piece.targets, *(x for x in piece[2:] if x is not None))
    return {
        "scored": [nats, tokens, correct],
        "positions": [bucket.fields() for bucket in positions.losses()],
    }


@pytest.mark.parametrize("trial", TRIALS, ids=str)
def test_ranks_in_pieces_score_as_one_model(seen: dict[str, Any], trial: Trial) -> None:
    result, expected = seen[str(trial)], expected_of(trial.case)
    nats, tokens, correct = expected["scored"]
    assert result["scored"] == [pytest.approx(nats, rel=1e-5), tokens, correct]
    assert result["whole"] == [pytest.approx(nats, rel=1e-5), tokens, correct]
    assert result["plain"] == [pytest.approx(nats, rel=1e-5), tokens]
    assert len(result["positions"]) == len(expected["positions"]) == 2, "positions up to 69"
    for bucket, by_hand in zip(result["positions"], expected["positions"], strict=True):
        assert bucket.keys() == by_hand.keys()
        assert ("loss_reset" in bucket) == (trial.case != "transformer")
        assert bucket == pytest.approx(by_hand, rel=1e-4, abs=1e-5)
    if trial.case != "transformer":
        assert abs(result["positions"][1]["difference"]) > 1e-4
