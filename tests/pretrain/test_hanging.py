"""A training step that hangs on one rank ends the whole run in its time, and says where each rank was."""

from __future__ import annotations

from pathlib import Path

from parallel.watchdog import EXIT_HUNG
from tests.distributed_helper import run_ranks
from tests.training_cases import events, make_data, write_recipe

SECONDS = 8
TRAIN = """
import os, sys, time
from parallel.engine import Engine

def hanging_step(self, *arguments, step=Engine.train_step, **options):
    self.taken = getattr(self, "taken", 0) + 1
    if self.taken == 3 and os.environ["RANK"] == "1":
        time.sleep(600)
    return step(self, *arguments, **options)

Engine.train_step = hanging_step
from pretrain.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_hanging_step_ends_the_run(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", number=120, words=40)
    recipe = write_recipe(data, tmp_path / "run", parallel={"step_timeout_seconds": SECONDS})
    finished = run_ranks(["-c", TRAIN, str(recipe)], ranks=2, timeout=120, check=False)
    assert finished.codes == [EXIT_HUNG, EXIT_HUNG], finished.report()
    for rank, error in enumerate(finished.errors):
        assert f"rank {rank} of 2 hangs: step 3 is not done after {SECONDS} s" in error
        assert ("in hanging_step" in error) and ("all_reduce" in error) == (rank == 0)
    assert [event["step"] for event in events(tmp_path / "run", "step")] == [1, 2]
