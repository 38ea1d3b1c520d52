"""Whatever befalls a save, at whatever moment: the newest checkpoint is whole, and goes on bit for bit as if nothing
had.

A small process, forked from the test, saves beside its steps as training does. strace makes its system calls fail, or
it is killed.
"""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.host_copies import TensorFile
from parallel.process import World
from pretrain.checkpoint_config import CheckpointConfig
from pretrain.checkpoints import Checkpoints, checkpoint_step, list_checkpoints, problems
from pretrain.fence import take_fence
from pretrain.loop import train
from pretrain.phases import load_phases
from pretrain.resume import TrainerState
from pretrain.rng import rng_tensors
from pretrain.saver import Saver
from tests.checkpoint_cases import NoWatchdog
from tests.checkpoint_walk import NUMBERS, Silent, Walk
from tests.training_cases import write_recipe

SECONDS = 60.0


pytestmark = pytest.mark.usefixtures("world")


def walk_and_save(folder: Path, world: World, steps: int, begin: Callable[[], object]) -> int:
    """Walk on from the newest checkpoint, saving at every step; how many saves failed."""
    torch.set_num_threads(1)  # those of the test are not there behind a fork
    folder.mkdir(exist_ok=True)
    config, log, walk = CheckpointConfig(keep=2, max_failed_saves=99), Silent(), Walk()
    checkpoints = Checkpoints(folder / "checkpoints", config.keep, world, take_fence(folder, world))
    if (newest := checkpoints.newest_whole(pytest.fail)) is not None:
        walk.load(newest)
    begin()
    with Saver(checkpoints, config, log, NoWatchdog(), last_tokens=0) as saver:
        for _ in range(steps):
            walk.step()
            saver.look()
            state = TrainerState(step=walk.number, tokens=walk.number, tokenizer_sha256=None, ranks=1)
            saver.save(state, walk.files, stays=False, wait=False)
        saver.finish()
    return log.failures


@dataclass(frozen=True)
class Child:
    """A forked process that walks."""

    pid: int
    go: int
    """Written to, it begins to walk: it has read the folder, and taken its fence, already."""

    @classmethod
    def fork(cls, folder: Path, world: World, steps: int) -> Child:
        (is_ready, ready), (read, write) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid:
            os.close(read)
            os.close(ready)
            os.read(is_ready, 1)
            os.close(is_ready)
            return cls(pid, write)
        status = 99
        try:
            sys.stderr = io.StringIO()  # what it says is no write that may fail
            status = walk_and_save(folder, world, steps, lambda: os.write(ready, b".") and os.read(read, 1))
        finally:
            os._exit(status)

    def begin(self) -> None:
        os.write(self.go, b".")
        os.close(self.go)

    def status(self) -> int:
        """The exit code, or the signal that ended it, negative."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@dataclass(frozen=True)
class Traced:
    """What strace saw of the thread that saves: its system calls in order, and how the process ended."""

    calls: list[str]
    injected: int
    status: int

    def count(self, name: str) -> int:
        return self.calls.count(name)


@pytest.fixture
def trace(tmp_path: Path, world: World) -> Callable[..., Traced]:
    """trace(folder, "write:error=ENOSPC:when=3+"): two steps and saves below `folder` with such faults."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")

    def run(folder: Path, *faults: str) -> Traced:
        child, log = Child.fork(folder, world, 2), folder / "strace"
        command = ["strace", "-f", "-o", str(log), "-e", "trace=write,fsync,rename,renameat,renameat2"]
        command += [part for fault in faults for part in ("-e", f"inject={fault}")]
        with subprocess.Popen([*command, "-p", str(child.pid)], stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            said = strace.stderr.readline()
            if "attached" not in said:
                os.kill(child.pid, signal.SIGKILL)
                child.status()
                pytest.skip(f"strace may not look at a process here: {said}")
            child.begin()
            status = child.status()
            strace.communicate(timeout=SECONDS)
        found = re.findall(r"^(\d+) +(\w+)\(", log.read_text(), re.MULTILINE)
        return Traced(
            [name for pid, name in found if int(pid) != child.pid], log.read_text().count("(INJECTED)"), status
        )

    return run


@pytest.fixture(scope="module")
def untouched() -> Callable[[int], torch.Tensor]:
    """untouched(n): the numbers behind n steps of a walk that nothing befell."""
    walk, seen = Walk(), [torch.zeros(NUMBERS)]
    state = rng_tensors()

    def behind(steps: int) -> torch.Tensor:
        nonlocal state
        if steps >= len(seen):
            torch.set_rng_state(state["torch"])
            while steps >= len(seen):
                walk.step()
                seen.append(walk.weights.clone())
            state = rng_tensors()
        return seen[steps]

    return behind


def assert_goes_on(folder: Path, world: World, untouched: Callable[[int], torch.Tensor], *, at_least: int) -> int:
    """No checkpoint is half of one, and from the newest, of step `at_least` or a later one, the walk goes on exactly.
    Returns its step.
    """
    checkpoints = Checkpoints(folder / "checkpoints", 2, world)
    assert all(problems(each) == [] for each in list_checkpoints(checkpoints.folder))
    newest = checkpoints.newest_whole(pytest.fail)
    if newest is None:
        assert at_least == 0
        return 0
    walk = Walk()
    walk.load(newest)
    assert walk.number == checkpoint_step(newest) >= at_least
    assert torch.equal(walk.weights, untouched(walk.number))
    expected = untouched(walk.number + 2)
    walk.load(newest)  # the generator was taken to there
    walk.step()
    walk.step()
    assert torch.equal(walk.weights, expected)
    return walk.number - 2


FAULTS = {
    "no space from the nth write on": (("write",), "{}:error=ENOSPC:when={}+"),
    "an input/output error at the nth fsync": (("fsync",), "{}:error=EIO:when={}"),
    "killed at the nth rename": (("rename", "renameat", "renameat2"), "{}:signal=SIGKILL:when={}"),
}


OF_LATEST = {"write": 1, "fsync": 2}
"""Calls behind the publication: the last ones of a save."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_call_of_a_save(
    tmp_path: Path, world: World, trace: Callable[..., Traced], untouched: Callable[[int], torch.Tensor], fault: str
) -> None:
    names, injection = FAULTS[fault]
    whole = trace(tmp_path / "whole")
    assert whole.status == 0 and whole.injected == 0
    assert assert_goes_on(tmp_path / "whole", world, untouched, at_least=2) == 2
    calls = {name: whole.count(name) for name in names}
    assert sum(calls.values()) >= 2 * 4 and not any(count % 2 for count in calls.values()), "two saves, alike"
    for name, count in calls.items():
        for number in range(1, count + 1):
            folder = tmp_path / f"{name}-{number}"
            traced = trace(folder, injection.format(name, number))
            if "SIGKILL" in injection:
                assert traced.status == -signal.SIGKILL, folder.name
            else:  # failures are counted, and the walk goes on
                # Behind its publication, where `latest` is written, a save has not failed any more.
                is_behind = (number - 1) % (count // 2) >= count // 2 - OF_LATEST[name]
                is_last = name == "fsync" or number > count // 2
                assert traced.injected >= 1 and traced.status <= 2, folder.name
                assert (traced.status == 0) == (is_behind and is_last), folder.name
            assert_goes_on(folder, world, untouched, at_least=int(number > count // 2))
            shutil.rmtree(folder)


@pytest.mark.parametrize("moments", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_again_and_again(
    tmp_path: Path, world: World, untouched: Callable[[int], torch.Tensor], moments: int
) -> None:
    """Each attempt goes on from the one before, and meets what that left."""
    begun = time.monotonic()
    child = Child.fork(tmp_path / "measured", world, 5)
    child.begin()
    assert child.status() == 0
    seconds = (time.monotonic() - begun) / 5  # of a save, about
    drawn, reached, folder = random.Random(7), 0, tmp_path / "run"
    for _ in range(moments):
        child = Child.fork(folder, world, 10**6)
        child.begin()
        time.sleep(drawn.uniform(0, 4 * seconds))
        os.kill(child.pid, signal.SIGKILL)
        assert child.status() == -signal.SIGKILL
        reached = assert_goes_on(folder, world, untouched, at_least=reached)
    assert reached > 0


def test_a_disk_that_is_full_for_a_while(
    mount_disk: Callable[[str], Path], world: World, monkeypatch: pytest.MonkeyPatch, untouched: Callable[[int], Any]
) -> None:
    """Found out while the thread writes: what is to be written is not known before, as with a quota."""
    monkeypatch.setattr(TensorFile, "num_bytes", 0)
    disk = mount_disk("5m")
    assert walk_and_save(disk, world, 2, lambda: None) == 0
    filler = disk / "filler"
    filler.write_bytes(bytes(2_000_000))
    assert walk_and_save(disk, world, 3, lambda: None) == 3, "all of them, and the walk went on"
    assert assert_goes_on(disk, world, untouched, at_least=2) == 2
    assert not list((disk / "checkpoints").glob(".*"))
    filler.unlink()
    assert walk_and_save(disk, world, 3, lambda: None) == 0
    assert assert_goes_on(disk, world, untouched, at_least=5) == 5


def test_one_altered_byte_of_any_file_is_found_and_named(data: Path, tmp_path: Path, world: World) -> None:
    recipe = write_recipe(data, tmp_path / "run", steps=8)
    train(load_phases(recipe, [("data.order", "streams")]), world)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 2, world)
    newest, before = list_checkpoints(checkpoints.folder)
    files = sorted(path.name for path in newest.iterdir() if path.stat().st_size)
    assert {name.split("-")[0].split(".")[0] for name in files} == {
        *("carried", "manifest", "model", "recipe", "rng", "state", "tokenizer", "trainer")
    }
    for name in files:
        path = newest / name
        content = path.read_bytes()
        at = random.Random(name).randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        said: list[str] = []
        assert checkpoints.newest_whole(said.append) == before
        assert len(said) == 1 and newest.name in said[0] and str(path) in said[0]
        aside = newest.with_name(f"damaged-{newest.name}")
        (aside / name).write_bytes(content)
        aside.rename(newest)
        assert checkpoints.newest_whole(pytest.fail) == newest
