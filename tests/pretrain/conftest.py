"""Fixtures: the data of small runs, a process group of one rank, and full disks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parallel import process
from parallel.process import World
from tests.training_cases import make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of training and held-out text, as `make_data` makes them; shared by a file's tests, which alter copies."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """This process as the only rank, for a file's tests."""
    alone = process.initialize("cpu")
    yield alone
    process.shutdown()


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """mount_disk("1m"): a folder with a file system of that size; skips where mounting is not allowed."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"mounting a small tmpfs is not allowed here: {result.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
