"""The order of training rows, against a slow oracle that shares no code with the reader."""

import numpy as np
import pytest

from pretrain.data.packing import Packing, Selection, parts_of
from pretrain.data.permutation import permute
from pretrain.errors import UserError
from tests.data_cases import documents, make_shards, make_tokenizer
from tests.order_oracle import permuted, stored_documents


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return make_shards(folder, make_tokenizer(folder), documents(40))


def pack(shards, length, *, seed=0, order="rows"):
    chosen = Selection(order=order)
    return Packing(parts_of(shards, chosen), sequence_length=length, seed=seed, selection=chosen, rows_per_step=1)


def rows_of(packing, samples):
    """Inputs and, one further, the last target: [n, sequence_length + 1]."""
    tokens, targets, resets = packing.read(samples)
    assert resets is None and np.array_equal(tokens[:, 1:], targets[:, :-1])
    return np.concatenate([tokens, targets[:, -1:]], 1)


def oracle(shards, length, seed, order, samples):
    texts = stored_documents(shards)
    streams = {}
    rows = []
    for sample in samples:
        total = sum(map(len, texts))
        epoch, row = divmod(sample, (total - 1) // length)
        if epoch not in streams:
            places = [permuted(place, len(texts), f"documents {seed} {epoch}") for place in range(len(texts))]
            streams[epoch] = [token for place in places for token in texts[place]]
        if order == "rows":
            row = permuted(row, (total - 1) // length, f"rows {seed} {epoch}")
        rows.append(streams[epoch][row * length : row * length + length + 1])
    return rows


@pytest.mark.parametrize("order", ["rows", "documents"])
@pytest.mark.parametrize("length", [1, 7, 64, 3001])
def test_rows_equal_the_oracle_over_three_epochs(shards, order, length):
    packing = pack(shards, length, seed=3, order=order)
    per_epoch = packing.pools[0].rows
    samples = sorted({*range(0, 3 * per_epoch, max(1, per_epoch // 40)), per_epoch - 1, per_epoch, 2 * per_epoch})
    assert rows_of(packing, np.array(samples)).tolist() == oracle(shards, length, 3, order, samples)


def test_an_epoch_reads_every_row_once_and_epochs_and_seeds_differ(shards):
    length = 16
    packing = pack(shards, length)
    per_epoch = packing.pools[0].rows
    stream = {tuple(row) for row in rows_of(pack(shards, length, order="documents"), np.arange(per_epoch)).tolist()}
    first = [tuple(row) for row in rows_of(packing, np.arange(per_epoch)).tolist()]
    assert set(first) == stream
    second = [tuple(row) for row in rows_of(packing, np.arange(per_epoch, 2 * per_epoch)).tolist()]
    other = rows_of(pack(shards, length, seed=1), np.arange(per_epoch)).tolist()
    assert first != second
    assert first != [tuple(row) for row in other]


def test_consecutive_rows_of_order_documents_share_one_token(shards):
    rows = rows_of(pack(shards, 10, order="documents"), np.arange(50))
    assert np.array_equal(rows[1:, 0], rows[:-1, -1])


def test_rows_do_not_depend_on_what_is_asked_with_them(shards):
    packing = pack(shards, 16)
    samples = np.arange(packing.pools[0].rows - 20, packing.pools[0].rows + 20)
    together = rows_of(packing, samples)
    fresh = pack(shards, 16)
    assert all(np.array_equal(rows_of(fresh, samples[[at]])[0], together[at]) for at in (39, 0, 20, 19, 3))


def test_the_order_is_pinned():
    """A change of these numbers breaks the resume of every run under way."""
    assert permute(np.arange(12), 12, "documents 0 0").tolist() == [0, 11, 2, 5, 6, 1, 8, 7, 9, 3, 4, 10]
    assert int(permute(np.array([123_456_789]), 10**9, "rows 7 2")[0]) == 28_160_126


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 12, 100, 257, 1000, 70_000])
def test_permute_is_a_permutation(size):
    out = permute(np.arange(size), size, "any")
    assert np.array_equal(np.sort(out), np.arange(size))
    chosen = np.array([0, size // 2, size - 1])
    assert np.array_equal(permute(chosen, size, "any"), out[chosen])


def test_small_permutations_are_all_about_equally_likely():
    counts = {}
    for key in range(2400):
        found = tuple(permute(np.arange(4), 4, str(key)).tolist())
        counts[found] = counts.get(found, 0) + 1
    # 100 are expected of each; 50 is five standard deviations away.
    assert len(counts) == 24
    assert min(counts.values()) > 50


def test_neighbours_are_torn_apart():
    out = permute(np.arange(10_000), 10_000, "any")
    assert abs(np.corrcoef(np.arange(10_000), out)[0, 1]) < 0.05
    assert abs(np.corrcoef(out[1:], out[:-1])[0, 1]) < 0.05


def test_a_set_smaller_than_one_row_is_an_error_with_its_tokens(shards):
    pack(shards, shards.tokens - 1)
    with pytest.raises(UserError, match=f"holds {shards.tokens} tokens, a row of training.sequence_length"):
        pack(shards, shards.tokens)
