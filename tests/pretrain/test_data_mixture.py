"""Mixtures: shares, exactness over resume on other layouts, limits, phases, and data that changed."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pretrain.data import Cursor, Division, ShardsConfig
from pretrain.errors import UserError
from tests.data_cases import documents, make_shards, make_tokenizer
from tests.order_oracle import epoch_order, permuted, stored_documents

LENGTH, SEED, ROWS = 24, 5, 24


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Three sets of one tokenizer by name."""
    folder = tmp_path_factory.mktemp("sets")
    tokenizer = make_tokenizer(folder)
    sizes = {"web": (40, 1), "code": (12, 2), "books": (6, 3)}
    return {
        name: make_shards(folder / name, tokenizer, documents(number, seed=seed, words=20))
        for name, (number, seed) in sizes.items()
    }


def section(sets, weights=(0.6, 0.3, 0.1), **fields):
    sources = {
        name: {"train": shards.folder, "weight": weight}
        for (name, shards), weight in zip(sets.items(), weights, strict=True)
    }
    for name, value in fields.pop("of", {}).items():
        sources[name] |= value
    return ShardsConfig(sources=sources, **{"num_workers": 0, **fields})


def open_loader(config, *, world_size=1, rank=0, micro=2, cursor=None, rows=ROWS):
    division = Division(LENGTH, micro, rows // (micro * world_size), rank, world_size)
    return config.open(SEED, grid=8).train.open_loader(division, cursor)


def rows_of(config, steps, *, world_size=1, micro=2, cursor=None):
    """Tokens, targets and resets of all ranks' rows by global sample: [3, steps * ROWS, LENGTH]."""
    ranks = []
    for rank in range(world_size):
        with open_loader(config, world_size=world_size, rank=rank, micro=micro, cursor=cursor) as loader:
            ranks.append([next(loader) for _ in range(steps)])
    found = []
    for name in ("tokens", "targets", "resets"):
        parts = [
            getattr(ranks[rank][step][number], name)
            for step in range(steps)
            for number in range(len(ranks[0][0]))
            for rank in range(world_size)
        ]
        found.append(torch.zeros(len(parts) * micro, LENGTH) if parts[0] is None else torch.cat(parts))
    return torch.stack([part.long() for part in found])


def test_each_source_is_read_in_its_own_order_and_rows_are_dealt_out_by_weight(sets):
    config = section(sets, weights=(2, 1, 1))
    tokens = rows_of(config, 20)[0]
    expected = {}
    for name, shards in sets.items():
        texts, rows = stored_documents(shards), []
        count = (shards.tokens - 1) // LENGTH
        for epoch in range(-(-20 * ROWS // count)):
            places = epoch_order(len(texts), SEED, epoch, f"{name} ")
            stream = [token for place in places for token in texts[place]]
            order = [permuted(row, count, f"{name} rows {SEED} {epoch}") for row in range(count)]
            rows += [stream[row * LENGTH : (row + 1) * LENGTH] for row in order]
        expected[name] = iter(rows)
    counted = {"web": 0, "code": 0, "books": 0}
    for row, found in enumerate(tokens.tolist()):
        # By their names: every fourth row is of books, every third one of the others of code.
        rest = row - row // 4
        others = "code" if (rest + 1) // 3 > rest // 3 else "web"
        name = "books" if (row + 1) // 4 > row // 4 else others
        assert found == next(expected[name]), row
        counted[name] += 1
    assert counted == {"web": 240, "code": 120, "books": 120}


CASES = [
    {},
    {"order": "documents", "reset_memory": True},
    {"order": "streams", "reset_memory": True},
    {"order": "streams"},
    {"packing": "best_fit", "reset_memory": True},
    {"of": {"books": {"max_epochs": 1.5}, "code": {"min_document_tokens": 20}}},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_do_not_depend_on_ranks_micro_batch_or_workers_or_where_they_resume(sets, case):
    steps = 30  # every source's epoch ends on the way
    expected = rows_of(section(sets, **case), steps)
    for world_size, micro, workers in ((4, 3, 2), (8, 1, 3)):
        found = rows_of(section(sets, num_workers=workers, **case), steps, world_size=world_size, micro=micro)
        assert torch.equal(found, expected)
    with open_loader(section(sets, num_workers=2, **case), world_size=3, rank=2) as loader:
        for _ in range(17):
            next(loader)
        cursor = Cursor.model_validate_json(loader.cursor().model_dump_json())
    assert all(source.epoch for source in cursor.sources.values())
    found = rows_of(section(sets, num_workers=1, **case), steps - 17, world_size=2, micro=6, cursor=cursor)
    assert torch.equal(found, expected[:, 17 * ROWS :])


def test_the_cursor_and_the_curves_say_where_each_source_stands(sets):
    with open_loader(section(sets)) as loader:
        for _ in range(5):
            next(loader)
        cursor, curves = loader.cursor(), loader.curves()
    assert {name: source.position for name, source in cursor.sources.items()} == {"web": 72, "code": 36, "books": 12}
    assert cursor.tokenizer == sets["web"].tokenizer.sha256
    assert {name: source.fingerprint for name, source in cursor.sources.items()} == {
        name: shards.fingerprint for name, shards in sets.items()
    }
    for name, share, read in (("web", 0.6, 72), ("code", 0.3, 36), ("books", 0.1, 12)):
        rows = (sets[name].tokens - 1) // LENGTH
        assert curves[f"data/share/{name}"] == pytest.approx(share)
        assert curves[f"data/epochs/{name}"] == pytest.approx(read / rows)
        assert cursor.sources[name].epoch == read // rows


def test_a_source_at_its_cap_is_read_no_more_and_the_run_is_refused_where_all_are(sets):
    config = section(sets, weights=(1, 1, 0), of={"code": {"max_epochs": 2}})
    count = (sets["code"].tokens - 1) // LENGTH
    with open_loader(config) as loader:
        for _ in range(30):
            next(loader)
        assert loader.cursor().sources["code"].position == 2 * count
        assert loader.cursor().sources["web"].position == 30 * ROWS - 2 * count
        assert list(loader.cursor().sources) == ["code", "web"]
    caps = {name: {"max_epochs": 1} for name in ("web", "code")}
    source = section(sets, weights=(1, 1, 0), of=caps).open(SEED, grid=8).train
    most = sum((sets[name].tokens - 1) // LENGTH for name in ("web", "code")) * LENGTH
    source.describe(most, sequence_length=LENGTH, rows_per_step=ROWS)
    with pytest.raises(UserError, match=rf"behind {most:,} of the .* raise max_epochs of one, or lower"):
        source.describe(most + 1, sequence_length=LENGTH, rows_per_step=ROWS)
    division = Division(LENGTH, 1, most // LENGTH, 0, 1)
    with source.open_loader(division, None) as loader:
        next(loader)
        with pytest.raises(UserError, match="behind the last one"):
            next(loader)


def test_the_description_says_what_is_read_of_a_source_that_reaches_its_cap_beside_one_without(sets):
    config = section(sets, weights=(1, 1, 0), of={"code": {"max_epochs": 0.5}})
    steps = 30
    with open_loader(config) as loader:
        for _ in range(steps):
            next(loader)
        read = {name: source.position for name, source in loader.cursor().sources.items()}
        passes = loader.curves()
    text = config.open(SEED, grid=8).train.describe(steps * ROWS * LENGTH, sequence_length=LENGTH, rows_per_step=ROWS)
    assert passes["data/epochs/code"] <= 0.5
    for line, name in zip(text.split("; "), ("code", "web"), strict=True):
        assert line.startswith(f"{100 * read[name] / (steps * ROWS):.3g} % of the rows {name}: ")
        tokens = read[name] * LENGTH
        assert line.endswith(f": {tokens / (sets[name].tokens - 1):.2f} passes over them")


def test_lanes_of_streams_are_shared_out_by_weight_and_none_may_have_none(sets):
    source = section(sets, order="streams").open(SEED, grid=8).train
    text = source.describe(10**4, sequence_length=LENGTH, rows_per_step=ROWS)
    assert [part.split(" % of the rows ")[0] for part in text.split("; ")] == ["12.5", "29.2", "58.3"]
    with pytest.raises(
        UserError, match=r"data.sources.books.weight 0.1: of 3 rows a step that is none; raise it to 0.33"
    ):
        source.describe(10**4, sequence_length=LENGTH, rows_per_step=3)


def test_one_set_may_be_two_sources_of_different_lengths(sets):
    folder = sets["web"].folder
    sources = {
        "long": {"train": folder, "weight": 1, "min_document_tokens": 60},
        "all": {"train": folder, "weight": 3},
    }
    source = ShardsConfig(sources=sources, num_workers=0).open(SEED, grid=8).train
    assert source.parts[0].shards is source.parts[1].shards
    text = source.describe(10**4, sequence_length=LENGTH, rows_per_step=ROWS)
    second, first = text.split("; ")
    assert first.startswith("25 % of the rows long: ") and " documents of at least 60 tokens, " in first
    assert second.startswith(f"75 % of the rows all: {sets['web'].documents} documents, ")


def test_changed_data_is_refused_with_what_changed_and_gone_on_from_when_allowed(sets):
    with open_loader(section(sets)) as loader:
        for _ in range(4):
            next(loader)
        cursor = loader.cursor()
    changed = {"weights": (0.6, 0.2, 0.2), "of": {"code": {"train": sets["books"].folder}}}
    with pytest.raises(UserError, match="--data.allow_changed true") as error:
        open_loader(section(sets, **changed), cursor=cursor)
    code, books = sets["code"], sets["books"]
    assert (
        f"source code: fingerprint {code.fingerprint[:12]} ({code.documents:,} documents, {code.tokens:,} tokens) in "
        f"the checkpoint, {books.fingerprint[:12]} ({books.documents:,} documents"
    ) in str(error.value)
    assert "source code: weight 3/10 in the checkpoint, 1/5 now" in str(error.value)
    assert "source books: weight 1/10 in the checkpoint, 1/5 now" in str(error.value)
    allowed = section(sets, **changed, allow_changed=True)
    with open_loader(allowed, cursor=cursor) as loader:
        assert len(loader.changes) == 3
        for _ in range(5):
            next(loader)
        then = loader.cursor()
    before = {"books": 9, "code": 29, "web": 58}
    assert {name: source.position for name, source in cursor.sources.items()} == before
    assert {name: source.position for name, source in then.sources.items()} == {
        name: count + {"books": 24, "code": 24, "web": 72}[name] for name, count in before.items()
    }
    # What follows is exact again, and needs no permission any more.
    expected = rows_of(allowed, 12, cursor=cursor)
    found = rows_of(
        section(sets, **changed), 7, world_size=4, micro=1, cursor=Cursor.model_validate_json(then.model_dump_json())
    )
    assert torch.equal(found, expected[:, 5 * ROWS :])


def test_lanes_begin_anew_where_the_data_changed(sets):
    config = section(sets, order="streams", reset_memory=True)
    with open_loader(config) as loader:
        for _ in range(3):
            next(loader)
        cursor = loader.cursor()
    changed = section(sets, weights=(1, 1, 1), order="streams", reset_memory=True, allow_changed=True)
    resets = rows_of(changed, 2, cursor=cursor)[2].view(2, ROWS, LENGTH)
    assert resets[0, :, 0].all() and not resets[1, :, 0].all()


def test_the_order_in_which_sources_are_listed_means_nothing(sets):
    listed = section(sets)
    turned = ShardsConfig(sources=dict(reversed(listed.sources.items())), num_workers=0)
    assert torch.equal(rows_of(listed, 5), rows_of(turned, 5))


def test_a_source_that_is_gone_or_new_is_named(sets):
    with open_loader(section(sets)) as loader:
        cursor = loader.cursor()
    fewer = {name: shards for name, shards in sets.items() if name != "books"}
    with pytest.raises(UserError, match="source books: is gone, none now"):
        open_loader(section(fewer, weights=(0.6, 0.3)), cursor=cursor)
    with open_loader(section(fewer, weights=(0.6, 0.3))) as loader:
        cursor = loader.cursor()
    with pytest.raises(UserError, match="source books: is new, none in the checkpoint"):
        open_loader(section(sets), cursor=cursor)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "train is missing: give --data.train FOLDER, or sources"),
        ({"train": "a", "sources": {"b": {"train": "b", "weight": 1}}}, "both set: remove one"),
        ({"sources": {"b": {"train": "b", "weight": 0}}}, "every weight of sources is 0"),
        (
            {"sources": {"b": {"train": "b", "weight": 1}}, "long_documents": {"at_least": 9, "share": 0.5}},
            "name a source of the same shards with min_document_tokens",
        ),
        ({"sources": {"train": {"train": "b", "weight": 1}}}, "sources has one called 'train'"),
        ({"sources": {"": {"train": "b", "weight": 1}}}, "sources has one called ''"),
        (
            {"sources": {"b": {"train": "b", "weight": 1, "max_epochs": 2}}, "order": "streams"},
            "sources.b.max_epochs is set, but order is streams",
        ),
        ({"train": "a", "packing": "best_fit", "order": "streams"}, "set order to rows, or packing to stream"),
        ({"sources": {"b": {"train": "b", "weight": -1}}}, "greater than or equal to 0"),
    ],
)
def test_sections_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        ShardsConfig(**fields)


def test_sources_of_different_tokenizers_are_refused(sets, tmp_path):
    other = make_shards(tmp_path, make_tokenizer(tmp_path, 380), documents(9))
    config = section({"web": sets["web"], "other": other}, weights=(1, 1))
    with pytest.raises(UserError, match=r"data.sources .*made with another tokenizer than data.sources .*build both"):
        config.open(SEED, grid=8)


def test_realised_shares_are_exact_to_a_row_after_any_number_of_rows(sets):
    rows = np.arange(1, 400)
    with open_loader(section(sets), rows=2) as loader:
        for row in rows[: len(rows) // 2]:
            next(loader)
            counts = [source.position for source in loader.cursor().sources.values()]
            assert sum(counts) == 2 * row
            assert all(abs(count - 2 * row * w) < 2 for count, w in zip(counts, (0.1, 0.3, 0.6), strict=True))
