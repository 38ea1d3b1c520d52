"""Checkpoints are whole or not there: every kind of damage is found and named, and a failed save harms nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.process import World
from pretrain.agreement import SharedUserError
from pretrain.checkpoints import Checkpoints, list_checkpoints, problems
from pretrain.resume import choose_checkpoint

pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def checkpoints(tmp_path: Path, world: World) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", 3, world)


def write(folder: Path) -> Sequence[Path]:
    paths = [folder / "weights.bin", folder / "trainer.json"]
    paths[0].write_bytes(os.urandom(1000))
    paths[1].write_text("{}")
    return paths


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_saved_checkpoint_is_whole(checkpoints: Checkpoints) -> None:
    folder = checkpoints.save(7, write)
    assert problems(folder) == []
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {folder.stat().st_mode & 0o666}
    assert names(checkpoints) == ["latest", "step-00000007"]
    assert checkpoints.newest_whole(pytest.fail) == folder


def test_another_runs_checkpoint_is_not_resumed_among_a_runs_own(
    checkpoints: Checkpoints, world: World, tmp_path: Path
) -> None:
    other = Checkpoints(tmp_path / "other", 3, world).save(4, write)
    assert choose_checkpoint(checkpoints, str(other), pytest.fail) == other
    own = checkpoints.save(2, write)
    with pytest.raises(SharedUserError, match=r"holds 1 checkpoint\(s\) of another run .* without checkpoints"):
        choose_checkpoint(checkpoints, str(other), pytest.fail)
    assert choose_checkpoint(checkpoints, str(own), pytest.fail) == own
    checkpoints.save(3, write)
    with pytest.raises(SharedUserError, match=r"holds newer checkpoints \(step-00000003\)"):
        choose_checkpoint(checkpoints, str(own), pytest.fail)


def test_a_run_without_checkpoints_has_no_newest(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest_whole(pytest.fail) is None


def test_only_the_newest_are_kept(checkpoints: Checkpoints) -> None:
    for step in range(1, 6):
        checkpoints.save(step, write)
    assert names(checkpoints) == ["latest", "step-00000003", "step-00000004", "step-00000005"]


def test_one_that_stays_is_kept_among_the_newest_and_behind_them(checkpoints: Checkpoints) -> None:
    for step in range(1, 8):
        folder = checkpoints.save(step, write, stays=step in (2, 6))
        assert problems(folder) == []
    assert names(checkpoints) == ["latest", "step-00000002", "step-00000005", "step-00000006", "step-00000007"]


def test_a_new_checkpoint_is_kept_among_others_of_later_steps(checkpoints: Checkpoints) -> None:
    for step in (8, 9, 10):
        checkpoints.save(step, write)
    new = checkpoints.save(3, write)
    assert problems(new) == []
    assert names(checkpoints) == ["latest", "step-00000003", "step-00000009", "step-00000010"]


@pytest.mark.parametrize("name", ["weights.bin", "trainer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_newest_is_named_and_the_one_before_taken(checkpoints: Checkpoints, name: str, damage: str) -> None:
    before = checkpoints.save(1, write)
    newest = checkpoints.save(2, write)
    path = newest / name
    if damage == "flip":
        flip(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    said: list[str] = []
    assert checkpoints.newest_whole(said.append) == before
    assert len(said) == 1
    assert "step-00000002 is damaged and not used" in said[0]
    assert name in said[0]
    assert "damaged-step-00000002" in names(checkpoints), "what may still be of use is not removed"
    checkpoints.save(2, write)
    assert names(checkpoints)[-2:] == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("name", ["weights.bin", "manifest.json"])
def test_an_error_in_reading_is_no_damage(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    checkpoints.save(1, write)
    newest = checkpoints.save(2, write)
    opened = open

    def failing(path: object, *arguments: object, **options: object) -> object:
        if path == newest / name:
            raise OSError(5, "Input/output error", str(path))
        return opened(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", failing)
        patch.setattr("io.open", failing)  # what pathlib calls
        with pytest.raises(SharedUserError, match=rf"step-00000002 cannot be read: .*{name}: Input/output error"):
            checkpoints.newest_whole(pytest.fail)
    assert checkpoints.newest_whole(pytest.fail) == newest


def test_a_flipped_manifest_never_passes(checkpoints: Checkpoints) -> None:
    folder = checkpoints.save(1, write)
    manifest = folder / "manifest.json"
    original = manifest.read_bytes()
    for position in range(len(original)):
        changed = bytearray(original)
        changed[position] ^= 1
        manifest.write_bytes(changed)
        assert problems(folder), f"byte {position}"
    manifest.write_bytes(original)
    assert problems(folder) == []


def test_nothing_whole_is_an_error_not_a_fresh_start(checkpoints: Checkpoints) -> None:
    flip(checkpoints.save(1, write) / "weights.bin")
    with pytest.raises(SharedUserError, match="no checkpoint in .* is whole"):
        checkpoints.newest_whole(lambda _: None)


def test_what_a_dead_save_left_is_no_checkpoint_and_goes_with_the_next(checkpoints: Checkpoints) -> None:
    whole = checkpoints.save(1, write)
    left = checkpoints.folder / ".partial-step-00000002"
    left.mkdir()
    write(left)
    assert list_checkpoints(checkpoints.folder) == [whole]
    checkpoints.save(3, write)
    assert not left.exists()


def test_an_error_of_the_disk_leaves_the_earlier_ones(checkpoints: Checkpoints) -> None:
    whole = checkpoints.save(1, write)

    def fail(folder: Path) -> Sequence[Path]:
        write(folder)
        raise OSError(5, "Input/output error", str(folder / "weights.bin"))

    with pytest.raises(SharedUserError, match=r"weights\.bin: Input/output error; the earlier .* step-00000001"):
        checkpoints.save(2, fail)
    assert names(checkpoints) == ["latest", "step-00000001"]
    assert checkpoints.newest_whole(pytest.fail) == whole


@pytest.mark.parametrize("at", ["rename", "replace", "rmtree"])
def test_what_fails_behind_the_publication_takes_it_not_back(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Older ones that stay as they are, or go in part only, and `latest` that keeps its name."""
    limited = Checkpoints(checkpoints.folder, 1, checkpoints.world)
    limited.save(1, write)
    owner = shutil if at == "rmtree" else Path
    real, said = getattr(owner, at), list[str]()

    def failing(path: Path, *arguments: Any, **options: Any) -> Any:
        if "step-00000001" in path.name or path.name == ".latest":
            raise OSError(30, "Read-only file system", str(path))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, at, failing)
        newest = limited.save(2, write, report=said.append)
        assert limited.newest_whole(pytest.fail) == newest
        assert len(said) == 1 and "Read-only" in said[0] and "the next save tries it again" in said[0]
    after = limited.save(3, write, report=pytest.fail)
    assert names(checkpoints) == ["latest", after.name] and (after.parent / "latest").read_text() == f"{after.name}\n"


def test_a_name_that_cannot_be_freed_is_not_used_again(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a save of the same step that failed, and whose files stay."""
    stuck, said = checkpoints.folder / ".partial-step-00000004", list[str]()
    stuck.mkdir(parents=True)
    (stuck / "other.bin").write_bytes(b"")
    remove = shutil.rmtree
    monkeypatch.setattr(
        "shutil.rmtree", lambda path, **options: Path(path) == stuck and os.rmdir(path) or remove(path, **options)
    )
    newest = checkpoints.save(4, write, report=said.append)
    assert problems(newest) == [] and not (newest / "other.bin").exists()
    assert len(said) == 1 and str(stuck) in said[0]


@pytest.fixture
def small_disk(mount_disk: Callable[[str], Path]) -> Path:
    """A file system of 1 MB."""
    return mount_disk("1m")


def test_a_full_disk_is_reported_and_nothing_is_lost(small_disk: Path, world: World) -> None:
    from safetensors.torch import save_file

    def large(folder: Path) -> Sequence[Path]:
        save_file({"weights": torch.zeros(150_000)}, folder / "weights.safetensors")
        return [folder / "weights.safetensors"]

    checkpoints = Checkpoints(small_disk / "checkpoints", 3, world)
    whole = checkpoints.save(1, large)
    with pytest.raises(SharedUserError, match=r"no space left for .* MB free\); free some"):
        checkpoints.save(2, large)
    assert names(checkpoints) == ["latest", "step-00000001"]
    assert checkpoints.newest_whole(pytest.fail) == whole
