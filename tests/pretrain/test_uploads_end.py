"""How a run that uploads its checkpoints ends where the store is slow, hangs or refuses, and where a signal comes."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import obstore
import pytest

from pretrain import checkpoint_store, uploads
from pretrain.agreement import SharedMachineError
from pretrain.checkpoint_store import CheckpointStore
from pretrain.checkpoints import Checkpoints
from pretrain.preemption import Preempted
from tests.upload_cases import SECONDS, Opened, Told, waited_for, write

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "LAST_PAUSE_SECONDS", 0.0)


@pytest.mark.parametrize("failures", [1, uploads.LAST_TRIES, uploads.LAST_TRIES + 1])
def test_the_end_of_a_run_tries_its_last_checkpoint_again_and_says_where_it_is_not_uploaded(
    here: Checkpoints,
    store: CheckpointStore,
    opened: Opened,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    failures: int,
) -> None:
    put, calls = obstore.put, [0]

    def refusing(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] <= failures:
            raise obstore.exceptions.GenericError("503")
        return put(*arguments, **options)

    here.save(1, write)
    monkeypatch.setattr(obstore, "put", refusing)
    if failures > uploads.LAST_TRIES:
        message = r"the last checkpoint is not uploaded: .*503; .*start the command again to try once more"
        with pytest.raises(SharedMachineError, match=message), opened(here):
            pass
        assert store.checkpoints() == []
    with opened(here):  # as where the command is started again
        pass
    assert store.checkpoints() == ["step-00000001"]
    assert told.kinds() == [("upload_failed", 1)] * failures + [("upload", 1)]


class Stuck:
    """A store that answers nothing until `released`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.released = threading.Event(), threading.Event()
        put = obstore.put

        def held(*arguments: Any, **options: Any) -> Any:
            self.reached.set()
            assert self.released.wait(SECONDS)
            return put(*arguments, **options)

        monkeypatch.setattr(obstore, "put", held)


def test_steps_do_not_wait_for_a_store_and_a_run_that_stops_waits_so_long(
    here: Checkpoints, opened: Opened, store: CheckpointStore, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "GRACE_SECONDS", 0.1)
    stuck = Stuck(monkeypatch)
    here.save(1, write)
    with pytest.raises(Preempted), opened(here, upload_wait_seconds=0.2) as copies:
        assert stuck.reached.wait(SECONDS)
        copies.begin()
        copies.look()
        begun = time.monotonic()
        raise Preempted("SIGTERM")
    assert 0.2 <= time.monotonic() - begun < 5
    begun = time.monotonic()
    with pytest.raises(ZeroDivisionError), opened(here, upload_wait_seconds=60):
        raise ZeroDivisionError
    assert time.monotonic() - begun < 5, "an error ends the run at once"
    stuck.released.set()
    assert store.checkpoints() == []


def test_a_run_that_has_had_its_tokens_waits_for_its_uploads(
    here: Checkpoints, opened: Opened, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = Stuck(monkeypatch)
    here.save(1, write)
    with opened(here, upload_wait_seconds=0.0):
        threading.Timer(0.3, stuck.released.set).start()
    assert store.checkpoints() == ["step-00000001"]


def test_the_end_of_a_run_waits_so_long_for_a_store_that_hangs(
    here: Checkpoints, opened: Opened, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "GRACE_SECONDS", 0.1)
    stuck = Stuck(monkeypatch)
    here.save(1, write)
    begun = time.monotonic()
    message = (
        rf"uploads to {store.location} are not done after 0.2 s \(checkpoint.upload_end_wait_seconds\); .*{here.folder}"
    )
    with pytest.raises(SharedMachineError, match=message), opened(here, upload_end_wait_seconds=0.2):
        pass
    assert 0.2 <= time.monotonic() - begun < 5
    stuck.released.set()


def test_the_end_of_a_run_waits_for_a_store_that_takes_pieces_however_slowly(
    here: Checkpoints, opened: Opened, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one file, and of several, for longer than it would wait for a store that takes none."""
    put, pieces, seconds = obstore.put, 8, 0.2
    monkeypatch.setattr(checkpoint_store, "PIECE_BYTES", 500)
    monkeypatch.setattr(uploads, "PARTS_AT_ONCE", 1)

    def slowly(client: Any, place: str, source: Any, **options: Any) -> Any:
        if not isinstance(source, bytes):
            taken = []
            for piece in source:
                time.sleep(seconds)
                taken.append(piece)
            source = b"".join(taken)
        return put(client, place, source)

    def write_pieces(folder: Path) -> list[Path]:
        for name in ("first.bin", "second.bin"):
            (folder / name).write_bytes(bytes(500 * pieces // 2))
        return [folder / "first.bin", folder / "second.bin"]

    here.save(1, write_pieces)
    monkeypatch.setattr(obstore, "put", slowly)
    begun = time.monotonic()
    with opened(here, upload_end_wait_seconds=1.2):
        pass
    assert time.monotonic() - begun >= pieces * seconds > 1.2
    assert store.checkpoints() == ["step-00000001"]


def test_a_store_that_fails_every_try_at_the_same_place_does_not_move(
    here: Checkpoints, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tries are asked for by then, each of which it takes some pieces of."""
    monkeypatch.setattr(checkpoint_store, "PIECE_BYTES", 500)
    monkeypatch.setattr(uploads, "PARTS_AT_ONCE", 1)
    monkeypatch.setattr(uploads, "GRACE_SECONDS", 0.1)

    def failing(client: Any, place: str, source: Any, **options: Any) -> Any:
        for _ in range(3):
            next(source)
        time.sleep(0.1)
        raise obstore.exceptions.GenericError("503")

    def write_pieces(folder: Path) -> list[Path]:
        (folder / "state.bin").write_bytes(bytes(500 * 9))
        return [folder / "state.bin"]

    here.save(1, write_pieces)
    monkeypatch.setattr(obstore, "put", failing)
    begun = time.monotonic()
    message = r"nothing more was taken, and uploads .* are not done after 0.5 s \(checkpoint.upload_end_wait_seconds\)"
    with pytest.raises(SharedMachineError, match=message), opened(here, upload_end_wait_seconds=0.5) as copies:
        for _ in range(30):
            copies.begin()
    assert time.monotonic() - begun < 20
    assert waited_for(lambda: not any(thread.name == "uploads" for thread in threading.enumerate()))


def test_a_signal_ends_the_wait_at_the_end_of_a_run(
    here: Checkpoints,
    opened: Opened,
    store: CheckpointStore,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(uploads, "GRACE_SECONDS", 0.1)
    stuck, asks = Stuck(monkeypatch), iter([None, signal.SIGUSR1])
    here.save(1, write)
    begun = time.monotonic()
    with pytest.raises(Preempted, match="SIGUSR1"), opened(here, lambda: next(asks), upload_wait_seconds=0.2):
        pass
    assert 0.2 <= time.monotonic() - begun < 5
    assert told.kinds() == [("upload_failed", None), ("preempt", None)]
    said = capsys.readouterr().err
    for words in (store.location, "SIGUSR1", str(here.folder), "start the command again"):
        assert words in said and words in told.events[0]["message"]
    stuck.released.set()


@pytest.mark.parametrize("takes", [True, False])
def test_a_run_asked_to_stop_at_its_end_is_done_only_where_the_store_takes_its_last_checkpoint(
    here: Checkpoints, opened: Opened, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, takes: bool
) -> None:
    """A signal may come when the store is there, or refuses: the latter is a stop and no crash."""
    here.save(1, write)
    if takes:
        stuck = Stuck(monkeypatch)
        threading.Timer(0.2, stuck.released.set).start()
    else:
        monkeypatch.setattr(
            obstore, "put", lambda *_, **__: (_ for _ in ()).throw(obstore.exceptions.GenericError("503"))
        )
    ended = []
    try:
        with opened(here, lambda: signal.SIGTERM, upload_wait_seconds=SECONDS):
            pass
    except Preempted as error:
        ended.append(str(error))
    assert ended == ([] if takes else ["SIGTERM"])
    assert store.checkpoints() == (["step-00000001"] if takes else [])
