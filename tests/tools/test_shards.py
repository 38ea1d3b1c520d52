"""Building, checking and describing shards."""

import fcntl
import json
import os
import resource
import shutil
import tarfile
import time

import numpy as np
import pytest
import sentencepiece
import webdataset

from pretrain.data import ShardSet
from pretrain.data.format import FileEntry
from pretrain.durable import file_sha256
from tests.data_cases import AWKWARD, documents, make_shards, make_tokenizer, write_jsonl
from tools.encoding import Tokenizer
from tools.shards.__main__ import main
from tools.shards.build import belongs_to_validation
from tools.tokenizer import TRAINER_OPTIONS

TEXTS = [text for text in [*AWKWARD, *documents(80)] if text]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "source.jsonl", TEXTS)


@pytest.fixture
def command(tmp_path, source, model):
    """A build with the defaults, to add options to."""
    return ["build", "--input", str(source), "--tokenizer", str(model), "--output", str(tmp_path / "out")]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_documents_come_back_from_either_part(tmp_path, command, model, capsys):
    assert main([*command, "--validation-fraction", "0.3", "--shard-tokens", "3000"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    tokenizer = Tokenizer.open(model)
    for part in ("train", "validation"):
        shards = ShardSet.open(tmp_path / "out" / part)
        expected = [text for text in TEXTS if belongs_to_validation(text.encode(), 0.3) == (part == "validation")]
        assert [tokenizer.decode(shards.read(number)) for number in range(shards.documents)] == expected
        assert all(shards.read(number)[-1] == tokenizer.eos_id for number in range(shards.documents))
        assert shards.text_bytes == sum(len(text.encode()) for text in expected)
        assert shards.token_bytes[np.concatenate([shards.read(n) for n in range(shards.documents)])].sum() == (
            shards.text_bytes
        )
        assert shards.tokenizer.path.read_bytes() == model.read_bytes()
        assert shards.manifest.split.part == part


def test_shards_hold_at_most_their_tokens_and_documents_stay_whole(tmp_path, model):
    shards = make_shards(tmp_path, model, TEXTS, shard_tokens=1000)
    entries = shards.manifest.shards
    assert len(entries) > 5
    assert all(entry.tokens <= 1000 or entry.documents == 1 for entry in entries)
    assert sum(entry.tokens for entry in entries) == shards.tokens
    assert any(entry.tokens > 1000 for entry in entries)


def test_two_builds_are_equal_byte_for_byte(tmp_path, command):
    assert main([*command, "--shard-tokens", "2000"]) == 0
    first = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    time.sleep(1.1)  # a tar's times have a resolution of a second
    assert main([*command, "--shard-tokens", "2000"]) == 0
    assert contents(tmp_path / "out") == first


def test_stock_webdataset_and_tar_read_the_shards(tmp_path, model):
    shards = make_shards(tmp_path, model, TEXTS)
    paths = [str(shards.folder / shard.name) for shard in shards.manifest.shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [np.frombuffer(sample["tokens"], "<u2").tolist() for sample in samples] == [
        shards.read(number).tolist() for number in range(shards.documents)
    ]
    assert len({sample["__key__"] for sample in samples}) == shards.documents
    with tarfile.open(paths[0]) as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


def test_large_vocabularies_are_stored_as_uint32(tmp_path, model, monkeypatch):
    monkeypatch.setattr("tools.shards.build.token_dtype", lambda vocab_size: "uint32")
    wide = make_shards(tmp_path / "wide", model, TEXTS[:20])
    monkeypatch.undo()
    narrow = make_shards(tmp_path / "narrow", model, TEXTS[:20])
    assert (wide.read(3).dtype, narrow.read(3).dtype) == (np.uint32, np.uint16)
    for number in range(20):
        assert np.array_equal(wide.read(number), narrow.read(number))


def test_verify_and_stats_of_whole_shards(tmp_path, command, capsys):
    assert main([*command, "--validation-fraction", "0.3"]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count(": whole\n") == 2
    assert main(["stats", str(tmp_path / "out" / "train")]) == 0
    assert "fingerprint" in capsys.readouterr().out
    assert main(["stats", "--json", str(tmp_path / "out")]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert sum(entry["documents"] for entry in numbers) == len(TEXTS)


def test_verify_names_every_damage(tmp_path, model, capsys):
    shards = make_shards(tmp_path, model, TEXTS)
    names = [shard.name for shard in shards.manifest.shards]
    data = bytearray((shards.folder / names[0]).read_bytes())
    data[600] ^= 1
    (shards.folder / names[0]).write_bytes(data)
    (shards.folder / names[1]).unlink()
    os.truncate(shards.folder / names[2], 512)
    assert main(["verify", str(shards.folder)]) == 2
    output = capsys.readouterr()
    assert "3 problems" in output.out
    for number, message in enumerate(("expected sha256", "missing", "found 512")):
        assert any(names[number] in line and message in line for line in output.err.splitlines())


def test_verify_finds_a_tar_that_differs_from_a_rewritten_index(tmp_path, model):
    """What no hash shows: a set whose parts fit their hashes, but not each other."""
    shards = make_shards(tmp_path, model, TEXTS)
    index = np.load(shards.folder / "index.npy")
    index["tokens"][3] -= 1
    index["tokens"][4] += 1
    index["offset"][4] -= 2
    np.save(shards.folder / "index.npy", index)
    rewrite_manifest(shards)
    assert main(["verify", str(shards.folder)]) == 2


def rewrite_manifest(shards):
    path = shards.folder / "index.npy"
    entry = FileEntry(name=path.name, sha256=file_sha256(path), bytes=path.stat().st_size)
    (shards.folder / "manifest.json").write_text(shards.manifest.model_copy(update={"index": entry}).to_json())


def test_verify_names_files_that_do_not_belong(tmp_path, model, capsys):
    shards = make_shards(tmp_path, model, TEXTS)
    (shards.folder / "shards-000099.tar").write_bytes(b"")
    assert main(["verify", str(shards.folder)]) == 2
    assert "shards-000099.tar: does not belong" in capsys.readouterr().err


def test_verify_names_a_part_without_its_manifest(tmp_path, command, capsys):
    assert main([*command, "--validation-fraction", "0.3"]) == 0
    (tmp_path / "out" / "train" / "manifest.json").unlink()
    for check in ("verify", "stats"):
        assert main([check, str(tmp_path / "out")]) == 2
        assert "train: holds no manifest.json" in capsys.readouterr().err


def test_output_is_never_replaced_unasked(tmp_path, command, capsys):
    out = tmp_path / "out"
    assert main([*command, "--shard-tokens", "2000"]) == 0
    before = contents(out)
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err
    assert contents(out) == before
    assert main([*command, "--overwrite"]) == 0
    assert contents(out) != before
    (out / "thesis.txt").write_text("mine")
    assert main([*command, "--overwrite"]) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert (out / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source.jsonl"]


def test_a_failed_overwrite_leaves_the_old_shards(tmp_path, command, source):
    assert main(command) == 0
    before = contents(tmp_path / "out")
    source.write_bytes(source.read_bytes() + b"{")
    assert main([*command, "--overwrite"]) == 2
    assert contents(tmp_path / "out") == before


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, command, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        code = main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert "no space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source.jsonl"]
    assert main(command) == 0


def test_a_second_build_into_the_same_folder_is_refused(tmp_path, command, capsys):
    (tmp_path / "out.building").mkdir()
    lock = os.open(tmp_path / "out.building", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        assert main(command) == 2
        assert "another build" in capsys.readouterr().err
        assert (tmp_path / "out.building").exists()
    finally:
        os.close(lock)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokenizer", "missing.model"], "missing.model: cannot be read"),
        (["--input", "missing.txt"], "missing.txt: no such file or folder"),
        (["--validation-fraction", "1.5"], "--validation-fraction 1.5: must be"),
        (["--validation-fraction", "1e-9"], "none of the 94 documents fell into validation"),
    ],
)
def test_wrong_options_are_named(tmp_path, command, capsys, options, message):
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source.jsonl"]


def test_an_empty_corpus_is_an_error(tmp_path, command, source, capsys):
    source.write_text('{"text": ""}\n')
    assert main(command) == 2
    assert "no document with text" in capsys.readouterr().err


def test_a_tokenizer_without_eos_is_refused(tmp_path, command, capsys):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[-40:]),
        model_prefix=str(tmp_path / "no"),
        vocab_size=330,
        **TRAINER_OPTIONS | {"eos_id": -1},
    )
    assert main([*command, "--tokenizer", str(tmp_path / "no.model")]) == 2
    assert "has no EOS token" in capsys.readouterr().err
