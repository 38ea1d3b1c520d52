"""The engine whose layers are divided over stages against the engine on one process: ten steps, statistics, scoring,
resuming, steps that are skipped, states that go bad.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.state_files import read_parameters
from tests.distributed_helper import run_ranks
from tests.parallel.pipeline_engine_worker import CLIP, HALF, ROWS, STEPS, Trial

RANKS = 2
THOROUGH = [
    Trial("mac", 2, accumulation=4, thorough=1),
    Trial("mal", 2, segments=2, carried=1, recompute=1, thorough=1),
    Trial("lmm-softmax", 2, stage=0, accumulation=1, carried=1, thorough=1),
]
TRIALS = [*THOROUGH, Trial("mag", 2, segments=4, truncate_every=1)]
BF16 = [Trial("lmm", 2, segments=4, precision="bf16", thorough=1)]
SPOILED = [
    Trial("lmm", 2, 1, spoil="loss"),
    Trial("lmm", 2, 0, spoil="gradient"),
    Trial("lmm", 2, precision="bf16", spoil="loss"),
    Trial("lmm", 2, carried=1, spoil="state"),
]
HELD_BACK = [
    Trial("lmm", 2, 1, spoil="loss limit"),
    Trial("lmm", 2, 0, spoil="norm limit"),
    Trial("lmm", 2, precision="bf16", spoil="norm limit"),
]

Seen = dict[str, dict[str, Any]]


def alone(trial: Trial) -> Trial:
    """The same training on one process: of whole rows, but where gradients are truncated."""
    segments = trial.segments if trial.truncate_every else 0
    return replace(trial, pipeline=1, stage=1, accumulation=1, segments=segments, recompute=0)


def launch(folder: Path, trials: list[Trial], ranks: int) -> Seen:
    texts = dict.fromkeys(map(str, trials))
    run_ranks(["tests/parallel/pipeline_engine_worker.py", str(folder), *texts], ranks=ranks, timeout=1500)
    return torch.load(folder / f"{ranks}.pt", weights_only=False)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder, trials = tmp_path_factory.mktemp("pipeline_engine"), [*TRIALS, *BF16, *SPOILED, *HELD_BACK]
    return launch(folder, [alone(trial) for trial in trials], 1) | launch(folder, trials, RANKS)


def assert_same_training(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(result["losses"]) == STEPS
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert result["tokens"] == expected["tokens"]
    assert result["parameters"].keys() == expected["parameters"].keys() != set()
    for name, value in expected["parameters"].items():
        error = float((result["parameters"][name] - value).norm() / value.norm())
        assert error <= 1e-5, f"{name}: {error}"


@pytest.mark.parametrize("trial", TRIALS, ids=str)
def test_ten_steps_are_those_of_one_process(seen: Seen, trial: Trial) -> None:
    assert_same_training(seen[str(trial)], seen[str(alone(trial))])


def test_clipping_is_exercised_and_steps_count(seen: Seen) -> None:
    expected = seen[str(alone(TRIALS[0]))]
    assert max(expected["norms"]) > CLIP
    assert abs(expected["losses"][0] - expected["losses"][-1]) > 1e-3


@pytest.mark.parametrize("trial", THOROUGH, ids=str)
def test_a_resumed_run_repeats_every_bit(seen: Seen, trial: Trial) -> None:
    result = seen[str(trial)]
    assert result["resumed"] == result["losses"][HALF:]
    assert result["resumed_same"]


@pytest.mark.parametrize("trial", THOROUGH, ids=str)
def test_what_is_saved_is_the_whole_model(seen: Seen, trial: Trial) -> None:
    saved, held = read_parameters(Path(seen[str(trial)]["folder"])), seen[str(trial)]["half"]
    assert saved.keys() == held.keys() == seen[str(alone(trial))]["parameters"].keys() != set()
    assert all(torch.equal(saved[name], value) for name, value in held.items())


@pytest.mark.parametrize("trial", THOROUGH, ids=str)
@pytest.mark.parametrize("how", ["scored", "by_pieces"])
def test_scores_are_those_of_one_process(seen: Seen, trial: Trial, how: str) -> None:
    result, expected = seen[str(trial)][how], seen[str(alone(trial))][how]
    assert (result.tokens, result.correct) == (expected.tokens, expected.correct)
    assert result.nats == pytest.approx(expected.nats, rel=1e-5)
    assert len(result.positions) == len(expected.positions) > 0
    for found, other in zip(result.positions, expected.positions, strict=True):
        assert found.fields() == pytest.approx(other.fields(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("trial", TRIALS, ids=str)
def test_statistics_are_those_of_all_layers(seen: Seen, trial: Trial) -> None:
    """Those of the last micro-batch: of all rows where a rank has but one."""
    result, expected = seen[str(trial)]["stats"], seen[str(alone(trial))]["stats"]
    assert [layer.keys() for layer in result] == [layer.keys() for layer in expected]
    if trial.accumulation == 1:
        for layer, other in zip(result, expected, strict=True):
            assert layer == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("trial", TRIALS, ids=str)
def test_the_bubble_is_measured(seen: Seen, trial: Trial) -> None:
    assert seen[str(trial)]["bubble"] > 0
    assert seen[str(alone(trial))]["bubble"] is None


@pytest.mark.parametrize("trial", BF16, ids=str)
def test_bf16_stays_near_one_process_in_bf16(seen: Seen, trial: Trial) -> None:
    result, expected = seen[str(trial)], seen[str(alone(trial))]
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-2)
    assert result["norms"][0] == pytest.approx(expected["norms"][0], rel=2e-2)
    assert result["resumed"] == result["losses"][HALF:]
    assert result["resumed_same"]


@pytest.mark.parametrize("trial", [trial for trial in SPOILED if trial.spoil != "state"], ids=str)
def test_a_step_that_is_not_finite_is_skipped_by_all_stages(seen: Seen, trial: Trial) -> None:
    result, expected = seen[str(trial)], seen[str(alone(trial))]
    assert result["skipped"] == expected["skipped"] == [False, True, False]
    assert result["same"], "a skipped step changes nothing"
    assert not torch.tensor(result["norms"][1]).isfinite()
    of_one = [loss for loss, skipped in zip(expected["losses"], expected["skipped"], strict=True) if not skipped]
    tolerance = 1e-5 if trial.precision == "fp32" else 1e-2
    assert [result["losses"][0], result["losses"][2]] == pytest.approx(of_one, rel=tolerance)
    bad = set(result["bad_rows"][1])
    assert bad == (set() if trial.spoil == "gradient" else spoiled_rows(trial))


@pytest.mark.parametrize("trial", HELD_BACK, ids=str)
def test_a_step_above_a_limit_is_held_back_by_all_stages(seen: Seen, trial: Trial) -> None:
    result, expected = seen[str(trial)], seen[str(alone(trial))]
    assert result["held_back"] == expected["held_back"] == [False, True, False]
    assert result["same"] and result["skipped"] == [False, False, False]
    for of_both in ("losses", "norms"):
        assert result[of_both] == pytest.approx(expected[of_both], rel=1e-5 if trial.precision == "fp32" else 2e-2)


def spoiled_rows(trial: Trial) -> set[int]:
    """The rows of the last data rank, which are all where there is one."""
    data = RANKS // trial.pipeline
    size = ROWS // trial.accumulation // data
    return {(m * data + data - 1) * size + row for m in range(trial.accumulation) for row in range(size)}


def test_a_row_whose_state_is_bad_on_one_stage_begins_anew_on_all(seen: Seen) -> None:
    trial = next(trial for trial in SPOILED if trial.spoil == "state")
    result = seen[str(trial)]
    assert result["skipped"] == [False, False, False]
    assert result["reset_rows"] == [(), (min(spoiled_rows(trial)),), ()]
    assert all(torch.tensor(result["losses"]).isfinite())
