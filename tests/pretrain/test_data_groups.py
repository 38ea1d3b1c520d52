"""The order of many documents, by groups of shards: against a slow oracle, and in bounded memory."""

import tracemalloc

import numpy as np
import pytest

from pretrain.data.packing import Packing, Selection, parts_of
from pretrain.data.stream import Stream
from tests.data_cases import documents, make_shards, make_tokenizer
from tests.data_index import index_only
from tests.order_oracle import padded, permuted, stored_documents

SEED, LENGTH = 3, 24


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return make_shards(folder, make_tokenizer(folder), documents(60, words=20), shard_tokens=300)


def open_packing(shards, group_documents, **selection):
    chosen = Selection(**selection)
    return Packing(
        parts_of(shards, chosen),
        sequence_length=LENGTH,
        seed=SEED,
        selection=chosen,
        rows_per_step=1,
        group_documents=group_documents,
    )


def grouped(shards, lengths, limit, epoch, at_least=1):
    """The documents of an epoch, a list for each group."""
    members = [[] for _ in shards.manifest.shards]
    for document in range(shards.documents):
        if lengths[document] >= at_least:
            members[shards.record(document).shard].append(document)
    groups, before = {}, 0
    for place in range(len(members)):
        shard = permuted(place, len(members), f"documents {SEED} {epoch} shards")
        groups.setdefault(before // limit, []).extend(members[shard])
        before += len(members[shard])
    keys = [f"documents {SEED} {epoch} group {number}" for number in range(len(groups))]
    return [
        [group[permuted(place, len(group), key)] for place in range(len(group))]
        for group, key in zip(groups.values(), keys, strict=True)
    ]


@pytest.mark.parametrize("order", ["rows", "documents"])
@pytest.mark.parametrize("chosen", [{}, {"grid": 8}, {"min_document_tokens": 40}], ids=str)
def test_rows_equal_the_oracle_over_two_epochs(shards, order, chosen):
    limit = 5 if "min_document_tokens" in chosen else 12
    packing = open_packing(shards, limit, order=order, **chosen)
    texts, rows = stored_documents(shards), packing.pools[0].rows
    assert len(shards.manifest.shards) > 6
    expected, at_least = [], chosen.get("min_document_tokens", 1)
    for epoch in (0, 1):
        groups = grouped(shards, [len(text) for text in texts], limit, epoch, at_least)
        assert len(groups) > 2
        flat, edges = [], [0]
        for group in groups:
            if chosen.get("grid"):
                flat += padded(texts, group, shards.tokenizer.eos_id, 8)
            else:
                flat += [token for document in group for token in texts[document]]
            edges.append(len(flat))
        if not chosen.get("grid"):
            flat = list(zip(flat, flat[1:], strict=False))
        numbers = list(range(rows))
        if order == "rows":
            # Rows are permuted among those that begin in the same group.
            starts = [min(-(-edge // LENGTH), rows) for edge in edges]
            numbers = [
                first + permuted(row, last - first, f"rows {SEED} {epoch} group {number}")
                for number, (first, last) in enumerate(zip(starts, starts[1:], strict=False))
                for row in range(last - first)
            ]
        expected += [flat[row * LENGTH : (row + 1) * LENGTH] for row in numbers]
    found = [part for part in packing.read(np.arange(2 * rows)) if part is not None]
    assert [list(zip(*row, strict=True)) for row in zip(*(part.tolist() for part in found), strict=True)] == expected


def test_rows_do_not_depend_on_what_is_asked_with_them(shards):
    packing = open_packing(shards, 12)
    samples = np.arange(2 * packing.pools[0].rows)
    together = packing.read(samples).tokens
    fresh = open_packing(shards, 12)
    for at in (len(samples) - 1, 0, len(samples) // 2, 7):
        assert np.array_equal(fresh.read(samples[[at]]).tokens[0], together[at])


def test_streams_and_few_documents_are_one_group(shards):
    for order, limit in (("streams", 12), ("rows", 13)):
        assert open_packing(shards, limit, order=order).pools[0].stream.groups(0).tolist()[0] == 0
        assert len(open_packing(shards, limit, order=order).pools[0].stream.groups(0)) == 2


def peak_of(stream, inputs):
    """Bytes that reading pieces from all over an epoch holds at most, beyond what the stream itself has."""
    tracemalloc.start()
    for share in (0.1, 0.5, 0.9):
        stream.pieces(0, np.array([int(share * inputs)]), 4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_is_that_of_two_groups_whatever_the_number_of_documents():
    shards = index_only(1_000_000, 500)
    whole = Stream(shards, seed=0, group_documents=None)
    parts = Stream(shards, seed=0, group_documents=20_000)
    assert len(parts.groups(0)) == 51
    assert peak_of(whole, whole.inputs) > 12e6
    assert peak_of(parts, parts.inputs) < 2e6
