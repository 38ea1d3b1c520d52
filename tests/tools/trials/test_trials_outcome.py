"""What a training's events come to, over all attempts; and a result file that is whole or an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.errors import UserError
from pretrain.metrics import RunLog, read_events
from tests.tools.trials.report_cases import result
from tools.trials.outcome import divergence, training_of
from tools.trials.results import read_result, read_results, run_folder, write_result


def step(number: int, speed: float) -> dict[str, Any]:
    return {"event": "step", "step": number, "tokens": 100 * number, "tokens_per_second": speed}


def evaluation(number: int, accuracy: float) -> dict[str, Any]:
    return {"event": "eval", "step": number, "accuracy": accuracy, "loss": 1 - accuracy}


EVENTS = [
    {"event": "start", "step": 0, "tokens": 0},
    step(10, 500.0),
    evaluation(10, 0.1),
    {"event": "save", "step": 10},
    step(20, 1000.0),
    evaluation(20, 0.2),
    {"event": "resume", "step": 10, "tokens": 1000},
    step(20, 250.0),
    {"event": "memory", "step": 20, "layers": [{"alpha": 0.5}, {}]},
    evaluation(20, 0.25),
    step(25, 500.0),
    {"event": "memory", "step": 25, "layers": [{"alpha": 0.75}, {}]},
]


def test_seconds_are_those_of_every_recorded_interval_of_every_attempt() -> None:
    training = training_of(EVENTS, "accuracy")
    assert (training.steps, training.tokens) == (25, 2500)
    assert training.seconds == pytest.approx(1000 / 500 + 1000 / 1000 + 1000 / 250 + 500 / 500)
    assert training.tokens_per_second == pytest.approx(3500 / 8)


def test_curve_and_memory_are_the_last_attempts() -> None:
    assert training_of(EVENTS, "accuracy").curve == {10: 0.1, 20: 0.25}
    assert training_of(EVENTS, "loss").curve == {10: 0.9, 20: 0.75}
    assert training_of(EVENTS, "loss").memory == {"layer 0": {"alpha": 0.75}}


def test_events_are_those_that_a_run_writes_and_a_cut_line_is_none(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    log = RunLog(tmp_path, name="x", is_main=True, start_step=0, total_steps=4)
    log.layers(3, [{"alpha": 0.25}, {}])
    log.layers(4, [{}, {}])
    log.close()
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write('{"event": "ste\n')
    (event,) = read_events(tmp_path)
    assert training_of([event], "loss").memory == {"layer 0": {"alpha": 0.25}}


def test_only_a_number_that_is_not_finite_is_a_divergence() -> None:
    assert divergence([]) is None and divergence(EVENTS) is None
    error = {"event": "error", "type": "DivergedError", "message": "step 3: loss nan"}
    assert divergence([*EVENTS, error]) == "DivergedError: step 3: loss nan"
    assert divergence([*EVENTS, {**error, "type": "UserError"}]) is None
    assert divergence([error, *EVENTS]) is None


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    bucket = {"first": 0, "last": 63, "tokens": 3, "loss": 0.1 + 0.2}
    probe = {"loss": float("inf"), "tokens": 3, "row_tokens": 64, "by_position": [bucket]}
    for seed in (0, 1):
        written = result("a", "b", seed, probes={"x": probe}, failed="why" if seed else None)
        write_result(run_folder(tmp_path, "a", "b", seed), written)
        assert read_result(run_folder(tmp_path, "a", "b", seed) / "result.json") == written
    assert [found.seed for found in read_results(tmp_path)] == [0, 1]


def test_a_result_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "a", "b", 0)
    write_result(folder, result("a", "b", 0))
    path = folder / "result.json"
    fields = json.loads(path.read_text())
    for text, part in [("", "is no result of a trial"), (json.dumps({**fields, "seed": "x"}), "seed"), ("\xff", "is")]:
        path.write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=part) as raised:
            read_results(tmp_path)
        assert str(path) in str(raised.value)
    path.write_text(json.dumps({**fields, "seed": 1}))
    with pytest.raises(UserError, match="says that it is a/b/seed-1's"):
        read_results(tmp_path)
