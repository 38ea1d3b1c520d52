"""What is printed finds no room on a full disk: it is left out, told once there is room, and no reason to end a run."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.console import OutlivingStream
from tests.forked_ranks import ROOT, rank_server
from tests.training_cases import events, write_synthetic_recipe


@pytest.mark.parametrize("is_buffered", [True, False])
def test_lines_are_left_out_while_there_is_no_room_and_told_once_behind(
    mount_disk: Callable[[str], Path], is_buffered: bool
) -> None:
    """As a log that a shell opened, with and without Python's buffer."""
    folder = mount_disk("64k")
    with open(folder / "log", "ab", buffering=-1 if is_buffered else 0) as log:
        text = os.fdopen(os.dup(log.fileno()), "w", buffering=-1 if is_buffered else 1)
        stream = OutlivingStream(text)
        print("first", file=stream, flush=True)
        for _ in range(2):
            fill(folder / "other")
            for number in range(2000):  # more than the buffer and the rest of a page hold
                print(f"line {number} of many", file=stream, flush=True)
            (folder / "other").unlink()
            print("again", file=stream, flush=True)
            print("and on", file=stream, flush=True)
        text.close()
    lines = (folder / "log").read_text().splitlines()
    assert lines[0] == "first" and lines[-2:] == ["again", "and on"]
    assert sum("lines are missing here" in line for line in lines) == 2
    assert sum(line == "again" for line in lines) == 2 and len(lines) < 4000


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC


def test_a_reader_that_is_gone_is_an_error_as_before() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    text = os.fdopen(writing, "w")
    stream = OutlivingStream(text)
    with pytest.raises(BrokenPipeError):
        print("x", file=stream, flush=True)
    with pytest.raises(BrokenPipeError):
        text.close()


def test_a_run_whose_output_finds_no_room_trains_to_its_end(tmp_path: Path) -> None:
    recipe = write_synthetic_recipe(tmp_path / "run", steps=3, evaluation={"every_tokens": None})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    full = Path("/dev/full")
    assert rank_server().start(["-m", "pretrain", str(recipe)], environment, full, full).wait() == 0
    assert [event["event"] for event in events(tmp_path / "run")][-2:] == ["save", "done"]
