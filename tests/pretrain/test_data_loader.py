"""The training loader: steps independent of ranks and workers, exact resume, clean ends."""

import threading

import pytest
import torch

from pretrain.data import Cursor, Division, Loader, ShardSet, ShardSource
from pretrain.data.packing import Selection, parts_of
from pretrain.errors import UserError
from tests.data_cases import documents, make_shards, make_tokenizer

LENGTH = 24
GLOBAL_ROWS = 24


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return make_shards(folder, make_tokenizer(folder), documents(40, words=20))


def open_loader(shards, *, seed=5, order="rows", num_workers=0, cursor=None, **division) -> Loader:
    chosen = Selection(order=order)
    source = ShardSource(tuple(parts_of(shards, chosen)), seed, chosen, num_workers)
    return source.open_loader(Division(**division), cursor)


def load(shards, *, world_size=1, rank=0, micro=2, workers=0, cursor=None, **changes):
    """A loader whose steps hold GLOBAL_ROWS rows over all ranks."""
    options = {"sequence_length": LENGTH, "num_workers": workers, "cursor": cursor} | changes
    accumulation = GLOBAL_ROWS // (micro * world_size)
    return open_loader(
        shards, micro_batch_size=micro, accumulation=accumulation, rank=rank, world_size=world_size, **options
    )


def rows_of(shards, steps, *, world_size=1, micro=2, workers=0, cursor=None, **changes):
    """The rows of `steps` steps by global sample, put together from every rank: [steps * GLOBAL_ROWS, LENGTH + 1]."""
    ranks = []
    for rank in range(world_size):
        with load(
            shards, world_size=world_size, rank=rank, micro=micro, workers=workers, cursor=cursor, **changes
        ) as it:
            ranks.append([next(it) for _ in range(steps)])
    return torch.cat(
        [
            torch.cat([ranks[rank][step][number].tokens, ranks[rank][step][number].targets[:, -1:]], 1)
            for step in range(steps)
            for number in range(GLOBAL_ROWS // (micro * world_size))
            for rank in range(world_size)
        ]
    )


def test_batches_have_the_stated_form(shards):
    with load(shards, world_size=3, rank=1, micro=2) as loader:
        step = next(loader)
    assert len(step) == 4
    for batch in step:
        assert batch.tokens.shape == batch.targets.shape == (2, LENGTH)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert batch.tokens.is_contiguous() and batch.targets.is_contiguous()
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])


@pytest.mark.parametrize("order", ["rows", "documents"])
def test_steps_do_not_depend_on_world_size_micro_batch_or_workers(shards, order):
    steps = 2 * shards.tokens // (LENGTH * GLOBAL_ROWS)  # over an epoch's end
    expected = rows_of(shards, steps, order=order)
    assert len(expected) > shards.tokens // LENGTH
    for world_size, micro, workers in ((1, 24, 1), (2, 3, 2), (4, 2, 3), (8, 3, 1), (3, 1, 5)):
        found = rows_of(shards, steps, world_size=world_size, micro=micro, workers=workers, order=order)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("world_size", "micro", "workers"), [(1, 2, 0), (2, 4, 1), (1, 12, 3), (8, 1, 2)])
def test_a_cursor_continues_exactly_on_another_layout(shards, world_size, micro, workers):
    expected = rows_of(shards, 40)
    loader = load(shards, world_size=4, rank=2, workers=2)
    for _ in range(17):
        next(loader)
    cursor = Cursor.model_validate_json(loader.cursor().model_dump_json())
    loader.close()
    assert cursor.position == 17 * GLOBAL_ROWS
    found = rows_of(shards, 23, world_size=world_size, micro=micro, workers=workers, cursor=cursor)
    assert torch.equal(found, expected[17 * GLOBAL_ROWS :])


def test_a_cursor_continues_with_another_batch_size(shards):
    expected = rows_of(shards, 3)
    cursor = Cursor(position=7, sequence_length=LENGTH, seed=5, order="rows", fingerprint=shards.fingerprint)
    with load(shards, cursor=cursor, micro=6) as loader:
        assert torch.equal(next(loader)[0].tokens, expected[7:13, :-1])
        assert loader.cursor().position == 7 + GLOBAL_ROWS


def test_the_cursor_counts_what_was_taken_not_what_was_read_ahead(shards):
    for workers in (0, 3):
        with load(shards, workers=workers) as loader:
            assert loader.cursor().position == 0
            for step in range(1, 4):
                next(loader)
                assert loader.cursor().position == step * GLOBAL_ROWS


def test_a_far_position_is_reached_at_once(shards):
    cursor = Cursor(position=10**15, sequence_length=LENGTH, seed=5, order="rows", fingerprint=shards.fingerprint)
    with load(shards, cursor=cursor) as loader:
        next(loader)
        assert loader.cursor().position == 10**15 + GLOBAL_ROWS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fingerprint": "f" * 64},
            "fingerprint ffff.* in the checkpoint, .*set the data of .*shards/train back",
        ),
        ({"sequence_length": 99}, "sequence_length 99 in the checkpoint, 24 now .*training.sequence_length back"),
        ({"seed": 6}, r"seed 6 in the checkpoint, 5 now \(set data.seed"),
        ({"order": "documents"}, r"order documents in the checkpoint, rows now \(set data.order"),
    ],
)
def test_a_cursor_of_another_run_is_refused_with_what_differs(shards, changes, message):
    fields = {"position": 0, "sequence_length": LENGTH, "seed": 5, "order": "rows", "fingerprint": shards.fingerprint}
    with pytest.raises(UserError, match=message) as error:
        load(shards, cursor=Cursor(**fields | changes))
    assert str(error.value).count("in the checkpoint") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size 0: must be at least 1"),
        ({"accumulation": 0}, "accumulation 0"),
        ({"sequence_length": -1}, "sequence_length -1"),
        ({"rank": 2}, "rank 2: must be at least 0 and below world_size 2"),
        ({"num_workers": -1}, "data.num_workers -1"),
        ({"sequence_length": 10**6}, "takes 1000001; add text or shorten the rows"),
    ],
)
def test_impossible_sizes_are_named(shards, changes, message):
    options = {"sequence_length": 8, "micro_batch_size": 1, "accumulation": 1, "rank": 0, "world_size": 2, "seed": 0}
    with pytest.raises(UserError, match=message):
        open_loader(shards, **options | changes)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_reading_reaches_the_consumer_and_no_step_is_left_out(tmp_path, workers):
    own = make_shards(tmp_path, make_tokenizer(tmp_path), documents(20, words=20))
    with load(own, workers=workers) as loader:
        expected = next(loader)
    broken = ShardSet.open(own.folder)
    hidden = own.folder.rename(tmp_path / "hidden")
    with load(broken, workers=workers) as loader:
        for _ in range(2):
            with pytest.raises(UserError, match=r"shards-\d+\.tar: cannot be read: No such file"):
                next(loader)
        assert loader.cursor().position == 0
    hidden.rename(own.folder)
    with load(broken, workers=workers) as loader:
        assert torch.equal(next(loader)[0].tokens, expected[0].tokens)


def test_closing_ends_the_workers(shards):
    before = threading.active_count()
    loader = load(shards, workers=3)
    next(loader)
    assert threading.active_count() == before + 3
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
