"""`python -m pretrain` as a user meets it: help, dry runs, exit codes, and what is refused before anything is lost."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pretrain.__main__ import main
from pretrain.command_line import parse
from pretrain.config import load_recipe
from pretrain.phases import load_phases
from pretrain.quantities import size_text
from tests.training_cases import events, losses, make_data, pretrain, write_recipe


@pytest.fixture(scope="module")
def finished_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 8 steps with checkpoints at 4 and 8; its recipe lies beside it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    pretrain(write_recipe(data, folder, steps=8))
    return folder


@pytest.fixture
def run_copy(finished_run: Path, data: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    write_recipe(data, folder, steps=8)
    return folder


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / "step-00000008"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_help_has_every_field_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("--model.memory.chunk INT", "--parallel.zero_stage 0|1|2|3  (default: 1)", "--training.tokens TOKENS"):
        assert part in text
    assert "Largest global norm of the gradient; 0 turns clipping off." in text
    assert "--training.boundary_states auto|device|host|disk" in text


def test_a_dry_run_prints_a_recipe_and_touches_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    path = write_recipe(data, folder)
    assert main([str(path), "--dry-run", "--ranks", "2", "--optimizer.lr=5e-4"]) == 0
    text = capsys.readouterr().out
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert load_recipe(again) == load_recipe(path, [("optimizer.lr", "5e-4")])
    for line in (
        "# parameters ",
        "# FLOPs a token ",
        "# memory of a rank ",
        "2 rank(s) x 1 micro-batch(es) x 2 row(s)",
        "2 are kept; written from copies in the hosts' memory",
    ):
        assert line in text
    assert "passes over them" in text
    assert not folder.exists()


def test_a_dry_run_counts_parameters_and_shares_them_out(data: Path, tmp_path: Path) -> None:
    from model import TitansLM
    from pretrain.plan import estimate_memory, num_parameters

    recipe = load_recipe(write_recipe(data, tmp_path / "run"), [("parallel.zero_stage", "3")])
    parameters = num_parameters(recipe.model)
    assert parameters == TitansLM(recipe.model).num_parameters()
    one, four = (estimate_memory(recipe, parameters, ranks) for ranks in (1, 4))
    assert one.parameters == 4 * parameters
    assert one.optimizer == 12 * parameters
    assert four.parameters == parameters
    assert four.activations == one.activations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training.mirco_batch_size", "2"], "did you mean micro_batch_size?"),
        (["--training.batch_tokens", "100", "--dry-run"], "64 or 128 would fit"),
        (["--model.segment", "20"], "segment is 20"),
        (["--optimizer.lr"], "--optimizer.lr has no value"),
        (["stray"], "unexpected argument 'stray'"),
        (["--dryrun"], "--dryrun: unknown; did you mean dry-run?"),
        (["--ranks", "2"], "--ranks belongs to --dry-run"),
        (["--model.vocab_size", "100", "--dry-run"], "set model.vocab_size to 400"),
    ],
)
def test_mistakes_end_with_code_2_and_the_fix(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    path = write_recipe(data, tmp_path / "run")
    assert main([str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_options_may_stand_before_the_recipe() -> None:
    before = parse(["--optimizer.lr", "5e-4", "--name=a", "--resume", "never", "recipe.yaml", "--seed", "-1"])
    assert before == parse(["recipe.yaml", "--optimizer.lr=5e-4", "--name", "a", "--seed=-1", "--resume=never"])
    assert before.overrides == [("optimizer.lr", "5e-4"), ("name", "a"), ("seed", "-1")]
    assert (str(before.recipe), before.resume) == ("recipe.yaml", "never")


def test_two_ranks_say_a_mistake_once(data: Path, tmp_path: Path) -> None:
    path = write_recipe(data, tmp_path / "run")
    shutil.copytree(data / "train", tmp_path / "shards")
    shard = next((tmp_path / "shards").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    finished = pretrain(path, "--data.train", str(tmp_path / "shards"), ranks=2, check=False)
    assert finished.codes == [2, 2]
    assert shard.name in finished.errors[0]
    assert finished.errors[0].count("error:") == 1
    assert "error:" not in finished.errors[1]


def test_an_altered_shard_ends_both_ranks(data: Path, tmp_path: Path) -> None:
    path = write_recipe(data, tmp_path / "run")
    shutil.copytree(data / "train", tmp_path / "shards")
    shard = sorted((tmp_path / "shards").glob("*.tar"))[-1]
    flip(shard)
    finished = pretrain(path, "--data.train", str(tmp_path / "shards"), ranks=2, check=False)
    assert finished.codes == [2, 2]
    assert f"{shard}: damaged: expected sha256" in finished.errors[0]
    assert "error:" not in finished.errors[1]


def test_an_altered_shard_of_a_later_phase_ends_the_run_before_its_first_step(data: Path, tmp_path: Path) -> None:
    folder, later = tmp_path / "run", tmp_path / "shards"
    shutil.copytree(data / "train", later)
    shard = sorted(later.glob("*.tar"))[0]
    flip(shard)
    path = write_recipe(data, folder)
    phases = [{"name": "sound"}, {"name": "damaged", "data": {"train": str(later)}}]
    path.write_text(path.read_text() + yaml.safe_dump({"phases": phases}))
    finished = pretrain(path, check=False)
    assert finished.codes == [2]
    assert f"phase damaged (2 of 2): {shard}: damaged: expected sha256" in finished.errors[0]
    read = [data / "train", data / "validation", later]
    total = sum(file.stat().st_size for place in read for file in place.glob("*.tar"))
    assert f"checking the sha256 of {size_text(total)} of shards in {', '.join(map(str, read))}" in (
        finished.outputs[0] + finished.errors[0]
    )
    assert [event["event"] for event in events(folder)] == ["error"]
    phases = load_phases(path, [("data.verify", "sizes")])
    assert not any(phase.recipe.data.to_verify() for phase in phases), "nothing is to be read through"


def test_a_damaged_newest_checkpoint_is_passed_over_loudly(run_copy: Path) -> None:
    flip(newest(run_copy) / "state-00000-of-00001.safetensors")
    before = losses(run_copy)
    finished = pretrain(run_copy.with_suffix(".yaml"))
    assert "step-00000008 is damaged and not used" in finished.errors[0]
    assert "state-00000-of-00001.safetensors is altered" in finished.errors[0]
    assert [event["step"] for event in events(run_copy, "resume")] == [4]
    assert losses(run_copy) == before, "the steps after the one before are the same steps"
    assert newest(run_copy).is_dir()
    assert (run_copy / "checkpoints" / "damaged-step-00000008").is_dir()


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(run_copy: Path) -> None:
    (newest(run_copy) / "trainer.json").unlink()
    finished = pretrain(run_copy.with_suffix(".yaml"), "--resume", str(newest(run_copy)), check=False)
    assert finished.codes == [2]
    assert "trainer.json" in finished.errors[0]
    assert newest(run_copy).is_dir()


def test_losses_that_stay_not_finite_end_the_run_and_leave_the_checkpoints_of_before(run_copy: Path) -> None:
    options = ["--optimizer.lr", "1e30", "--schedule.warmup_tokens", "0", "--training.tokens", "2048"]
    finished = pretrain(run_copy.with_suffix(".yaml"), *options, check=False)
    assert finished.codes == [2]
    assert "error: step 12: loss nan, gradient norm inf: not finite, the 3rd step in a row" in finished.errors[0]
    assert "Traceback" not in finished.errors[0]
    assert (run_copy / "checkpoints" / "latest").read_text() == "step-00000012\n"
    assert (run_copy / "checkpoints" / "step-00000008").is_dir()
    assert [event["step"] for event in events(run_copy, "skip")] == [10, 11, 12]
    assert events(run_copy)[-1]["type"] == "DivergedError"


def test_never_refuses_a_folder_that_holds_checkpoints(run_copy: Path) -> None:
    finished = pretrain(run_copy.with_suffix(".yaml"), "--resume", "never", check=False)
    assert finished.codes == [2]
    assert "holds 2 checkpoint(s) of an earlier run" in finished.errors[0]
    assert newest(run_copy).is_dir()


def test_another_models_checkpoint_is_refused_by_field(run_copy: Path) -> None:
    finished = pretrain(run_copy.with_suffix(".yaml"), "--model.ffn_dim", "64", check=False)
    assert finished.codes == [2]
    assert "model.ffn_dim is 48 in the checkpoint, 64 in the recipe" in finished.errors[0]
    assert newest(run_copy).is_dir()


def test_another_tokenizers_or_datas_checkpoint_is_refused(run_copy: Path, tmp_path: Path) -> None:
    others = make_data(tmp_path / "others", number=150)  # the same tokenizer, other documents
    recipe = run_copy.with_suffix(".yaml")
    options = ["--data.train", str(others / "train"), "--data.validation", str(others / "validation")]
    refused = pretrain(recipe, *options, "--training.tokens", "2048", check=False)
    assert refused.codes == [2]
    assert "fingerprint" in refused.errors[0]

    from tests.data_cases import documents, write_jsonl
    from tools.documents import DocumentReader
    from tools.shards.build import build
    from tools.tokenizer import train

    texts = DocumentReader([write_jsonl(tmp_path / "texts.jsonl", documents(200, seed=5))])
    (tmp_path / "other.model").write_bytes(train(texts, 390))
    build(texts, tmp_path / "other.model", tmp_path / "retokenized", shard_tokens=8000, validation_fraction=0.1)
    shards = tmp_path / "retokenized"
    options = ["--data.train", str(shards / "train"), "--data.validation", str(shards / "validation")]
    refused = pretrain(recipe, *options, check=False)
    assert refused.codes == [2]
    assert "was trained with another tokenizer" in refused.errors[0]


@pytest.fixture
def small_disk(mount_disk: Callable[[str], Path]) -> Path:
    """A file system of 1.5 MB."""
    return mount_disk("1500k")


def test_a_full_disk_ends_the_run_with_its_checkpoints_whole(data: Path, small_disk: Path, tmp_path: Path) -> None:
    recipe = write_recipe(data, tmp_path / "run")
    fields = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(fields | {"folder": str(small_disk)}))
    finished = pretrain(recipe, "--checkpoint.keep", "9", ranks=2, check=False)
    assert finished.codes == [74, 74], finished.report()
    assert "no space left" in finished.errors[0]
    assert list(losses(small_disk)) == list(range(1, 13)), "it ends where the last checkpoint can't be written"
    assert events(small_disk, "save_failed")[-1]["step"] == 12
    kept = sorted(path.name for path in (small_disk / "checkpoints").iterdir())
    assert kept[0] == "latest"
    assert kept[1:] == [f"step-{step:08d}" for step in range(4, 4 * len(kept), 4)]
    # Room again: it goes on from the newest.
    larger = ["mount", "-o", "remount,size=20m", str(small_disk)]
    subprocess.run(larger, check=True)
    pretrain(recipe, "--checkpoint.keep", "9", ranks=2)
    assert events(small_disk, "resume")[-1]["step"] == 4 * (len(kept) - 1)
    assert events(small_disk, "done")
