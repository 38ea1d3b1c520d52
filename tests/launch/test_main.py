"""`python -m launch`: help, what is refused, and that a recipe's errors come once, before anything starts."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main
from pretrain.exit_codes import EXIT_MACHINE_ERROR

DEMO = str(Path(__file__).parents[2] / "launch" / "recipes" / "demo.yaml")


@pytest.mark.parametrize("arguments", [["--help"], ["local", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert "local" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc", "0", DEMO], "--nproc 0"),
        (["--port", "70000", DEMO], "--port 70000"),
        (["--grace", "-1", DEMO], "--grace -1"),
        ([DEMO, "--nproc", "2"], "write it before"),
        (["--optimizer.lr", "5e-4", DEMO], "--optimizer.lr: training's options stand after the recipe"),
        (["no-such.yaml"], "no-such.yaml"),
        ([DEMO, "--training.batch_tokenz", "4096"], "batch_tokens"),
        (["--nproc", "3", DEMO], "training.batch_tokens"),
    ],
)
def test_mistakes_are_one_message_and_start_nothing(arguments, message, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["local", *arguments]) == 2
    output = capfd.readouterr()
    assert output.err.startswith("error: ") and message in output.err
    assert output.out == "" and list(tmp_path.iterdir()) == []


def test_a_folder_or_a_recipe_that_is_another_file_is_one_message(capfd, tmp_path):
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    file = str(tmp_path / "latin.yaml")
    for arguments, message in (([DEMO, "--folder", file], "give a --folder"), ([file], "is not UTF-8")):
        assert main(["local", *arguments]) == 2
        output = capfd.readouterr()
        assert output.err.startswith("error: ") and message in output.err and file in output.err


@pytest.mark.parametrize("command", ["local", "slurm"])
def test_a_disk_that_is_full_before_anything_starts_is_no_wrong_input(command, capfd, monkeypatch, tmp_path):
    """A machine's error, which whoever starts launches may try again."""

    def full(path: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "mkdir", full)
    assert main([command, DEMO, "--folder", str(tmp_path / "run")]) == EXIT_MACHINE_ERROR
    assert "No space left on device; give a --folder" in capfd.readouterr().err


def test_a_dry_run_says_what_would_run_and_leaves_nothing_behind(capfd, tmp_path):
    folder = tmp_path / "run"
    assert main(["local", "--nproc", "2", DEMO, "--dry-run", "--folder", str(folder)]) == 0
    assert "mac" in capfd.readouterr().out
    assert not folder.exists()
