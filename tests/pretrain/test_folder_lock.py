"""A second run in the same folder is refused, and the folder is free again once the first has ended."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parallel.process import World
from pretrain.agreement import SharedUserError
from pretrain.fence import FencedOffError, take_fence
from pretrain.folder_lock import LOCK_FILE, BusyError, alone_in, locked
from pretrain.loop import train
from pretrain.phases import load_phases
from tests.training_cases import make_data, write_recipe

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print(flush=True)
time.sleep(60)
"""


pytestmark = pytest.mark.usefixtures("world")


def test_a_folder_is_one_runs_until_it_ends(tmp_path: Path, world: World) -> None:
    folder = tmp_path / "runs" / "a"
    with alone_in(folder, world):
        with pytest.raises(SharedUserError, match=r"another run is training in it.* --folder"), alone_in(folder, world):
            pass
        with alone_in(tmp_path / "runs" / "b", world):
            pass
    with alone_in(folder, world):
        pass


def test_a_killed_runs_folder_is_free(tmp_path: Path, world: World) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / LOCK_FILE)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline()
        with pytest.raises(SharedUserError), alone_in(tmp_path, world):
            pass
        holder.kill()
    with alone_in(tmp_path, world):
        pass


@pytest.mark.parametrize(
    ("job", "restart", "is_let_in"), [("7", "1", True), ("7", "0", False), ("8", "1", False), (None, None, False)]
)
def test_the_next_copy_of_a_job_is_let_in_beside_the_one_that_was_cut_off(
    tmp_path: Path,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    job: str | None,
    restart: str | None,
    is_let_in: bool,
) -> None:
    def as_job(number: str | None, restarts: str | None) -> None:
        for name, value in (("SLURM_JOB_ID", number), ("SLURM_RESTART_COUNT", restarts)):
            monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)

    as_job("7", None)  # as Slurm has it before the first requeue
    with alone_in(tmp_path, world):
        older = take_fence(tmp_path, world)
        assert older is not None
        as_job(job, restart)
        if not is_let_in:
            with pytest.raises(SharedUserError, match="another run is training in it"), alone_in(tmp_path, world):
                pass
            return
        with alone_in(tmp_path, world):
            assert "held by an older copy of this job" in capsys.readouterr().err
            newer = take_fence(tmp_path, world)
            assert newer is not None
            newer.check()
            with pytest.raises(FencedOffError):
                older.check()


def test_a_copy_that_was_let_in_takes_the_lock_when_the_older_one_ends(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.folder_lock.SECONDS_BETWEEN_TRIES", 0.01)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    entry = {"number": 1, "token": "older", "job": "7", "restart": None}
    (tmp_path / "fence.json").write_text(json.dumps(entry))
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / LOCK_FILE)], stdout=subprocess.PIPE) as older:
        assert older.stdout is not None and older.stdout.readline()
        with alone_in(tmp_path, world):
            older.kill()
            older.wait()
            deadline = time.monotonic() + 30
            while is_free(tmp_path) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not is_free(tmp_path), "nothing keeps a third run out"
        assert is_free(tmp_path)


def is_free(folder: Path) -> bool:
    try:
        with locked(folder, busy="", place=""):
            return True
    except BusyError:
        return False


def test_a_folder_without_locks_is_said_and_used(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with alone_in(tmp_path, world):
        pass
    assert "cannot be locked (Operation not supported)" in capsys.readouterr().err


def test_training_holds_its_folder(tmp_path: Path, world: World) -> None:
    path = write_recipe(make_data(tmp_path / "data"), tmp_path / "run", steps=2)
    with alone_in(tmp_path / "run", world), pytest.raises(SharedUserError, match="another run is training in it"):
        train(load_phases(path), world)


def test_a_folder_that_is_a_file_is_named(tmp_path: Path, world: World) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(SharedUserError, match="give a --folder"), alone_in(tmp_path / "run", world):
        pass
