"""Runs on every rank: trains recipes one after another, each in attempts of which all but the last end by SIGKILL.

Every attempt is a process of its own, forked from this one, so that the slow imports happen once. Arguments: a JSON
list of `[recipe, [attempts]]`, an attempt being the moment of its death, `[function, phase, call]` (the call-th call of
a function of `MOMENTS` while that phase is run), or null for one that is to end by itself; and a port for each.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from parallel.deepspeed_import import import_deepspeed
from parallel.mesh import Mesh
from parallel.process import exit_now, initialize, shutdown
from pretrain import loop
from pretrain.checkpoints import Checkpoints
from pretrain.phases import load_phases

MOMENTS: dict[str, tuple[Any, str]] = {
    "step": (loop.Run, "record"),  # between a step and what is written about it
    "beginning": (loop, "restore"),  # between two phases
    "publish": (Checkpoints, "_publish"),  # rank 0: the checkpoint's files are there, its name is not
}


def die_at(function: str, phase: str, call: int) -> None:
    """Make this process kill itself at a moment."""
    running, calls = [""], [0]
    run_phase = loop.run_phase

    def noting(phases: Any, entered: Any, *arguments: Any) -> Any:
        running[0], calls[0] = entered.name, 0
        return run_phase(phases, entered, *arguments)

    owner, name = MOMENTS[function]
    original: Callable[..., Any] = getattr(owner, name)

    def deadly(*arguments: Any, **options: Any) -> Any:
        calls[0] += running[0] == phase
        if calls[0] == call and running[0] == phase:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    loop.run_phase = noting
    setattr(owner, name, deadly)


def attempt(recipe: str, death: tuple[str, str, int] | None, port: int) -> int:
    """One attempt in a process of its own; its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    if "MASTER_PORT" in os.environ:
        os.environ["MASTER_PORT"] = str(port)
    world = initialize("cpu")
    if death is not None:
        die_at(*death)
    made, build = [], Mesh.build
    Mesh.build = lambda world, layout: made.append(layout) or build(world, layout)
    loop.train(load_phases(recipe), world)
    assert len(made) == len(set(made)), "process groups stay: phases of a layout share a mesh"
    shutdown()
    exit_now(0)


def main(recipes: list[tuple[str, list[Any]]], ports: list[int]) -> None:
    """Train all; AssertionError for an attempt that ended otherwise."""
    torch.set_num_threads(1)
    import_deepspeed(torch.device("cpu"))
    for name in ("torch._dynamo", "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.superoffload"):
        importlib.import_module(name)  # what every attempt would import
    for recipe, attempts in recipes:
        for death in attempts:
            status = attempt(recipe, death, ports.pop(0))
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            # Where rank 0 alone dies, the others meet the end of their connection to it.
            followed = death is not None and death[0] == "publish" and os.environ.get("RANK", "0") != "0"
            assert status == 0 if death is None else killed or (followed and status != 0), (recipe, death, status)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
    exit_now(0)
