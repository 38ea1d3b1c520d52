"""An older copy of a run, which no lock keeps out of the folder, changes nothing there once a newer one began."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from parallel.process import World
from pretrain.agreement import SharedUserError
from pretrain.checkpoints import Checkpoints, SaveError, problems
from pretrain.exit_codes import EXIT_FENCED_OFF
from pretrain.fence import FENCE_FILE, Fence, FencedOffError, take_fence
from pretrain.fence_watch import FenceWatch
from pretrain.folder_lock import LOCK_FILE
from pretrain.loop import train
from pretrain.metrics import RunLog
from pretrain.phases import load_phases
from tests.distributed_helper import ROOT
from tests.training_cases import events, losses, write_recipe

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def start_copy(tmp_path: Path, world: World) -> Callable[[], Checkpoints]:
    """Each call is another copy of the run, with its checkpoints."""
    return lambda: Checkpoints(tmp_path / "checkpoints", 2, world, take_fence(tmp_path, world))


def write(folder: Path) -> Sequence[Path]:
    path = folder / "weights.bin"
    path.write_bytes(os.urandom(100))
    return [path]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_copies_take_numbers_in_turn_and_say_who_they_are(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert [take_fence(tmp_path, world).number for _ in range(3)] == [1, 2, 3]
    entry = json.loads((tmp_path / FENCE_FILE).read_text())
    assert (entry["number"], entry["pid"], entry["job"], entry["restart"]) == (3, os.getpid(), "77", "2")
    assert [path.name for path in tmp_path.iterdir()] == [FENCE_FILE], "nothing is left of its writing"


def test_of_two_that_took_one_number_at_once_the_last_is_right(tmp_path: Path, world: World) -> None:
    first = take_fence(tmp_path, world)
    assert first is not None
    first.check()
    other = json.loads(first.path.read_text()) | {"token": "another"}
    first.path.write_text(json.dumps(other))
    with pytest.raises(FencedOffError, match=r"number 1, host .* this one is 1"):
        first.check()
    Fence(first.path, 1, "another").check()


def test_a_copy_that_is_overtaken_behind_its_publication_retires_nothing(
    start_copy: Callable[[], Checkpoints], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = start_copy()
    for step in (1, 2):
        old.save(step, write)
    syncs = "pretrain.checkpoints.sync"
    real = importlib.import_module("pretrain.checkpoints").sync

    def overtaken(path: Path) -> None:
        real(path)
        if (
            path == old.folder
            and (path / "step-00000003").is_dir()
            and "step-00000003" in (path / "latest").read_text()
        ):
            start_copy()

    monkeypatch.setattr(syncs, overtaken)
    with pytest.raises(FencedOffError):
        old.save(3, write)
    assert len(list(old.folder.glob("step-*"))) == 3, "which it would have removed the first of"
    with pytest.raises(FencedOffError):
        old.require_no_newer_copy()


def test_an_older_copy_publishes_nothing_and_removes_nothing(
    tmp_path: Path, start_copy: Callable[[], Checkpoints]
) -> None:
    old = start_copy()
    first = old.save(1, write)
    new = start_copy()
    half_written = new.folder / ".partial-step-00000002-2"
    half_written.mkdir()
    before = contents(tmp_path)
    with pytest.raises(FencedOffError, match=r"fence\.json: another copy of this run took its folder over \(number 2"):
        old.save(2, write)
    assert contents(tmp_path) == before and half_written.is_dir()
    assert new.newest_whole(pytest.fail) == first


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_copy_that_is_overtaken_while_it_writes_does_not_publish(
    start_copy: Callable[[], Checkpoints], goes_on: bool
) -> None:
    """Both write the same step, each its own files; those of the older one may be gone before it has written all."""
    old, copies = start_copy(), []

    def slow(folder: Path) -> Sequence[Path]:
        copies.append(start_copy())
        copies.append(copies[0].save(2, write))
        assert not folder.exists(), "the newer one took it for the rest of a dead save"
        if goes_on:
            folder.mkdir()
        return write(folder)

    with pytest.raises(FencedOffError):
        old.save(2, slow)
    assert problems(copies[1]) == []
    assert (old.folder / "latest").read_text() == "step-00000002\n"


def test_a_checkpoint_of_an_overtaken_copy_gives_way(start_copy: Callable[[], Checkpoints]) -> None:
    """It was published between the newer copy's start and its reading the fence: the same step, another file."""
    start_copy().save(2, write)
    again = start_copy().save(2, write)
    assert problems(again) == []
    assert sorted(path.name for path in again.parent.iterdir()) == ["latest", "step-00000002"]


def test_an_older_copy_sets_no_checkpoint_aside(start_copy: Callable[[], Checkpoints]) -> None:
    old = start_copy()
    damaged = old.save(1, write)
    (damaged / "weights.bin").write_bytes(b"")
    start_copy()
    with pytest.raises(FencedOffError):
        old.newest_whole(lambda _: None)
    assert damaged.is_dir()


@pytest.mark.parametrize("damage", ["gone", "empty"])
def test_a_fence_that_cannot_be_read_fails_the_save(start_copy: Callable[[], Checkpoints], damage: str) -> None:
    checkpoints = start_copy()
    assert checkpoints.fence is not None
    if damage == "gone":
        checkpoints.fence.path.unlink()
    else:
        checkpoints.fence.path.write_text("")
    with pytest.raises(SaveError, match=r"fence\.json: (No such file|damaged)"):
        checkpoints.save(1, write)


def test_a_look_at_the_fence_is_one_a_second(start_copy: Callable[[], Checkpoints], clock: list[float]) -> None:
    fence = start_copy().fence
    assert fence is not None
    watch = FenceWatch(fence)
    assert watch.newer_copy() is None
    start_copy()
    assert watch.newer_copy() is None, "it was looked at in this second"
    clock[0] += 1.0
    assert "number 2" in str(watch.newer_copy())
    fence.path.unlink()
    clock[0] += 1.0
    assert watch.newer_copy() is not None, "once is for good"
    assert FenceWatch(fence).newer_copy() is None, "a fence that cannot be read is a save's to tell"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the watch of the fence counts by."""
    now = [100.0]
    monkeypatch.setattr("pretrain.fence_watch.time.monotonic", lambda: now[0])
    return now


def test_an_overtaken_copys_log_is_left_alone(
    tmp_path: Path, start_copy: Callable[[], Checkpoints], clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    fence = start_copy().fence
    assert fence is not None
    log = RunLog(tmp_path, name="a", is_main=True, start_step=0, total_steps=9, watch=FenceWatch(fence))
    log.event("step", step=1)
    start_copy()
    clock[0] += 1.0
    before = (tmp_path / "run.jsonl").read_text()
    log.event("step", step=2)
    log.close()
    assert (tmp_path / "run.jsonl").read_text() == before and '"step": 1' in before


def test_a_damaged_fence_is_named_at_the_start(tmp_path: Path, world: World) -> None:
    (tmp_path / FENCE_FILE).write_text("[1]")
    with pytest.raises(SharedUserError, match=r"fence\.json is damaged .* remove the file"):
        take_fence(tmp_path, world)


def test_a_run_whose_folder_another_copy_took_ends_with_77_and_leaves_it_alone(
    data: Path, tmp_path: Path, world: World
) -> None:
    """The lock is gone, as where another node cannot see it."""
    folder = tmp_path / "run"
    schedule = {"kind": "constant", "warmup_tokens": 256}
    recipe = write_recipe(data, folder, schedule=schedule, evaluation={"every_tokens": None, "tokens": 64})
    command = [sys.executable, "-m", "pretrain", str(recipe), "--training.tokens", str(128 * 4000)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as old:
        deadline = time.monotonic() + 120
        while not events(folder, "save"):
            assert old.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        (folder / LOCK_FILE).unlink()
        old.send_signal(signal.SIGSTOP)  # it is cut off: the new copy begins before it is back
        train(load_phases(recipe, [("training.tokens", str(128 * 24))]), world)
        ended = contents(folder)
        old.send_signal(signal.SIGCONT)
        _, said = old.communicate(timeout=60)
    assert old.returncode == EXIT_FENCED_OFF, said
    assert "another copy of this run took its folder over (number 2" in said and "Traceback" not in said
    after = contents(folder)
    own = {name for name in after if name.startswith("tensorboard")}
    assert {name: after[name] for name in after.keys() - own} == {name: ended[name] for name in ended.keys() - own}
    assert not list((folder / "checkpoints").glob(".*")), "and no half of a checkpoint"
    assert len(losses(folder)) >= 24
