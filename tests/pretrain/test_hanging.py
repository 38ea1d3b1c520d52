"""A rank that hangs in a training step, before the first one or between two phases, or that never comes, ends the whole
run in its time, and says where each rank was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallel.engine import Engine
from parallel.process import World
from parallel.watchdog import EXIT_HUNG
from pretrain import loop
from pretrain.phases import load_phases
from tests.distributed_helper import run_ranks
from tests.training_cases import events, make_data, write_recipe, write_synthetic_recipe

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


BESIDE_STEPS = """
import os, sys, time
from pretrain import loop

def asleep():
    time.sleep(600)

def hanging(*arguments, call=loop.{name}, calls=[], **options):
    calls.append(1)
    if len(calls) == {call} and os.environ["RANK"] == "1":
        asleep()
    return call(*arguments, **options)

loop.{name} = hanging
from pretrain.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
PHASES = "[{name: one}, {name: two}]"


@pytest.mark.parametrize(
    ("name", "call", "seconds", "doing"),
    [
        # Enough for a start on a busy machine, and for the first engine.
        ("choose_checkpoint", 1, 20, "what is checked before the start"),
        pytest.param(
            "build_engine", 2, 60, "what stands behind the steps of phase one (1 of 2)", marks=pytest.mark.slow
        ),
    ],
)
def test_what_hangs_beside_the_steps_ends_the_run(
    tmp_path: Path, name: str, call: int, seconds: int, doing: str
) -> None:
    data = make_data(tmp_path / "data", number=120, words=40)
    sections = {
        "parallel": {"startup_timeout_seconds": seconds},
        "schedule": {"kind": "constant", "warmup_tokens": 0},
    }
    recipe = write_recipe(data, tmp_path / "run", steps=1, **sections)
    program = BESIDE_STEPS.format(name=name, call=call)
    finished = run_ranks(["-c", program, str(recipe), "--phases", PHASES], ranks=2, check=False)
    assert finished.codes == [EXIT_HUNG, EXIT_HUNG], finished.report()
    field = "parallel.startup_timeout_seconds"
    for rank, error in enumerate(finished.errors):
        assert f"rank {rank} of 2 hangs: {doing} is not done after {seconds} s ({field})" in error
        assert ("in asleep" in error) == (rank == 1) and "in _train_alone" in error


def test_what_stands_between_phases_has_a_last_resort_too(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a thread that hangs there and holds the interpreter's lock; a process has one, which watchdogs share."""
    armed, found, build = [False], [], loop.build_engine

    def building(*arguments: Any, **options: Any) -> Engine:
        found.append(armed[0])
        return build(*arguments, **options)

    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *_, **__: armed.__setitem__(0, True))
    monkeypatch.setattr("faulthandler.cancel_dump_traceback_later", lambda: armed.__setitem__(0, False))
    monkeypatch.setattr(loop, "build_engine", building)
    sections = {"schedule": {"kind": "constant", "warmup_tokens": 0}, "evaluation": {"every_tokens": None}}
    recipe = write_synthetic_recipe(tmp_path / "run", steps=1, **sections)
    loop.train(load_phases(recipe, [("phases", PHASES)]), world)
    assert found == [True, True]
    assert armed == [False], "and none is left behind the end"


ABSENT = """
import os, sys
if os.environ["RANK"] == "1":
    sys.exit(0)
from pretrain.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_rank_that_never_comes_is_missed(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", number=120, words=40)
    recipe = write_recipe(data, tmp_path / "run", parallel={"startup_timeout_seconds": 2})
    finished = run_ranks(["-c", ABSENT, str(recipe)], ranks=2, timeout=120, check=False)
    assert finished.codes == [EXIT_HUNG, 0], finished.report()
    expected = "rank 0 of 2 hangs: joining the other ranks is not done after 2 s (parallel.startup_timeout_seconds)"
    assert expected in finished.errors[0] and "init_process_group" in finished.errors[0]
