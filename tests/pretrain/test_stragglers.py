"""A rank that is slower than the others is named; other work, and waiting for others, is not mistaken for it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.stragglers import Work, slowness
from tests.distributed_helper import run_ranks
from tests.training_cases import events, write_recipe

SLOW, RANKS, STEPS = 1, 4, 8
TRAIN = """
import os, sys, time
from parallel.engine import Engine

def slowed_step(self, *arguments, step=Engine.train_step, **options):
    began = time.thread_time()
    result = step(self, *arguments, **options)
    taken = time.thread_time() - began
    while os.environ["RANK"] == "{slow}" and time.thread_time() - began < 3 * taken:
        pass
    return result

Engine.train_step = slowed_step
from pretrain.__main__ import main
from parallel.process import exit_now
exit_now(main(sys.argv[1:]))
"""


def test_a_slowed_rank_is_named_with_its_host(data: Path, tmp_path: Path) -> None:
    guards = ("--guards.straggler_records", "3", "--logging.every_steps", "2", "--training.micro_batch_size", "1")
    recipe = write_recipe(data, tmp_path / "run", steps=STEPS)
    program = TRAIN.format(slow=SLOW)
    run_ranks(["-c", program, str(recipe), *guards], ranks=RANKS, timeout=300)
    (event,) = events(tmp_path / "run", "straggler")
    assert (event["rank"], event["host"], event["records"]) == (SLOW, socket.gethostname(), 3)
    assert event["step"] == 6, "the third record; the fourth tells nothing new"
    assert 1.8 < event["ratio"] < 6 and event["compute_seconds"] < event["step_seconds"]
    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    curve = {point.step: point.value for point in reader.Scalars("speed/slowest_rank_ratio")}
    assert list(curve) == [2, 4, 6, 8] and curve[6] == pytest.approx(event["ratio"])


def work(compute: float, data: float = 0.0, stage: int = 0) -> Work:
    return Work("host", stage, compute, data, 2.0)


def test_a_rank_is_compared_with_the_median_of_those_that_have_its_work() -> None:
    assert slowness([work(1.0), work(1.0), work(2.5), work(1.0)]) == [1, 1, 2.5, 1]
    assert slowness([work(1.0), work(3.0)]) == [1, 3], "of two, with the faster one"
    stages = [work(1.0), work(4.0, stage=1), work(1.1), work(8.0, stage=1)]
    assert slowness(stages) == pytest.approx([1, 1, 1.1, 2]), "stages of a pipeline have other work"


def test_waiting_for_data_counts_by_its_share_of_a_step() -> None:
    assert slowness([work(1.0, 0.1), work(1.0, 1.1), work(1.0, 0.1)]) == pytest.approx([1, 1.5, 1])
    assert slowness([work(1.0, 1e-9), work(1.0, 1e-6)]) == pytest.approx([1, 1], rel=1e-5), "next to nothing is none"
    assert slowness([work(0.0), work(0.0)]) == [1, 1]
