"""Ranks start with the right environment, and end together however one of them, or the launcher, ends."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.local import free_port, rank_environment

REPOSITORY = Path(__file__).parents[2]
# SIGHUP as in a terminal: under nohup it is ignored, which the launch respects and tests would inherit.
LAUNCH = """
import signal, sys
from pathlib import Path
from launch.local import launch_local
signal.signal(signal.SIGHUP, signal.SIG_DFL)
script, nproc, folder, grace = sys.argv[1:]
sys.exit(launch_local([sys.executable, script], int(nproc), Path(folder), grace_seconds=float(grace)).status)
"""
# Writes its process id for the test to follow, and does not end by itself.
STAY = """
import os, time
from pathlib import Path
Path(os.environ["PIDS"], os.environ["RANK"]).write_text(str(os.getpid()))
"""


FULL = """
import sys
from pathlib import Path
from launch.__main__ import outlive_full_disks
from launch.local import launch_local
outlive_full_disks()
sys.exit(launch_local([sys.executable, "-c", "print('x' * 200000)"], 2, Path(sys.argv[1])).status)
"""


def test_a_launcher_whose_own_output_finds_no_room_ends_as_the_ranks_do(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-c", FULL, str(tmp_path)]
        finished = subprocess.run(command, env=environment, stdout=full, stderr=full, timeout=60)
    assert finished.returncode == 0
    assert (tmp_path / "rank1.log").stat().st_size > 200000


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start the launcher on a script given as text; whatever still runs at the end of the test is killed."""
    started: list[subprocess.Popen] = []
    (tmp_path / "pids").mkdir()

    def start(body: str, nproc: int = 2, grace: float = 10.0) -> subprocess.Popen:
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(body))
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(script), str(nproc), str(tmp_path / "logs"), str(grace)],
            cwd=REPOSITORY,
            env={**os.environ, "PIDS": str(tmp_path / "pids"), "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for_pids(folder: Path, count: int) -> list[int]:
    """The process ids written below `folder`, once there are `count` of them."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        texts = [path.read_text() for path in sorted(folder.iterdir())]
        if len(texts) == count and all(texts):
            return [int(text) for text in texts]
        time.sleep(0.02)
    raise AssertionError(f"{count} processes did not start")


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has reaped yet counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_all_end(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still alive: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.02)


def test_every_rank_gets_its_place_and_one_meeting_point(launch, tmp_path):
    process = launch(
        """
        import os
        names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS"
        print(*(os.environ[name] for name in names.split()))
        """,
        nproc=3,
    )
    process.communicate(timeout=60)
    assert process.returncode == 0
    lines = [(tmp_path / "logs" / f"rank{rank}.log").read_text().splitlines()[-1].split() for rank in range(3)]
    assert [line[:5] for line in lines] == [[str(rank), str(rank), "3", "3", "127.0.0.1"] for rank in range(3)]
    assert len({line[5] for line in lines}) == 1
    assert all(int(line[6]) >= 1 for line in lines)


def test_only_rank_0_is_shown_and_every_rank_is_logged(launch, tmp_path):
    output, errors = launch("import os; print('hello from', os.environ['RANK'])").communicate(timeout=60)
    assert output == "hello from 0\n"
    assert "hello" not in errors
    assert "hello from 1" in (tmp_path / "logs" / "rank1.log").read_text()


def test_logs_of_an_earlier_launch_are_kept_and_not_shown_again(launch, tmp_path):
    launch("print('first')").communicate(timeout=60)
    output, _ = launch("print('second')").communicate(timeout=60)
    assert output == "second\n"
    log = (tmp_path / "logs" / "rank0.log").read_text()
    assert log.index("first") < log.index("second")


def test_a_failing_rank_ends_the_others_and_is_reported_first(launch, tmp_path):
    process = launch(
        STAY
        + """
if os.environ["RANK"] == "1":
    while len(os.listdir(os.environ["PIDS"])) < 3: time.sleep(0.01)
    print("about to divide")
    raise SystemExit(7)
time.sleep(600)
        """,
        nproc=3,
    )
    pids = wait_for_pids(tmp_path / "pids", 3)
    started = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 8
    assert process.returncode == 7
    report = [line for line in errors.splitlines() if "logs in" not in line]
    assert "rank 1 of 3 failed" in report[0] and "exit code 7" in report[0] and "rank1.log" in report[0]
    assert report[1].endswith("[rank 1] about to divide")
    assert_all_end(pids, 1)


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace_time(launch, tmp_path):
    process = launch(
        """
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        """
        + textwrap.indent(STAY, " " * 8)
        + """
        if os.environ["RANK"] == "1":
            while len(os.listdir(os.environ["PIDS"])) < 2: time.sleep(0.01)
            raise SystemExit(3)
        time.sleep(600)
        """,
        grace=0.5,
    )
    pids = wait_for_pids(tmp_path / "pids", 2)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "killing rank 0" in errors
    assert_all_end(pids, 1)


def test_a_failed_rank_ends_the_job_within_15_seconds_with_its_traceback_first(launch, tmp_path):
    """The others wait for it in a collective, and end slowly."""
    process = launch(
        """
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        """
        + textwrap.indent(STAY, " " * 8)
        + """
        import torch
        from parallel.process import initialize
        world = initialize("cpu")
        torch.distributed.barrier()
        if world.rank == 1:
            raise RuntimeError("the second rank is broken")
        try:
            torch.distributed.all_reduce(torch.zeros(1))
        finally:
            print("lost its peer", flush=True)
            time.sleep(600)
        """,
        nproc=3,
        grace=600,
    )
    pids = wait_for_pids(tmp_path / "pids", 3)
    while alive(pids[1]):
        time.sleep(0.05)
    failed = time.monotonic()
    _, errors = process.communicate(timeout=120)
    assert time.monotonic() - failed < 15
    assert process.returncode == 1
    report = [line for line in errors.splitlines() if "logs in" not in line]
    assert "rank 1 of 3 failed" in report[0] and report[1].endswith("[rank 1] rank 1 failed:")
    assert "the second rank is broken" in "\n".join(report)
    assert_all_end(pids, 1)


def test_a_job_that_hangs_ends_with_every_ranks_stack(launch, tmp_path):
    process = launch(
        STAY
        + """
import torch
from parallel.process import initialize
from parallel.watchdog import Watchdog
def stuck_here():
    time.sleep(600)
world = initialize("cpu")
with Watchdog(2.0 if world.rank == 0 else 60.0, rank=world.rank, ranks=world.size) as watchdog:
    watchdog.feed("step 7")
    if world.rank == 2:
        stuck_here()
    torch.distributed.all_reduce(torch.zeros(1))
        """,
        nproc=3,
    )
    pids = wait_for_pids(tmp_path / "pids", 3)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 124
    report = [line for line in errors.splitlines() if "logs in" not in line]
    assert "rank 0 of 3 found the job hanging" in report[0]
    assert any("[rank 0] rank 0 of 3 hangs: step 7 is not done after 2 s" in line for line in report)
    assert any("[rank 1]" in line and "in all_reduce" in line for line in report)
    assert any("[rank 2]" in line and "in stuck_here" in line for line in report)
    assert_all_end(pids, 1)


def test_a_rank_killed_by_a_signal_gives_the_shell_s_status(launch, tmp_path):
    process = launch(STAY + "time.sleep(600)")
    pids = wait_for_pids(tmp_path / "pids", 2)
    os.kill(pids[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 1 of 2 failed" in errors and "killed by SIGKILL" in errors
    assert_all_end(pids, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_ranks_which_may_end_in_their_own_way(launch, tmp_path, number):
    process = launch(
        """
        import signal, sys
        stop = lambda number, frame: (print("saved before the end"), sys.exit(75))
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        """
        + textwrap.indent(STAY, " " * 8)
        + """
        while True: time.sleep(0.1)
        """
    )
    pids = wait_for_pids(tmp_path / "pids", 2)
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    assert output == "saved before the end\n"
    assert "failed" not in errors
    assert_all_end(pids, 1)


def test_a_second_interrupt_kills_at_once(launch, tmp_path):
    process = launch(
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + STAY + "time.sleep(600)", grace=600
    )
    pids = wait_for_pids(tmp_path / "pids", 2)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "handing it on" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL
    assert_all_end(pids, 1)


def test_nothing_outlives_a_launcher_killed_with_sigkill(launch, tmp_path):
    """Neither the ranks nor what they started."""
    process = launch(
        STAY
        + """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(os.environ["PIDS"], "child" + os.environ["RANK"]).write_text(str(child.pid))
time.sleep(600)
"""
    )
    pids = wait_for_pids(tmp_path / "pids", 4)
    assert all(alive(pid) for pid in pids)
    process.kill()
    process.wait()
    assert_all_end(pids, 5)


def test_what_a_finished_rank_left_running_is_ended(launch, tmp_path):
    process = launch(
        """
        import os, subprocess, sys
        from pathlib import Path
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(os.environ["PIDS"], os.environ["RANK"]).write_text(str(child.pid))
        """
    )
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert_all_end(wait_for_pids(tmp_path / "pids", 2), 2)


def test_a_command_that_cannot_start_ends_the_launch(tmp_path):
    """The ranks already started must not stay behind."""
    from launch.local import launch_local

    with pytest.raises(FileNotFoundError):
        launch_local([str(tmp_path / "no-such-program")], 2, tmp_path / "logs")


def test_thread_count_is_the_user_s_when_set(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert rank_environment(0, 2, 1234)["OMP_NUM_THREADS"] == "5"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert rank_environment(0, 10_000, 1234)["OMP_NUM_THREADS"] == "1"


def test_free_ports_can_be_bound():
    assert 1024 <= free_port() <= 65535
