"""A signal to one rank stops all of them behind the same step with a checkpoint, whatever they are doing, and what is
started again ends as a run that nobody stopped, bit for bit.
"""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any, NoReturn

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from parallel.host_copies import TensorFile
from parallel.process import World
from pretrain.checkpoints import SaveError
from pretrain.errors import MachineError
from pretrain.loop import train
from pretrain.phases import load_phases
from pretrain.preemption import STOP_SIGNALS, Preempted, StopRequests, listen
from pretrain.saver import Saver
from pretrain.steps import Run
from tests.distributed_helper import Finished, run_ranks
from tests.training_cases import events, losses, weights_and_optimizer, write_synthetic_recipe

WORKER = "tests/pretrain/preemption_worker.py"
USR1, TERM = int(signal.SIGUSR1), int(signal.SIGTERM)
ATTEMPTS = {  # what a rank does when signals reach it (which time, rank, signals); where all stop
    "start-up": ([["start", 1, 1, [USR1]]], 0, "SIGUSR1"),
    "a step, and the save that follows": ([["step", 3, 1, [TERM]], ["save", 1, 0, [TERM, TERM]]], 3, "SIGTERM"),
    "a save that was due": ([["save", 1, 0, [USR1]]], 4, "SIGUSR1"),
    "an evaluation": ([["evaluation", 1, 0, [TERM]]], 8, "SIGTERM"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """What the worker left: the folder of its runs, and what its ranks printed."""
    folder = tmp_path_factory.mktemp("runs")
    # Saves that steps wait for, so that the step at which one is under way is known.
    every = {"every_tokens": 512, "keep": 2, "asynchronous": False}
    recipes = [str(write_synthetic_recipe(folder / name, checkpoint=every)) for name in ("whole", "run")]
    plans = [*(plan for plan, _, _ in ATTEMPTS.values()), []]
    broken = write_synthetic_recipe(folder / "broken", steps=400, checkpoint={"every_tokens": 128 * 8})
    return folder, run_ranks([WORKER, *recipes, json.dumps(plans), str(broken)], ranks=2)


def test_preempted_runs_end_as_one_that_was_not(runs: tuple[Path, Finished]) -> None:
    place, finished = runs
    whole, folder = place / "whole", place / "run"
    names = [name for _, _, name in ATTEMPTS.values()]
    for output in finished.outputs:  # every rank ends each of these attempts, and for the same reason
        assert [line for line in output.splitlines() if line in names] == names
    saved = {step: str(folder / "checkpoints" / f"step-{step:08d}") for step in (3, 4, 8)} | {0: None}
    expected = [(step, name, saved[step]) for _, step, name in ATTEMPTS.values()]
    assert [(e["step"], e["signal"], e["checkpoint"]) for e in events(folder, "preempt")] == expected
    assert [event["step"] for event in events(folder, "resume")] == [3, 4, 8]
    assert [event["step"] for event in events(folder, "save")] == [3, 4, 8, 12, 14]
    assert [event["step"] for event in events(folder, "step")] == list(range(1, 15))  # none twice
    assert losses(folder) == losses(whole) and len(losses(whole)) == 14
    assert [e["loss"] for e in events(folder, "eval")] == [e["loss"] for e in events(whole, "eval")]
    assert not events(folder, "error")
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [(e.step, e.value) for e in board.Scalars("run/restarts")] == [(0, 0), (0, 1), (3, 2), (4, 3), (8, 4)]


def test_a_mistake_in_one_ranks_saving_ends_the_run_at_the_next_step(runs: tuple[Path, Finished]) -> None:
    """And both ranks know it: the one whose thread waits for the lost one would do so for half an hour."""
    place, finished = runs
    told, own = (output.split("broken: ")[1] for output in finished.outputs)
    assert own == "ZeroDivisionError a mistake in what writes\n"
    assert told.startswith(
        "SavingThreadError the thread that writes the checkpoint of step 8 failed:\nrank 1: Traceback"
    )
    assert told.endswith("ZeroDivisionError: a mistake in what writes\n\n")
    assert 8 <= max(losses(place / "broken")) < 16, "before the next save, which would wait for it"
    assert not events(place / "broken", "save")
    assert events(place / "broken")[-1]["type"] == "SavingThreadError", "rank 0, which writes the log, tells it"


@pytest.mark.parametrize(("failing", "held"), [((2,), 4), ((2, 3), 4), ((1, 2), None)])
def test_a_stop_whose_save_fails_goes_on_from_the_one_before(
    failing: tuple[int, ...], held: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    """The save that is under way, the stop's own, or both; without any checkpoint it is an error of the machine."""
    write, asks, writes = TensorFile.write, iter(range(100)), iter(range(1, 100))
    stop_at = 8 if failing == (2, 3) else 6

    def on_a_full_disk(file: TensorFile, folder: Path) -> Path:
        if file.name.startswith("state") and next(writes) in failing:
            raise OSError(28, "No space left on device", str(folder / file.name))
        return write(file, folder)

    monkeypatch.setattr(TensorFile, "write", on_a_full_disk)
    monkeypatch.setattr(StopRequests, "agreed", lambda _: signal.SIGUSR1 if next(asks) == stop_at else None)
    every = {"every_tokens": 512, "max_failed_saves": 2}
    phases = load_phases(write_synthetic_recipe(tmp_path / "run", checkpoint=every))
    with pytest.raises(SaveError if held is None else Preempted) as end:
        train(phases, world)
    stops = [(event["step"], event["checkpoint"]) for event in events(tmp_path / "run", "preempt")]
    if held is None:
        assert isinstance(end.value, MachineError) and stops == []
    else:
        assert stops == [(stop_at, str(tmp_path / "run" / "checkpoints" / f"step-{held:08d}"))]


@pytest.mark.parametrize(("stop_at", "saved"), [(5, [4]), (6, [4, 5])])
def test_a_stop_beside_a_save_waits_for_it_and_goes_on_bit_for_bit(
    stop_at: int, saved: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    """The save of step 4 is under way when the request comes, right behind it or a step later."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    recipes = [write_synthetic_recipe(run, steps=8, evaluation={"every_tokens": None}) for run in (whole, folder)]
    train(load_phases(recipes[0]), world)
    write, finish, preempt = TensorFile.write, Saver.finish, Run.preempt
    asked, may_end = iter(range(1, 100)), threading.Event()

    def held(file: TensorFile, where: Path) -> Path:
        assert may_end.wait(60), "nobody waits for it"
        return write(file, where)

    def finishing(saver: Saver, **options: bool) -> None:
        assert list((folder / "checkpoints").glob("step-*")) == [] or may_end.is_set(), "it is under way"
        threading.Timer(0.2, may_end.set).start()
        finish(saver, **options)

    def stopping(run: Run, *given: Any) -> NoReturn:
        patches.setattr(Saver, "finish", finishing)
        preempt(run, *given)

    with monkeypatch.context() as patches, pytest.raises(Preempted):
        patches.setattr(TensorFile, "write", held)
        patches.setattr(Run, "preempt", stopping)
        patches.setattr(StopRequests, "agreed", lambda _: signal.SIGUSR1 if next(asked) == stop_at else None)
        train(load_phases(recipes[1]), world)
    (stop,) = events(folder, "preempt")
    assert stop["checkpoint"] == str(folder / "checkpoints" / f"step-{stop_at - 1:08d}")
    assert [event["step"] for event in events(folder, "save")] == saved
    train(load_phases(recipes[1]), world)
    assert [event["step"] for event in events(folder, "resume")] == [stop_at - 1]
    assert losses(folder) == losses(whole) and len(losses(whole)) == 8
    assert weights_and_optimizer(folder, 8) == weights_and_optimizer(whole, 8)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_process_alone_asks_nobody(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.preemption._noted", [])
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        signal.raise_signal(number)  # held back, as by a launcher while the process starts
        requests = StopRequests(World(0, 1, 0, None), timeout_minutes=1)
        assert requests.agreed() is None
        listen()
        assert requests.agreed() is number
        signal.raise_signal(number)
        assert requests.agreed() is number
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
