"""`launch local` starts a crashed run again, as often as it was told; a signal to it ends a run with a checkpoint."""

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import attempts
from launch.__main__ import main
from launch.attempts import Ledger, ask_to_stop
from launch.jobs import local_job
from launch.local import launch_with_restarts
from pretrain.errors import UserError
from tests.training_cases import events, write_synthetic_recipe

REPOSITORY = Path(__file__).parents[2]
# Called as a rank of a training: its first argument is the run's folder, where it counts its attempts.
RANK = """
import os, signal, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
with open(folder / f"attempts{rank}", "a") as file:
    file.write(" ".join(sys.argv[2:]) + "\\n")
number = len((folder / f"attempts{rank}").read_text().splitlines())
def event(kind, **fields):
    import json
    with open(folder / "run.jsonl", "a") as file:
        file.write(json.dumps({"event": kind, **fields}) + "\\n")
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run ranks of a script given as text with so many restarts; the exit status, and the attempts."""
    monkeypatch.setattr("launch.attempts.FIRST_WAIT_SECONDS", 0.0)

    def start(body: str, restarts: int, nproc: int = 2):
        script = tmp_path / "script.py"
        script.write_text(RANK + textwrap.dedent(body))
        options = argparse.Namespace(
            arguments=["--resume", "never"], nproc=nproc, port=None, grace=5.0, restarts=restarts, recipe="x.yaml"
        )
        status = launch_with_restarts([sys.executable, str(script), str(tmp_path)], tmp_path, options)
        return status, Ledger(tmp_path).read()

    return start


def test_a_crash_is_started_again_until_it_is_done(run, tmp_path, capfd):
    status, attempts = run(
        """
        if number == 2:
            event("save", step=4)
        if number < 4:
            event("step", step=number)
            sys.exit(f"ValueError: number {'abc'[number - 1]}" if rank == 1 else 0)
        """,
        restarts=2,
    )
    assert status == 0
    assert [(a.exit_code, a.rank, a.step, a.error) for a in attempts] == [
        (1, 1, 1, "ValueError: number a"),
        (1, 1, 2, "ValueError: number b"),
        (1, 1, 3, "ValueError: number c"),
        (0, None, None, None),
    ]
    assert attempts[1].saved and attempts[-1].reason == "done"
    crashes = [
        (event["step"], event["rank"], event["exit_code"], event["message"]) for event in events(tmp_path, "crash")
    ]
    assert crashes == [(n, 1, 1, f"rank 1: ValueError: number {'abc'[n - 1]}") for n in (1, 2, 3)]
    given = (tmp_path / "attempts0").read_text().splitlines()
    assert given == ["--resume never"] * 2 + ["--resume never --resume auto"] * 2
    assert capfd.readouterr().err.count("starting again in 0 s") == 3


@pytest.mark.parametrize(
    ("body", "restarts", "status", "attempts"),
    [
        ("sys.exit('ValueError: the same')", 9, 1, 2),
        ("os.kill(os.getpid(), signal.SIGKILL)", 2, 137, 3),
        ("os.kill(os.getpid(), signal.SIGKILL)", 0, 137, 1),
        ("sys.exit(2)", 9, 2, 1),
        ("sys.exit(77)", 9, 77, 1),
        ("sys.exit(75)", 9, 75, 1),
    ],
)
def test_what_ends_a_launch(run, body, restarts, status, attempts, capfd):
    found, ended = run(body, restarts, nproc=1)
    assert (found, len(ended)) == (status, attempts)
    assert ("not started again" in capfd.readouterr().err) == (restarts > 0 and ended[-1].crashed)


def test_the_step_is_the_one_that_the_failing_rank_names(run, tmp_path):
    """By its traceback, or as the watchdog says it; the log of steps names others."""
    body = """
        sys.path.insert(0, %r)
        from pretrain.errors import note_step
        event("step", step=10 * number)
        if rank == 1 and number < 3:
            error = ValueError("x")
            note_step(error, 14 + number)
            raise error
        if rank == 1:
            sys.exit("rank 1 of 2 hangs: step 17 is not done after 2 s (parallel.step_timeout_seconds)")
    """
    status, attempts = run(body % str(REPOSITORY), restarts=2)
    assert status == 1 and [attempt.step for attempt in attempts] == [15, 16, 17]
    assert [attempt.error for attempt in attempts[:2]] == ["ValueError: x"] * 2
    assert [event["step"] for event in events(tmp_path, "crash")] == [15, 16, 17]


def test_a_launch_waits_for_room_to_write_an_attempt_down_and_then_ends(run, tmp_path, monkeypatch, capfd):
    """As often as crashes are tried again: an attempt that is not written down would not count."""
    append, refused = attempts.append_line, []

    def full(path: Path, line: str) -> None:
        if len(refused) < limit and (refused or '"ended": null' not in line):  # from the first attempt's end on
            refused.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        append(path, line)

    monkeypatch.setattr(attempts, "append_line", full)
    limit = 3  # its end, and two tries of the next attempt
    status, found = run("sys.exit('ValueError: x' if number == 1 else 0)", restarts=2, nproc=1)
    ledger = str(Ledger(tmp_path).path)
    assert status == 0 and [each.exit_code for each in found] == [None, 0]
    assert found[0].reason is not None and found[0].reason.startswith("lost")
    said = capfd.readouterr().err
    assert f"{ledger}: No space left on device (on the disk of " in said and "MB free); make room" in said
    assert "another try in 0 s" in said
    refused.clear()
    limit = 99
    message = r"attempts.jsonl: No space left on device \(on the disk of .* MB free\); make room"
    with pytest.raises(UserError, match=message):
        run("sys.exit('ValueError: x')", restarts=2, nproc=1)


@pytest.mark.parametrize("way", ["stop", "signal", "mark"])
def test_a_launch_that_waits_to_start_again_can_be_stopped(run, tmp_path, monkeypatch, capfd, way):
    monkeypatch.setattr("launch.attempts.FIRST_WAIT_SECONDS", 0.3 if way == "mark" else 600.0)

    def ask() -> None:
        while not any(attempt.again for attempt in Ledger(tmp_path).read()):
            time.sleep(0.01)
        if way == "mark":
            ask_to_stop(tmp_path, local_job())
        elif way == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            assert main(["stop", str(tmp_path)]) == 0

    asking = threading.Thread(target=ask)
    asking.start()
    status, attempts = run("sys.exit('ValueError: x')", restarts=3, nproc=1)
    asking.join()
    assert status == 1 and len(attempts) == 1
    assert not attempts[0].again and "stopped for good" in (attempts[0].reason or "")
    assert "stopped while it waited" in capfd.readouterr().err


def test_a_signal_to_the_launcher_saves_and_ends_the_run(tmp_path):
    folder = tmp_path / "run"
    recipe = write_synthetic_recipe(folder, steps=4000, evaluation={"every_tokens": None})
    command = [sys.executable, "-m", "launch", "local", "--nproc", "2", "--restarts", "1", "--grace", "60", str(recipe)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: bool(events(folder, "step")), launcher)
        launcher.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        launcher.send_signal(signal.SIGTERM)  # which does not end it sooner
        _, errors = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
        launcher.communicate()
    assert launcher.returncode == 75 and "stopped on request" in errors, errors
    preempted = events(folder)[-1]
    assert preempted["event"] == "preempt" and preempted["signal"] == "SIGTERM"
    assert Path(preempted["checkpoint"]).name == f"step-{preempted['step']:08d}"
    assert json.loads((Path(preempted["checkpoint"]) / "trainer.json").read_text())["step"] == preempted["step"]
    (attempt,) = Ledger(folder).read()
    assert (attempt.exit_code, attempt.saved, attempt.step) == (75, True, preempted["step"])


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
