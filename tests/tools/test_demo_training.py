"""The demo's kill hits everything that was started, and its comparison of losses can fail."""

import json
import sys

import psutil
import pytest

from pretrain.errors import UserError
from tools.demo.training import compare_replay, newest_checkpoint, step_losses, train_killed

TRAINING = """
import json, pathlib, subprocess, sys, time
run = pathlib.Path(sys.argv[1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(run / "child").write_text(str(child.pid))
for step in range(1, 1000):
    with (run / "run.jsonl").open("a") as events:
        events.write(json.dumps({"event": "step", "step": step, "loss": 1 / step}) + "\\n")
    if step % 4 == 0:
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
    time.sleep(0.02)
"""


def test_the_kill_leaves_no_process_and_comes_after_a_checkpoint(tmp_path):
    kill = train_killed([sys.executable, "-c", TRAINING, str(tmp_path)], tmp_path, kill_step=6)
    assert kill.step >= 6 and kill.processes == 2
    assert kill.checkpoint_step in (4, kill.step - kill.step % 4)
    assert not psutil.pid_exists(int((tmp_path / "child").read_text()))


def test_a_training_that_ends_before_the_kill_is_an_error(tmp_path):
    with pytest.raises(UserError, match="status 3"):
        train_killed([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, kill_step=6)


def test_events_of_a_killed_run_are_read_without_the_line_that_was_cut(tmp_path):
    events = tmp_path / "run.jsonl"
    assert step_losses(tmp_path) == []
    lines = [{"event": "start"}, {"event": "step", "step": 1, "loss": 0.1 + 0.2}, {"event": "save", "step": 1}]
    events.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "st')
    assert step_losses(tmp_path) == [(1, 0.1 + 0.2)]


def test_only_finished_checkpoints_count(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for name in ("step-00000004", "step-00000012", "step-00000020"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for name in ("step-00000004", "step-00000012"):
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.name == "step-00000012"


def test_a_loss_that_moves_in_its_last_bit_is_not_equal():
    losses = [(1, 3.0), (2, 2.0), (3, 1.0), (2, 2.0), (3, 1.0000000000000002), (4, 0.5)]
    replay = compare_replay(losses)
    assert (replay.steps, replay.equal) == (2, 1)
