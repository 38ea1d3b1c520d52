"""Rows that go on from step to step, in whole runs: by hand, killed, resumed, on other numbers of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model import TitansLM
from pretrain.config import Recipe, load_recipe
from pretrain.data import ShardSet
from pretrain.optimizer import build_optimizer
from tests.data_cases import documents, make_shards, make_tokenizer
from tests.distributed_helper import run_ranks
from tests.order_oracle import epoch_order, padded, permuted, stored_documents
from tests.streams_by_hand import train_by_hand
from tests.training_cases import VOCABULARY, events, losses, make_data, pretrain, recipe_fields

WORKER = "tests/pretrain/train_worker.py"
STEPS, HALF = 10, 4
LANES, LENGTH, GRID = 4, 32, 16
LONG_STEPS, LONG_LANES = 50, 2
CONSTANT = {"kind": "constant", "warmup_tokens": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents about as long as a row."""
    return make_data(tmp_path_factory.mktemp("data"), 150, words=8)


@pytest.fixture(scope="module")
def one_document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a document that is longer than 50 steps."""
    folder = tmp_path_factory.mktemp("document")
    shards = make_shards(folder, make_tokenizer(folder, VOCABULARY), ["".join(documents(40, seed=3))])
    assert shards.documents == 1 and shards.tokens > LONG_LANES * LONG_STEPS * GRID
    return shards.folder


def write(fields: dict[str, Any], name: str) -> Path:
    """The recipe as a file beside the run's folder."""
    path = Path(fields["folder"]).with_name(f"{name}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(fields))
    return path


def make_recipe(data: Path, folder: Path, *, steps: int = STEPS, order: str = "streams", **sections: Any) -> Path:
    """Four lanes of 32 tokens over many documents, with an evaluation and a checkpoint on the way."""
    step = LANES * LENGTH
    often = {"checkpoint": {"every_tokens": step * HALF}, "evaluation": {"every_tokens": step * 3, "tokens": 100}}
    fields = recipe_fields(data, folder, steps=steps, schedule=CONSTANT, **often, **sections)
    fields["data"] |= {"order": order, "reset_memory": True}
    return write(fields, f"{folder.name}-{steps}")


def document_recipe(document: Path, folder: Path) -> Path:
    """Two lanes of 16 tokens over one document, each 50 steps long, whose memory is never reset."""
    step = LONG_LANES * GRID
    fields = recipe_fields(
        document.parent,
        folder,
        schedule=CONSTANT,
        training={"tokens": LONG_STEPS * step, "sequence_length": GRID, "batch_tokens": step},
        checkpoint={"every_tokens": 10 * step},
    )
    fields["data"] = {"train": str(document), "order": "streams", "num_workers": 1}
    del fields["evaluation"]
    return write(fields, folder.name)


@pytest.fixture(scope="module")
def runs(data: Path, one_document: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On one process: the document; many documents, whole and by segments. On two: the same, and gone on with from the
    one's checkpoint. On one again: gone on with from the two's.
    """
    folder = tmp_path_factory.mktemp("runs")
    segments = {"training": {"segment_length": GRID}}
    sharded = {"parallel": {"zero_stage": 3}, "training": {"micro_batch_size": 1, "segment_length": GRID}}
    alone = [
        document_recipe(one_document, folder / "document"),
        make_recipe(data, folder / "one"),
        make_recipe(data, folder / "segments", **segments),
        make_recipe(data, folder / "rows", steps=HALF, order="rows"),
    ]
    run_ranks([WORKER, *map(str, alone)], ranks=1, timeout=300)
    go_on(folder, "one", "one-then-two")
    two = [make_recipe(data, folder / "two", **sharded), make_recipe(data, folder / "one-then-two")]
    run_ranks([WORKER, *map(str, two)], ranks=2, timeout=300)
    go_on(folder, "two", "two-then-one")
    run_ranks([WORKER, str(make_recipe(data, folder / "two-then-one"))], ranks=1, timeout=300)
    return folder


def go_on(folder: Path, run: str, other: str) -> None:
    """Begin another run with a run's checkpoint in its middle."""
    name = f"step-{2 * HALF:08d}"
    shutil.copytree(folder / run / "checkpoints" / name, folder / other / "checkpoints" / name)


def trained_by_hand(recipe: Recipe, lanes: list[list[tuple[int, int, bool]]], steps: int) -> list[float]:
    """The losses of steps on lanes of (input, target, whether a document begins)."""
    torch.manual_seed(recipe.seed)
    model = TitansLM(recipe.model)
    optimizer = build_optimizer(model, recipe.optimizer, torch.device("cpu"))
    inputs, targets, resets = (torch.tensor([[t[n] for t in lane] for lane in lanes]) for n in range(3))
    clip = recipe.optimizer.gradient_clip
    return train_by_hand(model, optimizer, inputs, targets, resets, steps=steps, clip=clip)


def lanes_of(stream: list[tuple[int, int, bool]], count: int, length: int, steps: int) -> list:
    """The first steps of each lane's share of an epoch's stream."""
    rows = len(stream) // length // count
    assert rows >= steps
    shares = [stream[lane * rows * length : (lane * rows + steps) * length] for lane in range(count)]
    return [[(*share[0][:2], True), *share[1:]] for share in shares]


@pytest.fixture(scope="module")
def stream(data: Path) -> list[tuple[int, int, bool]]:
    """The first epoch's padded documents."""
    shards = ShardSet.open(data / "train")
    texts = stored_documents(shards)
    return padded(texts, epoch_order(len(texts), 0, 0), shards.tokenizer.eos_id, GRID)


@pytest.fixture(scope="module")
def many_lanes(stream: list) -> list:
    return lanes_of(stream, LANES, LENGTH, STEPS)


def test_fifty_steps_on_one_document_are_those_by_hand(runs: Path, one_document: Path) -> None:
    (text,) = stored_documents(ShardSet.open(one_document))
    stream = [(*pair, False) for pair in zip(text, text[1:], strict=False)]
    lanes = lanes_of(stream, LONG_LANES, GRID, LONG_STEPS)
    expected = trained_by_hand(load_recipe(runs / "document.yaml"), lanes, LONG_STEPS)
    found = losses(runs / "document")
    assert list(found) == list(range(1, LONG_STEPS + 1))
    assert list(found.values()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("run", ["one", "segments", "two"])
def test_steps_on_many_documents_are_those_by_hand(runs: Path, many_lanes: list, run: str) -> None:
    begin = [[step for step, triple in enumerate(lane) if triple[2]] for lane in many_lanes]
    assert sum(map(len, begin)) > 20 and any(step % LENGTH for lane in begin for step in lane)
    expected = trained_by_hand(load_recipe(runs / f"{run}-{STEPS}.yaml"), many_lanes, STEPS)
    assert list(losses(runs / run).values()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("run", "whole"), [("one-then-two", "one"), ("two-then-one", "two")])
def test_another_number_of_ranks_goes_on(runs: Path, run: str, whole: str) -> None:
    assert [event["step"] for event in events(runs / run, "resume")] == [2 * HALF]
    expected = {step: loss for step, loss in losses(runs / whole).items() if step > 2 * HALF}
    assert len(expected) == STEPS - 2 * HALF
    assert losses(runs / run) == pytest.approx(expected, rel=1e-5)


def test_a_killed_run_goes_on_bit_for_bit(one_document: Path, runs: Path, tmp_path: Path) -> None:
    """With another number of loader workers."""
    folder = tmp_path / "run"
    recipe = document_recipe(one_document, folder)
    killed = pretrain(recipe, check=False, kill_when=lambda: len(losses(folder)) >= LONG_STEPS // 2)
    assert killed.codes == [-9] and not events(folder, "done")
    pretrain(recipe, "--data.num_workers", "3")
    (resume,) = events(folder, "resume")
    assert 0 < resume["step"] < LONG_STEPS
    assert losses(folder) == losses(runs / "document")


def test_padding_is_counted_in_the_log_and_in_tensorboard(runs: Path, many_lanes: list) -> None:
    expected = [
        sum(target == -100 for lane in many_lanes for _, target, _ in lane[step * LENGTH : (step + 1) * LENGTH])
        for step in range(STEPS)
    ]
    assert sum(expected) > 0
    assert [event["padded_tokens"] for event in events(runs / "two", "step")] == expected
    reader = EventAccumulator(str(runs / "two" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [point.value for point in reader.Scalars("data/padded_tokens")] == expected
    assert "padded_tokens" not in events(runs / "document", "step")[0]


def test_rows_that_stand_by_themselves_have_their_memory_reset_too(runs: Path, stream: list) -> None:
    count = len(stream) // LENGTH
    numbers = [permuted(sample, count, "rows 0 0") for sample in range(HALF * LANES)]
    rows = [stream[number * LENGTH : (number + 1) * LENGTH] for number in numbers]
    assert sum(triple[2] for row in rows for triple in row[1:]) > 4
    begun = [[(*row[0][:2], True), *row[1:]] for row in rows]
    lanes = [[triple for row in begun[lane::LANES] for triple in row] for lane in range(LANES)]
    expected = trained_by_hand(load_recipe(runs / f"rows-{HALF}.yaml"), lanes, HALF)
    assert list(losses(runs / "rows").values()) == pytest.approx(expected, rel=1e-5)
    assert not list((runs / "rows").glob("checkpoints/*/carried-*"))
    assert len(list((runs / "one").glob(f"checkpoints/step-{STEPS:08d}/carried-*"))) == 1


def test_the_log_and_the_dry_run_say_what_is_read(runs: Path) -> None:
    text = pretrain(runs / f"one-{STEPS}.yaml", "--dry-run").outputs[0]
    (line,) = [line for line in text.splitlines() if "passes over them" in line]
    assert "padded to multiples of 16: " in line and "% of what is read is padding" in line
    (start,) = events(runs / "one", "start")
    assert line.endswith(start["data"])
    assert "4 rows that go on from step to step" in text


def test_another_number_of_rows_is_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "one" / "checkpoints", tmp_path / "checkpoints")
    options = ["--folder", str(tmp_path), "--training.tokens", "10K", "--training.batch_tokens", "64"]
    refused = pretrain(runs / f"one-{STEPS}.yaml", *options, check=False)
    assert refused.codes == [2], refused.report()
    assert (
        "4 rows of a step go on from the step before, and with this recipe's data.order streams 2 do"
        in (refused.errors[0])
    )


def test_rows_that_stood_by_themselves_do_not_begin_to_go_on(data: Path, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "rows" / "checkpoints", tmp_path / "run" / "checkpoints")
    refused = pretrain(make_recipe(data, tmp_path / "run"), check=False)
    assert refused.codes == [2], refused.report()
    assert "no rows of a step go on from the step before" in refused.errors[0]
