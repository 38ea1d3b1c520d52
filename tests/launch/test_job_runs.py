"""The job script as bash runs it, with Slurm's programs and the launcher played: what it does when one fails."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.attempts import ask_to_stop
from tests.launch.test_job import script

JOB = "4711"
# Its n-th call does what the n-th line of the file beside it says, and the last line from then on.
PROGRAM = """#!/bin/bash
lines=$0.lines count=$0.count
echo "${0##*/} $*" >> "$CALLS"
number=0
[ -e "$count" ] && read -r number < "$count"
number=$((number + 1))
echo "$number" > "$count"
mapfile -t known < "$lines"
[ "$number" -gt "${#known[@]}" ] && number=${#known[@]}
eval "${known[number - 1]}"
"""
AWAY = "echo 'Unable to contact slurm controller' >&2; exit 1"
RUNNING = "echo RUNNING None"
SHOWN = "case $1 in show) [ $2 = job ] && echo '   Requeue=1 Restarts=0 BatchFlag=1' || echo n1 ;; esac"
AGAIN = ["echo 1", "echo again 10"]  # of `attempt begin`, of `attempt end`


class Played:
    """What the script printed, its exit code, and the calls of the programs."""

    def __init__(self, result: subprocess.CompletedProcess[str], calls: list[str]) -> None:
        self.text, self.code, self.calls = result.stdout + result.stderr, result.returncode, calls

    def count(self, start: str) -> int:
        """How many calls begin so."""
        return sum(call.startswith(start) for call in self.calls)

    @property
    def requeues(self) -> int:
        """How often Slurm was asked to requeue the job."""
        return self.count(f"scontrol requeue {JOB}")


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., Played]:
    """Run the script with programs that do so on each call; a sleep takes no time unless told otherwise."""

    def run(restarts: int | None = None, **programs: list[str]) -> Played:
        usual = {"python": AGAIN, "srun": ["exit 1"], "sleep": [":"], "squeue": [RUNNING], "scontrol": [SHOWN]}
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, lines in {**usual, **programs}.items():
            (folder / name).write_text(PROGRAM)
            (folder / name).chmod(0o755)
            (folder / f"{name}.lines").write_text("\n".join(lines) + "\n")
        text = script(run_folder=tmp_path, directory=tmp_path, python=str(folder / "python")).text()
        assert "\nrequeue 120 10 " in text  # 20 minutes
        (tmp_path / "job.sbatch").write_text(text.replace("\nrequeue 120 10 ", "\nrequeue 4 10 "))
        calls = tmp_path / "calls"
        environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NODELIST": "n1",
            **({} if restarts is None else {"SLURM_RESTART_COUNT": str(restarts)}),
        }
        # The number of the script's process, for signals to it.
        command = ["bash", "-c", f"export SCRIPT=$$; exec bash {tmp_path}/job.sbatch"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return Played(result, calls.read_text().splitlines())

    return run


def show(restarts: int) -> str:
    """scontrol, of a job that was requeued so often."""
    return SHOWN.replace("Restarts=0", f"Restarts={restarts}")


def test_a_crash_is_requeued_after_its_wait(play):
    played = play()
    assert played.requeues == 1 and played.calls.index("sleep 10") < played.calls.index(f"scontrol requeue {JOB}")
    assert played.calls[-1] == "sleep 300" and played.code == 0
    assert played.count("srun") == 1 and any(c.endswith("--exit-code 1 --max-restarts 3") for c in played.calls)


def test_what_is_over_is_not_requeued(play):
    played = play(python=["echo 1", "echo end 2"])
    assert (played.requeues, played.code, played.count("squeue")) == (0, 2, 0)


@pytest.mark.parametrize("program", ["squeue", "scontrol"])
def test_a_controller_that_is_away_at_an_attempts_end_is_waited_for(play, program):
    back = {"squeue": RUNNING, "scontrol": SHOWN}[program]
    first = [SHOWN] if program == "scontrol" else []  # the nodes' names
    played = play(**{program: [*first, AWAY, AWAY, AWAY, back]})
    assert played.requeues == 1 and played.calls[-1] == "sleep 300"
    assert played.count("sleep 10") == 1 + 3


def test_a_controller_that_stays_away_ends_the_job_with_the_ranks_exit_code(play):
    played = play(squeue=[AWAY])
    assert played.requeues == 0 and played.code == 1 and played.count("sleep 10") == 1 + 4
    assert "does not answer" in played.text


def test_a_requeue_that_is_refused_is_tried_again(play):
    played = play(scontrol=[SHOWN, SHOWN, "exit 1", SHOWN, "exit 0"])
    assert played.requeues == 2 and played.calls[-1] == "sleep 300"


@pytest.mark.parametrize("state", ["COMPLETING None", "CANCELLED None", "PENDING BeginTime"])
def test_a_job_that_was_cancelled_is_not_requeued(play, state):
    played = play(squeue=[f"echo {state}"])
    assert (played.requeues, played.code) == (0, 1) and f"not requeued, as it is {state}" in played.text


@pytest.mark.parametrize(
    ("own", "newest", "requeues"), [(None, 0, 1), (None, 1, 0), (1, 1, 1), (1, 2, 0), (1, 10, 0), (1, 11, 0)]
)
def test_a_copy_that_slurm_took_for_lost_leaves_its_successor_alone(play, own, newest, requeues):
    played = play(restarts=own, scontrol=[show(newest)])
    assert played.requeues == requeues and ("a newer copy" in played.text) == (requeues == 0)


def test_an_end_that_cannot_be_written_down_is_a_crash(play):
    played = play(python=["echo 1", "echo Stale file handle >&2; exit 1"])
    assert played.requeues == 1 and played.count("sleep 60") == 1


def test_a_request_to_stop_while_an_attempt_begins_starts_no_ranks(play):
    played = play(python=["kill -USR1 $SCRIPT; echo 1", "echo again 0"])
    assert played.count("srun") == 0 and played.requeues == 1 and "SIGUSR1" in played.text
    assert any(call.endswith("--attempt 1 --exit-code 75 --max-restarts 3") for call in played.calls)


def test_a_request_to_stop_is_handed_on_to_the_ranks(play):
    played = play(
        srun=["trap 'exit 75' USR1; kill -USR1 $SCRIPT; while :; do /bin/sleep 0.02; done"],
        python=["echo 1", "echo again 0"],
    )
    assert played.requeues == 1 and any("--exit-code 75" in call for call in played.calls)


def test_a_signal_ends_the_wait_behind_a_crash(play):
    played = play(sleep=["kill -USR1 $SCRIPT; exec /bin/sleep 30", ":"])
    assert played.requeues == 1 and played.calls[-1] == "sleep 300"


def test_a_stop_during_the_wait_behind_a_crash_is_no_requeue(play, tmp_path):
    ask_to_stop(tmp_path, JOB)
    mark = next((tmp_path / "launch").iterdir())
    text = mark.read_text()
    mark.unlink()
    played = play(sleep=[f"printf '%s' '{text.strip()}' > {mark}; kill -USR1 $SCRIPT; exec /bin/sleep 30", ":"])
    assert (played.requeues, played.code) == (0, 1) and "launch stop" in played.text


def test_a_stop_of_another_job_holds_nobody(play, tmp_path):
    for job in ("471", "47110", "1"):
        ask_to_stop(tmp_path, job)
    assert play().requeues == 1


@pytest.mark.parametrize(
    ("states", "requeues"),
    [
        (["echo COMPLETING TimeLimit"], 1),
        ([AWAY, "echo COMPLETING TimeLimit"], 1),
        (["echo COMPLETING None"], 0),
        ([AWAY], 0),
    ],
)
def test_at_the_limit_the_job_is_requeued_while_its_ranks_still_save(play, states, requeues):
    played = play(
        srun=["trap 'exit 75' USR1; kill -TERM $SCRIPT; while :; do /bin/sleep 0.02; done"],
        python=["echo 1", "echo end 75"],
        squeue=states,
    )
    assert (played.code, played.requeues) == (75, requeues)
