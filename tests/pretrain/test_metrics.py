"""Logs that can be read back, also after a run that was killed in the middle of a line."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from parallel.engine import Engine
from parallel.process import World
from pretrain.devices import available_host_bytes, peak_flops, peak_memory_bytes, peak_resident_bytes
from pretrain.errors import UserError, noted_step
from pretrain.loop import open_log as open_run_log
from pretrain.loop import train
from pretrain.metrics import RunLog, Stopwatch, duration
from pretrain.phases import load_phases
from pretrain.resume import TrainerState
from tests.training_cases import events, write_recipe, write_synthetic_recipe


@pytest.fixture(autouse=True)
def files_sort_as_they_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one second are read by the text of their number in this process, and a 10 stands before a 9."""
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer._global_uid.get", itertools.count(1000).__next__)


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


def test_the_last_checkpoint_and_the_last_error_are_texts_beside_the_curves(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.event("start")
    log.event("step", step=4)
    log.event("save", step=4, checkpoint="checkpoints/step-00000004")
    log.event("save_failed", step=6, message="no space left")
    log.event("step", step=7)
    log.event("error", type="ValueError", message="bad")
    log.close()
    with open(tmp_path / "run.jsonl", "a") as file:  # as the launcher writes it
        file.write('{"event": "crash", "message": "rank 1: killed by SIGKILL"}\n')
    again = open_log(tmp_path, start_step=8)
    again.restarted(8)
    again.event("resume")
    again.close()
    open_log(tmp_path, start_step=9).close()
    reader = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    shown = {
        name: [(point.step, point.tensor_proto.string_val[0].decode()) for point in reader.Tensors(name)]
        for name in reader.Tags()["tensors"]
    }
    assert shown == {
        "run/last_checkpoint/text_summary": [(4, "checkpoints/step-00000004")],
        "run/last_error/text_summary": [(6, "no space left"), (7, "bad"), (8, "rank 1: killed by SIGKILL")],
    }


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


@pytest.fixture
def full_disk(mount_disk: Callable[[str], Path]) -> Path:
    """A file system of 1 MB with an open log in it, filled up behind the log's back."""
    return mount_disk("1m")


def fill(folder: Path) -> None:
    with open(folder / "other", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def draw(log: RunLog) -> None:
    """Enough points for more than the page that a file may still have."""
    for step in range(400):
        log.scalars(step, {"train/loss": 1.0})


def test_curves_lose_points_on_a_full_disk_and_go_on_when_there_is_room(
    full_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    thrown: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", thrown.append)
    log = open_log(full_disk)
    fill(full_disk)
    deadline = time.monotonic() + 60
    while log._board is not None and time.monotonic() < deadline:  # its thread meets the full disk in its own time
        draw(log)
    assert log._board is None
    draw(log)
    assert capsys.readouterr().err.count("No space left on device; points of curves") == 1
    (full_disk / "other").unlink()
    monkeypatch.setattr(log, "_try_again_at", time.monotonic())
    log.scalars(1000, {"train/loss": 2.0})
    log.close()
    reader = EventAccumulator(str(full_disk / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [(point.step, point.value) for point in reader.Scalars("train/loss")][-1] == (1000, 2.0)
    assert thrown == [], "a rank's hook for threads would end the process with a traceback"


def test_events_wait_for_room_on_a_full_disk(full_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(full_disk)
    fill(full_disk)
    for step in range(300):  # more than the page that the file may still have
        log.event("step", step=step)
    assert capsys.readouterr().err.count("No space left on device; events wait for room") == 1
    assert len((full_disk / "run.jsonl").read_text().splitlines()) < 300
    (full_disk / "other").unlink()
    log.event("step", step=300)
    lines = (full_disk / "run.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(301)), "each once and in order"
    log.close()


def test_events_that_found_no_room_to_the_end_are_an_error(full_disk: Path) -> None:
    log = open_log(full_disk)
    fill(full_disk)
    for step in range(300):
        log.event("step", step=step)
    with pytest.raises(UserError, match=r"run\.jsonl: No space left on device; make room and resume"):
        log.close()


def test_an_error_of_another_thread_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thrown: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", thrown.append)
    for step in (7, 8):  # a later run's log takes the place of an earlier one's
        log = open_log(tmp_path)
        log.step = step
        log.close()
    thread = threading.Thread(target=(tmp_path / "absent").read_text)
    thread.start()
    thread.join()
    assert [arguments.exc_type for arguments in thrown] == [FileNotFoundError]
    assert thrown[0].exc_value is not None and thrown[0].exc_value.__notes__ == ["the run was at step 8"]


def test_an_error_in_a_step_names_it_between_two_that_are_logged(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_synthetic_recipe(tmp_path, steps=9, logging={"every_steps": 5}, evaluation={"every_tokens": None})
    step, taken = Engine.train_step, [0]

    def failing(engine: Engine, *arguments: Any, **options: Any) -> Any:
        taken[0] += 1
        if taken[0] == 7:
            raise ZeroDivisionError("x")
        return step(engine, *arguments, **options)

    monkeypatch.setattr(Engine, "train_step", failing)
    with pytest.raises(ZeroDivisionError) as caught:
        train(load_phases(recipe), world)
    assert [event["step"] for event in events(tmp_path, "step")] == [5]
    assert [event["step"] for event in events(tmp_path, "error")] == [7]
    lines = traceback.format_exception(caught.value)
    assert noted_step(lines[-1]) == 7


def test_a_log_that_cannot_be_closed_hides_no_earlier_error(full_disk: Path) -> None:
    phases = load_phases(write_recipe(Path("shards"), full_disk / "run"))
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    with (
        pytest.raises(FloatingPointError, match="the first error") as caught,
        open_run_log(phases, world, TrainerState(tokenizer_sha256=None, ranks=1)) as log,
    ):
        fill(full_disk)
        for step in range(300):
            log.event("step", step=step)
        raise FloatingPointError("the first error")
    assert "make room and resume" in "".join(caught.value.__notes__)


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


@pytest.mark.parametrize("text", ["Name:\tpython\nVmRSS:\t 100 kB\n", None])
def test_peak_memory_is_known_where_proc_does_not_say_it(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "status").write_text(text)
    assert peak_resident_bytes(tmp_path / "status") > 10**6
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t 77 kB\n")
    assert peak_resident_bytes(tmp_path / "status") == 77 * 1024


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu"), "bf16") is None
    assert peak_memory_bytes(torch.device("cpu")) > 10**6


def memory_group(folder: Path, names: tuple[str, str], limit: str, used: int, cached: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cached}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_leaves_less_of_the_hosts_memory(tmp_path: Path, version: int) -> None:
    """A job's limit above the process's own; file caches, which the kernel gives up, count as free."""
    groups, mount = tmp_path / "cgroup", tmp_path / "mount"
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    cached = "inactive_file 100" if version == 2 else "total_inactive_file 100"
    groups.write_text("0::/job/step\n" if version == 2 else "5:devices:/\n4:memory:/job/step\n")
    root = mount if version == 2 else mount / "memory"
    memory_group(root / "job" / "step", names, "max" if version == 2 else str(2**62), 300, cached)
    machine = available_host_bytes(groups, mount)
    assert machine > 10**6, "no limit: the machine's"
    memory_group(root / "job", names, "1000", 700, cached)
    assert available_host_bytes(groups, mount) == 1000 - 700 + 100
    memory_group(root / "job", names, "500", 700, cached)
    assert available_host_bytes(groups, mount) == 0
    assert available_host_bytes(tmp_path / "absent", mount) > 10**6
