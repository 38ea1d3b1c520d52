"""Runs on every rank: walks and saves beside its steps, while strace makes system calls of one rank fail, or kills it.

Arguments: FOLDER STEPS [RANK LOG STRACE_OPTION...]: so many steps, a save behind each, from the newest checkpoint below
FOLDER on, where a rank has strace with such options, which writes to LOG. Each rank leaves FOLDER/ended-RANK.json: the
step that it began from, how many saves failed, and the sum of the numbers that it walked to. A rank that nothing may
look at leaves `untraced` there and ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from parallel.process import World, barrier, exit_now, gather_objects, initialize, shutdown, side_group
from pretrain.checkpoint_config import CheckpointConfig
from pretrain.checkpoints import Checkpoints
from pretrain.errors import outlive_full_disks
from pretrain.fence import take_fence
from pretrain.resume import TrainerState
from pretrain.saver import Saver
from tests.checkpoint_cases import NoWatchdog
from tests.checkpoint_walk import Silent, Walk


def attach(log: str, options: list[str]) -> subprocess.Popen[str] | None:
    """strace on this process, its threads too; None where that is not allowed."""
    command = ["strace", "-f", "-o", log, "-e", "trace=write,fsync,rename,renameat,renameat2", *options]
    strace = subprocess.Popen([*command, "-p", str(os.getpid())], stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    return strace if "attached" in strace.stderr.readline() else None


def walk(folder: Path, world: World, steps: int, traced: list[str]) -> dict[str, object]:
    config, log, walked = CheckpointConfig(keep=2, max_failed_saves=99), Silent(), Walk(world.rank)
    fence = take_fence(folder, world)
    checkpoints = Checkpoints(folder / "checkpoints", config.keep, world, fence, side_group(5))
    found: list[str] = []
    if (newest := checkpoints.newest_whole(found.append)) is not None:
        walked.load(newest)
    assert not found, found
    begun = walked.number
    is_traced = bool(traced) and int(traced[0]) == world.rank
    strace = attach(traced[1], traced[2:]) if is_traced else None
    if any(gather_objects(is_traced and strace is None)):
        return {"untraced": True}
    with Saver(checkpoints, config, log, NoWatchdog(), last_tokens=0) as saver:
        for _ in range(steps):
            walked.step()
            saver.look()
            state = TrainerState(step=walked.number, tokens=walked.number, tokenizer_sha256=None, ranks=world.size)
            saver.save(state, walked.files, stays=False, wait=False)
        saver.finish()
    if strace is not None:  # what is left below is no save
        strace.terminate()
        strace.wait()
    return {"begun": begun, "failures": log.failures, "sum": float(walked.weights.double().sum())}


def main(folder: Path, steps: int, traced: list[str]) -> None:
    outlive_full_disks()
    torch.set_num_threads(1)
    world = initialize("cpu")
    folder.mkdir(exist_ok=True)
    ended = walk(folder, world, steps, traced)
    barrier()  # a rank that strace looks at still saves as the others do
    (folder / f"ended-{world.rank}.json").write_text(json.dumps(ended))
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
