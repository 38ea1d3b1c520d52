"""A rank that hangs is found within its time, with every rank's stack, whatever it hangs in."""

from __future__ import annotations

import signal

from parallel.watchdog import EXIT_HUNG, LAST_RESORT_SECONDS
from tests.distributed_helper import Finished, run_ranks

RANKS = """
import ctypes, os, signal, threading, time
import torch
from parallel.process import initialize
from parallel.watchdog import Watchdog

def stuck_here():
    {hang}

world = initialize("cpu")
with Watchdog({seconds}, rank=world.rank, ranks=world.size) as watchdog:
    for step in range(3):
        watchdog.feed(f"step {{step}}")
        if step == 2 and world.rank == 1:
            stuck_here()
        torch.distributed.all_reduce(torch.zeros(1))
"""


def run(hang: str, seconds: float, ranks: int = 2) -> Finished:
    return run_ranks(["-c", RANKS.format(hang=hang, seconds=seconds)], ranks=ranks, timeout=60, check=False)


def test_a_hanging_rank_and_those_that_wait_for_it_show_where_they_are() -> None:
    finished = run("time.sleep(600)", seconds=1.5)
    assert finished.codes == [EXIT_HUNG, EXIT_HUNG], finished.report()
    for rank, error in enumerate(finished.errors):
        assert f"rank {rank} of 2 hangs: step 2 is not done after 1.5 s (parallel.step_timeout_seconds)" in error
    assert "in stuck_here" in finished.errors[1] and "all_reduce" not in finished.errors[1]
    assert "in all_reduce" in finished.errors[0] and "stuck_here" not in finished.errors[0]
    assert finished.seconds < 30


def test_a_thread_that_holds_the_interpreter_is_found_too() -> None:
    """As a C extension that waits without letting go of Python's lock."""
    finished = run("ctypes.PyDLL(None).sleep(600)", seconds=0.5)
    assert finished.codes[1] == 1, finished.report()
    assert "in stuck_here" in finished.errors[1]
    assert finished.codes[0] != 0
    assert finished.seconds < 30 + LAST_RESORT_SECONDS


def test_a_stopped_process_is_missed_by_the_others() -> None:
    finished = run("os.kill(os.getpid(), signal.SIGSTOP)", seconds=1.0)
    assert finished.codes == [EXIT_HUNG, -signal.SIGKILL], finished.report()
    assert "in all_reduce" in finished.errors[0]


WORKING = """
import time
from parallel.watchdog import Watchdog
with Watchdog(0.5, rank=0, ranks=1) as watchdog:
    for step in range(4):
        time.sleep(0.2)
        watchdog.feed(f"step {step}")
    watchdog.rest()
    time.sleep(1.0)
    watchdog.feed("more")
time.sleep(1.0)
print("done")
"""


def test_work_that_goes_on_and_rest_are_left_alone() -> None:
    finished = run_ranks(["-c", WORKING], ranks=1, timeout=30)
    assert finished.outputs == ["done\n"] and finished.errors == [""]


ASKED = """
import os, time
from parallel.process import exit_now, initialize, shutdown
from parallel.watchdog import STACKS_SIGNAL, Watchdog
def before():
    os.kill(os.getpid(), STACKS_SIGNAL)
def within():
    os.kill(os.getpid(), STACKS_SIGNAL)
def behind():
    os.kill(os.getpid(), STACKS_SIGNAL)
initialize("cpu")
before()
with Watchdog(60, rank=0, ranks=1):
    within()
behind()
print("goes on")
shutdown()
exit_now(0)
"""


def test_stacks_are_shown_when_asked_for() -> None:
    finished = run_ranks(["-c", ASKED], ranks=1, timeout=30)
    assert finished.outputs == ["goes on\n"]
    assert all(f"in {name}" in finished.errors[0] for name in ("before", "within", "behind"))
