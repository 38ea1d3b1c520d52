"""Checkpoints written beside the steps: the same bytes as between them, none dropped, failures told and survived."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from parallel.engine import Engine
from parallel.host_copies import HostCopies, SavedFile, TensorFile
from parallel.process import World
from pretrain.checkpoint_config import CheckpointConfig
from pretrain.checkpoints import Checkpoints, SaveError, problems
from pretrain.loop import train
from pretrain.metrics import RunLog
from pretrain.phases import load_phases
from pretrain.resume import TrainerState
from pretrain.saver import Saver
from tests.checkpoint_cases import NoWatchdog
from tests.training_cases import events, losses, write_recipe

SECONDS = 30.0
"""After which what is waited for will not come any more."""


pytestmark = pytest.mark.usefixtures("world")


class Told(RunLog):
    """A log that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.curves: list[tuple[int, dict[str, Any]]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"event": kind, **fields})

    def scalars(self, step: int, values: Any) -> None:
        self.curves.append((step, dict(values)))


@pytest.fixture
def told() -> Told:
    return Told()


MakeSaver = Callable[..., Saver]


@pytest.fixture
def make_saver(tmp_path: Path, world: World, told: Told) -> MakeSaver:
    def make(*, last_tokens: int = 0, **fields: Any) -> Saver:
        config = CheckpointConfig(**fields)
        checkpoints = Checkpoints(tmp_path, config.keep, world, staging=config.staging)
        return Saver(checkpoints, config, told, NoWatchdog(), last_tokens=last_tokens)

    return make


def state_at(step: int) -> TrainerState:
    return TrainerState(step=step, tokens=100 * step, tokenizer_sha256=None, ranks=1)


def files_of(tensor: torch.Tensor) -> Callable[[HostCopies | None], Sequence[SavedFile]]:
    def files(copies: HostCopies | None) -> Sequence[SavedFile]:
        return [TensorFile("weights", {"w": tensor if copies is None else copies.copy("w", tensor)})]

    return files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


class Gate:
    """Holds back what is written to `weights` until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str = "weights") -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        write = TensorFile.write

        def held(file: TensorFile, folder: Path) -> Path:
            if file.name.startswith(name):
                self.reached.set()
                assert self.opened.wait(SECONDS), "what writes was waited for"
            return write(file, folder)

        monkeypatch.setattr(TensorFile, "write", held)


def fail_writes(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """The writes of these numbers, from 1, of the file of weights meet a full disk."""
    write, calls = TensorFile.write, iter(range(1, 10**6))

    def failing(file: TensorFile, folder: Path) -> Path:
        if file.name.startswith(("weights", "state")) and next(calls) in numbers:
            raise OSError(28, "No space left on device", str(folder / file.name))
        return write(file, folder)

    monkeypatch.setattr(TensorFile, "write", failing)


def test_steps_go_on_and_the_values_are_those_of_the_step(
    make_saver: MakeSaver, told: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    weights, gate = torch.arange(1000.0), Gate(monkeypatch)
    with make_saver() as saver:
        saver.save(state_at(1), files_of(weights), stays=False, wait=False)
        weights.zero_()  # a step
        saver.look()
        assert gate.reached.wait(SECONDS) and told.events == [] and names(tmp_path) == []
        gate.opened.set()
    assert torch.equal(load(tmp_path / "step-00000001"), torch.arange(1000.0))
    (save,) = told.events
    assert (save["event"], save["step"], save["tokens"]) == ("save", 1, 100)
    assert save["checkpoint"] == str(tmp_path / "step-00000001")
    assert 0 < save["stall_seconds"] and 0 < save["write_seconds"]
    ((step, curves),) = told.curves
    assert step == 1 and curves.pop("checkpoint/failed_saves") == 0
    assert curves == {f"checkpoint/{name}": save[name] for name in ("stall_seconds", "write_seconds")}


def load(checkpoint: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    assert problems(checkpoint) == []
    return load_file(checkpoint / "weights")["w"]


def test_a_save_that_is_due_while_one_is_written_waits_for_it(
    make_saver: MakeSaver, told: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gate = Gate(monkeypatch)
    with make_saver() as saver:
        saver.save(state_at(1), files_of(torch.ones(9)), stays=False, wait=False)
        assert gate.reached.wait(SECONDS)
        timer = threading.Timer(0.3, gate.opened.set)
        timer.start()
        saver.save(state_at(2), files_of(torch.full((9,), 2.0)), stays=False, wait=False)
        timer.join()
        assert [event["step"] for event in told.events] == [1]
        assert told.events[0]["stall_seconds"] >= 0.25, "it was waited for"
    assert [load(tmp_path / name)[0] for name in names(tmp_path)] == [1, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="a thread's priority is its own on Linux alone")
def test_what_writes_gives_way_and_nothing_else_does(make_saver: MakeSaver, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, write, before = [], TensorFile.write, os.getpriority(os.PRIO_PROCESS, 0)

    def seeing(file: TensorFile, folder: Path) -> Path:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return write(file, folder)

    monkeypatch.setattr(TensorFile, "write", seeing)
    with make_saver() as saver:
        saver.save(state_at(1), files_of(torch.ones(9)), stays=False, wait=True)
    assert seen == [min(19, before + 5)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_buffers_are_used_again() -> None:
    copies = HostCopies()
    first = copies.copy("w", torch.ones(5))
    assert copies.copy("w", torch.zeros(5)) is first and first.sum() == 0
    assert copies.copy("w", torch.ones(6)).shape == (6,), "another shape, as where a phase shares otherwise"
    assert copies.copy("w", torch.ones(6, dtype=torch.int64)).dtype == torch.int64


def test_it_looks_without_waiting_and_tells_at_the_first_look_behind_the_end(make_saver: MakeSaver, told: Told) -> None:
    with make_saver() as saver:
        saver.save(state_at(1), files_of(torch.ones(9)), stays=False, wait=False)
        deadline = time.monotonic() + SECONDS
        while not told.events and time.monotonic() < deadline:
            saver.look()
        assert [event["step"] for event in told.events] == [1]
        saver.look()
        assert len(told.events) == 1


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failure_is_told_and_the_next_save_tries_again(
    make_saver: MakeSaver,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    asynchronous: bool,
) -> None:
    fail_writes(monkeypatch, 2, 3)
    with make_saver(asynchronous=asynchronous) as saver:
        for step in (1, 2, 3, 4):
            saver.save(state_at(step), files_of(torch.ones(9)), stays=False, wait=False)
    assert [(event["event"], event["step"]) for event in told.events] == [
        ("save", 1),
        ("save_failed", 2),
        ("save_failed", 3),
        ("save", 4),
    ]
    assert "no space left for" in told.events[1]["message"] and "(newest: step-00000001)" in told.events[1]["message"]
    assert [(step, values["checkpoint/failed_saves"]) for step, values in told.curves] == [
        (1, 0),
        (2, 1),
        (3, 2),
        (4, 2),
    ]
    assert names(tmp_path) == ["step-00000001", "step-00000004"] and not list(tmp_path.glob(".*"))
    said = capsys.readouterr().err
    assert "The run goes on" in said and "2 more that fail in a row end the run (checkpoint.max_failed_saves)" in said


def test_so_many_failures_in_a_row_end_the_run(make_saver: MakeSaver, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_writes(monkeypatch, 1, 3, 4)
    with (
        pytest.raises(SaveError, match=r"step 4: .*no space left .*; 2 in a row end the run \(checkpoint\.max_failed"),
        make_saver(max_failed_saves=2) as saver,
    ):
        for step in (1, 2, 3, 4):  # the second one, which is written, begins the count anew
            saver.save(state_at(step), files_of(torch.ones(9)), stays=False, wait=False)
        saver.finish()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_is_waited_for_must_not_fail(
    make_saver: MakeSaver, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    fail_writes(monkeypatch, 1)
    with pytest.raises(SaveError, match="no space left"), make_saver(asynchronous=asynchronous) as saver:
        saver.save(state_at(1), files_of(torch.ones(9)), stays=True, wait=True)


def test_a_save_that_fails_behind_the_last_step_is_an_error(
    make_saver: MakeSaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_writes(monkeypatch, 1)
    with pytest.raises(SaveError, match="no space left"), make_saver() as saver:
        saver.save(state_at(1), files_of(torch.ones(9)), stays=True, wait=False)


def test_an_error_that_ends_the_run_lets_the_save_under_way_end(
    make_saver: MakeSaver, told: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gate = Gate(monkeypatch)
    with pytest.raises(ZeroDivisionError), make_saver() as saver:
        saver.save(state_at(1), files_of(torch.ones(9)), stays=False, wait=False)
        assert gate.reached.wait(SECONDS)
        threading.Timer(0.1, gate.opened.set).start()
        raise ZeroDivisionError
    assert problems(tmp_path / "step-00000001") == []
    assert [event["event"] for event in told.events] == ["save"]


def test_an_error_stays_the_one_to_show_where_the_save_fails_too(
    make_saver: MakeSaver, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_writes(monkeypatch, 1)
    with pytest.raises(ZeroDivisionError) as caught, make_saver() as saver:
        saver.save(state_at(1), files_of(torch.ones(9)), stays=False, wait=False)
        raise ZeroDivisionError
    assert "no space left" in "".join(caught.value.__notes__)
    assert [event["event"] for event in told.events] == ["save_failed"]


def test_checkpoints_that_are_kept_for_good(
    make_saver: MakeSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved every 300 tokens, kept at the first at or behind each multiple of 1,000; step 12's could not be written."""
    fail_writes(monkeypatch, 4)
    with make_saver(keep=1, keep_every_tokens=1000) as saver:
        for step in range(3, 31, 3):
            saver.save(state_at(step), files_of(torch.ones(9)), stays=False, wait=False)
    assert names(tmp_path) == ["step-00000015", "step-00000021", "step-00000030"]


def test_a_resumed_run_knows_which_multiples_are_behind_it(make_saver: MakeSaver, tmp_path: Path) -> None:
    with make_saver(keep=1, keep_every_tokens=1000, last_tokens=1200) as saver:
        for step in (15, 18, 21, 24):
            saver.save(state_at(step), files_of(torch.ones(9)), stays=False, wait=False)
    assert names(tmp_path) == ["step-00000021", "step-00000024"]


def test_what_does_not_fit_is_not_begun(make_saver: MakeSaver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So the logs on the same disk go on."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=4 * 1000 - 1))
    monkeypatch.setattr(TensorFile, "write", lambda *_: pytest.fail("written all the same"))
    with (
        pytest.raises(SaveError, match=r"no space left for .*\(0\.0 MB free, 0\.0 MB are to be written\)"),
        make_saver() as s,
    ):
        s.save(state_at(1), files_of(torch.ones(1000)), stays=False, wait=True)
    assert not list(tmp_path.glob("*step*"))


def test_a_runs_checkpoints_are_byte_for_byte_those_of_one_that_waits(
    data: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of them is held back until two more steps have changed weights, moments and rows' states."""
    folder, kept = tmp_path / "run", tmp_path / "beside"
    recipe = write_recipe(data, folder, steps=8, checkpoint={"keep": 9})
    streams = ("data.order", "streams")
    gate, taken = Gate(monkeypatch, "state"), []
    step = Engine.train_step

    def counted(*arguments: Any, **options: Any) -> Any:
        taken.append(step(*arguments, **options))
        if len(taken) == 6:
            gate.opened.set()
        return taken[-1]

    monkeypatch.setattr(Engine, "train_step", counted)
    train(load_phases(recipe, [streams]), world)
    order = [(event["event"], event["step"]) for event in events(folder) if event["event"] in ("step", "save")]
    assert order.index(("save", 4)) > order.index(("step", 6)), "the steps did not wait"
    learned = losses(folder)
    folder.rename(kept)
    train(load_phases(recipe, [streams, ("checkpoint.asynchronous", "false")]), world)
    assert losses(folder) == learned
    assert names(folder / "checkpoints") == names(kept / "checkpoints") == ["step-00000004", "step-00000008"]
    for name in names(folder / "checkpoints"):
        one, other = (run / "checkpoints" / name for run in (kept, folder))
        files = {path.name: path.read_bytes() for path in one.iterdir()}
        others = {path.name: path.read_bytes() for path in other.iterdir()}
        assert {"state-00000-of-00001.safetensors", "carried-00000-of-00001.safetensors"} < files.keys()
        manifests = [json.loads(each.pop("manifest.json"))["files"] for each in (files, others)]
        recipes = [each.pop("recipe.yaml").decode() for each in (files, others)]
        assert recipes[0].replace("asynchronous: true", "asynchronous: false") == recipes[1] != recipes[0]
        assert files == others
        assert [each.pop("recipe.yaml")["bytes"] for each in manifests] == [len(text) for text in recipes]
        assert manifests[0] == manifests[1]


def test_a_run_goes_on_behind_a_full_disk_and_says_so(
    data: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    fail_writes(monkeypatch, 1, 2)
    train(load_phases(write_recipe(data, folder, steps=12)), world)
    assert [(e["event"], e["step"]) for e in events(folder) if e["event"].startswith("save")] == [
        ("save_failed", 4),
        ("save_failed", 8),
        ("save", 12),
    ]
    assert list(losses(folder)) == list(range(1, 13)) and events(folder, "done")
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [(p.step, p.value) for p in reader.Scalars("checkpoint/failed_saves")] == [(4, 1), (8, 2), (12, 2)]
    assert [p.step for p in reader.Scalars("checkpoint/write_seconds")] == [12]


def test_what_cannot_be_removed_is_an_alarm_and_tried_again(
    make_saver: MakeSaver,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    remove, saved = shutil.rmtree, files_of(torch.ones(9))

    def busy(path: Path, **options: Any) -> None:
        if "step-00000001" in Path(path).name:
            raise OSError(16, "Device or resource busy", str(path))
        remove(path, **options)

    with make_saver(keep=1) as saver:
        saver.save(state_at(1), saved, stays=False, wait=True)
        with monkeypatch.context() as patch:
            patch.setattr("shutil.rmtree", busy)
            saver.save(state_at(2), saved, stays=False, wait=True)
            saver.save(state_at(3), saved, stays=False, wait=True)
        left = tmp_path / ".removed-step-00000001"
        assert names(tmp_path) == ["step-00000003"] and left.is_dir()
        assert [(e["event"], e["step"]) for e in told.events] == [
            ("save", 1),
            ("save_alarm", 2),
            ("save", 2),
            ("save_alarm", 3),
            ("save", 3),
        ]
        assert all("resource busy" in e["message"] for e in told.events if e["event"] == "save_alarm")
        assert "step 2: step-00000001 is removed, but not all of it" in capsys.readouterr().err
        saver.save(state_at(4), saved, stays=False, wait=True)
    assert not left.exists() and names(tmp_path) == ["step-00000004"] and told.events[-2]["step"] == 3


@pytest.mark.parametrize("asynchronous", [True, False])
def test_staged_files_become_a_checkpoint_beside_the_steps(
    make_saver: MakeSaver,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    asynchronous: bool,
) -> None:
    """They are on the node's disk when the steps go on, or copied, and what is in the run's folder no half of one."""
    local = tmp_path_factory.mktemp("local")
    reached, opened, copy = threading.Event(), threading.Event(), shutil.copyfile

    def held(source: Path, target: Path) -> Path:
        reached.set()
        assert opened.wait(SECONDS)
        return copy(source, target)

    monkeypatch.setattr("shutil.copyfile", held)
    weights = torch.arange(1000.0)
    with make_saver(asynchronous=asynchronous, staging=local) as saver:
        saver.save(state_at(1), files_of(weights), stays=False, wait=False)
        weights.zero_()  # a step
        assert reached.wait(SECONDS)
        saver.look()
        (staged,) = local.rglob("weights")
        assert staged.parent.name == "rank-00000" and told.events == [] and names(tmp_path) == []
        opened.set()
    assert torch.equal(load(tmp_path / "step-00000001"), torch.arange(1000.0))
    assert [event["event"] for event in told.events] == ["save"] and not list(local.rglob("weights"))


def test_what_cannot_be_brought_from_the_nodes_disk_is_a_save_that_failed(
    make_saver: MakeSaver, told: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: Any
) -> None:
    """The disk of the run is full, then the one of the node; then the copy is altered on its way."""
    local, copy, calls = tmp_path_factory.mktemp("local"), shutil.copyfile, iter(range(1, 9))

    def failing(source: Path, target: Path) -> Path:
        number = next(calls)
        if number == 1:
            raise OSError(28, "No space left on device", str(target))
        copied = copy(source, target)
        if number == 2:
            copied.write_bytes(b"altered")
        return copied

    monkeypatch.setattr("shutil.copyfile", failing)
    fail_writes(monkeypatch, 2)
    with make_saver(asynchronous=False, staging=local, max_failed_saves=9) as saver:
        for step in (1, 2, 3, 4):
            saver.save(state_at(step), files_of(torch.ones(9)), stays=False, wait=False)
    failed = [event["message"] for event in told.events if event["event"] == "save_failed"]
    assert [event["step"] for event in told.events] == [1, 2, 3, 4] and len(failed) == 3
    assert f"no space left for {tmp_path}" in failed[0] and f"no space left for {local}" in failed[1]
    assert "is not what" in failed[2]
    assert names(tmp_path) == ["step-00000004"] and not list(tmp_path.glob(".partial*"))
    assert load(tmp_path / "step-00000004").sum() == 9
