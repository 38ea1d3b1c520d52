"""The engine by segments against the engine on whole rows: every ZeRO stage, one and two processes, accumulation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed_helper import run_ranks
from tests.parallel.segment_worker import CLIP, STEPS, Trial

CASES = ("mac", "mag", "mal", "lmm", "lmm-softmax", "transformer")
WHOLE = {case: Trial(case, 1) for case in CASES}
WHOLE_BF16 = Trial("mac", 1, precision="bf16")

ALONE = [Trial("mac", 0, 4), Trial("mac", 0, 4, accumulation=2), Trial("mac", 3, 4, accumulation=2)]
EXACT = [
    *(Trial("mac", stage, 4, accumulation=2) for stage in (1, 2, 3)),
    Trial("mac", 1, 4),
    Trial("mac", 2, 16, place="host"),
    Trial("mac", 3, 4),
    Trial("mac", 1, 1),
    Trial("mag", 3, 4, recompute=True),
    Trial("lmm", 3, 8, place="disk", accumulation=2),
    *(Trial(case, 3, 4) for case in ("mal", "lmm-softmax", "transformer")),
]
TRUNCATED = [Trial("mac", stage, 4, truncate_every=2, accumulation=2) for stage in (1, 2, 3)]
TRUNCATED_ALONE = Trial("mac", 0, 4, truncate_every=2)
BF16 = [Trial("mac", stage, 4, accumulation=2, precision="bf16") for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    results = {}
    together = [*WHOLE.values(), WHOLE_BF16, *EXACT, *TRUNCATED, *BF16]
    for ranks, trials in ((1, [*ALONE, TRUNCATED_ALONE]), (2, together)):
        folder = tmp_path_factory.mktemp("segments")
        output = folder / "seen.json"
        run_ranks(["tests/parallel/segment_worker.py", str(output), *map(str, trials)], ranks=ranks, timeout=300)
        assert [path.name for path in folder.iterdir()] == ["seen.json"]
        results[ranks] = json.loads(output.read_text())
    return results


def require_same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(result["losses"]) == STEPS
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert result["tokens"] == expected["tokens"]
    assert result["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-5)


@pytest.mark.parametrize("trial", EXACT, ids=str)
def test_segments_train_as_whole_rows_do(seen: dict[int, Any], trial: Trial) -> None:
    require_same(seen[2][str(trial)], seen[2][str(WHOLE[trial.case])])


@pytest.mark.parametrize("trial", ALONE, ids=str)
def test_so_they_do_on_one_process(seen: dict[int, Any], trial: Trial) -> None:
    require_same(seen[1][str(trial)], seen[2][str(WHOLE[trial.case])])


@pytest.mark.parametrize("trial", TRUNCATED, ids=str)
def test_truncated_gradients_are_the_same_in_every_layout(seen: dict[int, Any], trial: Trial) -> None:
    result, whole = seen[2][str(trial)], seen[2][str(WHOLE["mac"])]
    require_same(result, seen[1][str(TRUNCATED_ALONE)])
    assert result["losses"][0] == pytest.approx(whole["losses"][0], rel=1e-5), "the forward is the same"
    assert result["norms"][0] != pytest.approx(whole["norms"][0], rel=1e-4), "the gradient is not"


def test_clipping_is_exercised_and_steps_count(seen: dict[int, Any]) -> None:
    whole = seen[2][str(WHOLE["mac"])]
    assert max(whole["norms"]) > CLIP
    assert abs(whole["losses"][0] - whole["losses"][-1]) > 1e-3


@pytest.mark.parametrize("trial", BF16, ids=str)
def test_bf16_stays_near_whole_rows_in_bf16(seen: dict[int, Any], trial: Trial) -> None:
    result, expected = seen[2][str(trial)], seen[2][str(WHOLE_BF16)]
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-2)
    assert result["norms"] == pytest.approx(expected["norms"], rel=3e-2)


@pytest.mark.parametrize("trial", [trial for trial in EXACT if trial.accumulation == 1], ids=str)
def test_statistics_are_those_of_whole_rows(seen: dict[int, Any], trial: Trial) -> None:
    result, expected = seen[2][str(trial)]["stats"], seen[2][str(WHOLE[trial.case])]["stats"]
    assert len(result) == len(expected) == 2
    for layer, whole in zip(result, expected, strict=True):
        assert layer == pytest.approx(whole, rel=1e-4)
