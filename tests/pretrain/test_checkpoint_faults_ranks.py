"""Two ranks save a checkpoint together while a system call of one of them fails, or it is killed there: the newest
checkpoint is whole, and both go on from the same one, bit for bit as if nothing had.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoints import list_checkpoints, problems
from tests.checkpoint_walk import Walk
from tests.distributed_helper import Finished, run_ranks

RENAMES = ("rename", "renameat", "renameat2")
FAULTS = {
    "no space from the nth write on": (("write",), "{}:error=ENOSPC:when={}+"),
    "an input/output error at the nth fsync": (("fsync",), "{}:error=EIO:when={}"),
    "killed at the nth fsync": (("fsync",), "{}:signal=SIGKILL:when={}"),
    "killed at the nth rename": (RENAMES, "{}:signal=SIGKILL:when={}"),  # rank 0's alone
}
SAVES = 2
OF_LATEST = {"write": 1, "fsync": 2}
"""Calls of rank 0 behind the publication: the last ones of a save."""


@dataclass(frozen=True)
class Traced:
    """Calls of a rank's thread that saves, how many faults it met, and how both ranks ended."""

    calls: Counter[str]
    injected: int
    finished: Finished


Trace = Callable[..., Traced]


def walk(folder: Path, steps: int, *traced: str) -> Finished:
    return run_ranks(["tests/pretrain/fault_worker.py", str(folder), str(steps), *traced], ranks=2, check=False)


def ended(folder: Path) -> list[dict[str, Any]]:
    """What both ranks left."""
    return [json.loads((folder / f"ended-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    """trace(folder, rank, "fsync:error=EIO:when=3"): two steps and saves by two ranks, of which one meets the fault."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")

    def run(folder: Path, rank: int, *faults: str) -> Traced:
        log = tmp_path / f"{folder.name}.strace"
        finished = walk(folder, SAVES, str(rank), str(log), *(f"--inject={fault}" for fault in faults))
        if (folder / "ended-0.json").exists() and "untraced" in ended(folder)[0]:
            pytest.skip("strace may not look at a process here")
        text = log.read_text()
        found = re.findall(r"^(\d+) +(\w+)\(", text, re.MULTILINE)
        saving = Counter(thread for thread, name in found if name == "fsync").most_common(1)
        calls = Counter(name for thread, name in found if saving and thread == saving[0][0])
        return Traced(calls, text.count("(INJECTED)"), finished)

    return run


@cache
def untouched(rank: int, steps: int) -> float:
    """The sum of the numbers of a rank behind so many steps that nothing befell."""
    walked = Walk(rank)
    for _ in range(steps):
        walked.step()
    return float(walked.weights.double().sum())


def assert_both_go_on(folder: Path, *, at_least: int) -> None:
    """No checkpoint is half of one, and both ranks go on from the newest, of step `at_least` or later, exactly."""
    found = list_checkpoints(folder / "checkpoints")
    assert all(problems(each) == [] for each in found)
    again = walk(folder, 1)
    assert again.codes == [0, 0], again.report()
    both = ended(folder)
    assert both[0]["begun"] == both[1]["begun"] >= at_least
    for rank, each in enumerate(both):
        assert each["failures"] == 0 and each["sum"] == untouched(rank, each["begun"] + 1)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moments", ["one", pytest.param("each", marks=pytest.mark.slow)])
def test_a_fault_of_one_of_two_ranks_in_a_save(tmp_path: Path, trace: Trace, moments: str, rank: int) -> None:
    whole = trace(tmp_path / "whole", rank)
    assert whole.finished.codes == [0, 0], whole.finished.report()
    assert whole.injected == 0 and [each["failures"] for each in ended(tmp_path / "whole")] == [0, 0]
    assert_both_go_on(tmp_path / "whole", at_least=SAVES)
    tried = 0
    for names, injection in FAULTS.values():
        for name in names:
            count = whole.calls[name]
            assert count % SAVES == 0, "two saves, alike"
            numbers = range(1, count + 1) if moments == "each" else [count // SAVES + 1][:count]
            for number in numbers:
                fault, at_least = injection.format(name, number), int(number > count // SAVES)
                # Behind its publication, where rank 0 writes `latest`, a save has not failed any more.
                is_behind = rank == 0 and (number - 1) % (count // SAVES) >= count // SAVES - OF_LATEST.get(name, 0)
                is_last = name == "fsync" or number > count // SAVES
                is_told = not (is_behind and is_last)
                assert_whole_behind(trace, tmp_path / f"{tried}", rank, fault, at_least=at_least, is_told=is_told)
                tried += 1
    assert tried >= (3 if moments == "one" else 3 * SAVES * 2)


def assert_whole_behind(trace: Trace, folder: Path, rank: int, fault: str, *, at_least: int, is_told: bool) -> None:
    """A walk that meets such a fault, behind a checkpoint of step `at_least`; a save that met it `is_told` to fail."""
    traced = trace(folder, rank, fault)
    assert traced.injected >= 1 or "SIGKILL" in fault, fault
    if "SIGKILL" in fault:
        assert traced.finished.codes[rank] == -signal.SIGKILL, f"{fault}\n{traced.finished.report()}"
    else:  # failures are counted, and both walk on, and count alike
        assert traced.finished.codes == [0, 0], f"{fault}\n{traced.finished.report()}"
        failures = [each["failures"] for each in ended(folder)]
        assert failures[0] == failures[1] <= SAVES and (failures[0] >= 1) == is_told, f"{fault}: {failures}"
    assert_both_go_on(folder, at_least=at_least)
    shutil.rmtree(folder)
