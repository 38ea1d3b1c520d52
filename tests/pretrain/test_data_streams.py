"""Documents padded to a grid, lanes that go on from step to step, and a share of long documents, against oracles."""

import numpy as np
import pytest
import torch

from pretrain.data import Cursor, Division, ShardSource
from pretrain.data.packing import LongDocuments, Packing, Selection, parts_of
from pretrain.errors import UserError
from tests.data_cases import documents, make_shards, make_tokenizer
from tests.order_oracle import epoch_order, padded, permuted, stored_documents

LENGTH, GRID, SEED = 24, 8, 5


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return make_shards(folder, make_tokenizer(folder), documents(40, words=20))


def pack(shards, *, rows_per_step=1, length=LENGTH, **selection):
    chosen = Selection(**{"order": "documents", **selection})
    return Packing(
        parts_of(shards, chosen), sequence_length=length, seed=SEED, selection=chosen, rows_per_step=rows_per_step
    )


def as_triples(rows):
    """The rows' inputs, targets and resets, a list of triples for each row."""
    return [list(zip(*row, strict=True)) for row in zip(*(part.tolist() for part in rows), strict=True)]


@pytest.mark.parametrize("order", ["rows", "documents"])
@pytest.mark.parametrize(("length", "grid"), [(24, 8), (24, 1), (8, 8), (640, 64)])
def test_padded_rows_equal_the_oracle_over_two_epochs(shards, order, length, grid):
    packing = pack(shards, order=order, length=length, grid=grid)
    texts, eos, rows = stored_documents(shards), shards.tokenizer.eos_id, packing.pools[0].rows
    expected = []
    for epoch in (0, 1):
        stream = padded(texts, epoch_order(len(texts), SEED, epoch), eos, grid)
        assert len(stream) // length == rows
        numbers = [permuted(row, rows, f"rows {SEED} {epoch}") if order == "rows" else row for row in range(rows)]
        expected += [stream[number * length : (number + 1) * length] for number in numbers]
    assert as_triples(packing.read(np.arange(2 * rows))) == expected


def test_every_token_is_a_target_once_and_none_is_predicted_from_another_document(shards):
    packing = pack(shards, grid=GRID, length=GRID)  # rows of the grid: nothing is left over
    rows = packing.read(np.arange(packing.pools[0].rows))
    tokens, targets, resets = (part.ravel() for part in rows)
    ends = [*np.flatnonzero(resets)[1:], len(tokens)]
    found = [targets[start:end] for start, end in zip(np.flatnonzero(resets), ends, strict=True)]
    texts = stored_documents(shards)
    assert sorted(part[part != -100].tolist() for part in found) == sorted(texts)
    assert (tokens[resets] == shards.tokenizer.eos_id).all()
    inside = ~resets & (targets != -100)
    assert np.array_equal(tokens[inside], np.roll(targets, 1)[inside])
    padding = int((targets == -100).sum())
    assert padding == sum(-len(text) % GRID for text in texts) > 0
    assert packing.pools[0].stream.padding == pytest.approx(padding / len(targets))


@pytest.mark.parametrize("grid", [None, GRID])
@pytest.mark.parametrize("rows_per_step", [1, 3, 8])
def test_each_row_goes_on_where_it_ended_in_the_step_before(shards, grid, rows_per_step):
    packing = pack(shards, order="streams", grid=grid, rows_per_step=rows_per_step)
    pool, texts = packing.pools[0], stored_documents(shards)
    steps = pool.rows_per_lane
    assert 0 <= pool.rows - steps * rows_per_step < rows_per_step
    for epoch in (0, 1, 2):
        first = epoch * steps * rows_per_step
        rows = packing.read(np.arange(first, first + steps * rows_per_step))
        order = epoch_order(len(texts), SEED, epoch)
        if grid is None:
            joined = [token for place in order for token in texts[place]]
            stream = [(*pair, False) for pair in zip(joined, joined[1:], strict=False)]
        else:
            stream = padded(texts, order, shards.tokenizer.eos_id, grid)
        for lane in range(rows_per_step):
            mine = [t for row in as_triples([part[lane::rows_per_step] for part in rows]) for t in row]
            start = lane * steps * LENGTH
            expected = stream[start : start + steps * LENGTH]
            assert mine == [(*expected[0][:2], True), *expected[1:]], "a lane begins with a reset"


def open_loader(shards, *, world_size=1, rank=0, micro=2, workers=0, cursor=None, rows=12, **selection):
    division = Division(LENGTH, micro, rows // (micro * world_size), rank, world_size)
    chosen = Selection(**{"order": "streams", "grid": GRID, **selection})
    source = ShardSource(tuple(parts_of(shards, chosen)), SEED, chosen, workers)
    return source.open_loader(division, cursor)


def steps_of(shards, steps, *, world_size=1, micro=2, **options):
    """Tokens, targets and resets [steps, 3, rows, LENGTH] of all ranks' rows in their global order."""
    ranks = []
    for rank in range(world_size):
        with open_loader(shards, world_size=world_size, rank=rank, micro=micro, **options) as loader:
            ranks.append([next(loader) for _ in range(steps)])
    whole = []
    for step in range(steps):
        batches = [ranks[rank][step][m] for m in range(len(ranks[0][step])) for rank in range(world_size)]
        parts = ([getattr(batch, name) for batch in batches] for name in ("tokens", "targets", "resets"))
        whole.append(torch.stack([torch.cat(part).long() for part in parts]))
    return torch.stack(whole)


LONG = LongDocuments(at_least=60, share=0.3)


@pytest.mark.parametrize("long", [None, LONG], ids=["all", "long"])
@pytest.mark.parametrize("order", ["streams", "rows"])
def test_steps_do_not_depend_on_ranks_micro_batch_or_workers_or_where_they_resume(shards, order, long):
    steps = 2 * shards.tokens // (LENGTH * 12)  # over an epoch's end
    options = {"order": order, "long_documents": long}
    expected = steps_of(shards, steps, **options)
    for world_size, micro, workers in ((1, 12, 1), (2, 3, 2), (4, 1, 3)):
        found = steps_of(shards, steps, world_size=world_size, micro=micro, workers=workers, **options)
        assert torch.equal(found, expected)
    with open_loader(shards, world_size=3, rank=1, workers=2, **options) as loader:
        for _ in range(7):
            next(loader)
        cursor = Cursor.model_validate_json(loader.cursor().model_dump_json())
    found = steps_of(shards, steps - 7, world_size=2, micro=6, workers=1, cursor=cursor, **options)
    assert torch.equal(found, expected[7:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 6}, r"rows_per_step 12 in the checkpoint, 6 now \(with data.order streams each row goes on from one"),
        ({"grid": None}, r"grid 8 in the checkpoint, None now \(documents are padded to it: set data.reset_memory"),
        ({"min_document_tokens": 9}, "min_document_tokens 1 in the checkpoint, 9 now"),
        ({"long_documents": LONG}, "source long: is new, none in the checkpoint"),
        ({"order": "documents"}, "order streams in the checkpoint, documents now"),
    ],
)
def test_a_cursor_of_another_order_is_refused(shards, changes, message):
    with open_loader(shards) as loader:
        next(loader)
        cursor = loader.cursor()
    assert (cursor.position, cursor.rows_per_step) == (12, 12)
    with pytest.raises(UserError, match=message):
        open_loader(shards, cursor=cursor, **changes)


def test_a_cursor_inside_a_step_is_damaged(shards):
    with open_loader(shards) as loader:
        text = loader.cursor().model_dump_json().replace('"position":0', '"position":5')
    with pytest.raises(ValueError, match="position 5 is inside a step of 12 rows"):
        Cursor.model_validate_json(text)


def test_a_cursor_from_before_these_fields_goes_on(shards):
    old = {"position": 24, "sequence_length": 24, "seed": 5, "order": "rows", "fingerprint": shards.fingerprint}
    with open_loader(shards, order="rows", grid=None) as loader:
        expected = [next(loader) for _ in range(3)]
        cursor = loader.cursor()
    with open_loader(shards, order="rows", grid=None, cursor=Cursor.model_validate(old)) as loader:
        found = next(loader)
        assert loader.cursor() == cursor
    assert found[0].resets is None
    assert all(torch.equal(x.tokens, y.tokens) for x, y in zip(found, expected[2], strict=True))


def test_other_orders_go_on_with_another_number_of_rows(shards):
    with open_loader(shards, order="rows") as loader:
        next(loader)
        cursor = loader.cursor()
    with open_loader(shards, order="rows", rows=6, cursor=cursor) as loader:
        assert loader.cursor().position == 12


@pytest.mark.parametrize("order", ["rows", "documents"])
@pytest.mark.parametrize("share", [0.3, 0.05, 1])
def test_the_share_of_rows_is_of_long_documents(shards, order, share):
    """Row i is one of them where floor((i + 1) share) > floor(i share); both kinds are read in their own order."""
    long = LongDocuments(at_least=60, share=share)
    packing = pack(shards, order=order, grid=GRID, long_documents=long)
    texts = stored_documents(shards)
    chosen = [text for text in texts if len(text) >= 60]
    assert 0 < len(chosen) < len(texts)
    only = pack(shards, order=order, grid=GRID, long_documents=LongDocuments(at_least=60, share=1))
    everything = pack(shards, order=order, grid=GRID)
    count = 3 * everything.pools[0].rows
    triples = as_triples(packing.read(np.arange(count)))
    number = {True: 0, False: 0}
    percent = round(100 * share)
    for row, found in enumerate(triples):
        is_long = (row + 1) * percent // 100 > row * percent // 100
        source = only if is_long else everything
        assert found == as_triples(source.read(np.array([number[is_long]])))[0], row
        number[is_long] += 1
    assert number[True] == count * percent // 100
    # An epoch of long rows holds the long documents, and nothing else.
    stream = padded(chosen, epoch_order(len(chosen), SEED, 0, "long "), shards.tokenizer.eos_id, GRID)
    rows = only.pools[0].rows
    expected = [stream[row * LENGTH : (row + 1) * LENGTH] for row in range(rows)]
    assert sorted(as_triples(only.read(np.arange(rows)))) == sorted(expected)


def test_lanes_are_of_one_kind_for_good(shards):
    packing = pack(shards, order="streams", grid=GRID, rows_per_step=7, long_documents=LONG)
    assert packing.shares == pytest.approx([2 / 7, 5 / 7])
    only = pack(shards, order="streams", grid=GRID, rows_per_step=2, long_documents=LongDocuments(at_least=60, share=1))
    others = pack(shards, order="streams", grid=GRID, rows_per_step=5)
    steps = 2 * max(others.pools[0].rows_per_lane, only.pools[0].rows_per_lane) + 3
    found = np.array(packing.read(np.arange(7 * steps))).reshape(3, steps, 7, LENGTH)
    lanes = [lane for lane in range(7) if (lane + 1) * 3 // 10 > lane * 3 // 10]
    assert lanes == [3, 6]
    expected = np.array(only.read(np.arange(2 * steps))).reshape(3, steps, 2, LENGTH)
    assert np.array_equal(found[:, :, lanes], expected)
    rest = np.array(others.read(np.arange(5 * steps))).reshape(3, steps, 5, LENGTH)
    assert np.array_equal(np.delete(found, lanes, axis=2), rest)


def test_short_documents_are_left_out(shards):
    texts = stored_documents(shards)
    chosen = [text for text in texts if len(text) >= 60]
    packing = pack(shards, min_document_tokens=60)
    assert packing.pools[0].stream.tokens == sum(map(len, chosen))
    rows = packing.pools[0].rows
    tokens, targets, _ = packing.read(np.arange(rows))
    order = epoch_order(len(chosen), SEED, 0)
    joined = [token for place in order for token in chosen[place]]
    assert tokens.ravel().tolist() == joined[: rows * LENGTH]
    assert targets.ravel().tolist() == joined[1 : rows * LENGTH + 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_document_tokens": 10**6}, r"data.min_document_tokens 1000000: no document of .* has so many tokens"),
        (
            {"long_documents": LongDocuments(at_least=10**6, share=0.5)},
            r"data.long_documents.at_least 1000000: no document of .*, the longest has \d+; lower it",
        ),
        (
            {"order": "streams", "rows_per_step": 4, "long_documents": LongDocuments(at_least=60, share=0.2)},
            "data.long_documents.share 0.2: of 4 rows a step that is none; raise it to 0.25",
        ),
        (
            {"order": "streams", "rows_per_step": 10**5},
            "100000 rows a step that each go on in the next: a row of training.sequence_length 24 takes 25; add text",
        ),
        ({"grid": GRID, "length": 8 * 10**5}, r"tokens, \d+ with padding, a row of .* takes 800000; add text"),
        (
            {"long_documents": LongDocuments(at_least=100, share=0.2), "length": 2000},
            r"tokens in documents of at least 100 \(data.long_documents.at_least\), a row",
        ),
    ],
)
def test_data_that_is_too_small_is_named(shards, options, message):
    with pytest.raises(UserError, match=message):
        pack(shards, **options)


def test_a_line_says_what_is_padding_and_what_is_long(shards):
    def line(**selection):
        chosen = Selection(**selection)
        source = ShardSource(tuple(parts_of(shards, chosen)), SEED, chosen, 0)
        return source.describe(10 * shards.tokens, sequence_length=LENGTH, rows_per_step=7)

    assert line() == f"40 documents, {shards.tokens:,} tokens: 10.00 passes over them"
    lengths = np.array([len(text) for text in stored_documents(shards)])
    places = -(-lengths // GRID) * GRID
    share = f"{100 * (1 - lengths.sum() / places.sum()):.2f} % of what is read is padding"
    assert line(grid=GRID) == (
        f"40 documents, {shards.tokens:,} tokens: {10 * shards.tokens / places.sum():.2f} passes over them, padded to "
        f"multiples of 8: {share}"
    )
    text = line(order="streams", long_documents=LONG)
    count, tokens = (lengths >= 60).sum(), lengths[lengths >= 60].sum()
    passes = 2 / 7 * 10 * shards.tokens / (tokens - 1)
    assert text.startswith(
        f"28.6 % of the rows: {count} documents of at least 60 tokens, {tokens:,} tokens: {passes:.2f} passes over "
        "them; 71.4 % of the rows: 40 documents"
    )
