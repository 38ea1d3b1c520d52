"""Where a run stands, which rank's log is shown, and how a run is stopped, from the files that runs write."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.attempts import LAUNCH_FOLDER, STOP_FILE, Ledger, told_to_stop
from launch.jobs import local_job, process_start
from launch.logs import start_of_last_lines

TIME = "2026-01-01T00:00:{:02d}.000+00:00"
RECIPE = {"name": "tiny", "training": {"tokens": 4000}, "phases": [{"name": "a"}, {"training": {"tokens": 6000}}]}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two attempts below runs/: the first crashed, the second runs as a process that waits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm
    folder = tmp_path / "runs" / "group" / "tiny-1"
    (folder / "logs").mkdir(parents=True)
    events = [
        {"event": "start", "step": 0, "tokens": 0, "steps": 100, "recipe": RECIPE},
        {"event": "step", "step": 5, "tokens": 500, "loss": 3.0, "tokens_per_second": 50.0},
        {"event": "save", "step": 5, "tokens": 500, "checkpoint": "checkpoints/step-00000005"},
        {"event": "error", "type": "OSError", "message": "gone"},
        {"event": "resume", "step": 5, "tokens": 500, "steps": 100, "recipe": RECIPE},
        {"event": "step", "step": 9, "tokens": 1000, "loss": 2.5, "tokens_per_second": 100.0, "mfu": 0.4},
        {"event": "eval", "step": 9, "tokens": 1000, "loss": 2.6},
    ]
    lines = [
        json.dumps({"event": event.pop("event"), "time": TIME.format(second), **event}) + "\n"
        for second, event in enumerate(events)
    ]
    (folder / "run.jsonl").write_text("".join(lines) + '{"event": "step", "time": "2026-01-0')
    for rank in range(3):
        (folder / "logs" / f"rank{rank}.log").write_text("".join(f"rank {rank} line {n}\n" for n in range(100)))
    return folder


def attempt_of(folder: Path, job: str) -> None:
    ledger = Ledger(folder)
    crashed = ledger.begin("local-here-1", ["here"])
    ledger.write(replace(ledger.ended(crashed, 1, rank=2, error="ValueError: bad"), ended="2025-01-01T00:00:00+00:00"))
    ledger.begin(job, ["here"])


def status(*words: str, capfd: pytest.CaptureFixture[str]) -> dict:
    assert main(["status", "--json", *words]) == 0
    return json.loads(capfd.readouterr().out)


def test_status_of_a_run_whose_launcher_is_gone(run, capfd):
    attempt_of(run, f"local-{socket.gethostname()}-{2**22 + 5}-1")
    found = status("tiny-1", capfd=capfd)
    assert found["state"] == "lost" and found["tokens_per_second"] is None
    assert (found["step"], found["steps"], found["tokens"], found["total_tokens"]) == (9, 100, 1000, 10_000)
    assert (found["loss"], found["restarts"], found["checkpoint"]) == (2.5, 1, "checkpoints/step-00000005")
    assert found["last_error"] == "OSError: gone" and found["updated"] == TIME.format(6)
    assert main(["status"]) == 0
    assert "runs/group/tiny-1: lost" in capfd.readouterr().out


def test_a_run_of_this_machine_is_seen_to_run_and_is_stopped(run, capfd):
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print(flush=True); signal.pause()"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        launcher.stdout.readline()
        attempt_of(run, f"local-{socket.gethostname()}-{launcher.pid}-{process_start(launcher.pid)}")
        found = status(str(run), capfd=capfd)
        assert found["state"] == "running" and (found["tokens_per_second"], found["mfu"]) == (100.0, 0.4)
        assert found["seconds_left"] == 90.0
        ledger = Ledger(run)
        ledger.write(ledger.ended(ledger.begin("local-here-2", ["here"]), 2))  # refused: the folder is taken
        assert status(str(run), capfd=capfd)["state"] == "running"
        main(["status", str(run)])
        text = capfd.readouterr().out
        assert "1,000 of 10,000 tokens (10.0 %)" in text and "MFU 40.0 %, 1m 30s left" in text
        assert main(["stop", "tiny-1"]) == 0
        assert launcher.wait(30) == 75 and told_to_stop(run, Ledger(run).read()[1].job)
    finally:
        launcher.kill()
        launcher.communicate()
    assert main(["stop", "tiny-1"]) == 2
    assert "no launch of this run is active" in capfd.readouterr().err


def test_a_run_of_another_host_is_not_stopped_from_here(run, capfd):
    attempt_of(run, f"local-elsewhere-{os.getpid()}-1")
    assert main(["stop", "tiny-1"]) == 2
    assert "on another host" in capfd.readouterr().err and not (run / LAUNCH_FOLDER / STOP_FILE).exists()


def test_another_process_with_the_launchers_number_is_not_the_launcher(run, capfd):
    attempt_of(run, f"local-{socket.gethostname()}-{os.getpid()}-{process_start(os.getpid()) + 1}")
    assert status(str(run), capfd=capfd)["state"] == "lost"
    assert main(["stop", "tiny-1"]) == 2


@pytest.mark.parametrize(("again", "state"), [(True, "running"), (False, "failed")])
def test_a_launch_that_waits_to_start_again_runs(run, capfd, again, state):
    ledger = Ledger(run)
    ended = ledger.ended(ledger.begin(local_job(), ["here"]), 1)
    ledger.write(replace(ended, again=again))
    assert status(str(run), capfd=capfd)["state"] == state


def test_a_run_that_is_done_or_has_not_begun(run, capfd, tmp_path):
    ledger = Ledger(run)
    ledger.write(ledger.ended(ledger.begin("9", ["n1"]), 0))
    assert status("tiny-1", capfd=capfd)["state"] == "done"
    submitted = tmp_path / "runs" / "new"
    (submitted / "launch").mkdir(parents=True)
    (submitted / "launch" / "job.json").write_text('{"job": "12", "name": "big job", "submitted": "2026-01-01"}')
    found = status("big job", capfd=capfd)
    assert (found["state"], found["job"], found["step"], found["restarts"]) == ("not started", "12", None, 0)


def test_names_that_are_no_run_are_told_with_those_that_are(run, capfd):
    for command in ("status", "logs", "stop"):
        assert main([command, "tinny"]) == 2
        assert "runs/group/tiny-1" in capfd.readouterr().err


def test_the_log_of_the_rank_that_failed_is_shown_first(run, capfd):
    assert main(["logs", "tiny-1", "--lines", "2"]) == 0
    assert capfd.readouterr().out.splitlines()[1:] == ["rank 0 line 98", "rank 0 line 99"]
    ledger = Ledger(run)
    ledger.write(ledger.ended(ledger.begin("9", ["n1"]), 1, rank=2, error="x"))
    assert main(["logs", "tiny-1", "--lines", "1"]) == 0
    assert capfd.readouterr().out.splitlines()[1:] == ["rank 2 line 99"]
    assert main(["logs", "tiny-1", "--rank", "1", "--lines", "1000"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 101
    assert main(["logs", "tiny-1", "--rank", "7"]) == 2
    assert "rank7.log: no such log" in capfd.readouterr().err


def test_a_log_is_followed_until_ctrl_c(run):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "launch", "logs", str(run), "--follow", "--lines", "1"]
    # Whoever runs the tests in the background of a shell has it ignored, and hands that on.
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=listening)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("---") and process.stdout.readline() == "rank 0 line 99\n"
    with open(run / "logs" / "rank0.log", "a") as log:
        log.write("more\n")
    assert process.stdout.readline() == "more\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_last_lines_are_found_without_reading_all(tmp_path):
    path = tmp_path / "log"
    path.write_text("x" * 10_000 + "\nend\nlast")
    assert path.read_bytes()[start_of_last_lines(path, 2) :] == b"end\nlast"
    path.write_text("")
    assert start_of_last_lines(path, 2) == 0


def fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, squeue: str) -> Path:
    """A squeue that runs this line of shell, and a scancel that writes down what it is told; where it writes."""
    told = folder / "told"
    for name, line in {"squeue": squeue, "scancel": f'echo "$@" >> {told}'}.items():
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"))
    return told


def submitted(run: Path) -> None:
    attempt_of(run, "12")
    (run / "launch" / "job.json").write_text('{"job": "12", "name": "tiny", "submitted": "2026-01-01T00:00:00+00:00"}')


@pytest.mark.parametrize(
    ("squeue", "state"),
    [
        ("echo RUNNING", "running"),
        ("echo PENDING", "pending"),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", "lost"),
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", "unknown"),
    ],
)
def test_the_state_of_a_job_is_slurms(run, capfd, monkeypatch, tmp_path, squeue, state):
    submitted(run)
    assert status("tiny-1", capfd=capfd)["state"] == "unknown"  # without squeue
    fake_slurm(tmp_path, monkeypatch, squeue)
    found = status("tiny-1", capfd=capfd)
    assert (found["job"], found["state"]) == ("12", state)


ONCE = "if [ -e {0}/asked ]; then {1}; else : > {0}/asked; echo PENDING; fi"


@pytest.mark.parametrize(
    ("squeue", "told"),
    [
        ("echo RUNNING", ["--batch --signal=USR1 12"]),
        (ONCE.format("{0}", ":"), ["--state=PENDING 12"]),
        (ONCE.format("{0}", "echo RUNNING"), ["--state=PENDING 12", "--batch --signal=USR1 12"]),  # it began meanwhile
        ("echo CONFIGURING", ["12"]),
    ],
)
def test_a_job_is_told_to_save_and_one_that_waits_is_cancelled(run, monkeypatch, tmp_path, squeue, told):
    submitted(run)
    written = fake_slurm(tmp_path, monkeypatch, squeue.format(tmp_path))
    assert main(["stop", "tiny-1"]) == 0
    assert written.read_text().splitlines() == told and told_to_stop(run, "12")


def test_a_slurm_that_does_not_answer_is_not_asked_to_cancel(run, monkeypatch, tmp_path, capfd):
    submitted(run)
    written = fake_slurm(tmp_path, monkeypatch, "echo Unable to contact slurm controller >&2; exit 1")
    assert main(["stop", "tiny-1"]) == 2
    assert "does not answer" in capfd.readouterr().err
    assert not written.exists() and not told_to_stop(run, "12")


@pytest.mark.parametrize(("active", "attempts"), [("13", ["12", "13"]), ("12", ["12"]), ("12", ["12", "local-a-1-1"])])
def test_the_job_that_is_stopped_is_one_that_slurm_knows(run, monkeypatch, tmp_path, active, attempts):
    """Job 12 was submitted last; the ledger may know of newer ones, and have jobs whose end nobody saw."""
    submitted(run)
    ledger = Ledger(run)
    for job in ["11", *attempts]:
        attempt = ledger.begin(job, ["here"])
        if not job.isdigit():
            ledger.write(ledger.ended(attempt, 2))
    squeue = f"case $* in *--job={active}' '*) echo RUNNING ;; *) echo Invalid job id specified >&2; exit 1 ;; esac"
    written = fake_slurm(tmp_path, monkeypatch, squeue)
    assert main(["stop", "tiny-1"]) == 0
    assert written.read_text() == f"--batch --signal=USR1 {active}\n" and told_to_stop(run, active)
    assert not any(told_to_stop(run, job) for job in {"11", "12", "13"} - {active})
