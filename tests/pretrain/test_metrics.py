"""Logs that can be read back, also after a run that was killed in the middle of a line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.devices import peak_flops, peak_memory_bytes
from pretrain.errors import UserError
from pretrain.metrics import RunLog, Stopwatch, duration


def open_log(folder: Path, *, is_main: bool = True, start_step: int = 0) -> RunLog:
    return RunLog(folder, name="test", is_main=is_main, start_step=start_step, total_steps=10)


def test_events_keep_every_bit_of_a_float(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    value = math.nextafter(0.1, 1.0)
    log.event("step", loss=value)
    log.close()
    assert json.loads((tmp_path / "run.jsonl").read_text())["loss"] == value


def test_a_cut_last_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text('{"event": "start"}\n{"event": "st')
    log = open_log(tmp_path)
    log.event("resume", step=3)
    log.close()
    assert json.loads((tmp_path / "run.jsonl").read_text().splitlines()[-1])["event"] == "resume"


def test_curves_of_a_resumed_run_have_no_doubled_points(tmp_path: Path) -> None:
    first = open_log(tmp_path)
    for step in (1, 2, 3):
        first.scalars(step, {"train/loss": float(step), "speed/mfu": None})
    first.close()
    second = open_log(tmp_path, start_step=1)
    second.scalars(2, {"train/loss": 20.0})
    second.close()
    reader = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert reader.Tags()["scalars"] == ["train/loss"]
    assert [(point.step, point.value) for point in reader.Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path, is_main=False)
    log.event("start")
    log.scalars(1, {"train/loss": 1.0})
    log.progress(1, 1.0, 1.0, 1.0, 1.0)
    log.say("hello")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_progress_is_a_line_with_the_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path)
    log.progress(5, 2.5, 1e-3, 1234.5, 3700)
    log.close()
    assert (
        capsys.readouterr().out == "test  step 5/10 (50.0 %)  loss 2.5000  lr 1.00e-03  1,234 tokens/s  1h 01m left\n"
    )


def test_progress_in_a_file_is_a_line_every_few_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, name="a", is_main=True, start_step=0, total_steps=50)
    for step in range(1, 51):
        log.progress(step, 2.5, 1e-3, 1234.5, 3700)
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("step ")[1].split("/")[0] for line in lines] == ["1", "50"]


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="give a --folder that can be written"):
        open_log(tmp_path / "run")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (41.2, "42s"), (725, "12m 05s"), (12000, "3h 20m"), (187200, "2d 04h")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_stopwatch_counts_only_what_ran_between(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    for _ in range(2):
        watch.start()
        watch.stop()
    assert watch.lap() == 3.0
    watch.start()
    watch.stop()
    assert watch.lap() == 1.0
    assert watch.mean == pytest.approx(7 / 3)


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu"), "bf16") is None
    assert peak_memory_bytes(torch.device("cpu")) > 10**6
