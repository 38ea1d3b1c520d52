"""Runs on every rank: a run that nobody stops, then the same run in another folder through the attempts of a plan, each
of which sends signals to a rank from inside what it does. Processes are started once for all attempts.

Usage: preemption_worker.py WHOLE.yaml STOPPED.yaml PLAN BROKEN.yaml, PLAN being JSON: for each attempt a list of [what
the rank does, which time, rank, signals]. The last run's save meets a mistake of the program on rank 1 alone; its end
is printed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pretrain.loop
import pretrain.steps
from parallel.engine import Engine
from parallel.host_copies import TensorFile
from parallel.process import exit_now, initialize
from pretrain import preemption
from pretrain.checkpoints import Checkpoints
from pretrain.loop import train
from pretrain.phases import load_phases
from pretrain.saver import SavingThreadError

rank, plan, times = int(os.environ["RANK"]), [], {}


def signalling(name: str, function: Callable) -> Callable:
    """The function, before which this rank sends itself what the plan says."""

    def call(*arguments: Any, **options: Any) -> Any:
        times[name] = times.get(name, 0) + 1
        for what, which, who, numbers in plan:
            if (what, which, who) == (name, times[name], rank):
                for number in numbers:
                    os.kill(os.getpid(), number)
        return function(*arguments, **options)

    return call


def mistaken(file: TensorFile, folder: Path, write: Callable = TensorFile.write) -> Path:
    if rank == 1 and folder.name.startswith(".partial-step-00000008"):
        raise ZeroDivisionError("a mistake in what writes")
    return write(file, folder)


def main(whole: str, stopped: str, attempts: str, broken: str) -> None:
    torch.set_num_threads(1)
    world = initialize("cpu")
    preemption.listen()
    train(load_phases(whole), world)
    pretrain.loop.build_engine = signalling("start", pretrain.loop.build_engine)
    pretrain.steps.evaluate = signalling("evaluation", pretrain.steps.evaluate)
    Checkpoints.write = signalling("save", Checkpoints.write)
    Engine.train_step = signalling("step", Engine.train_step)
    for plan[:] in json.loads(attempts):
        times.clear()
        preemption._noted.clear()
        try:
            train(load_phases(stopped), world)
        except preemption.Preempted as end:
            print(end, flush=True)
    TensorFile.write = mistaken
    try:
        train(load_phases(broken), world)
    except (SavingThreadError, ZeroDivisionError) as error:
        print("broken:", type(error).__name__, str(error), flush=True)
    exit_now(0)  # the ranks' threads are out of step: no shutdown


if __name__ == "__main__":
    main(*sys.argv[1:])
