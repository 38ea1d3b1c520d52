"""The order of training rows, against a slow oracle that shares no code with the reader."""

import hashlib
import math
import tarfile

import numpy as np
import pytest

from pretrain.data.packing import Packing, permute
from pretrain.errors import UserError
from tests.data_cases import documents, make_shards, make_tokenizer

MASK = 2**64 - 1


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return make_shards(folder, make_tokenizer(folder), documents(40))


def permuted(value, size, key):
    """One entry of the permutation, in Python's own integers, as the module's docstring and references define it."""
    digest = hashlib.sha512(key.encode()).digest()
    keys = [int.from_bytes(digest[at : at + 8], "little") for at in range(0, 64, 8)]
    rows = math.ceil(math.sqrt(size))
    columns = math.ceil(size / rows)
    while True:
        left, right = divmod(value, columns)
        for number, round_key in enumerate(keys):
            mixed = (right if number % 2 == 0 else left) ^ round_key
            mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & MASK
            mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & MASK
            mixed = (mixed ^ (mixed >> 31)) >> 32
            if number % 2 == 0:
                left = (left + (mixed * rows >> 32)) % rows
            else:
                right = (right + (mixed * columns >> 32)) % columns
        value = left * columns + right
        if value < size:
            return value


def stored_documents(shards):
    """Every document's tokens, read by tarfile alone."""
    found = []
    for path in sorted(shards.folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [np.frombuffer(tar.extractfile(member).read(), "<u2").tolist() for member in tar]
    return found


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
    packing = Packing(shards, sequence_length=length, seed=3, order=order)
    per_epoch = packing.rows_per_epoch
    samples = sorted({*range(0, 3 * per_epoch, max(1, per_epoch // 40)), per_epoch - 1, per_epoch, 2 * per_epoch})
    assert packing.rows(np.array(samples)).tolist() == oracle(shards, length, 3, order, samples)


def test_an_epoch_reads_every_row_once_and_epochs_and_seeds_differ(shards):
    length = 16
    packing = Packing(shards, sequence_length=length, seed=0, order="rows")
    per_epoch = packing.rows_per_epoch
    stream = {
        tuple(row)
        for row in Packing(shards, sequence_length=length, seed=0, order="documents")
        .rows(np.arange(per_epoch))
        .tolist()
    }
    first = [tuple(row) for row in packing.rows(np.arange(per_epoch)).tolist()]
    assert set(first) == stream
    second = [tuple(row) for row in packing.rows(np.arange(per_epoch, 2 * per_epoch)).tolist()]
    other = Packing(shards, sequence_length=length, seed=1, order="rows").rows(np.arange(per_epoch)).tolist()
    assert first != second
    assert first != [tuple(row) for row in other]


def test_consecutive_rows_of_order_documents_share_one_token(shards):
    rows = Packing(shards, sequence_length=10, seed=0, order="documents").rows(np.arange(50))
    assert np.array_equal(rows[1:, 0], rows[:-1, -1])


def test_rows_do_not_depend_on_what_is_asked_with_them(shards):
    packing = Packing(shards, sequence_length=16, seed=0, order="rows")
    samples = np.arange(packing.rows_per_epoch - 20, packing.rows_per_epoch + 20)
    together = packing.rows(samples)
    fresh = Packing(shards, sequence_length=16, seed=0, order="rows")
    assert all(np.array_equal(fresh.rows(samples[[at]])[0], together[at]) for at in (39, 0, 20, 19, 3))


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
    Packing(shards, sequence_length=shards.tokens - 1, seed=0, order="rows")
    with pytest.raises(UserError, match=f"holds {shards.tokens} tokens, a row of training.sequence_length"):
        Packing(shards, sequence_length=shards.tokens, seed=0, order="rows")
