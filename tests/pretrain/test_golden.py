"""Fifty steps of every variant give the losses that are kept in tests/golden, so that no change stays unseen.

Where platform, processor and versions are those of the record, every bit must agree. How to write the record anew is
in tests/golden_cases.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.golden_cases import GOLDEN, STEPS, VARIANTS, differences, environment, golden_recipe, run

ANOTHER_WAY = {
    "lmm, forgetting to zero": ("lmm", {"memory": {"forget_to": "zero"}}),
    "mac, another constant in its norms": ("mac", {"norm_eps": 1e-4}),
}
"""Changes that leave every shape and, to the eye, the course of the loss as they are."""
CHANGED_STEPS = 15


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """All runs in one launch: the variants, and two that are changed."""
    folder = tmp_path_factory.mktemp("golden")
    recipes = {variant: golden_recipe(variant, folder / variant) for variant in VARIANTS}
    for number, (name, (variant, changes)) in enumerate(ANOTHER_WAY.items()):
        recipes[name] = golden_recipe(variant, folder / f"changed-{number}", CHANGED_STEPS, **changes)
    return run(recipes, folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_recorded(recorded: dict[str, Any], seen: dict[str, list[float]], variant: str) -> None:
    here = environment()
    found = differences(recorded["losses"][variant], seen[variant], exactly=here == recorded["environment"])
    assert not found, (
        f"{variant}: {len(found)} of {STEPS} losses are not those recorded: {'; '.join(found[:3])}. If the change is "
        f"meant: python -m tests.golden_cases. Recorded with {recorded['environment']}, here {here}"
    )


@pytest.mark.parametrize("name", ANOTHER_WAY)
def test_a_change_that_nothing_else_shows_is_seen(
    recorded: dict[str, Any], seen: dict[str, list[float]], name: str
) -> None:
    expected = recorded["losses"][ANOTHER_WAY[name][0]][:CHANGED_STEPS]
    assert differences(expected, seen[name], exactly=False)
    assert seen[name] == pytest.approx(expected, rel=0.05), "the change was to be one that hardly shows"


def test_the_record_is_of_runs_that_learn(recorded: dict[str, Any]) -> None:
    for variant, course in recorded["losses"].items():
        assert len(course) == STEPS
        assert sum(course[-5:]) < sum(course[:5]) - 1, variant


@pytest.mark.parametrize(
    ("now", "exactly", "differs"),
    [
        (math.nextafter(3.0, 4.0), True, True),
        (3.0, True, False),
        (3.0005, False, True),
        (3.00029, False, False),
        (math.nan, False, True),
        (math.inf, False, True),
    ],
)
def test_the_comparison_is_as_strict_as_it_says(now: float, exactly: bool, differs: bool) -> None:
    found = differences([2.0, 3.0], [2.0, now], exactly=exactly)
    assert bool(found) == differs
    assert all(line.startswith("step 2") for line in found)


def test_missing_steps_are_differences() -> None:
    assert differences([2.0, 3.0], [2.0], exactly=False)


def test_the_record_lies_in_the_test_tree() -> None:
    assert GOLDEN.parent == Path(__file__).parents[1] / "golden"
