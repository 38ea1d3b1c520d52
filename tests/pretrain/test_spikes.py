"""Spikes of loss and gradient norm: what the robust z-score is, what it leaves alone, and what is remembered."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydantic import ValidationError

from parallel.step_gate import Limits
from pretrain.guards_config import GuardsConfig
from pretrain.spikes import Level, SpikeState

GUARDS = GuardsConfig()


def after(values: np.ndarray, norms: np.ndarray | None = None, guards: GuardsConfig = GUARDS) -> SpikeState:
    """What is remembered of steps of these losses."""
    state = SpikeState()
    for loss, norm in zip(values, values if norms is None else norms, strict=True):
        state = state.with_taken(float(loss), float(norm), guards.window)
    return state


def count_spikes(losses: np.ndarray, norms: np.ndarray, guards: GuardsConfig = GUARDS) -> int:
    """Among steps that are taken whatever they are."""
    state, found = SpikeState(), 0
    for loss, norm in zip(losses, norms, strict=True):
        verdict = state.verdict(guards, float(loss), float(norm))
        found += verdict is not None and verdict.is_spike
        state = state.with_taken(float(loss), float(norm), guards.window)
    return found


def test_the_score_is_the_distance_from_the_median_in_robust_deviations() -> None:
    values = np.random.default_rng(0).normal(3.0, 0.2, 128)
    median = np.median(values)
    scale = 1.4826 * np.median(np.abs(values - median))
    level = Level.of(tuple(values))
    assert level == pytest.approx((median, scale), rel=1e-12)
    assert level.z(4.0) == pytest.approx((4.0 - median) / scale, rel=1e-12)
    assert level.z(level.limit(6.0)) == pytest.approx(6.0, rel=1e-12)
    assert level.scale == pytest.approx(0.2, rel=0.15), "it is the standard deviation of normal values"


def test_a_step_is_a_spike_above_either_limit_alone_and_never_below() -> None:
    state = after(np.random.default_rng(1).normal(3.0, 0.1, 128))
    limits = state.limits(GUARDS)
    assert limits is not None and limits.loss < limits.gradient_norm
    for loss, norm, expected in (
        (limits.loss * 1.001, 3.0, True),
        (limits.loss * 0.999, 3.0, False),
        (3.0, limits.gradient_norm * 1.001, True),
        (3.0, limits.gradient_norm * 0.999, False),
        (0.0, 0.0, False),
    ):
        verdict = state.verdict(GUARDS, loss, norm)
        assert verdict is not None and verdict.is_spike == expected, (loss, norm)
    assert state.verdict(GUARDS, 0.0, 0.0).loss_z < -20, "far below is told, and is none"


def test_a_limit_that_is_off_lets_everything_pass() -> None:
    guards = GuardsConfig(loss_z=None)
    limits = after(np.full(128, 3.0), guards=guards).limits(guards)
    assert limits == Limits(loss=math.inf, gradient_norm=pytest.approx(3.0 + 10 * 0.003))


def test_nothing_is_judged_before_the_warmup_is_over() -> None:
    state = after(np.full(GUARDS.warmup_steps - 1, 3.0))
    assert state.limits(GUARDS) is None and state.verdict(GUARDS, 1e9, 1e9) is None
    state = state.with_taken(3.0, 3.0, GUARDS.window)
    assert state.verdict(GUARDS, 1e9, 1e9).is_spike


def test_normal_noise_has_next_to_no_spikes() -> None:
    """6 deviations of a normal distribution are passed once in 1e9; the window's own estimate makes it more."""
    random = np.random.default_rng(2)
    steps = 8_000
    losses, norms = random.normal(2.5, 0.05, steps), np.exp(random.normal(0.0, 0.2, steps))
    assert count_spikes(losses, norms) == 0
    # The estimate is not so wide that nothing could be one: 3 deviations are passed once in 741.
    assert 3 < count_spikes(losses, np.ones(steps), GuardsConfig(loss_z=3.0, gradient_norm_z=None)) < 45


@pytest.mark.parametrize("slope", [0.1, -0.1, 1e-4])
def test_a_trend_is_no_spike(slope: float) -> None:
    values = 100 + slope * np.arange(400)
    assert count_spikes(values, values) == 0


def test_up_to_half_of_the_window_may_be_spikes_and_the_next_is_still_one() -> None:
    values = np.random.default_rng(3).normal(3.0, 0.1, 128)
    values[::2] += np.where(np.arange(64) < 60, 50.0, 0.0)
    assert after(values).verdict(GUARDS, 53.0, 53.0).loss_z > 2
    few = values.copy()
    few[:100] = np.random.default_rng(4).normal(3.0, 0.1, 100)
    assert after(few).verdict(GUARDS, 53.0, 53.0).is_spike


def test_values_that_repeat_are_a_measure_of_nothing() -> None:
    state = after(np.full(128, 2.0))
    assert not state.verdict(GUARDS, 2.0 * 1.005, 2.0).is_spike and state.verdict(GUARDS, 2.0 * 1.007, 2.0).is_spike
    zeros = after(np.zeros(128))
    assert not zeros.verdict(GUARDS, 0.0, 0.0).is_spike and zeros.verdict(GUARDS, 1e-9, 0.0).loss_z == math.inf


def test_the_window_is_of_the_last_steps() -> None:
    state = after(np.arange(300.0))
    assert state.losses == tuple(np.arange(172.0, 300.0)) and state.taken == 300


def test_a_row_of_spikes_knows_its_beginning_and_ends() -> None:
    state = SpikeState().with_spike(7, 24).with_spike(8, 28)
    assert (state.in_a_row, state.total, state.first_step, state.first_row) == (2, 2, 7, 24)
    over = state.without_row().with_spike(20, 76)
    assert (over.in_a_row, over.total, over.first_step, over.first_row) == (1, 3, 20, 76)
    back = over.gone_back(after(np.ones(5)))
    assert (back.total, back.in_a_row, back.rollbacks, back.taken) == (3, 0, 1, 5)
    assert back.in_next_phase() == SpikeState(total=3)


def test_a_checkpoint_holds_every_bit_of_it() -> None:
    random = np.random.default_rng(5)
    state = after(random.normal(size=128).astype(np.float32) * 1e-5).with_spike(3, 4)
    assert SpikeState.model_validate_json(state.model_dump_json(indent=1)) == state


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"on_spike": "skip", "loss_z": None, "gradient_norm_z": None}, "nothing is a spike"),
        ({"max_spikes": 2}, "max_spikes is 2, but on_spike is log"),
        ({"max_rollbacks": 0}, "max_rollbacks is 0, but on_spike is log"),
        ({"straggler_ratio": None, "straggler_records": 2}, "straggler_records is 2, but straggler_ratio is none"),
        ({"preflight": False, "min_bandwidth": 1.0}, "min_bandwidth is 1.0, but preflight is false"),
        ({"warmup_steps": 5}, "greater than or equal to 10"),
    ],
)
def test_what_has_no_effect_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GuardsConfig(**fields)
