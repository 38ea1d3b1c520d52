"""Runs the cases that need Triton's interpreter in new processes: all kernels of a process are interpreted, or none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
CASES = ("interpreted.py", "selftest_cases.py")


def assert_passes_interpreted(file: str, *arguments: str) -> None:
    path = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]


@pytest.mark.parametrize("file", CASES)
def test_under_the_interpreter(file: str) -> None:
    assert_passes_interpreted(file)


@pytest.mark.slow
@pytest.mark.parametrize("file", CASES)
def test_under_the_interpreter_in_more_cases(file: str) -> None:
    assert_passes_interpreted(file, "-m", "slow")
