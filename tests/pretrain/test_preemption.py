"""A signal to one rank stops all of them behind the same step with a checkpoint, whatever they are doing, and what is
started again ends as a run that nobody stopped, bit for bit.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from parallel import process
from parallel.host_copies import TensorFile
from parallel.process import World
from pretrain.checkpoints import SaveError
from pretrain.errors import MachineError
from pretrain.loop import train
from pretrain.phases import load_phases
from pretrain.preemption import STOP_SIGNALS, Preempted, StopRequests, listen
from tests.distributed_helper import run_ranks
from tests.training_cases import events, losses, write_synthetic_recipe

WORKER = "tests/pretrain/preemption_worker.py"
USR1, TERM = int(signal.SIGUSR1), int(signal.SIGTERM)
ATTEMPTS = {  # what a rank does when signals reach it (which time, rank, signals); where all stop
    "start-up": ([["start", 1, 1, [USR1]]], 0, "SIGUSR1"),
    "a step, and the save that follows": ([["step", 3, 1, [TERM]], ["save", 1, 0, [TERM, TERM]]], 3, "SIGTERM"),
    "a save that was due": ([["save", 1, 0, [USR1]]], 4, "SIGUSR1"),
    "an evaluation": ([["evaluation", 1, 0, [TERM]]], 8, "SIGTERM"),
}


def test_preempted_runs_end_as_one_that_was_not(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    # Saves that steps wait for, so that the step at which one is under way is known.
    every = {"every_tokens": 512, "keep": 2, "asynchronous": False}
    recipes = [str(write_synthetic_recipe(run, checkpoint=every)) for run in (whole, folder)]
    plans = [*(plan for plan, _, _ in ATTEMPTS.values()), []]
    finished = run_ranks([WORKER, *recipes, json.dumps(plans)], ranks=2)
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


@pytest.mark.parametrize(("failing", "held"), [((2,), 4), ((2, 3), 4), ((1, 2), None)])
def test_a_stop_whose_save_fails_goes_on_from_the_one_before(
    failing: tuple[int, ...], held: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    try:
        with pytest.raises(SaveError if held is None else Preempted) as end:
            train(phases, process.initialize("cpu"))
    finally:
        process.shutdown()
    stops = [(event["step"], event["checkpoint"]) for event in events(tmp_path / "run", "preempt")]
    if held is None:
        assert isinstance(end.value, MachineError) and stops == []
    else:
        assert stops == [(stop_at, str(tmp_path / "run" / "checkpoints" / f"step-{held:08d}"))]


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
