"""The job script, what is refused before one is written, and what its commands decide behind an attempt."""

import errno
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch import attempts
from launch.__main__ import main
from launch.attempts import Ledger, ask_to_stop
from launch.job_script import JobScript
from launch.jobs import SubmittedJob
from launch.run_events import read_events
from launch.slurm import limit_seconds
from launch.task import RankExit, environment_of_task, write_exit
from pretrain.errors import UserError

DEMO = str(Path(__file__).parents[2] / "launch" / "recipes" / "demo.yaml")
STEP = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "12345"}


def script(**fields) -> JobScript:
    given = {
        "name": "run",
        "run_folder": Path("/runs/run"),
        "directory": Path("/code"),
        "python": "/usr/bin/python3",
        "training": ("recipe.yaml",),
        "nodes": 2,
        "tasks_per_node": 4,
        "gpus_per_node": 0,
        "cpus_per_task": None,
        "signal_seconds": 60,
        "max_restarts": 3,
    }
    return JobScript(**given | fields)


def directives(text: str) -> dict[str, str]:
    lines = [shlex.split(line.removeprefix("#SBATCH "))[0] for line in text.splitlines() if line.startswith("#SBATCH ")]
    return dict((line.removeprefix("--").split("=", 1) + [""])[:2] for line in lines)


def assert_bash_takes(text: str) -> None:
    result = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr


def test_the_script_says_what_was_asked_for():
    text = script(gpus_per_node=4, cpus_per_task=12, sbatch=(("partition", "long"), ("time", "1-00"))).text()
    assert_bash_takes(text)
    found = directives(text)
    assert found == {
        "job-name": "run",
        "nodes": "2",
        "ntasks": "8",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "cpus-per-task": "12",
        "partition": "long",
        "time": "1-00",
        "signal": "B:USR1@60",
        "output": "/runs/run/logs/job-%j.log",
        "open-mode": "append",
        "requeue": "",
    }
    assert "srun --nodes=2 --ntasks=8 --ntasks-per-node=4 --cpus-per-task=12 --kill-on-bad-exit=1" in text
    assert "gpus-per-node" not in directives(script().text())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:30", 330), ("1:02:03", 3723), ("2-3", 183600), ("1-2:30", 95400), ("1-0:0:10", 86410)],
)
def test_time_limits_are_read_as_sbatch_reads_them(text, seconds):
    assert limit_seconds(text) == seconds


def test_words_with_signs_of_the_shell_stay_words(tmp_path):
    odd = ["it's.yaml", "$(touch hacked)", "`touch hacked`", '"', "a b", "--x=${HOME}", "{braces}"]
    folder = Path("/runs/50% of $it's")
    text = script(training=tuple(odd), run_folder=folder, directory=tmp_path).text()
    assert_bash_takes(text)
    assert directives(text)["output"] == "/runs/50%% of $it's/logs/job-%j.log"
    begin = text.index("cd ")
    settings = text[begin : text.index("launcher()", begin)]
    printed = subprocess.run(
        ["bash", "-c", settings + 'printf "%s\\0" "$run" "${training[@]}"'], capture_output=True, text=True, check=True
    )
    assert printed.stdout.split("\0")[:-1] == [str(folder), *odd]
    assert list(tmp_path.iterdir()) == []


def test_a_container_holds_all_that_runs():
    text = script(container="image.sqsh", container_mounts="/data:/data").text()
    assert_bash_takes(text)
    line = next(line for line in text.splitlines() if line.startswith("container="))
    assert "--container-image=image.sqsh --container-workdir=/code --container-mounts=/data:/data" in line


@pytest.mark.parametrize("field", [{"name": "a\nb"}, {"training": ("a\n#SBATCH --x",)}, {"sbatch": (("qos", "\x1b"),)}])
def test_nothing_adds_a_line_to_the_script(field):
    with pytest.raises(UserError, match="line's end"):
        script(**field).text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0", DEMO], "--nodes 0"),
        (["--gpus-per-node", "-1", DEMO], "--gpus-per-node -1"),
        (["--gpus-per-node", "8", "--tasks-per-node", "4", DEMO], "a rank has one GPU"),
        (["--time", "tomorrow", DEMO], "--time tomorrow"),
        (["--signal-seconds", "0", DEMO], "--signal-seconds 0"),
        (["--time", "2", DEMO], "--time 2 ends before the run has begun"),
        (["--signal-seconds", "70000", DEMO], "65535"),
        (["--max-restarts", "-1", DEMO], "--max-restarts -1"),
        (["--container-mounts", "/a:/a", DEMO], "--container IMAGE"),
        ([DEMO, "--nodes", "2"], "write it before"),
        ([DEMO, "--partition=x"], "write it before"),
        (["--nodes", "3", DEMO], "training.batch_tokens"),
        ([DEMO, "--parallel.device", "cuda"], "--gpus-per-node"),
        (["--job-name", "a\nb", DEMO], "line's end"),
        ([DEMO], "sbatch is not on the PATH"),
    ],
)
def test_mistakes_are_one_message_and_submit_nothing(arguments, message, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm
    assert main(["slurm", *arguments]) == 2
    output = capfd.readouterr()
    assert output.err.startswith("error: ") and message in output.err and output.out == ""
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert written == ({"job.sbatch", "rank0.log"} if "sbatch is" in message else set())


def test_print_and_no_submit_give_the_same_script(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = ["--nodes", "2", "--time", "60", DEMO, "--folder", "my run", "--optimizer.lr", "1e-3"]
    assert main(["slurm", "--print", *options]) == 0
    printed = capfd.readouterr().out
    assert list(tmp_path.iterdir()) == [] and f"training=({DEMO} --folder 'my run' --optimizer.lr 1e-3)" in printed
    assert main(["slurm", "--no-submit", *options]) == 0
    assert (tmp_path / "my run" / "launch" / "job.sbatch").read_text() == printed
    assert directives(printed)["output"] == f"{tmp_path}/my run/logs/job-%j.log"


@pytest.mark.parametrize(
    ("options", "device", "added"),
    [
        (["--gpus-per-node", "1"], "auto", " --parallel.device cuda"),
        (["--gpus-per-node", "1"], "cpu", ""),
        ([], "auto", ""),
    ],
)
def test_a_job_with_gpus_does_not_train_on_cpus_where_they_are_gone(
    options, device, added, capfd, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert main(["slurm", "--print", *options, DEMO, "--parallel.device", device]) == 0
    assert f"training=({DEMO} --parallel.device {device}{added})" in capfd.readouterr().out


def test_a_dry_run_shows_the_plan_and_leaves_nothing_behind(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm
    folder = tmp_path / "run"
    assert main(["slurm", "--dry-run", "--nodes", "2", DEMO, "--folder", str(folder)]) == 0
    shown = capfd.readouterr().out
    assert "job demo: 2 nodes x 1 ranks on CPUs" in shown and "sbatch is not on the PATH" in shown and "mac" in shown
    assert not folder.exists()


def test_a_dry_run_asks_sbatch_whether_it_takes_the_job(capfd, monkeypatch, tmp_path):
    refusal = "allocation failure: no such partition"
    program = f'[ "$*" = --test-only ] && cat > {tmp_path}/asked; echo {refusal}; exit 1'
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\n{program}\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    options = ["--nodes", "2", DEMO, "--folder", str(tmp_path / "run")]
    assert main(["slurm", "--print", *options]) == 0
    script = capfd.readouterr().out
    assert main(["slurm", "--dry-run", *options]) == 2
    assert (tmp_path / "asked").read_text() == script
    assert refusal in capfd.readouterr().out


def test_a_job_that_is_submitted_is_no_failure_where_it_cannot_be_written_down(capfd, monkeypatch, tmp_path):
    """Whoever tries failures again would submit a second one. The job itself writes it down when it starts."""
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho 4242\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def full(job: SubmittedJob, folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    monkeypatch.setattr(SubmittedJob, "write", full)
    assert main(["slurm", "--nodes", "2", DEMO, "--folder", str(tmp_path / "run")]) == 0
    said = capfd.readouterr().err
    assert "job 4242: 2 x 1 ranks" in said and "not written down: " in said and "No space left on device" in said


def test_a_task_takes_its_place_from_slurm():
    found = environment_of_task({**STEP, "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "6"})
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT")
    assert [found[name] for name in names] == ["3", "1", "4", "2", "6", "n1", "12345"]
    assert environment_of_task({**STEP, "OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    with pytest.raises(UserError, match="SLURM_PROCID, MASTER_PORT not set"):
        environment_of_task(
            {name: value for name, value in STEP.items() if name not in ("SLURM_PROCID", "MASTER_PORT")}
        )


def begin(folder: Path, capfd, job: str = "7", restarts: int = 3) -> str:
    command = ["attempt", "begin", "--run", str(folder), "--job", job, "--nodes", "n[1-2]"]
    main([*command, "--max-restarts", str(restarts)])
    return capfd.readouterr().out.strip()


def end(folder: Path, capfd, attempt: int, code: int, exits: dict[int, tuple[float, int, str | None]]) -> str:
    for rank, (when, left, error) in exits.items():
        write_exit(folder, RankExit(attempt, rank, "n1", when, left, error))
    command = ["attempt", "end", "--run", str(folder), "--attempt", str(attempt), "--exit-code", str(code)]
    assert main([*command, "--max-restarts", "3"]) == 0
    return capfd.readouterr().out.strip()


def test_the_first_rank_to_fail_decides_and_not_the_exit_code_of_srun(tmp_path, capfd):
    assert begin(tmp_path, capfd) == "1"
    lost_peer = (11.0, 1, "RuntimeError: Connection closed by peer")
    assert end(tmp_path, capfd, 1, 143, {0: lost_peer, 1: (12.0, 2, "error: no space")}) == "end 2"
    assert Ledger(tmp_path).read()[0].failure == "rank 1: error: no space"
    assert begin(tmp_path, capfd) == "2"
    assert end(tmp_path, capfd, 2, 143, {0: (20.0, 75, None), 1: (20.1, 75, None)}) == "again 0"
    assert begin(tmp_path, capfd) == "3"
    assert end(tmp_path, capfd, 3, 137, {}) == "again 10"  # what the ranks of attempt 2 left says nothing of it
    assert begin(tmp_path, capfd) == "4"
    with open(tmp_path / "run.jsonl", "a") as file:
        file.write('{"event": "save", "step": 4}\n')
    assert end(tmp_path, capfd, 4, 0, {0: (30.0, 0, None)}) == "end 0"
    assert begin(tmp_path, capfd) == "5 --resume auto"
    assert begin(tmp_path, capfd, job="8") == "6"  # another launch
    crashes = [(event["attempt"], event["exit_code"]) for event in read_events(tmp_path) if event["event"] == "crash"]
    assert crashes == [(3, 137)]


def test_a_full_disk_at_an_attempts_end_is_no_reason_not_to_go_on_and_never_a_requeue_without_end(
    tmp_path, capfd, monkeypatch
):
    """Its end is not written: the next attempt counts it as a crash, where it can be written down itself."""
    monkeypatch.setattr("launch.attempts.FIRST_WAIT_SECONDS", 0.0)
    append, full = attempts.append_line, [False]

    def append_line(path: Path, line: str) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        append(path, line)

    monkeypatch.setattr(attempts, "append_line", append_line)
    message = rf"{Ledger(tmp_path).path}: No space left on device \(on the disk of /.*, [0-9.]+ MB free\); make room"
    for number in (1, 2, 3, 4):
        assert begin(tmp_path, capfd).split()[0] == str(number)
        full[0] = True
        ending = ["attempt", "end", "--run", str(tmp_path), "--attempt", str(number), "--exit-code", "74"]
        assert main([*ending, "--max-restarts", "3"]) == 0
        shown = capfd.readouterr()
        assert shown.out.strip() == ("again 0" if number < 4 else "end 74") and re.search(message, shown.err)
        full[0] = False
    assert begin(tmp_path, capfd) == "", "lost attempts are crashes"
    full[0] = True
    command = ["attempt", "begin", "--run", str(tmp_path), "--job", "8", "--nodes", "n1", "--max-restarts", "3"]
    assert main(command) == 74
    shown = capfd.readouterr()
    assert shown.out == "" and len(re.findall(message, shown.err)) == 4 and shown.err.count("another try in") == 3


def test_a_write_that_fails_behind_its_line_begins_no_attempt_twice(tmp_path, capfd, monkeypatch):
    """As where NFS finds no room, or a quota, in fsync: each line can be read by then."""
    monkeypatch.setattr("launch.attempts.FIRST_WAIT_SECONDS", 0.0)
    begin(tmp_path, capfd)
    sync, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) in (1, 3, 5):  # behind the lost attempt's end, its event, and the next attempt's line
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        command = ["attempt", "begin", "--run", str(tmp_path), "--job", "7", "--nodes", "n1", "--max-restarts", "3"]
        assert main(command) == 0
    shown = capfd.readouterr()
    assert shown.out.split()[0] == "2" and shown.err.count("another try in") == 3
    first, second = Ledger(tmp_path).read()
    assert first.ended is not None and first.reason.startswith("lost") and second.ended is None
    assert [event["attempt"] for event in read_events(tmp_path) if event["event"] == "crash"] == [1]
    assert read_events(tmp_path, second.events_from) == []


def test_a_launch_that_was_stopped_or_lost_too_often_begins_no_attempt(tmp_path, capfd):
    assert [begin(tmp_path, capfd, restarts=2) for _ in range(4)] == ["1", "2", "3", ""]  # Slurm lost each
    assert begin(tmp_path, capfd, job="8") == "5"
    ask_to_stop(tmp_path, "8")
    assert end(tmp_path, capfd, 5, 75, {0: (1.0, 75, None)}) == "end 75"
    assert begin(tmp_path, capfd, job="8") == ""
    assert begin(tmp_path, capfd, job="9") == "6"  # the script submitted again by hand


def test_a_request_to_stop_that_kills_what_cannot_take_it_yet_is_no_crash(tmp_path, capfd):
    begin(tmp_path, capfd)
    assert end(tmp_path, capfd, 1, 138, {}) == "again 0"  # srun, before it listens
    begin(tmp_path, capfd)
    assert end(tmp_path, capfd, 2, 143, {1: (1.0, 138, None), 0: (2.0, 1, "lost its peer")}) == "again 0"
    begin(tmp_path, capfd)
    assert end(tmp_path, capfd, 3, 138, {0: (1.0, 2, "error: no space"), 1: (0.5, 138, None)}) == "end 2"
    begin(tmp_path, capfd)
    assert end(tmp_path, capfd, 4, 138, {0: (1.0, 1, "ValueError: x"), 1: (2.0, 138, None)}) == "again 10"
    assert [found.exit_code for found in Ledger(tmp_path).read()] == [75, 75, 2, 1]


def test_a_job_that_was_submitted_by_hand_is_the_runs_job(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NAME", "by hand")
    SubmittedJob("7", "launched", "2026-01-01T00:00:00+00:00").write(tmp_path)
    begin(tmp_path, capfd, job="7")
    assert SubmittedJob.read(tmp_path) == SubmittedJob("7", "launched", "2026-01-01T00:00:00+00:00")
    begin(tmp_path, capfd, job="8")
    found = SubmittedJob.read(tmp_path)
    assert found is not None and (found.job, found.name) == ("8", "by hand")
    assert sorted(path.name for path in (tmp_path / "launch").iterdir()) == ["attempts.jsonl", "job.json"]
    for damaged in ("", "{", "[]", '{"job": "1"}', '"x"'):
        (tmp_path / "launch" / "job.json").write_text(damaged)
        assert SubmittedJob.read(tmp_path) is None


def test_what_a_job_script_asks_needs_neither_torch_nor_long(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not for this')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    command = ["attempt", "begin", "--run", str(tmp_path), "--job", "7", "--nodes", "n1", "--max-restarts", "3"]
    for words in (command, ["status", str(tmp_path)], ["slurm", "--help"]):
        result = subprocess.run(
            [sys.executable, "-m", "launch", *words], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
