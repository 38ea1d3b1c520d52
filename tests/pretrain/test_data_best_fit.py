"""Best-fit packing: documents that fit are whole, no token is lost, rows are few and the same for any reader."""

import numpy as np
import pytest

from pretrain.data.best_fit import pack
from pretrain.data.packing import Packing, Selection, parts_of
from tests.data_cases import documents, make_shards, make_tokenizer
from tests.order_oracle import stored_documents


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return make_shards(folder, make_tokenizer(folder), documents(60, words=30))


def open_packing(shards, length, *, seed=0, **options):
    chosen = Selection(packing="best_fit", **options)
    return Packing(parts_of(shards, chosen), sequence_length=length, seed=seed, selection=chosen, rows_per_step=1)


def best_fit_by_hand(items, room):
    """Item by item, from the longest on: the contents of every row."""
    rows = []
    for item in sorted(items, reverse=True):
        fitting = [row for row in rows if room - sum(row) >= item]
        if fitting:
            min(fitting, key=lambda row: room - sum(row)).append(item)
        else:
            rows.append([item])
    return rows


@pytest.mark.parametrize("seed", range(8))
def test_packing_by_length_is_as_good_as_item_by_item(seed):
    generator = np.random.default_rng(seed)
    items = np.clip(generator.lognormal(3, 1, 300).astype(int), 1, 100)
    sizes, counts = np.unique(items, return_counts=True)
    packed = pack(sizes, counts, 100)
    assert all(sum(row) <= 100 and row == sorted(row, reverse=True) for row, _ in packed)
    assert sorted(size for row, count in packed for size in row * count) == sorted(items.tolist())
    by_hand = best_fit_by_hand(items.tolist(), 100)
    assert sum(count for _, count in packed) == len(by_hand)
    assert sorted(100 - sum(row) for row, count in packed for _ in range(count)) == sorted(
        100 - sum(row) for row in by_hand
    )


@pytest.mark.parametrize("grid", [None, 8])
@pytest.mark.parametrize("length", [64, 96])
def test_an_epoch_holds_every_token_once_and_cuts_only_what_is_longer_than_a_row(shards, length, grid):
    packing = open_packing(shards, length, grid=grid)
    texts, eos, rows = stored_documents(shards), shards.tokenizer.eos_id, packing.pools[0].rows
    for epoch in (0, 1):
        tokens, targets, resets = packing.read(np.arange(epoch * rows, (epoch + 1) * rows))
        pieces = []
        for row in range(rows):
            wanted = targets[row][targets[row] != -100].tolist()
            ends = [i + 1 for i, token in enumerate(wanted) if token == eos]
            pieces += [wanted[a:b] for a, b in zip([0, *ends], [*ends, len(wanted)], strict=True) if a < b]
            for place in range(1, length):  # within a document the input is the target before
                if targets[row, place] != -100 and tokens[row, place] != eos:
                    assert tokens[row, place] == targets[row, place - 1]
        whole = [text for text in texts if len(text) <= length]
        assert len(whole) not in (0, len(texts))
        left = list(pieces)
        for text in whole:
            left.remove(text)
        expected = sorted(
            text[start : start + length]
            for text in texts
            if len(text) > length
            for start in range(0, len(text), length)
        )
        assert sorted(left) == expected
        assert (resets is None) == (grid is None)
        if grid:
            begins = np.argwhere(resets)
            assert len(begins) >= len(texts) and not (begins[:, 1] % grid).any()
            assert (tokens[resets] == eos).all()
    stream = packing.pools[0].stream
    assert stream.cut == sum(len(text) > length for text in texts)
    assert stream.padding == pytest.approx(1 - shards.tokens / (rows * length))


def test_a_row_that_a_document_goes_on_in_begins_with_the_token_before(shards):
    length = 32
    packing = open_packing(shards, length)
    text = max(stored_documents(shards), key=len)
    assert len(text) > 2 * length
    tokens, targets, _ = packing.read(np.arange(packing.pools[0].rows))
    row = next(i for i in range(len(targets)) if targets[i].tolist() == text[length : 2 * length])
    assert tokens[row].tolist() == text[length - 1 : 2 * length - 1]


def test_rows_are_independent_of_each_other_and_differ_by_epoch_and_seed(shards):
    packing = open_packing(shards, 64)
    rows = packing.pools[0].rows
    together = packing.read(np.arange(2 * rows))
    fresh = open_packing(shards, 64)
    for sample in (2 * rows - 1, 0, rows, rows - 1):
        assert np.array_equal(fresh.read(np.array([sample])).tokens[0], together.tokens[sample])
    assert not np.array_equal(together.tokens[:rows], together.tokens[rows:])
    assert not np.array_equal(open_packing(shards, 64, seed=1).read(np.arange(rows)).tokens, together.tokens[:rows])


def test_it_needs_fewer_cuts_than_end_to_end(shards):
    packing = open_packing(shards, 128)
    lengths = np.array([len(text) for text in stored_documents(shards)])
    starts = np.cumsum(lengths) - lengths
    cut_in_stream = (starts // 128 != (starts + lengths - 1) // 128).sum()
    assert packing.pools[0].stream.cut < cut_in_stream / 2
    assert packing.pools[0].stream.padding < 0.1
