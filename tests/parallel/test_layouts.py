"""Training in every layout gives the losses, gradient norms and final parameters of one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.layout_runs import differences, run_trials
from tests.parallel.layout_table import lines, merged, run_table, written_lines
from tests.parallel.layouts import COVERING, IN_BF16, Trial, table

Seen = dict[Trial, dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder: Path = tmp_path_factory.mktemp("layouts")
    trials = [*COVERING, *IN_BF16]
    return run_trials([*(trial.alone for trial in trials), *trials], folder)


@pytest.mark.parametrize("trial", COVERING, ids=str)
def test_a_layout_is_one_process(seen: Seen, trial: Trial) -> None:
    found = differences(seen[trial], seen[trial.alone])
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("spoiled", ["norms", "stats", "parameters"])
def test_numbers_that_are_none_are_no_small_difference(spoiled: str) -> None:
    """`max` passes over NaN."""
    one = torch.ones(3)
    expected = {"losses": one, "norms": one, "stats": one, "evaluated": (1.0, 2, 1, []), "parameters": {"w": one}}
    found = expected | {spoiled: {"w": one * math.nan} if spoiled == "parameters" else one * math.nan}
    assert max(differences(expected, expected).values()) == 0
    with pytest.raises(AssertionError):
        differences(found, expected)


@pytest.mark.parametrize("trial", IN_BF16, ids=str)
def test_bf16_stays_near_one_process(seen: Seen, trial: Trial) -> None:
    found, expected = seen[trial], seen[trial.alone]
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-2, atol=0)
    torch.testing.assert_close(found["norms"][0], expected["norms"][0], rtol=2e-2, atol=0)


def test_the_trials_are_no_trivial_ones(seen: Seen) -> None:
    """The loss of the same rows falls, and gradients are clipped."""
    for trial in COVERING:
        losses, norms = seen[trial.alone]["losses"], seen[trial.alone]["norms"]
        assert losses[2] < losses[0] and losses[3] < losses[1] and norms.max() > 0.5


@pytest.mark.slow
def test_every_layout_of_the_table_is_one_process(tmp_path: Path) -> None:
    wrong = {str(trial): found for trial, found in run_table(tmp_path).items() if not max(found.values()) <= 1e-5}
    assert not wrong


def test_the_table_on_the_page_is_whole_and_below_the_bound() -> None:
    """As `python -m tests.parallel.layout_table` wrote it: of every layout, with all variants and ways of its rows."""
    nothing = dict.fromkeys(("loss", "norm", "parameters"), 0.0)
    expected, written = lines(dict.fromkeys(table(), nothing), "never"), written_lines()
    assert written.keys() == expected.keys()
    for place, row in written.items():
        assert row[6:8] == expected[place][6:8], place
        assert all(float(number) < 1e-5 for number in row[-4:-1]), place


def test_the_table_is_filled_a_variant_at_a_time() -> None:
    def line(case: str, loss: float, norm: float, measured: str) -> list[str]:
        found = {Trial(case, data=2): {"loss": loss, "norm": norm, "parameters": 1e-7}}
        return lines(found, measured)[2, 1, 2, 1, 1, 1]

    mag, mac = line("mag", 2e-6, 1e-7, "day 1"), line("mac", 1e-6, 3e-7, "day 2")
    both = merged(mag, mac)
    assert both[6:] == ["mac, mag", "whole", "2.0e-06", "3.0e-07", "1.0e-07", "day 1; day 2"]
    assert merged(both, line("mag", 1e-7, 1e-7, "day 3"))[6] == "mac, mag"
    assert merged(mag, line("mag", 1e-7, 1e-7, "day 3")) == line("mag", 1e-7, 1e-7, "day 3")
