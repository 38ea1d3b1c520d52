"""Two ranks save together: what befalls one of them is known to both, and copies are made by both."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint_store import CheckpointStore
from pretrain.checkpoints import problems
from pretrain.uploads import LAST_TRIES
from tests.distributed_helper import run_ranks
from tests.training_cases import events, losses, pretrain, write_recipe

PLANS = ("slow", "once", "always", "overtaken", "stored")


@pytest.fixture(scope="module")
def together(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plans of the worker on two ranks: a run of three saves for each."""
    folder = tmp_path_factory.mktemp("together")
    fields = {"checkpoint": {"keep": 9, "max_failed_saves": 2}, "evaluation": {"every_tokens": None, "tokens": 64}}
    recipes = [f"{plan}={write_recipe(data, folder / plan, steps=12, **fields)}" for plan in PLANS[:-1]]
    fields["checkpoint"] |= {"staging": str(folder / "local"), "upload": str(folder / "store"), "asynchronous": False}
    recipes.append(f"stored={write_recipe(data, folder / 'stored', steps=12, **fields)}")
    run_ranks(["tests/pretrain/saver_worker.py", str(folder), *recipes], ranks=2, timeout=400)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def ended(folder: Path, plan: str) -> dict[str, Any]:
    """How the run ended, on both ranks alike."""
    first, second = (json.loads((folder / f"{plan}-{rank}.json").read_text()) for rank in (0, 1))
    assert first["type"] == second["type"]
    return first


def saves(folder: Path) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in events(folder) if event["event"].startswith("save")]


def test_ranks_wait_for_the_slowest_of_them(together: Path) -> None:
    assert ended(together, "slow")["type"] is None
    assert saves(together / "slow") == [("save", 4), ("save", 8), ("save", 12)]
    assert all(event["write_seconds"] >= 0.2 for event in events(together / "slow", "save"))
    for name in names(together / "slow" / "checkpoints"):
        assert problems(together / "slow" / "checkpoints" / name) == []


def test_what_fails_on_one_rank_is_no_checkpoint_and_both_go_on(together: Path) -> None:
    assert ended(together, "once")["type"] is None
    assert saves(together / "once") == [("save", 4), ("save_failed", 8), ("save", 12)]
    (failed,) = events(together / "once", "save_failed")
    assert "rank 1: no space left for" in failed["message"]
    assert names(together / "once" / "checkpoints") == ["step-00000004", "step-00000012"]
    assert losses(together / "once") == losses(together / "slow")


def test_both_ranks_end_for_failures_in_a_row(together: Path) -> None:
    end = ended(together, "always")
    assert end["type"] == "SaveError" and "2 in a row end the run (checkpoint.max_failed_saves)" in end["message"]
    assert saves(together / "always") == [("save_failed", 4), ("save_failed", 8)]
    assert len(losses(together / "always")) >= 8 and not names(together / "always" / "checkpoints")
    assert events(together / "always")[-1]["event"] == "error"


def test_both_ranks_end_where_another_copy_took_over(together: Path) -> None:
    end = ended(together, "overtaken")
    assert end["type"] == "FencedOffError" and "another copy of this run took its folder over" in end["message"]
    assert saves(together / "overtaken") == [("save", 4)]
    assert names(together / "overtaken" / "checkpoints") == ["step-00000004"]
    assert events(together / "overtaken")[-1]["event"] == "step", "its log is the other copy's"


def test_ranks_that_see_different_checkpoints_choose_the_same_or_none(together: Path) -> None:
    first, second = (json.loads((together / f"views-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for view in ("first", "second"):
        assert "a file system that all nodes share" in first[view]["auto"]
    assert "rank 1 on" in first["first"]["auto"] and "step-00000001 is not there" in first["first"]["auto"]
    assert "rank 0 on" in first["second"]["auto"] and "rank 0 on" in first["second"]["never"]
    assert "holds 1 checkpoint(s) of an earlier run" in first["first"]["never"]
    assert "rank 1 on" in first["first"]["first/step-00000001"]
    assert "no such folder" in first["second"]["second/step-00000001"]
    assert first["both"]["auto"] == first["both"]["both/step-00000001"] == "both/step-00000001"
    assert first["late"]["auto"] == first["late"]["late/step-00000001"] == "late/step-00000001", "as rank 0 sees it"
    assert first["none"]["auto"] == first["none"]["never"] == "None"


def test_ranks_stage_and_upload_what_they_would_have_written(together: Path) -> None:
    assert ended(together, "stored")["type"] is None and saves(together / "stored") == saves(together / "slow")
    assert sorted(event["step"] for event in events(together / "stored", "upload")) == [4, 8, 12]
    assert not events(together / "stored", "upload_failed") and not list((together / "local").rglob("*.safetensors"))
    for name in names(together / "slow" / "checkpoints"):
        places = [together / "slow" / "checkpoints", together / "stored" / "checkpoints", together / "store"]
        direct, staged, copy = ({path.name: path.read_bytes() for path in (place / name).iterdir()} for place in places)
        assert staged == copy and direct.keys() == staged.keys()
        for file in direct.keys() - {"recipe.yaml", "manifest.json"}:
            assert direct[file] == staged[file], file


def test_a_run_without_a_copy_of_its_end_is_no_done_one_and_started_again_uploads_it(
    data: Path, tmp_path: Path
) -> None:
    run, store = tmp_path / "refused", tmp_path / "store"
    refused = write_recipe(data, run, steps=4, checkpoint={"upload": str(store)})
    again = shutil.copy(refused, refused.with_stem("again"))
    plans = [f"refused={refused}", f"taken={again}"]
    run_ranks(["tests/pretrain/saver_worker.py", "-", *plans], ranks=2, timeout=180)
    failed = ended(tmp_path, "refused")
    assert failed["type"] == "SharedMachineError", failed
    assert "the last checkpoint is not uploaded: rank 1: 503" in failed["message"]
    assert len(events(run, "upload_failed")) > LAST_TRIES and [kind for kind, _ in saves(run)] == ["save"]
    assert ended(tmp_path, "again")["type"] is None
    assert [event["step"] for event in events(run, "upload")] == [4]
    assert CheckpointStore(store).checkpoints() == names(run / "checkpoints") == ["step-00000004"]


def test_a_rank_that_has_fetched_its_files_waits_for_a_slower_one(together: Path, tmp_path: Path) -> None:
    """Longer than its watchdog lets a piece of work take: what is slow is another rank's, whose own watches that."""
    command = ["tests/pretrain/download_worker.py", str(tmp_path / "new"), str(together / "store")]
    found = run_ranks(command, ranks=2, timeout=180)
    newest = tmp_path / "new" / "step-00000012"
    assert all(str(newest) in output for output in found.outputs) and problems(newest) == []


def test_ranks_wait_at_a_runs_end_as_long_as_any_of_them_is_sending(tmp_path: Path) -> None:
    """One alone has files to send, in pieces, for longer than a store that takes none is waited for."""
    run_ranks(["tests/pretrain/slow_upload_worker.py", str(tmp_path)], ranks=2)
    assert CheckpointStore(tmp_path / "store").checkpoints() == ["step-00000001"]


def test_a_signal_to_one_rank_ends_the_wait_for_a_store_that_hangs_on_both(data: Path, tmp_path: Path) -> None:
    """Long before the end's own limit, and both processes end, with a thread left in the store."""
    fields = {"upload": str(tmp_path / "store"), "upload_wait_seconds": 0.2}
    recipe = write_recipe(data, tmp_path / "hung", steps=4, checkpoint=fields)
    run_ranks(["tests/pretrain/saver_worker.py", "-", f"hung={recipe}"], ranks=2, timeout=180)
    assert ended(tmp_path, "hung") == {"type": "Preempted", "message": "SIGUSR1"}
    (failed,) = events(tmp_path / "hung", "upload_failed")
    assert str(tmp_path / "store") in failed["message"] and "when SIGUSR1 asked the run to stop" in failed["message"]
    assert events(tmp_path / "hung")[-1]["event"] == "preempt"
    again = shutil.copy(recipe, recipe.with_stem("again"))
    run_ranks(["tests/pretrain/saver_worker.py", "-", f"taken={again}"], ranks=2, timeout=180)
    assert ended(tmp_path, "again")["type"] is None
    assert CheckpointStore(tmp_path / "store").checkpoints() == ["step-00000004"]


def test_a_run_killed_in_an_upload_goes_on_from_the_copy_before_on_a_new_node(together: Path, data: Path) -> None:
    """Rank 1 dies between two of its files of the checkpoint behind it. The folder is gone then."""
    store = together / "of_killed"
    fields = {"checkpoint": {"keep": 9, "upload": str(store)}, "evaluation": {"every_tokens": None, "tokens": 64}}
    recipe = write_recipe(data, together / "killed", steps=12, **fields)
    killed = run_ranks(["tests/pretrain/saver_worker.py", "-", f"killed={recipe}"], ranks=2, timeout=180, check=False)
    assert -signal.SIGKILL in killed.codes, killed.report()
    copies = CheckpointStore(store)
    assert copies.checkpoints() == ["step-00000004"] and len(copies.begun()) == 2
    shutil.rmtree(together / "killed")
    pretrain(recipe, ranks=2)
    (resume,) = events(together / "killed", "resume")
    assert resume["step"] == 4 and not events(together / "killed", "start")
    expected = losses(together / "slow")
    assert losses(together / "killed") == {step: expected[step] for step in range(5, 13)}
    for place in (together / "killed" / "checkpoints", store):
        assert names(place) == [f"step-{step:08d}" for step in (4, 8, 12)]
        assert not any(problems(place / name) for name in names(place))
