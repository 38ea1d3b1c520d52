"""The order of passes: every pass once each way, 1F1B for micro-batches, and the bubble of a simulated pipeline."""

from __future__ import annotations

from itertools import product

import pytest

from parallel.pipeline_schedule import Pass, backward_order, expected_bubble, plan_passes, steps_of_stage
from tests.parallel.pipeline_by_clock import simulate

SHAPES = [
    (sequences, segments, every)
    for sequences, segments in product((1, 2, 5), (1, 2, 3, 8))
    for every in (None, 1, 2, 3)
    if every is None or every <= segments
]


@pytest.mark.parametrize(("sequences", "segments", "every"), SHAPES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_every_pass_runs_once_each_way_on_every_stage(sequences: int, segments: int, every: int, stages: int) -> None:
    passes = plan_passes(sequences, segments, every)
    assert len(passes) == sequences * segments
    for stage in range(stages):
        steps = list(steps_of_stage(passes, stages, stage))
        assert [number for kind, number in steps if kind == "forward"] == list(range(len(passes)))
        assert [number for kind, number in steps if kind == "backward"] == backward_order(passes)


def test_gradients_go_back_through_each_stretch() -> None:
    passes = plan_passes(2, 5, 2)
    assert backward_order(passes) == [1, 0, 3, 2, 4, 6, 5, 8, 7, 9]
    assert passes[4] == Pass(sequence=0, segment=4, begins_stretch=True, ends_stretch=True)
    assert backward_order(plan_passes(1, 4, None)) == [3, 2, 1, 0]
    assert backward_order(plan_passes(3, 1, None)) == [0, 1, 2]


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8])
def test_micro_batches_go_in_the_order_of_deepspeeds_1f1b(stages: int, micro_batches: int) -> None:
    schedule = pytest.importorskip("deepspeed.runtime.pipe.schedule")
    kinds = {schedule.ForwardPass: "forward", schedule.BackwardPass: "backward"}
    passes = plan_passes(micro_batches, 1, None)
    for stage in range(stages):
        theirs = schedule.TrainSchedule(micro_batches=micro_batches, stages=stages, stage_id=stage)
        counts = {"forward": 0, "backward": 0}
        expected = []
        for command in (command for step in theirs for command in step):
            if type(command) in kinds:
                kind = kinds[type(command)]
                expected.append((kind, counts[kind]))
                counts[kind] += 1
        assert list(steps_of_stage(passes, stages, stage)) == expected


@pytest.mark.parametrize(("sequences", "segments", "every"), SHAPES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_stand_idle_as_long_as_expected(sequences: int, segments: int, every: int, stages: int) -> None:
    """A forward takes 1, a backward 2, and none waits for one that is behind it in the order: the simulation ends."""
    passes = plan_passes(sequences, segments, every)
    found = simulate(passes, stages, forward=1.0, backward=2.0, again=0.0)
    assert found.bubble == pytest.approx(expected_bubble(stages, len(passes)))


@pytest.mark.parametrize("stages", [2, 4])
def test_running_passes_again_lengthens_no_bubble(stages: int) -> None:
    passes = plan_passes(2, 8, None)
    found = simulate(passes, stages, forward=1.0, backward=2.0, again=1.0)
    assert found.bubble <= expected_bubble(stages, len(passes)) + 1e-9


@pytest.mark.parametrize(("sequences", "segments", "every"), SHAPES)
def test_what_waits_is_bounded_by_the_stretch_and_the_stages(sequences: int, segments: int, every: int) -> None:
    passes, stages = plan_passes(sequences, segments, every), 4
    for stage in range(stages):
        waiting = graphs = 0
        for kind, number in steps_of_stage(passes, stages, stage):
            change = 1 if kind == "forward" else -1
            waiting += change
            graphs += change * passes[number].ends_stretch
            assert waiting <= min(segments, every or segments) + stages - 1 - stage
            assert graphs <= stages - stage, "graphs do not grow with the number of segments"
