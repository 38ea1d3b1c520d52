"""Synthetic rows: every answer can be worked out from its row, splits are disjoint, any layout gives the same rows."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from kernels.cross_entropy import token_scores
from parallel.engine import IGNORED, Scored
from parallel.mesh import Mesh
from parallel.process import World
from pretrain.config import load_recipe
from pretrain.data import Batch, Cursor, Division
from pretrain.data.synthetic import (
    ASK,
    MARK,
    NUM_SPECIAL,
    PAD,
    Copy,
    Draws,
    HeldOutDraws,
    Passkey,
    Permutations,
    Recall,
    SyntheticSource,
    Task,
)
from pretrain.errors import UserError
from pretrain.evaluation import evaluate
from tests.training_cases import recipe_fields

ROWS = 200
TASKS: dict[str, Task] = {
    "recall": Recall(),
    "recall-few": Recall(num_pairs=5, num_queries=2, filler=[0, 9], num_keys=5, num_values=3, num_filler=1),
    "passkey": Passkey(filler=[10, 40]),
    "passkey-first": Passkey(filler=30, length=1, depth=0.0),
    "passkey-middle": Passkey(filler=30, depth=0.5),
    "copy": Copy(filler=[0, 20], length=7),
    "permutations": Permutations(length=[1, 20]),
    "permutations-3": Permutations(degree=3, length=[9, 20], every=4),
}


def draw(task: Task, sample: int, split: str = "train", seed: int = 0) -> tuple[list[int], list[int]]:
    tokens, targets = task.draw(Draws(seed, split, sample))
    return tokens.tolist(), targets.tolist()


def recall_answers(task: Recall, tokens: list[int]) -> dict[int, int]:
    """What belongs at each position, read off the row alone: the pairs are a dictionary."""
    asks = tokens.index(ASK)
    written = dict(zip(tokens[0 : 2 * task.num_pairs : 2], tokens[1 : 2 * task.num_pairs : 2], strict=True))
    assert len(written) == task.num_pairs
    values_from, filler_from = NUM_SPECIAL + task.num_keys, NUM_SPECIAL + task.num_keys + task.num_values
    assert all(NUM_SPECIAL <= key < values_from <= value < filler_from for key, value in written.items())
    filler = tokens[2 * task.num_pairs : asks]
    assert task.filler[0] <= len(filler) <= task.filler[1]
    assert all(filler_from <= token < task.vocab_size for token in filler)
    questions = {place: tokens[place] for place in range(asks + 1, len(tokens), 2)}
    assert len(set(questions.values())) == task.num_queries
    return {place: written[key] for place, key in questions.items()}


def passkey_answers(task: Passkey, tokens: list[int]) -> dict[int, int]:
    mark, asks = tokens.index(MARK), tokens.index(ASK)
    digits = tokens[mark + 1 : mark + 1 + task.length]
    filler = tokens[:mark] + tokens[mark + 1 + task.length : asks]
    first = NUM_SPECIAL + task.num_digits
    assert all(NUM_SPECIAL <= digit < first for digit in digits)
    assert all(first <= token < task.vocab_size for token in filler)
    assert task.filler[0] <= len(filler) <= task.filler[1]
    assert task.depth is None or mark == round(task.depth * len(filler))
    return {asks + number: digit for number, digit in enumerate(digits)}


def copy_answers(task: Copy, tokens: list[int]) -> dict[int, int]:
    asks = tokens.index(ASK)
    assert task.filler[0] <= asks - task.length <= task.filler[1]
    return {asks + number: symbol for number, symbol in enumerate(tokens[: task.length])}


def permutation_answers(task: Permutations, tokens: list[int]) -> dict[int, int]:
    """Moves things about, one letter after another, and names the permutation that they have come to."""
    group = list(itertools.permutations(range(task.degree)))
    assert task.length[0] <= len(tokens) <= task.length[1]
    things = list(range(task.degree))
    answers = {}
    for place, token in enumerate(tokens):
        letter = group[token - NUM_SPECIAL]
        things = [letter[thing] for thing in things]
        if (place + 1) % task.every == 0:
            answers[place] = NUM_SPECIAL + group.index(tuple(things))
    return answers


ORACLES: dict[type[Task], Callable[..., dict[int, int]]] = {
    Recall: recall_answers,
    Passkey: passkey_answers,
    Copy: copy_answers,
    Permutations: permutation_answers,
}


@pytest.mark.parametrize("name", TASKS)
def test_each_answer_follows_from_its_row_and_nothing_else_is_a_target(name: str) -> None:
    task = TASKS[name]
    longest = 0
    for sample in range(ROWS):
        tokens, targets = draw(task, sample)
        assert len(tokens) == len(targets) <= task.row_tokens
        assert all(0 <= token < task.vocab_size for token in tokens) and PAD not in tokens
        expected = ORACLES[type(task)](task, tokens)
        assert {place: target for place, target in enumerate(targets) if target != IGNORED} == expected
        longest = max(longest, len(tokens))
    assert longest == task.row_tokens, "row_tokens is the longest row, not a bound above it"


@pytest.mark.parametrize("name", TASKS)
def test_a_row_depends_on_seed_split_and_number_alone(name: str) -> None:
    task = TASKS[name]
    assert draw(task, 7) == draw(task, 7)
    if name not in ("recall-few", "passkey-first"):  # which have so few rows that some may well be alike
        others = [draw(task, 8), draw(task, 7, seed=1), draw(task, 7, split="held-out")]
        assert draw(task, 7) not in others


def test_training_and_held_out_rows_are_disjoint() -> None:
    seen = {split: {tuple(draw(TASKS["recall"], n, split)[0]) for n in range(2000)} for split in ("train", "held-out")}
    assert len(seen["train"]) == len(seen["held-out"]) == 2000
    assert not seen["train"] & seen["held-out"]


def test_draws_are_uniform_and_distinct_where_they_should_be() -> None:
    draws = Draws(-3, "train", 10**15)
    numbers = draws.below(10, 20_000)
    assert np.bincount(numbers, minlength=10) == pytest.approx(2000, abs=5 * math.sqrt(2000))
    firsts = np.zeros((6, 6), int)
    for _ in range(3000):
        chosen = draws.distinct(6, 6)
        assert sorted(chosen) == list(range(6))
        firsts[np.arange(6), chosen] += 1
    assert firsts == pytest.approx(500, abs=5 * math.sqrt(500))
    assert {draws.between(3, 5) for _ in range(100)} == {3, 4, 5}


def test_rows_stay_what_they_are() -> None:
    """Resumed runs count on it: where this fails, raise the generation in the fingerprint, or mend the change."""
    text = json.dumps([draw(task, sample) for task in TASKS.values() for sample in (0, 1, 10**12)])
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "4cd4d46431c440333877c8c3c218a63172fe0669995707099205bfbb70afa048"
    )


def load(source: SyntheticSource, world: int, accumulation: int, *, cursor: Cursor | None = None, length: int = 112):
    return [source.open_loader(Division(length, 3, accumulation, rank, world), cursor) for rank in range(world)]


def step_rows(loaders: list, steps: int) -> list[tuple[list[int], list[int]]]:
    """The rows of the next steps in the order of their global numbers."""
    rows = []
    for _ in range(steps):
        parts = [next(loader) for loader in loaders]
        for micro_batch in range(len(parts[0])):
            for batches in parts:
                batch = batches[micro_batch]
                rows += zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
    return rows


@pytest.mark.parametrize("name", ["recall", "passkey", "permutations"])
def test_any_layout_and_a_resume_over_another_give_the_same_rows(name: str) -> None:
    task, length = TASKS[name], 112
    expected = []
    for sample in range(36):
        tokens, targets = draw(task, sample, seed=4)
        padding = length - len(tokens)
        expected.append((tokens + [PAD] * padding, targets + [IGNORED] * padding))
    first = load(SyntheticSource(task, 4, 2), 2, 1)
    rows = step_rows(first, 3)
    cursor = Cursor.model_validate_json(first[1].cursor().model_dump_json())
    assert cursor.position == 18
    rows += step_rows(load(SyntheticSource(task, 4, 0), 1, 2, cursor=cursor), 3)
    assert rows == expected
    third = load(SyntheticSource(task, 4, 3), 3, 2)
    assert step_rows(third, 2) == expected
    for loader in first + third:
        loader.close()


@pytest.mark.parametrize(
    ("task", "seed", "length", "message"),
    [
        (Recall(num_pairs=9), 0, 112, "data.task is not what the run began with"),
        (Recall(), 1, 112, "set data.seed"),
        (Recall(), 0, 113, "training.sequence_length back"),
    ],
)
def test_a_cursor_of_other_rows_is_refused(task: Task, seed: int, length: int, message: str) -> None:
    (loader,) = load(SyntheticSource(Recall(), 0, 0), 1, 1)
    with pytest.raises(UserError, match=message):
        load(SyntheticSource(task, seed, 0), 1, 1, cursor=loader.cursor(), length=length)


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 4), (2, 3), (3, 5)])
def test_each_held_out_row_is_scored_once_on_any_number_of_ranks(ranks: int, batch_size: int) -> None:
    task = TASKS["recall"]
    options = {"sequence_length": 100, "batch_size": batch_size, "max_tokens": 2050, "world_size": ranks}
    parts = [list(HeldOutDraws(task, 6).batches(rank=rank, **options)) for rank in range(ranks)]
    assert len({len(batches) for batches in parts}) == 1
    rows = []
    for step in zip(*parts, strict=True):
        for batch in step:
            assert batch.tokens.shape == batch.targets.shape == (batch_size, 100)
            rows += zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
    scored = [(tokens, targets) for tokens, targets in rows if any(target != IGNORED for target in targets)]
    expected = [draw(task, sample, "held-out", seed=6) for sample in range(21)]
    assert scored == [(tokens + [PAD] * 4, targets + [IGNORED] * 4) for tokens, targets in expected]


def test_held_out_rows_without_end_are_refused() -> None:
    with pytest.raises(UserError, match=r"evaluation\.tokens: none"):
        HeldOutDraws(Recall(), 0).batches(sequence_length=96, batch_size=1, max_tokens=None)


class Predictor:
    """Stands in for an engine: its model is sure of the token that `guess` names at each position."""

    def __init__(self, vocab_size: int, guess: Callable[[Batch], torch.Tensor]) -> None:
        self.vocab_size, self.guess = vocab_size, guess

    def evaluate(self, batches, *, with_correct: bool, **ways: object) -> Scored:
        assert with_correct and not any(ways.values())
        weight = torch.eye(self.vocab_size)
        totals = np.zeros(3)
        for batch in batches:
            targets = batch.targets.flatten()
            sure = 20 * torch.nn.functional.one_hot(self.guess(batch).flatten(), self.vocab_size).float()
            losses, correct = token_scores(sure, weight, targets, chunk_tokens=100)
            totals += [float(losses.sum()), int((targets != IGNORED).sum()), int(correct.sum())]
        return Scored(totals[0], int(totals[1]), int(totals[2]))


def accuracy(task: Task, guess: Callable[[Batch], torch.Tensor]) -> float:
    engine = Predictor(task.vocab_size, guess)
    alone = Mesh.data_parallel(World(rank=0, size=1, local_rank=0, device=torch.device("cpu")))
    length = task.row_tokens
    result = evaluate(
        engine, HeldOutDraws(task, 0), alone, sequence_length=length, batch_size=8, max_tokens=500 * length
    )
    assert result.bits_per_byte is None and "bits" not in str(result)
    assert result.fields()["accuracy"] == result.correct / result.tokens
    return result.accuracy


@pytest.mark.parametrize("name", ["recall", "passkey", "copy", "permutations-3"])
def test_a_perfect_predictor_is_always_right_and_a_constant_one_as_often_as_chance(name: str) -> None:
    task = TASKS[name]
    assert accuracy(task, lambda batch: batch.targets.clamp(min=0)) == 1.0
    answer = max(target for sample in range(20) for target in draw(task, sample)[1])
    constant = accuracy(task, lambda batch: torch.full_like(batch.tokens, answer))
    assert 0.6 * task.chance < constant < 1.4 * task.chance


def recipe_file(tmp_path: Path) -> Path:
    fields = recipe_fields(Path("none"), tmp_path / "run", training={"sequence_length": 96, "batch_tokens": 768})
    fields["data"] = {"kind": "synthetic", "task": {"kind": "recall"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_a_recipe_of_any_kind_survives_being_written_out(tmp_path: Path) -> None:
    for task in TASKS.values():
        options = [("data.task", json.dumps(task.model_dump(mode="json"))), ("training.sequence_length", "192")]
        recipe = load_recipe(recipe_file(tmp_path), options)
        assert recipe.data.task == task
        (tmp_path / "written.yaml").write_text(recipe.to_yaml())
        assert load_recipe(tmp_path / "written.yaml") == recipe


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"data.kind": "shard"}, "data.kind: 'shard' does not fit: did you mean shards?"),
        ({"data.task.kind": "recal"}, "data.task.kind: 'recal' does not fit: did you mean recall?"),
        ({"data.task": "{}"}, "data.task.kind: missing; give --data.task.kind, one of: recall, passkey, copy"),
        ({"data.task.num_pair": "3"}, "data.task.num_pair: unknown; did you mean num_pairs?"),
        ({"data.train": "x"}, "data.train: unknown"),
        ({"data.task.num_keys": "0"}, "data.task.num_keys: 0 does not fit"),
        ({"data.task.num_keys": "7"}, "data.task: num_pairs 8 is above num_keys 7"),
        ({"data.task.num_queries": "9"}, "data.task: num_queries 9 is above num_pairs 8"),
        ({"data.task.filler": "[4, 3]"}, "data.task.filler: [4, 3] does not fit: the range begins at 4"),
        ({"data.task.filler": "1Ki"}, "training.sequence_length 96 is too short for data.task recall"),
        ({"data.task.filler": "1Ki"}, "takes 1056 tokens: set training.sequence_length to 1056"),
        ({"model.vocab_size": "82"}, "model.vocab_size 82 is smaller than the 83 tokens of data.task recall"),
        ({"evaluation.tokens": "null"}, "evaluation.tokens is none"),
        ({"data.task": "{kind: permutations, every: 40}"}, "data.task: every 40 is above length 32"),
    ],
)
def test_a_misfit_is_refused_by_name(tmp_path: Path, options: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file(tmp_path), list(options.items()))
    assert expected in str(caught.value)
