"""The learning rate at its corners, and numbers of tokens as people write them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pretrain.quantities import parse_tokens
from pretrain.schedule import ScheduleConfig, learning_rate


def rates(config: ScheduleConfig, *tokens: int, total: int = 1000) -> list[float]:
    return [learning_rate(config, 2.0, count, total) for count in tokens]


def test_warm_up_is_linear_and_never_starts_at_zero() -> None:
    config = ScheduleConfig(kind="constant", warmup_tokens=100)
    assert rates(config, 1, 50, 100, 101, 1000) == pytest.approx([0.02, 1.0, 2.0, 2.0, 2.0])


def test_cosine_falls_to_its_floor_at_the_end() -> None:
    config = ScheduleConfig(kind="cosine", warmup_tokens=200, min_lr_ratio=0.1)
    assert rates(config, 200, 600, 1000, 2000) == pytest.approx([2.0, 1.1, 0.2, 0.2])


def test_wsd_stays_and_then_falls_in_a_line() -> None:
    config = ScheduleConfig(kind="wsd", warmup_tokens=100, decay_tokens=200, min_lr_ratio=0.0)
    assert rates(config, 100, 500, 800, 900, 1000) == pytest.approx([2.0, 2.0, 2.0, 1.0, 0.0])


def test_a_run_that_is_all_warm_up_has_no_division_by_zero() -> None:
    assert rates(ScheduleConfig(warmup_tokens=1000), 1000) == pytest.approx([2.0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "wsd"}, "needs decay_tokens"),
        ({"kind": "cosine", "decay_tokens": 10}, "belongs to kind wsd"),
        ({"kind": "constant", "min_lr_ratio": 0.2}, "unused with kind constant"),
    ],
)
def test_unused_and_missing_options_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(**fields)


@pytest.mark.parametrize(
    ("text", "count"),
    [("15B", 15_000_000_000), ("0.5M", 500_000), ("1_000_000", 10**6), ("4Ki", 4096), ("1e9", 10**9), ("2 Mi", 2**21)],
)
def test_token_counts_are_read(text: str, count: int) -> None:
    assert parse_tokens(text) == count


@pytest.mark.parametrize("text", ["15X", "0.3", "-5", "", "B", "1.5e0"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="whole number of tokens"):
        parse_tokens(text)
