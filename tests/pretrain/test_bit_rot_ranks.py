"""A byte that rots in any file of a checkpoint is found and named by all ranks, and the checkpoint before is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.checkpoints import list_checkpoints, problems
from tests.distributed_helper import run_ranks
from tests.training_cases import pretrain, write_recipe


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_altered_byte_of_any_file_is_found_and_named_by_all_ranks(data: Path, tmp_path: Path, ranks: int) -> None:
    recipe = write_recipe(data, tmp_path / "run", steps=8, training={"micro_batch_size": 1})
    pretrain(recipe, "--data.order", "streams", ranks=ranks)
    folder = tmp_path / "run" / "checkpoints"
    newest, before = list_checkpoints(folder)
    run_ranks(["tests/pretrain/rot_worker.py", str(folder), str(tmp_path / "rot")], ranks=ranks, timeout=180)
    files = sorted(path.name for path in newest.iterdir() if path.stat().st_size)
    assert sum(name.startswith("state-") for name in files) == sum(name.startswith("rng-") for name in files) == ranks
    assert any(name.startswith("carried") for name in files)
    for rank in range(ranks):
        found = json.loads((tmp_path / f"rot-{rank}.json").read_text())
        assert sorted(found) == files
        for name, each in found.items():
            assert each["chosen"] == before.name, name
            assert len(each["said"]) == 1 and str(newest / name) in each["said"][0], name
    assert list_checkpoints(folder) == [newest, before] and problems(newest) == []
