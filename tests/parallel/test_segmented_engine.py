"""The engine by segments against the engine on whole rows: gradients and steps in every ZeRO stage, on one and two
processes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed_helper import run_ranks
from tests.parallel.segment_worker import CLIP, STEPS, Trial

CASES = ("mac", "mag", "mal", "lmm", "lmm-softmax", "transformer")
WHOLE = {case: Trial(case, 1) for case in CASES}
WHOLE_BF16 = Trial("lmm", 1, precision="bf16")

ALONE = [Trial("lmm", 0, 4, accumulation=2), Trial("lmm", 3, 4)]
EXACT = [
    Trial("mac", 1, 4, accumulation=2),
    *(Trial("mac", stage, 4) for stage in (2, 3)),
    Trial("lmm", 1, 1),
    Trial("lmm", 2, 16, place="host"),
    Trial("mag", 3, 2, recompute=True),
    Trial("mal", 1, 2),
    Trial("lmm", 3, 8, place="disk", accumulation=2),
    Trial("lmm-softmax", 2, 4, accumulation=2),
    Trial("transformer", 1, 4),
]
EVERY = [Trial(case, stage, segments) for case in CASES for stage in (1, 2, 3) for segments in (2, 4, 16)]
TRUNCATED = [
    Trial("mac", 3, 4, truncate_every=2),
    # A memory that forgets to zero has its initial weights in the graph of the first stretch alone.
    *(Trial("lmm-softmax", stage, 4, truncate_every=1) for stage in (1, 2, 3)),
]
TRUNCATED_ALONE = {"mac": Trial("mac", 0, 4, truncate_every=2), "lmm-softmax": Trial("lmm-softmax", 0, 4, 1)}
BF16 = [Trial("lmm", stage, 4, accumulation=2, precision="bf16") for stage in (1, 2, 3)]
EVERY_PASS = [
    Trial("lmm", 2, 4, accumulation=2, reduce="backward"),
    Trial("mac", 3, 4, reduce="backward"),
    replace(BF16[-1], reduce="backward"),
]

Seen = dict[str, dict[str, Any]]


def launch(folder: Path, trials: list[Trial], ranks: int) -> Seen:
    """What the trials saw, after one launch of all of them, which leaves no state between segments behind."""
    output, boundaries = folder / "seen.pt", folder / "boundaries"
    boundaries.mkdir()
    run_ranks(["tests/parallel/segment_worker.py", str(output), *map(str, trials)], ranks=ranks, timeout=3600)
    assert not list(boundaries.iterdir())
    return torch.load(output)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return launch(tmp_path_factory.mktemp("alone"), [*ALONE, *TRUNCATED_ALONE.values()], 1)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    trials = [*WHOLE.values(), WHOLE_BF16, *EXACT, *TRUNCATED, *BF16, *EVERY_PASS]
    return launch(tmp_path_factory.mktemp("two"), trials, 2)


def assert_same_training(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(result["losses"]) == STEPS
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert result["tokens"] == expected["tokens"]
    assert result["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-5)
    assert result["gradients"].keys() == expected["gradients"].keys() != set()
    for name, gradient in expected["gradients"].items():
        largest, error = float(gradient.abs().max()), float((result["gradients"][name] - gradient).abs().max())
        # The gates' biases sum terms that cancel: fp32 alone takes them 5e-6 of themselves from float64.
        assert largest > 0 and error <= 1e-5 * max(largest, CLIP / 100), f"{name}: {error} of {largest}"


@pytest.mark.parametrize("trial", EXACT, ids=str)
def test_segments_train_as_whole_rows_do(seen: Seen, trial: Trial) -> None:
    assert_same_training(seen[str(trial)], seen[str(WHOLE[trial.case])])


@pytest.mark.slow
def test_they_do_in_every_variant_stage_and_number(seen: Seen, tmp_path: Path) -> None:
    results = launch(tmp_path, EVERY, 2)
    for trial in EVERY:
        assert_same_training(results[str(trial)], seen[str(WHOLE[trial.case])])


@pytest.mark.parametrize("trial", ALONE, ids=str)
def test_so_they_do_on_one_process(alone: Seen, seen: Seen, trial: Trial) -> None:
    assert_same_training(alone[str(trial)], seen[str(WHOLE[trial.case])])


@pytest.mark.parametrize("trial", TRUNCATED, ids=str)
def test_truncated_gradients_are_the_same_in_every_layout(alone: Seen, seen: Seen, trial: Trial) -> None:
    result, whole = seen[str(trial)], seen[str(WHOLE[trial.case])]
    assert_same_training(result, alone[str(TRUNCATED_ALONE[trial.case])])
    assert result["losses"][0] == pytest.approx(whole["losses"][0], rel=1e-5), "the forward is the same"
    assert result["norms"][0] != pytest.approx(whole["norms"][0], rel=1e-4), "the gradient is not"


def test_clipping_is_exercised_and_steps_count(seen: Seen) -> None:
    whole = seen[str(WHOLE["mac"])]
    assert max(whole["norms"]) > CLIP
    assert abs(whole["losses"][0] - whole["losses"][-1]) > 1e-3


@pytest.mark.parametrize("trial", [*EXACT, *TRUNCATED, *BF16, *EVERY_PASS], ids=str)
def test_gradients_are_reduced_once_a_step(seen: Seen, trial: Trial) -> None:
    """And behind every backward pass where that is asked for: the count does not always give one."""
    times = 1 if trial.reduce == "step" else trial.segments * trial.accumulation
    assert seen[str(trial)]["reduced"] == pytest.approx(times, rel=0.05)


@pytest.mark.parametrize("trial", EVERY_PASS[:-1], ids=str)
def test_reduced_behind_every_pass_they_are_the_same(seen: Seen, trial: Trial) -> None:
    assert_same_training(seen[str(trial)], seen[str(WHOLE[trial.case])])


def test_bf16_gradients_that_wait_are_summed_in_fp32(seen: Seen) -> None:
    """As those that are reduced behind every pass: sums in bf16 would be as far off as bf16 is coarse, 2^-9."""
    waited, reduced = (seen[str(trial)]["gradients"] for trial in (BF16[-1], EVERY_PASS[-1]))
    assert waited.keys() == reduced.keys() != set()
    for name, gradient in reduced.items():
        error = float((waited[name] - gradient).abs().max())
        assert error <= 1e-5 * float(gradient.abs().max()), f"{name}: {error}"


@pytest.mark.parametrize("trial", BF16, ids=str)
def test_bf16_stays_near_whole_rows_in_bf16(seen: Seen, trial: Trial) -> None:
    result, expected = seen[str(trial)], seen[str(WHOLE_BF16)]
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-2)
    assert result["norms"] == pytest.approx(expected["norms"], rel=3e-2)


@pytest.mark.parametrize("trial", [trial for trial in EXACT if trial.accumulation == 1], ids=str)
def test_statistics_are_those_of_whole_rows(seen: Seen, trial: Trial) -> None:
    result, expected = seen[str(trial)]["stats"], seen[str(WHOLE[trial.case])]["stats"]
    assert len(result) == len(expected) == 2
    for layer, whole in zip(result, expected, strict=True):
        assert layer == pytest.approx(whole, rel=1e-4)
