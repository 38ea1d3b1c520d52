"""The demo refuses what it must, and goes the whole way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.demo.__main__ import prepare_folder

REPOSITORY = Path(__file__).parents[2]


def run_demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.demo", "--folder", str(folder), *arguments]
    environment = {**os.environ, "COLUMNS": "250"}  # rows of the table stay on one line
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


def test_a_folder_that_the_demo_did_not_make_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    result = run_demo(tmp_path / "mine")
    assert result.returncode == 2 and "was not made by the demo" in result.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_mistake_is_named_before_an_earlier_demo_is_replaced(tmp_path):
    folder = tmp_path / "demo"
    prepare_folder(folder)
    (folder / "model").write_text("an earlier demo's")
    result = run_demo(folder, "--", "--training.tokenz", "1000")
    assert result.returncode == 2 and "did you mean tokens" in result.stderr
    result = run_demo(folder, "--data", str(tmp_path / "missing"))
    assert result.returncode == 2 and str(tmp_path / "missing") in result.stderr
    assert (folder / "model").read_text() == "an earlier demo's"


@pytest.mark.slow
def test_the_whole_way_and_too_little_training_is_said_so(tmp_path):
    """A few steps cannot beat a bigram model: the demo says NO and fails, but every step of it works."""
    changes = ("--training.tokens", "40_960", "--checkpoint.every_tokens", "8192", "--schedule.warmup_tokens", "4096")
    folder = tmp_path / "demo"
    result = run_demo(folder, "--", *changes)
    assert result.returncode == 1, result.stderr
    assert "steps that ran twice gave bitwise the same loss" in result.stdout
    assert "better than the bigram" in result.stdout and "NO" in result.stdout
    assert json.loads((folder / "evaluation.json").read_text())["bits_per_byte"] > 0
    assert list((folder / "run" / "tensorboard").iterdir())
