"""Runs on every rank: trains the recipes named on the command line one after another, in these processes."""

from __future__ import annotations

import sys

import torch

from parallel.process import exit_now, initialize, shutdown
from pretrain.loop import train
from pretrain.phases import load_phases


def main(recipes: list[str]) -> None:
    torch.set_num_threads(1)
    world = initialize("cpu")
    for path in recipes:
        train(load_phases(path), world)
    shutdown()
    exit_now(0)


if __name__ == "__main__":
    main(sys.argv[1:])
