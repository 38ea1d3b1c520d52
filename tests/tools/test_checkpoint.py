"""Checkpoints looked at, checked, and rewritten for another layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from parallel.mesh import Layout
from parallel.state_files import INDEX_FILE, KINDS, StateReader, state_file
from pretrain import uploads
from pretrain.checkpoint_store import CheckpointStore, StoreError
from pretrain.checkpoints import problems
from pretrain.folder_lock import locked
from tests.checkpoint_cases import STEP, make_checkpoint, small_model, value_of
from tools.checkpoint.__main__ import main
from tools.checkpoint.reshape import rank_shares


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    """Checkpoints by the layout that wrote them, to be left as they are."""
    layouts = (Layout(), Layout(data=2, tensor=2))
    return {layout: make_checkpoint(tmp_path_factory.mktemp("run") / "run", layout) for layout in layouts}


def test_inspect_says_what_a_checkpoint_holds(saved: dict[Layout, Path], capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = saved[Layout(data=2, tensor=2)]
    run = checkpoint.parent.parent
    assert main(["inspect", str(run), "--parameters"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for expected in (
        str(checkpoint),
        f"step {STEP} (1 of them skipped)",
        "tokens 896",
        "phase the only one",
        "mac, 2 layers of width 32, 2 heads, vocabulary 400",
        "4 rank(s); its state files by pipeline 1 x data 2 x sequence 1 x tensor 2",
        "zero_stage 1, precision fp32",
        "row 28 of 32 tokens each, order rows, seed 0, data 0123456789ab",
        "carried rows 0",
        "4 state (",
        "embedding.weight [400, 32] 2 slices along axis 0",
        "norm.weight [32] whole",
    ):
        assert expected in text, expected
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    config = small_model(run)
    assert found["parameters"] == sum(value_of(config, name, "weight").numel() for name in found["tensors"])
    assert found["files"]["state"]["bytes"] >= 12 * found["parameters"]


def test_verify_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint(tmp_path / "run", Layout(data=3))
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert "whole" in capsys.readouterr().out
    altered = checkpoint / state_file(1, 3)
    content = bytearray(altered.read_bytes())
    content[-1] ^= 1
    altered.write_bytes(content)
    assert main(["verify", str(checkpoint)]) == 2
    captured = capsys.readouterr()
    assert "1 problem(s)" in captured.out and f"{altered} is altered" in captured.err
    altered.unlink()
    assert main(["verify", str(checkpoint)]) == 2
    assert f"{altered} is missing" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_inspect_names_a_damaged_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint(tmp_path / "run", Layout())
    (checkpoint / INDEX_FILE).write_text('{"version": 2}')
    assert main(["inspect", str(checkpoint)]) == 2
    assert f"{checkpoint / INDEX_FILE} is damaged (KeyError: 'parameters')" in capsys.readouterr().err


def test_verify_finds_parts_that_were_never_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that have the bytes that were written, and do not hold everything."""
    monkeypatch.setattr("tests.checkpoint_cases.KINDS", KINDS[:2])
    checkpoint = make_checkpoint(tmp_path / "run", Layout())
    assert problems(checkpoint) == []
    assert main(["verify", str(checkpoint)]) == 2
    assert "exp_avg_sq of embedding.weight is not whole" in capsys.readouterr().err


@pytest.mark.parametrize(("layout", "stage"), [(Layout(), 0), (Layout(data=2, tensor=2), 1), (Layout(), 3)], ids=str)
def test_reshape_gives_each_rank_its_file_and_changes_no_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], saved: dict[Layout, Path], layout: Layout, stage: int
) -> None:
    checkpoint, output = saved[layout], tmp_path / "new" / "checkpoint"
    assert main(["reshape", str(checkpoint), "--output", str(output), "--ranks", "3", "--zero-stage", str(stage)]) == 0
    assert "3 state file(s)" in capsys.readouterr().out
    assert main(["verify", str(output)]) == 0
    others = {path.name for path in checkpoint.iterdir() if not path.name.startswith(("state", "manifest"))}
    assert {path.name for path in output.iterdir() if not path.name.startswith(("state", "manifest"))} == others
    assert all((output / name).read_bytes() == (checkpoint / name).read_bytes() for name in others)
    config = small_model(checkpoint.parent.parent)
    with StateReader(output) as reader:
        assert (reader.optimizer_step, reader.layout) == (STEP, Layout(data=3))
        for name, shape in reader.shapes.items():
            for kind in KINDS:
                expected = value_of(config, name, kind).flatten()
                assert torch.equal(reader.read(kind, name, 0, shape.numel()), expected)
    for rank in range(1 if stage == 0 else 3):
        with StateReader(output, nearest=rank / 2) as reader:
            for share in rank_shares(config, Layout(data=3), rank, stage, context=32):
                reader.read("exp_avg", share.parameter, share.start, share.numel, share.part)
            assert reader.num_open == 1
    sizes = [(output / state_file(rank, 3)).stat().st_size for rank in range(3)]
    assert stage == 0 or max(sizes) < 1.2 * min(sizes)


def test_reshape_balances_stages_as_the_recipe_says(tmp_path: Path) -> None:
    model = {"num_layers": 6, "vocab_size": 4000}
    fields = {"parallel": {"pipeline": 2, "balance_stages": "parameters"}, "model": model}
    checkpoint, output = make_checkpoint(tmp_path / "run", Layout(), **fields), tmp_path / "new"
    assert main(["reshape", str(checkpoint), "--output", str(output), "--ranks", "2", "--pipeline", "2"]) == 0
    config, layout = small_model(tmp_path / "run", **fields), Layout(pipeline=2)
    first, other = (rank_shares(config, layout, 0, 1, context=32, balance=by) for by in ("parameters", "flops"))
    assert {share.parameter for share in first} != {share.parameter for share in other}
    with safe_open(output / state_file(0, 2), framework="pt") as file:
        assert {key.split(":")[1] for key in file.keys()} == {share.parameter for share in first}


def test_files_that_are_streamed_are_those_of_the_library(tmp_path: Path, saved: dict[Layout, Path]) -> None:
    checkpoint = saved[Layout()]
    main(["reshape", str(checkpoint), "--output", str(tmp_path / "again"), "--ranks", "1", "--zero-stage", "1"])
    written, streamed = (load_file(folder / state_file(0, 1)) for folder in (checkpoint, tmp_path / "again"))
    assert written.keys() == streamed.keys()
    assert all(torch.equal(streamed[key], values) for key, values in written.items())
    with safe_open(tmp_path / "again" / state_file(0, 1), framework="pt") as file:
        assert all(file.get_tensor(key).dtype == torch.float32 for key in file.keys())


def test_reshape_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint(tmp_path / "run", Layout())

    def refused(*options: str, output: str = "new") -> str:
        assert main(["reshape", str(checkpoint), "--output", str(tmp_path / output), *options]) == 2
        return capsys.readouterr().err

    assert "is there already" in refused("--ranks", "1", output="run")
    assert "3 ranks cannot be laid out" in refused("--ranks", "3", "--tensor", "2")
    assert "zero_stage 2 with pipeline 2" in refused("--ranks", "2", "--pipeline", "2", "--zero-stage", "2")
    assert "model.variant is mac" in refused("--ranks", "2", "--sequence", "2")
    (checkpoint / "model.json").write_text("{}")
    assert "model.json has 2 bytes" in refused("--ranks", "2")
    assert not (tmp_path / "new").exists() and not (tmp_path / ".partial-new").exists()


def test_upload_brings_to_the_store_what_a_run_could_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path / "run", Layout(data=2), checkpoint={"upload": str(tmp_path / "store")})
    assert main(["upload", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'store'} holds {checkpoint.name}\n"
    copy = tmp_path / "store" / checkpoint.name
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: path.read_bytes() for path in checkpoint.iterdir()
    }
    assert not (tmp_path / "run" / "run.jsonl").exists()
    (copy / "manifest.json").unlink()
    monkeypatch.setattr(uploads, "LAST_PAUSE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "put", lambda *_: (_ for _ in ()).throw(StoreError("503")))
        assert main(["upload", str(tmp_path / "run")]) == 2
    assert "the last checkpoint is not uploaded: 503" in capsys.readouterr().err
    assert not (copy / "manifest.json").exists()
    assert main(["upload", str(tmp_path / "run")]) == 0 and (copy / "manifest.json").exists()


def test_upload_takes_nothing_back_that_a_store_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is behind its store, or of another run with the same steps."""
    run = tmp_path / "run"
    checkpoint = make_checkpoint(run, Layout(), checkpoint={"upload": str(tmp_path / "store")})
    assert main(["upload", str(run)]) == 0
    copy = tmp_path / "store" / checkpoint.name
    manifest = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(manifest + " ")
    assert main(["upload", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"{copy}: is not the checkpoint of this step in {checkpoint.parent} (their manifest.json differ)" in said
    assert (copy / "manifest.json").read_text() != manifest
    (copy / "manifest.json").write_text(manifest)
    copy.rename(copy.with_name("step-00000099"))
    (tmp_path / "store" / "latest").write_text("step-00000099\n")
    assert main(["upload", str(run)]) == 2
    said = capsys.readouterr().err
    assert (
        f"holds newer checkpoints (step-00000099) than {checkpoint.parent}, whose newest is {checkpoint.name}" in said
    )
    assert (tmp_path / "store" / "latest").read_text() == "step-00000099\n" and not copy.exists()


def test_upload_is_not_done_where_an_older_checkpoint_fails_and_leaves_out_what_the_store_would_not_keep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = tmp_path / "run", tmp_path / "store"
    newest = make_checkpoint(run, Layout(), checkpoint={"upload": str(store), "upload_keep": 2})
    older = [newest.with_name(f"step-{step:08d}") for step in (6, 5, 4)]
    for path in older:
        shutil.copytree(newest, path)
    (older[2] / "stays").touch()
    put = CheckpointStore.put

    def refusing(self: CheckpointStore, checkpoint: str, *arguments: Any) -> None:
        if checkpoint == older[2].name:
            raise StoreError("503")
        put(self, checkpoint, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "put", refusing)
        assert main(["upload", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"{older[2].name} not uploaded: 503. What is not uploaded stays here" in said and "run goes on" not in said
    assert f"error: {store}: does not have {older[2].name}, for the reason above" in said
    assert main(["upload", str(run)]) == 0
    assert capsys.readouterr().out == f"{store} holds {newest.name}, {older[0].name}, {older[2].name}\n"


def test_upload_leaves_alone_what_a_run_is_training_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which may be uploading, or removing, the same files."""
    make_checkpoint(tmp_path / "run", Layout(), checkpoint={"upload": str(tmp_path / "store")})
    with locked(tmp_path / "run", busy="", place=""):
        assert main(["upload", str(tmp_path / "run")]) == 2
    assert f"folder {tmp_path / 'run'}: a run is training in it; wait for its end" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
    assert main(["upload", str(tmp_path / "run")]) == 0


def test_upload_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upload", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    make_checkpoint(tmp_path / "run", Layout())
    assert main(["upload", str(tmp_path / "run")]) == 2
    assert "recipe.yaml: names no checkpoint.upload" in capsys.readouterr().err
