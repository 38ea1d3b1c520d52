"""Shard sets behind http and S3: what is read equals the local set, or an error names the URL and what was found."""

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import ShardsConfig, ShardSet, Share, open_shards
from pretrain.data.damage import Damage, DamagedShard
from pretrain.data.stores import DamagedError, StoreConfig, UnreachableError, parse_location
from pretrain.data.stores import remote as remote_module
from pretrain.errors import UserError
from tests.data_cases import documents, make_shards, make_tokenizer
from tests.store_server import Fault, served

SHARD = "shards-000001.tar"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    return make_shards(folder, make_tokenizer(folder), documents(30))


@pytest.fixture
def site(tmp_path, local):
    """A copy of the set, served."""
    folder = tmp_path / "site"
    folder.mkdir()
    for path in local.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with served(folder) as site:
        yield site


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote_module, "FIRST_WAIT", 0.01)


@pytest.fixture
def config(tmp_path):
    return StoreConfig(cache_folder=tmp_path / "cache", store_timeout_seconds=1.0, store_retries=3)


def opened(site, config, **options):
    return ShardSet.open(site.url, config=config, **options)


def assert_same(shards, local):
    assert shards.fingerprint == local.fingerprint
    for number in range(local.documents):
        assert np.array_equal(shards.read(number), local.read(number))


def test_a_set_over_http_is_the_local_one(site, config, local):
    shards = opened(site, config)
    assert_same(shards, local)
    assert shards.folder == site.url
    assert shards.tokenizer.path.read_bytes() == local.tokenizer.path.read_bytes()
    shards.close()
    # All of it is in the cache now.
    before = len(site.requests)
    again = opened(site, config)
    assert_same(again, local)
    asked = {(method, name) for method, name, _ in site.requests[before:]}
    assert ("GET", SHARD) not in asked and ("GET", "index.npy") not in asked
    assert ("HEAD", SHARD) in asked


def test_the_recipe_takes_a_url_and_its_options(site, tmp_path, local):
    section = {"train": site.url + "/", "cache_folder": tmp_path / "c", "cache_gigabytes": 0.5}
    config = ShardsConfig(**section)
    assert ShardsConfig.model_validate_json(config.model_dump_json()) == config
    assert config.missing() is None
    assert_same(opened_training(config, Share(0, 1)), local)
    assert (tmp_path / "c" / "objects").is_dir()


def opened_training(config, share=None):
    (shards,) = open_shards(config, share)[0].values()
    return shards


def test_what_a_run_checks_at_its_start_is_what_the_cache_holds(site, tmp_path, local):
    config = ShardsConfig(train=site.url, cache_folder=tmp_path / "c")
    assert config.to_verify() == {}
    read_all(opened_training(config))
    assert config.to_verify() == {site.url: sum(shard.bytes for shard in local.manifest.shards)}
    assert config.model_copy(update={"verify": "sizes"}).to_verify() == {}


def test_a_run_finds_a_flipped_byte_that_it_reads_past_the_cache(site, tmp_path, local):
    """Whether or not the set was opened for a start's check."""
    data = bytearray((local.folder / SHARD).read_bytes())
    data[700] ^= 1
    (site.folder / SHARD).write_bytes(data)
    config = ShardsConfig(train=site.url, cache_folder=tmp_path / "c", cache_gigabytes=0.0)
    for share in (None, Share(0, 1)):
        with pytest.raises(DamagedError, match=f"{SHARD}: damaged: expected sha256"):
            read_all(opened_training(config, share))
    read_all(opened_training(config.model_copy(update={"verify": "sizes"})))


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(status=503), Fault(status=503)],
        [Fault(status=500)],
        [Fault(stall=700)],
        [Fault(cut=0)],
        [Fault(cut=1000), Fault(status=503), Fault(stall=0)],
    ],
    ids=["503", "500", "stall", "cut", "all"],
)
def test_what_passes_is_tried_again(site, config, local, faults):
    site.faults[SHARD] = list(faults)
    assert_same(opened(site, config), local)
    assert len(site.ranges(SHARD)) == len(faults) + 1


def test_a_cut_body_goes_on_where_it_ended(tmp_path, config):
    data = os.urandom(3_000_000)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "big").write_bytes(data)
    with served(tmp_path / "site") as site:
        site.faults["big"] = [Fault(cut=1_500_000), Fault(stall=600_000)]
        pieces = remote_module.Objects(site.url, config).pieces("big", len(data))
        assert b"".join(pieces) == data
        first, second, third = site.ranges("big")
    assert first is None
    starts = [int(wanted.removeprefix("bytes=").rstrip("-")) for wanted in (second, third)]
    assert 1_000_000 < starts[0] <= 1_500_000
    assert starts[0] + 300_000 < starts[1] <= starts[0] + 600_000


def test_a_server_without_byte_ranges_serves_whole_files_alone(site, config, local):
    site.ranges_answered = False
    data = os.urandom(1_000_000)
    (site.folder / "big").write_bytes(data)
    site.faults["big"] = [Fault(cut=600_000), Fault(), Fault(cut=800_000)]
    assert b"".join(remote_module.Objects(site.url, config).pieces("big", len(data))) == data
    assert [wanted is None for wanted in site.ranges("big")] == [True, False, True, True]
    assert_same(opened(site, config), local)
    with pytest.raises(UnreachableError, match=r"Range request not supported .* give data\.cache_gigabytes room"):
        read_all(opened(site, config.model_copy(update={"cache_gigabytes": 0.0})))


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(stall=100), Fault(cut=100)], ids=["503", "stall", "cut"])
def test_what_does_not_pass_is_named_in_time(site, config, fault):
    site.always[SHARD] = fault
    shards = opened(site, config)
    start = time.monotonic()
    with pytest.raises(UnreachableError, match=rf"{site.url}/{SHARD}: not read, tried 4 times .*data\.store_timeout"):
        read_all(shards)
    assert time.monotonic() - start < 20
    assert len(site.ranges(SHARD)) == 4


def read_all(shards):
    return [shards.read(number) for number in range(shards.documents)]


def test_a_server_that_is_gone_is_named(site, config):
    free = site.url
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9/manifest\.json: not read, tried 4 times"):
        ShardSet.open(free.rpartition(":")[0] + ":9", config=config)


@pytest.mark.parametrize("status", [401, 403])
def test_refusal_is_named_at_once(site, config, status):
    site.always[SHARD] = Fault(status=status)
    with pytest.raises(UnreachableError, match=rf"{SHARD}: refused: .*credentials"):
        read_all(opened(site, config))
    assert len(site.ranges(SHARD)) == 1


def test_a_file_of_another_length_is_named_with_both(site, config, local):
    entry = local.manifest.shards[1]
    site.always[SHARD] = Fault(body=b"x" * 1234)
    with pytest.raises(DamagedError, match=rf"{SHARD}: damaged: expected {entry.bytes} bytes, found 1234"):
        read_all(opened(site, config))


@pytest.mark.parametrize("damage", ["member", "byte", "empty", "page"])
def test_a_cut_shard_is_found_at_the_start(site, config, local, damage):
    entry = local.manifest.shards[1]
    data = (local.folder / SHARD).read_bytes()
    document = int(np.flatnonzero([local.record(n).shard == 1 for n in range(local.documents)])[2])
    member = local.record(document).offset - 512
    content = {"member": data[:member], "byte": data[: member + 77], "empty": b"", "page": b"<html>not found</html>"}
    (site.folder / SHARD).write_bytes(content[damage])
    with pytest.raises(
        DamagedError, match=rf"{SHARD}: damaged: expected {entry.bytes} bytes, found {len(content[damage])}"
    ):
        opened(site, config)


@pytest.mark.parametrize("gigabytes", [1.0, 0.0], ids=["cached", "by ranges"])
@pytest.mark.parametrize("place", ["header", "payload"])
def test_a_flipped_byte_is_found_before_it_is_used(site, config, local, place, gigabytes):
    data = bytearray((local.folder / SHARD).read_bytes())
    data[{"header": 10, "payload": 700}[place]] ^= 0x40
    (site.folder / SHARD).write_bytes(data)
    entry = local.manifest.shards[1]
    shards = opened(site, config.model_copy(update={"cache_gigabytes": gigabytes}), verify="hashes")
    with pytest.raises(DamagedError, match=rf"{SHARD}: damaged: expected sha256 {entry.sha256}, found [0-9a-f]{{64}}"):
        read_all(shards)
    assert not (config.cache_folder / "objects" / entry.sha256).exists()


def test_a_byte_flipped_on_the_way_once_is_fetched_again(site, config, local):
    data = bytearray((local.folder / SHARD).read_bytes())
    data[700] ^= 1
    site.faults[SHARD] = [Fault(body=bytes(data))]
    assert_same(opened(site, config), local)


def test_a_shard_that_is_deleted_mid_run_is_named(site, config, local):
    shards = opened(site, config)
    shards.read(0)
    (site.folder / SHARD).unlink()
    with pytest.raises(DamagedError, match=rf"{SHARD}: missing: expected {local.manifest.shards[1].bytes} bytes"):
        read_all(shards)


def test_a_missing_shard_is_found_at_the_start_by_the_one_whose_share_it_is(site, config):
    (site.folder / SHARD).unlink()
    with pytest.raises(DamagedError, match=f"{SHARD}: missing"):
        opened(site, config, share=1, shares=2)
    opened(site, config, share=0, shares=2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", b"<html>404</html>", r"manifest\.json: cannot be read as JSON .*HTML page"),
        ("manifest.json", None, r"manifest\.json: no such file; give the URL of a shard set"),
        ("index.npy", b"<html>404</html>", r"index\.npy: damaged: expected \d+ bytes, found 16"),
        ("tokenizer.model", None, r"tokenizer\.model: missing"),
    ],
)
def test_files_beside_the_shards_are_checked(site, config, name, content, message):
    if content is None:
        (site.folder / name).unlink()
    else:
        (site.folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        opened(site, config)


def test_without_a_cache_shards_are_read_by_ranges(site, config, local, caplog):
    ranges = config.model_copy(update={"cache_gigabytes": 0.0})
    assert_same(opened(site, ranges, verify="sizes"), local)
    record = local.record(3)
    first = f"bytes={record.offset}-{record.offset + 2 * record.tokens - 1}"
    assert first in site.ranges(local.manifest.shards[record.shard].name)
    assert None not in site.ranges(SHARD)
    assert caplog.text.count("read by byte ranges") == 1


def test_with_hashes_a_shard_read_by_ranges_is_read_through_once_before(site, config, local):
    assert_same(opened(site, config.model_copy(update={"cache_gigabytes": 0.0}), verify="hashes"), local)
    asked = site.ranges(SHARD)
    assert asked[0] is None and asked.count(None) == 1 and len(asked) > 2


def test_damage_in_the_cache_is_found_with_hashes(site, config, local, caplog):
    opened(site, config).read(local.documents - 1)
    entry = local.manifest.shards[-1]
    kept = config.cache_folder / "objects" / entry.sha256
    kept.chmod(0o600)
    data = bytearray(kept.read_bytes())
    data[600] ^= 1
    kept.write_bytes(data)
    assert_same(opened(site, config, verify="hashes"), local)
    assert "removed, and fetched again" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ftp://host/x", "ftp:// is not read"),
        ("https://", "names no host"),
        ("s3:///x", "names no bucket"),
        ("https://host/x?token=1", "URL with a query"),
    ],
)
def test_wrong_urls_are_named(text, message):
    with pytest.raises(UserError, match=message):
        ShardSet.open(text)
    with pytest.raises(ValueError, match=message):
        ShardsConfig(train=text)


def test_locations_are_paths_or_urls():
    assert parse_location("a/b") == Path("a/b")
    assert parse_location("file:///a/b") == Path("/a/b")
    assert parse_location("S3://Bucket/a//b/") == "s3://Bucket/a//b"


def test_a_set_on_s3_is_the_local_one_and_its_damage_is_named(bucket, config, local):
    for path in local.folder.iterdir():
        bucket(f"sets/one/{path.name}", path.read_bytes())
    patient = config.model_copy(update={"store_timeout_seconds": 10.0})
    shards = ShardSet.open("s3://data/sets/one/", config=patient)
    assert_same(shards, local)
    shards.close()
    by_ranges = patient.model_copy(update={"cache_gigabytes": 0.0})
    assert_same(ShardSet.open("s3://data/sets/one", config=by_ranges), local)
    data = bytearray((local.folder / SHARD).read_bytes())
    data[700] ^= 1
    bucket(f"sets/one/{SHARD}", bytes(data))
    with pytest.raises(DamagedError, match=rf"s3://data/sets/one/{SHARD}: damaged: expected sha256"):
        read_all(ShardSet.open("s3://data/sets/one", "hashes", config=by_ranges))
    with pytest.raises(UserError, match=r"s3://data/sets/two/manifest\.json: no such file"):
        ShardSet.open("s3://data/sets/two", config=patient)


def test_documents_are_read_from_s3_and_http(tmp_path, bucket):
    from tools.documents import DocumentReader

    lines = [json.dumps({"text": text}) + "\n" for text in documents(20)]
    bucket("texts/b.jsonl", "".join(lines[:10]).encode())
    bucket("texts/a/c.jsonl", "".join(lines[10:]).encode())
    bucket("texts/a/notes.csv", b"no")
    reader = DocumentReader([parse_location("s3://data/texts")])
    assert [document.text for document in reader] == documents(20)[10:] + documents(20)[:10]
    assert [str(file.location) for file in reader.files] == ["s3://data/texts/a/c.jsonl", "s3://data/texts/b.jsonl"]
    (tmp_path / "x.txt").write_text("over http")
    with served(tmp_path) as site:
        assert [document.text for document in DocumentReader([f"{site.url}/x.txt"])] == ["over http"]
        with pytest.raises(UserError, match="http has no list of a folder's files"):
            DocumentReader([site.url])
        with pytest.raises(UserError, match=r"y\.txt: no such file; give an existing URL"):
            DocumentReader([f"{site.url}/y.txt"])


def gathered(shards):
    """All documents end to end, by one call."""
    lengths = np.asarray(shards.document_tokens).astype(np.int64)
    places = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    zeros = np.zeros(len(lengths), np.int64)
    return shards.gather(np.arange(len(lengths)), zeros, lengths, places, int(lengths.sum()), fill=0)


@pytest.mark.parametrize("gigabytes", [1.0, 0.0], ids=["cached", "by ranges"])
def test_rows_gathered_over_http_are_the_local_ones(site, config, local, gigabytes):
    shards = opened(site, config.model_copy(update={"cache_gigabytes": gigabytes}))
    assert np.array_equal(gathered(shards), gathered(local))


@pytest.mark.parametrize("gigabytes", [1.0, 0.0], ids=["cached", "by ranges"])
def test_a_damaged_shard_at_a_url_can_be_skipped(site, config, local, gigabytes):
    config = config.model_copy(update={"cache_gigabytes": gigabytes})
    data = bytearray((local.folder / SHARD).read_bytes())
    data[700] ^= 1
    (site.folder / SHARD).write_bytes(data)
    with pytest.raises(DamagedShard, match=r"expected sha256 .* skipped by --data\.on_damage skip") as caught:
        gathered(opened(site, config, verify="hashes", on_damage="skip"))
    assert caught.value.damage == Damage(site.url, 1, f"sha256 {hashlib.sha256(data).hexdigest()}")
    (site.folder / SHARD).unlink()
    assert opened(site, config, on_damage="skip").skipped == {1: "none"}
