"""Runs on every rank of test_engine_scoring.py: scores rows in pieces under several layouts, ranks having different
rows, and writes what it saw.

Arguments: OUTPUT.json TRIAL..., as segment_worker.py takes them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from parallel.process import World, initialize
from parallel.scoring import IGNORED
from tests.model_cases import random_tokens
from tests.parallel.segment_worker import Rows, Trial, build
from tests.worker_results import hand_over

LENGTHS = {0: [40, 17], 1: [40, 70, 9, 33]}
"""The rows that each of two ranks scores; one is through before the other."""
PIECE, WINDOW = 12, 16


def rows_of(rank: int) -> list[Rows]:
    """A rank's batches of two rows."""
    found = []
    for number, length in enumerate(LENGTHS[rank]):
        drawn = random_tokens(2, length + 1, seed=10 * rank + number)
        targets = drawn[:, 1:].clone()
        targets[0, : number + 2] = IGNORED
        found.append(Rows(drawn[:, :-1], targets))
    return found


def run(trial: Trial, world: World, folder: Path) -> dict[str, object]:
    engine = build(trial, world, folder)
    window = None if trial.case == "transformer" else WINDOW
    own = rows_of(world.rank)
    scored = engine.evaluate(own, with_correct=True, piece=PIECE, by_position=True, reset_window=window)
    whole = engine.evaluate(own, with_correct=True)
    plain = engine.evaluate(own, piece=PIECE)
    engine.destroy()
    return {
        "scored": [scored.nats, scored.tokens, scored.correct],
        "whole": [whole.nats, whole.tokens, whole.correct],
        "plain": [plain.nats, plain.tokens],
        "positions": [bucket.fields() for bucket in scored.positions or []],
    }


def main(output: str, trials: list[str]) -> None:
    world = initialize("cpu")
    torch.set_num_threads(1)
    seen = {text: run(Trial.parse(text), world, Path(output).parent) for text in trials}
    hand_over(world, output, seen)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
