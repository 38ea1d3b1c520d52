"""Opening and reading shard sets: damage of every kind is found and named."""

import gc
import hashlib
import json
import os

import numpy as np
import pytest

from pretrain.data import Division, ShardsConfig, ShardSet, Share, open_shards
from pretrain.data.files import OpenFiles
from pretrain.data.format import Manifest
from pretrain.data.stores import LocalStore
from pretrain.errors import UserError
from tests.data_cases import documents, make_shards, make_tokenizer, write_jsonl
from tools.documents import DocumentReader
from tools.encoding import Tokenizer
from tools.shards.build import build


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def shards(tmp_path, model):
    return make_shards(tmp_path, model, documents(30))


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x01
    path.write_bytes(data)


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_numbers_and_tokenizer(shards, model):
    tokenizer = Tokenizer.open(model)
    texts = documents(30)
    assert (shards.documents, shards.text_bytes) == (30, sum(len(text.encode()) for text in texts))
    assert shards.tokens == shards.document_tokens.sum() == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    info = shards.tokenizer
    assert (info.sha256, info.vocab_size, info.eos_id, info.bos_id) == (tokenizer.sha256, 400, 2, 1)
    assert info.path.is_file()
    assert len(shards.fingerprint) == 64


def test_parts_of_a_document(shards):
    whole = shards.read(7)
    assert np.array_equal(shards.read(7, 3, 9), whole[3:9])
    assert np.array_equal(shards.read(7, 3), whole[3:])
    assert shards.read(7, 5, 5).size == 0
    for arguments in ((30,), (-1,), (7, 5, 4), (7, 0, len(whole) + 1), (7, -1, 2)):
        with pytest.raises(IndexError):
            shards.read(*arguments)


def test_the_fingerprint_is_that_of_the_content(tmp_path, model, shards):
    assert make_shards(tmp_path / "same", model, documents(30)).fingerprint == shards.fingerprint
    assert make_shards(tmp_path / "other", model, documents(29)).fingerprint != shards.fingerprint


def test_a_missing_shard_is_named(shards):
    (shards.folder / "shards-000001.tar").unlink()
    with pytest.raises(UserError, match=r"shards-000001\.tar: missing .* expected \d+ bytes"):
        ShardSet.open(shards.folder)


@pytest.mark.parametrize("size", [0, 512, 10_239])
def test_a_shard_of_another_size_is_named_with_both(shards, size):
    entry = shards.manifest.shards[1]
    os.truncate(shards.folder / entry.name, size)
    with pytest.raises(UserError, match=rf"shards-000001\.tar: damaged: expected {entry.bytes} bytes, found {size}"):
        ShardSet.open(shards.folder)


@pytest.mark.parametrize("offset", [10, 600, -1])
def test_a_flipped_bit_in_header_payload_or_padding_is_found_by_its_hash(shards, offset):
    entry = shards.manifest.shards[1]
    flip(shards.folder / entry.name, offset)
    ShardSet.open(shards.folder)
    with pytest.raises(
        UserError, match=rf"shards-000001\.tar: damaged: expected sha256 {entry.sha256}, found [0-9a-f]{{64}}"
    ):
        ShardSet.open(shards.folder, verify="hashes")


@pytest.mark.parametrize("name", ["index.npy", "token_bytes.npy", "tokenizer.model"])
def test_damage_beside_the_shards_is_always_found(shards, name):
    flip(shards.folder / name, -2)
    with pytest.raises(UserError, match=f"{name}: damaged: expected sha256"):
        ShardSet.open(shards.folder)
    (shards.folder / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing"):
        ShardSet.open(shards.folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 5}, "was changed after it was written"),
        ({"fingerprint": "0"}, "was changed after it was written"),
        ({"dtype": "int8"}, "field dtype"),
        ({"documents": -1}, "field documents"),
        ({"unknown": 1}, "field unknown"),
        ({"version": 2}, "format version 2, this program reads 1"),
        ({"format": "other"}, "is not a manifest"),
    ],
)
def test_an_edited_manifest_is_refused(shards, changes, message):
    edit_manifest(shards.folder, **changes)
    with pytest.raises(UserError, match=rf"manifest\.json: .*{message}"):
        ShardSet.open(shards.folder)


@pytest.mark.parametrize("content", [b"", b"{", b"<html>", b"[]", b"\xff\x00"])
def test_a_damaged_manifest_is_refused(shards, content):
    (shards.folder / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json: "):
        ShardSet.open(shards.folder)


def test_folders_that_hold_no_set_say_what_to_do(tmp_path, shards):
    with pytest.raises(UserError, match="no such folder; build it with"):
        ShardSet.open(tmp_path / "nothing")
    with pytest.raises(UserError, match=f"give one of its shard sets: {shards.folder}"):
        ShardSet.open(shards.folder.parent)
    with pytest.raises(UserError, match="holds no manifest.json"):
        ShardSet.open(tmp_path)


def test_a_shard_that_is_cut_or_deleted_while_in_use_is_named(shards):
    entry = shards.manifest.shards[0]
    shards.read(0)
    os.truncate(shards.folder / entry.name, 600)
    with pytest.raises(
        UserError,
        match=rf"shards-000000\.tar: was cut while in use: .* expected {entry.bytes} bytes of sha256",
    ):
        shards.read(0)
    shards.close()
    (shards.folder / entry.name).unlink()
    with pytest.raises(UserError, match=r"shards-000000\.tar: cannot be read: No such file"):
        shards.read(0)


def test_a_token_outside_the_vocabulary_is_named(shards):
    path = shards.folder / "shards-000000.tar"
    data = bytearray(path.read_bytes())
    data[513] = 0xFF
    path.write_bytes(data)
    reopened = ShardSet.open(shards.folder)
    with pytest.raises(
        UserError, match=r"shards-000000\.tar: damaged: document 0 holds token \d+, the vocabulary has 400"
    ):
        reopened.read(0)


def test_open_shards_checks_that_both_sets_have_one_tokenizer(tmp_path, model):
    reader = DocumentReader([write_jsonl(tmp_path / "a.jsonl", documents(30))])
    build(reader, model, tmp_path / "a", validation_fraction=0.3)
    (tmp_path / "other").mkdir()
    build(reader, make_tokenizer(tmp_path / "other", 380), tmp_path / "b", validation_fraction=0.3)
    sets, validation = open_shards(ShardsConfig(train=tmp_path / "a/train", validation=tmp_path / "a/validation"))
    (train,) = sets.values()
    assert train.documents + validation.documents == 30
    assert open_shards(ShardsConfig(train=tmp_path / "a/train"))[1] is None
    with pytest.raises(UserError, match=r"data\.validation .*made with another tokenizer than data\.train"):
        open_shards(ShardsConfig(train=tmp_path / "a/train", validation=tmp_path / "b/validation"))


def test_an_altered_shard_is_found_by_the_one_whose_share_it_is(shards):
    assert len(shards.manifest.shards) > 1
    flip(shards.folder / "shards-000001.tar", 600)
    config = ShardsConfig(train=shards.folder)
    for share in (Share(0, 1), Share(1, 2)):
        with pytest.raises(UserError, match=r"shards-000001\.tar: damaged: expected sha256"):
            open_shards(config, share)
    open_shards(config, Share(0, 2))
    open_shards(config.model_copy(update={"verify": "sizes"}), Share(0, 1))
    open_shards(config)


def test_open_files_are_bounded_and_never_closed_in_use(tmp_path):
    paths = [tmp_path / str(number) for number in range(20)]
    for path in paths:
        path.write_text(path.name)
    files = OpenFiles(lambda number: os.open(paths[number], os.O_RDONLY), limit=3)
    held = files._acquire(0)
    for number in [*range(1, 20)] * 2:
        assert files.read(number, 9, 0) == str(number).encode()
        assert len(files) <= 3
    assert os.pread(held, 9, 0) == b"0"
    files._release(0)
    files.close()
    assert len(files) == 0
    assert files.read(7, 1, 0) == b"7"


@pytest.mark.parametrize(
    "changes", [{"sha256": "../../precious"}, {"sha256": ""}, {"name": "../precious"}, {"name": ".."}]
)
@pytest.mark.parametrize("of", ["index", "shards"])
def test_a_foreign_manifest_cannot_name_files_outside_of_its_folder_or_the_cache(shards, changes, of):
    content = shards.manifest.model_dump(mode="json")
    (content["shards"][0] if of == "shards" else content[of]).update(changes)
    # As a foreigner would: with the fingerprint of what it says.
    told = {key: value for key, value in content.items() if key != "fingerprint"}
    fingerprint = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    with pytest.raises(UserError, match=rf"field {of}\..*{next(iter(changes))}"):
        Manifest.parse(json.dumps({**content, "fingerprint": fingerprint}).encode(), "manifest.json")


def test_data_of_several_sets_keep_together_as_many_files_open_as_one_and_close_them(tmp_path, model):
    sets = {str(n): make_shards(tmp_path / str(n), model, documents(12, seed=n), shard_tokens=20) for n in range(3)}
    assert all(len(shards.manifest.shards) > 8 for shards in sets.values())
    sources = {name: {"train": shards.folder, "weight": 1} for name, shards in sets.items()}
    config = ShardsConfig(sources=sources, validation=sets["0"].folder, num_workers=0)
    before = open_descriptors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "max_open_files", 20)
        with config.open(0, grid=8) as data:
            opened = open_descriptors()  # the indexes
            division = Division(sequence_length=8, micro_batch_size=50, accumulation=1, rank=0, world_size=1)
            with data.train.open_loader(division, None) as loader:
                next(loader)
            for _ in data.held_out.batches(sequence_length=8, batch_size=50, max_tokens=None, rank=0, world_size=1):
                pass
            assert 4 <= open_descriptors() - opened <= 20
        assert open_descriptors() == opened
    del data, loader
    gc.collect()
    assert open_descriptors() == before
    config.to_verify()
    assert open_descriptors() == before


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))
