"""The demo's training: started, killed half-way with everything it started, resumed, and its losses compared."""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pretrain.checkpoints import CHECKPOINTS_FOLDER, MANIFEST, checkpoint_step, list_checkpoints
from pretrain.errors import UserError
from pretrain.metrics import read_events

POLL_SECONDS = 0.1
GONE_SECONDS = 10


@dataclass(frozen=True)
class Kill:
    """What the kill hit: processes ended, the last step done, and the checkpoint to resume from."""

    processes: int
    step: int
    checkpoint_step: int


@dataclass(frozen=True)
class Replay:
    """Steps that ran twice, before the kill and after the resume, and how many of them gave bitwise the same loss."""

    steps: int
    equal: int


def train_killed(command: Sequence[str], run_folder: Path, kill_step: int) -> Kill:
    """Run `command` until its run.jsonl shows `kill_step` and a checkpoint is there, then SIGKILL it with all that it
    started. Raises UserError when the training ends before."""
    launcher = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        while launcher.poll() is None:
            losses = step_losses(run_folder)
            newest = newest_checkpoint(run_folder)
            saved = checkpoint_step(newest) if newest else None
            if saved is not None and losses and losses[-1][0] >= max(kill_step, saved + 1):
                return Kill(kill_tree(launcher), step_losses(run_folder)[-1][0], saved)
            time.sleep(POLL_SECONDS)
    finally:
        kill_tree(launcher)
    raise UserError(f"training ended with status {launcher.returncode} before it could be killed at step {kill_step}")


def kill_tree(launcher: "subprocess.Popen[bytes]") -> int:
    """SIGKILL a process and all below it, at once, and wait until all are gone; returns how many there were."""
    if launcher.poll() is not None:
        return 0
    parent = psutil.Process(launcher.pid)
    tree = [parent, *parent.children(recursive=True)]
    for process in tree:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue  # the launcher's guard was quicker
    _, alive = psutil.wait_procs(tree, timeout=GONE_SECONDS)
    launcher.wait()
    if alive:
        pids = ", ".join(str(process.pid) for process in alive)
        raise UserError(f"processes {pids} are still there {GONE_SECONDS} s after SIGKILL")
    return len(tree)


def step_losses(run_folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every step event in the order written. Raises UserError for events that cannot be read."""
    return [(event["step"], event["loss"]) for event in read_events(run_folder) if event["event"] == "step"]


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end: its manifest is written last."""
    checkpoints = list_checkpoints(run_folder / CHECKPOINTS_FOLDER)
    return next((path for path in checkpoints if (path / MANIFEST).is_file()), None)


def compare_replay(losses: Sequence[tuple[int, float]]) -> Replay:
    """Compare the losses of the steps that occur twice in a run's events; the second time is after a resume."""
    first: dict[int, float] = {}
    equal = []
    for step, loss in losses:
        if step in first:
            equal.append(first[step] == loss)
        first[step] = loss
    return Replay(len(equal), sum(equal))


def launch_command(recipe: Path, nproc: int, overrides: Sequence[str]) -> list[str]:
    """`python -m launch local` on this machine, for a recipe and overrides."""
    return [sys.executable, "-m", "launch", "local", "--nproc", str(nproc), str(recipe), *overrides]
