"""Copies of checkpoints in a store: whole or not there, made beside the steps, kept from retention until they are, and
what a run on a new node goes on from.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import obstore
import pytest

from parallel.process import World
from pretrain import checkpoint_store, checkpoints, uploads
from pretrain.agreement import SharedMachineError, SharedUserError
from pretrain.checkpoint_config import CheckpointConfig
from pretrain.checkpoint_store import CheckpointStore, StoreError
from pretrain.checkpoints import Checkpoints, list_checkpoints, problems
from pretrain.durable import finished_file
from pretrain.fence import take_fence
from pretrain.resume import choose_checkpoint
from pretrain.uploads import Uploads
from tests.upload_cases import Opened, Told, contents, elsewhere, go_on, never_asked, waited_for, write

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "LAST_PAUSE_SECONDS", 0.0)


def test_what_a_folder_holds_is_uploaded_and_a_new_node_goes_on_from_it(
    here: Checkpoints, store: CheckpointStore, opened: Opened, told: Told, tmp_path: Path
) -> None:
    first = here.save(4, write, stays=True)
    with opened(here) as copies:
        second = here.save(8, write)
        copies.begin()
    assert sorted(told.kinds()) == [("upload", 4), ("upload", 8)]
    for folder in (first, second):
        assert contents(Path(store.location) / folder.name) == contents(folder)
    assert (Path(store.location) / "latest").read_text() == "step-00000008\n"
    with opened(here):
        pass
    assert len(told.events) == 2, "and not again"
    new = elsewhere(here, tmp_path, store)
    found = go_on(new, store, [])
    assert found == new.folder / "step-00000008" and contents(found) == contents(second) and problems(found) == []
    assert go_on(here, store, []) == second, "it is here already"
    assert list_checkpoints(here.folder) == [second, first]


def test_the_newest_is_named_where_an_older_one_is_uploaded_behind_it(
    here: Checkpoints, store: CheckpointStore, opened: Opened, told: Told
) -> None:
    for step in (4, 8):
        here.save(step, write)
    with opened(here):
        pass
    assert told.kinds() == [("upload", 8), ("upload", 4)]
    assert (Path(store.location) / "latest").read_text() == "step-00000008\n"


def test_a_checkpoint_that_stays_stays_where_it_is_downloaded(
    here: Checkpoints, store: CheckpointStore, opened: Opened, tmp_path: Path
) -> None:
    here.save(4, write, stays=True)
    with opened(here):
        pass
    new = elsewhere(here, tmp_path, store)
    found = go_on(new, store, [])
    assert found is not None and (found / "stays").exists()


def test_an_upload_that_ends_anywhere_is_no_copy_and_the_next_one_completes_it(
    here: Checkpoints,
    store: CheckpointStore,
    opened: Opened,
    told: Told,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between any two requests, as where the process was killed there: what is in the store then is the same."""
    first = here.save(1, write)
    with opened(here):
        pass
    second, put, calls = here.save(2, write), obstore.put, [0]
    for last in range(1, 5):  # three files and the manifest
        calls[0] = 0

        def gone(*arguments: Any, last: int = last, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] >= last:
                raise obstore.exceptions.GenericError("no route to host")
            return put(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(obstore, "put", gone)
            with pytest.raises(SharedMachineError, match="no route to host"), opened(here):
                pass
        assert told.events[-1]["event"] == "upload_failed" and "no route to host" in told.events[-1]["message"]
        assert store.location in told.events[-1]["message"]
        assert len(list((Path(store.location) / second.name).glob("*"))) == last - 1
        found = go_on(elsewhere(here, tmp_path, store), store, [])
        assert found is not None and contents(found) == contents(first)
    with opened(here):
        pass
    found = go_on(elsewhere(here, tmp_path, store), store, [])
    assert told.kinds()[-1] == ("upload", 2) and found is not None and contents(found) == contents(second)


def test_another_attempts_copy_is_none_from_the_first_file_on_that_is_put_over_it(
    here: Checkpoints, store: CheckpointStore, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same step, with other values."""
    here.save(4, write)
    other = elsewhere(here, tmp_path, store)
    other.save(4, write)
    with opened(here):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "put", lambda *_: (_ for _ in ()).throw(StoreError("gone")))
        with pytest.raises(SharedMachineError), opened(other):
            pass
    assert store.checkpoints() == [] and store.begun() == ["step-00000004"]
    with opened(other):
        pass
    assert contents(Path(store.location) / "step-00000004") == contents(other.folder / "step-00000004")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_copy_of_which_any_file_is_damaged_is_refused_by_name_and_the_one_before_used(
    here: Checkpoints, store: CheckpointStore, opened: Opened, tmp_path: Path, damage: str
) -> None:
    here.save(1, write)
    second = here.save(2, write)
    with opened(here):
        pass
    for name in contents(second):
        path = Path(store.location) / second.name / name
        content = path.read_bytes()
        if damage == "remove":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(content[:-1])
        else:
            at = len(content) // 2
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        new, said = elsewhere(here, tmp_path, store), list[str]()
        assert go_on(new, store, said) == new.folder / "step-00000001"
        if (name, damage) != ("manifest.json", "remove"):  # it was never uploaded whole, then
            assert len(said) == 1 and str(path) in said[0] and "not used" in said[0]
        assert [path.name for path in list_checkpoints(new.folder)] == ["step-00000001"]
        assert not list(new.folder.glob(".partial*"))
        path.write_bytes(content)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_is_watched_until_its_files_are_checked_and_rests_only_for_others(
    here: Checkpoints, store: CheckpointStore, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    ranks: int,
) -> None:  # fmt: skip
    """Bringing files to the disk and reading them again may hang as well, and a rank that is alone waits for nobody."""
    here.save(1, write)
    with opened(here):
        pass
    new, done = elsewhere(here, tmp_path, store), list[str]()
    new = replace(new, world=replace(new.world, size=ranks))  # the first of so many, with its share of the files

    def finished(path: Path) -> Any:
        done.append(f"finished {path.name}")
        return finished_file(path)

    monkeypatch.setattr(checkpoints, "finished_file", finished)
    found = choose_checkpoint(new, "auto", pytest.fail, store, done.append, lambda: done.append("rests"))
    assert found == new.folder / "step-00000001"
    names = sorted(path.name for path in (here.folder / found.name).iterdir() if path.name != "manifest.json")[::ranks]
    checked = [done.index(f"finished {name}") for name in names]
    assert all(done[at - 1].startswith("the checksum of ") and done[at - 1].endswith(done[at][9:]) for at in checked)
    assert [at for at, each in enumerate(done) if each == "rests"] == ([] if ranks == 1 else [max(checked) + 1])


def test_a_damaged_one_here_is_replaced_by_its_copy(here: Checkpoints, store: CheckpointStore, opened: Opened) -> None:
    """Also where none here is whole."""
    for step in (1, 2):
        here.save(step, write)
    with opened(here):
        pass
    whole = contents(here.folder / "step-00000002")
    (here.folder / "step-00000002" / "state.bin").write_bytes(b"")
    said: list[str] = []
    found = go_on(here, store, said)
    assert found == here.folder / "step-00000002" and contents(found) == whole and len(said) == 1
    for path in list_checkpoints(here.folder):
        (path / "state.bin").write_bytes(b"")
    found = go_on(here, store, said)
    assert found == here.folder / "step-00000002" and contents(found) == whole


def test_a_store_that_cannot_be_read_is_no_empty_one(
    here: Checkpoints, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: Any, **__: Any) -> Any:
        raise obstore.exceptions.GenericError("no route to host")

    monkeypatch.setattr(obstore, "list_with_delimiter", gone)
    with pytest.raises(SharedMachineError, match=r"is not known: .*no route to host; start again when the store"):
        go_on(here, store, [])
    with pytest.raises(SharedUserError, match="--resume never: whether there are checkpoints"):
        choose_checkpoint(here, "never", pytest.fail, store)
    newest = here.save(3, write)
    assert go_on(here, store, []) == newest
    assert "whether it has a newer checkpoint" in capsys.readouterr().err


def test_a_run_does_not_begin_among_another_ones_copies(
    here: Checkpoints, store: CheckpointStore, opened: Opened, tmp_path: Path
) -> None:
    older, _ = here.save(1, write), here.save(2, write)
    with opened(here):
        pass
    new = elsewhere(here, tmp_path, store)
    with pytest.raises(SharedUserError, match=r"never: .*store holds 2 checkpoint\(s\) of an earlier run"):
        choose_checkpoint(new, "never", pytest.fail, store)
    with pytest.raises(SharedUserError, match=r"store holds newer checkpoints \(step-00000002\)"):
        choose_checkpoint(new, str(older), pytest.fail, store)


def test_nothing_is_removed_before_it_is_uploaded_but_for_room(
    here: Checkpoints,
    store: CheckpointStore,
    opened: Opened,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuses, put = [True], obstore.put

    def refusing(*arguments: Any, **options: Any) -> Any:
        if refuses[0]:
            raise obstore.exceptions.GenericError("403")
        return put(*arguments, **options)

    monkeypatch.setattr(obstore, "put", refusing)
    with opened(here) as copies:
        kept = replace(here, copies=copies)
        for step in range(1, 6):
            kept.save(step, write)
            copies.begin()
        assert len(list_checkpoints(here.folder)) == 5, "keep is 2"
        usage = shutil.disk_usage(here.folder)
        with monkeypatch.context() as patch:
            free = lambda _: usage._replace(free=10 if (here.folder / "step-00000002").exists() else usage.free)  # noqa: E731
            patch.setattr("shutil.disk_usage", free)
            said: list[str] = []
            kept.save(6, write, num_bytes=11, report=said.append)
        assert [path.name[-1] for path in list_checkpoints(here.folder)] == ["6", "5", "4", "3"]
        assert [line[:13] for line in said] == ["step-00000001", "step-00000002"] and "was not uploaded" in said[0]
        assert waited_for(lambda: (copies.look(), len(told.events) >= 5)[1])
        refuses[0] = False
        copies.begin()
        assert waited_for(lambda: copies.holds("step-00000003"))
        kept.save(7, write)
    assert [path.name[-1] for path in list_checkpoints(here.folder)] == ["7", "6"]
    assert sorted(store.checkpoints()) == [f"step-{step:08d}" for step in range(3, 7)]
    assert {event["event"] for event in told.events[:5]} == {"upload_failed"}


def test_so_many_copies_stay_and_those_that_are_kept_for_good(
    here: Checkpoints, store: CheckpointStore, opened: Opened, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("step-00000001", "state.bin", b"of an upload that was never completed")
    with opened(here, upload_keep=1) as copies:
        kept = replace(here, copies=copies)
        for step in (2, 3, 4, 5):
            kept.save(step, write, stays=step == 3)
            copies.begin()
            assert waited_for(lambda step=step: copies.holds(f"step-{step:08d}"))
        assert store.begun() == ["step-00000005", "step-00000003"]
        with monkeypatch.context() as patch:
            patch.setattr(
                obstore, "delete", lambda *_: (_ for _ in ()).throw(obstore.exceptions.GenericError("read-only"))
            )
            kept.save(6, write)
            copies.begin()
            assert waited_for(lambda: copies.holds("step-00000006"))
    assert [kind for kind in told.kinds() if kind[0] != "upload"] == [("upload_alarm", 6)]
    assert store.checkpoints() == ["step-00000006", "step-00000005", "step-00000003"]


def test_what_the_store_would_not_keep_is_not_uploaded_and_may_go_once_newer_ones_are_there(
    here: Checkpoints, store: CheckpointStore, opened: Opened, told: Told
) -> None:
    for step in range(1, 5):
        here.save(step, write, stays=step == 1, spare=9)
    for _ in range(2):  # as of a run that is started again
        with opened(here, upload_keep=2) as copies:
            pass
    assert told.kinds() == [("upload", 4), ("upload", 3), ("upload", 1)]
    assert store.begun() == ["step-00000004", "step-00000003", "step-00000001"]
    replace(here, copies=copies).save(5, write)
    assert [path.name[-1] for path in list_checkpoints(here.folder)] == ["5", "4", "1"]


def test_an_overtaken_copy_of_the_run_completes_no_upload(
    here: Checkpoints, store: CheckpointStore, opened: Opened, told: Told, world: World
) -> None:
    run = here.folder.parent
    run.mkdir()
    old = replace(here, fence=take_fence(run, world))
    old.save(1, write)
    take_fence(run, world)
    with opened(old):
        pass
    assert store.checkpoints() == [] and told.events == [], "the log is the newer one's"


def test_a_folder_that_cannot_be_listed_once_is_told_and_the_next_attempt_uploads(
    here: Checkpoints, store: CheckpointStore, opened: Opened, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.save(1, write)
    calls: list[Path] = []

    def stale(folder: Path) -> list[Path]:
        calls.append(folder)
        if len(calls) == 1:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(folder))
        return list_checkpoints(folder)

    monkeypatch.setattr(uploads, "list_checkpoints", stale)
    with opened(here) as copies:
        copies.begin()
    assert told.kinds() == [("upload_failed", None), ("upload", 1)]
    assert os.strerror(errno.ESTALE) in told.events[0]["message"]
    assert store.checkpoints() == ["step-00000001"]


def test_what_makes_room_is_told_only_where_the_store_has_no_copy_of_it(
    here: Checkpoints, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(here) as copies:
        for step in range(1, 5):
            here.save(step, write, spare=9)
            if step == 1:
                copies.begin()
                assert waited_for(lambda: copies.holds("step-00000001"))
        usage = shutil.disk_usage(here.folder)
        free = lambda _: usage._replace(free=10 if (here.folder / "step-00000002").exists() else usage.free)  # noqa: E731
        monkeypatch.setattr("shutil.disk_usage", free)
        said: list[str] = []
        replace(here, copies=copies).save(5, write, num_bytes=11, report=said.append)
    assert len(said) == 1 and said[0].startswith("step-00000002 is removed and was not uploaded")


def test_s3_takes_checkpoints_and_gives_them_back(
    here: Checkpoints, tmp_path: Path, bucket: Callable[[str, bytes], object], told: Told
) -> None:
    def large(folder: Path) -> Sequence[Path]:
        (folder / "large.bin").write_bytes(os.urandom(checkpoint_store.PIECE_BYTES * 2 + 77))
        return [*write(folder), folder / "large.bin"]

    for step, files in ((1, write), (2, large)):
        here.save(step, files)
    location = "s3://data/runs/one two"
    store = CheckpointStore(location)
    with Uploads(here, store, CheckpointConfig(upload=location, upload_keep=1), told, lambda _: None, never_asked):
        pass
    assert ("upload", 2) in told.kinds() and all(kind == "upload" for kind, _ in told.kinds())
    new = elsewhere(here, tmp_path, store)
    found = go_on(new, store, [])
    assert found is not None and contents(found) == contents(here.folder / "step-00000002")
    bucket("runs/one two/step-00000002/large.bin", b"altered")
    said: list[str] = []
    with pytest.raises(SharedUserError, match="no checkpoint in s3://data/runs/one two is whole"):
        go_on(elsewhere(here, tmp_path, store), store, said)
    assert "s3://data/runs/one two/step-00000002/large.bin is altered" in said[0]
