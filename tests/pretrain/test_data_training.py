"""A run on a mixture with a damaged shard: what its logs and checkpoints say, and going on with changed data."""

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.checkpoints import list_checkpoints
from pretrain.data import ShardSet
from pretrain.resume import read_trainer_state
from tests.data_cases import documents, make_shards, make_tokenizer
from tests.training_cases import events, pretrain, recipe_fields


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sets, of which the first has a shard with a bit that is not what it was."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = make_tokenizer(folder)
    sets = {
        name: make_shards(folder / name, tokenizer, documents(60, seed)) for seed, name in enumerate(("web", "code"))
    }
    path = sets["web"].folder / sets["web"].manifest.shards[1].name
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    return sets


def write_recipe(data: dict[str, ShardSet], folder, steps, **changes):
    weights = changes.pop("weights", (0.75, 0.25))
    sources = {
        name: {"train": str(shards.folder), "weight": weight}
        for (name, shards), weight in zip(data.items(), weights, strict=True)
    }
    section = {"sources": sources, "num_workers": 1, **changes}
    fields = recipe_fields(folder, folder, steps=steps, evaluation={"every_tokens": None, "tokens": 1_000_000})
    fields["data"] = section
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(fields))
    return path


def test_a_mixture_with_a_damaged_shard_is_trained_on_logged_and_gone_on_with(data, tmp_path):
    folder, entry = tmp_path / "run", data["web"].manifest.shards[1]
    stopped = pretrain(write_recipe(data, folder, 4), check=False)
    assert stopped.codes == [2] and f"{entry.name}: damaged: expected sha256 {entry.sha256}, found" in stopped.errors[0]

    finished = pretrain(write_recipe(data, folder, 4, on_damage="skip"), ranks=2)
    assert f"skipped as damaged: {entry.name} of data.sources.web" in finished.outputs[0]
    (damage,) = events(folder, "damage")
    assert (damage["shard"], damage["expected"], damage["tokens_lost"]) == (entry.name, entry.sha256, entry.tokens)
    steps = events(folder, "step")
    assert steps[-1]["shares"] == {"web": 0.75, "code": 0.25}
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    curves = {name: [point.value for point in board.Scalars(name)] for name in board.Tags()["scalars"]}
    assert curves["data/share/web"][-1] == pytest.approx(0.75) and len(curves["data/epochs/code"]) == 4
    assert curves["data/skipped_documents"] == [entry.documents] * 4
    assert all(
        0 <= wait < step
        for wait, step in zip(curves["speed/data_seconds"], curves["speed/seconds_per_step"], strict=True)
    )
    cursor = read_trainer_state(list_checkpoints(folder / "checkpoints")[-1]).cursor
    assert [shard.shard for shard in cursor.skipped] == [entry.name]
    assert {name: source.position for name, source in cursor.sources.items()} == {"web": 12, "code": 4}

    changed = write_recipe(data, folder, 6, on_damage="skip", weights=(0.5, 0.5))
    refused = pretrain(changed, check=False)
    assert refused.codes == [2]
    assert "source web: weight 3/4 in the checkpoint, 1/2 now" in refused.errors[0]
    pretrain(changed, "--data.allow_changed", "true")
    (event,) = events(folder, "data_changed")
    assert event["step"] == 4 and len(event["changes"]) == 2
    assert events(folder, "step")[-1]["shares"] == {"web": 16 / 24, "code": 8 / 24}
