"""Sets made of tars that webdataset's own TarWriter wrote, and what is found wrong with such tars."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
import webdataset

from pretrain.data import ShardSet
from tests.data_cases import documents, make_tokenizer
from tests.store_server import served
from tools.encoding import Tokenizer
from tools.shards.__main__ import main

TEXTS = documents(40)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokens(model):
    tokenizer = Tokenizer.open(model)
    return [np.array([*tokenizer.encode(text), tokenizer.eos_id], np.int64) for text in TEXTS]


def write_tars(folder, fields, per_tar=15):
    """Tars by webdataset's TarWriter, with these fields of each sample."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(fields), per_tar):
        with webdataset.TarWriter(str(folder / f"old-{first:04d}.tar")) as sink:
            for number, sample in enumerate(fields[first : first + per_tar], first):
                sink.write({"__key__": f"part/sample{number:06d}", **sample})
    return folder


def index(folder, model, *options):
    return main(["index", str(folder), "--tokenizer", str(model), *options])


@pytest.mark.parametrize(
    ("name", "dtype", "stored", "options"),
    [
        ("npy", np.uint16, "uint16", []),
        ("npy", np.int32, "uint32", []),
        ("npy", np.int64, "uint64", []),
        ("u16", np.uint16, "uint16", []),
        ("u32", np.uint32, "uint32", []),
        ("tokens", np.uint16, "uint16", []),
        ("bin", np.uint32, "uint32", ["--suffix", ".bin", "--dtype", "uint32"]),
        ("input.npy", np.int64, "uint64", ["--suffix", ".input.npy"]),
    ],
)
def test_tars_of_webdataset_become_a_set(tmp_path, model, tokens, name, dtype, stored, options, capsys):
    arrays = [document.astype(dtype) for document in tokens]
    fields = [{name: x if name.endswith("npy") else x.tobytes(), "json": {"n": len(x)}} for x in arrays]
    folder = write_tars(tmp_path / "tars", fields)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert index(folder, model, *options) == 0
    assert "40 documents" in capsys.readouterr().out
    shards = ShardSet.open(folder, "hashes")
    assert (shards.documents, shards.manifest.dtype, len(shards.manifest.shards)) == (40, stored, 3)
    for number, expected in enumerate(tokens):
        assert np.array_equal(shards.read(number), expected)
        assert shards.record(number).text_bytes == len(TEXTS[number].encode())
    assert shards.manifest.separator == "eos-after-document"
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert main(["verify", str(folder)]) == 0
    with served(folder) as site:
        assert main(["verify", site.url]) == 0


def test_documents_without_eos_are_taken_and_told(tmp_path, model, tokens, capsys):
    folder = write_tars(tmp_path / "tars", [{"u16": x[:-1].astype("<u2").tobytes()} for x in tokens])
    assert index(folder, model) == 0
    assert "not all documents end with EOS" in capsys.readouterr().out
    assert ShardSet.open(folder).manifest.separator == "none"
    assert main(["verify", str(folder)]) == 0


def test_an_index_is_replaced_only_when_asked(tmp_path, model, tokens, capsys):
    folder = write_tars(tmp_path / "tars", [{"npy": x.astype(np.uint16)} for x in tokens])
    assert index(folder, model) == 0
    before = ShardSet.open(folder).fingerprint
    assert index(folder, model) == 2
    assert "replace its index with --overwrite" in capsys.readouterr().err
    assert index(folder, folder / "tokenizer.model", "--overwrite") == 0
    assert ShardSet.open(folder).fingerprint == before


WRONG = {
    "two suffixes": ([{"npy": np.array([5], np.uint16), "u16": b"\5\0"}], [], r"members end in \.npy, \.u16: say with"),
    "unknown suffix": ([{"bin": b"\5\0"}], [], r"members end in \.bin: say with --suffix"),
    "absent suffix": (
        [{"u16": b"\5\0"}],
        ["--suffix", ".npy"],
        r"--suffix \.npy: no member ends in it; there are \.u16",
    ),
    "no dtype": ([{"bin": b"\5\0"}], ["--suffix", ".bin"], "say with --dtype"),
    "two dtypes": (
        [{"npy": np.array([5], np.uint16)}, {"npy": np.array([5])}],
        [],
        "is of int64, others before of uint16",
    ),
    "two dimensions": ([{"npy": np.ones((2, 2), np.uint16)}], [], r"has shape \(2, 2\)"),
    "floats": ([{"npy": np.ones(3)}], [], "is of float64; tokens must be"),
    "big-endian": ([{"npy": np.ones(3, ">u2")}], [], "is of >u2; tokens must be"),
    "vocabulary": ([{"u16": b"\xff\xff"}], [], "holds token 65535, the vocabulary of .* has 400"),
    "negative": ([{"npy": np.array([3, -1], np.int32)}], [], "holds token 4294967295, the vocabulary"),
    "half a token": ([{"u16": b"\5\0\1"}], [], "3 bytes are no whole number of tokens"),
    "empty": ([{"u16": b""}], [], "0 bytes are no whole number of tokens, or none"),
    "pickle": ([{"npy": "RAW"}], [], "is no .npy array"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_members_are_named(tmp_path, model, case, capsys):
    fields, options, message = WRONG[case]
    if case == "pickle":
        write_raw(tmp_path / "tars", {"a.npy": b"\x80\x04\x95garbage"})
    else:
        write_tars(tmp_path / "tars", fields)
    assert index(tmp_path / "tars", model, *options) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "tars" / "manifest.json").exists()


def write_raw(folder, members):
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def damage_of(data, document, kind):
    """A tar, and the offset of the data of a document in the middle of it, damaged."""
    flipped = bytearray(data)
    if kind == "header":
        flipped[document - 512 + 10] ^= 1
        return bytes(flipped)
    return {
        "member": data[: document - 512],
        "end": data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512),
        "byte": data[: document + 77],
        "empty": b"",
        "page": b"<html>not found</html>",
        "zeros": data[: document - 512] + bytes(512) + data[document:],
        "gzip": b"\x1f\x8b" + data,
    }[kind]


@pytest.mark.parametrize("kind", ["member", "end", "byte", "header", "empty", "page", "zeros", "gzip"])
def test_a_damaged_tar_is_named_before_it_is_indexed(tmp_path, model, tokens, kind, capsys):
    """Most of these stock webdataset and tarfile read as a shorter tar without a word."""
    folder = write_tars(tmp_path / "tars", [{"u16": x.astype("<u2").tobytes()} for x in tokens])
    path = folder / "old-0015.tar"
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[7].offset_data
    path.write_bytes(damage_of(path.read_bytes(), offset, kind))
    assert index(folder, model) == 2
    assert f"{path}: " in capsys.readouterr().err
    assert not (folder / "manifest.json").exists()


def test_damage_after_indexing_is_named(tmp_path, model, tokens, capsys):
    folder = write_tars(tmp_path / "tars", [{"npy": x.astype(np.uint16)} for x in tokens])
    assert index(folder, model) == 0
    path = folder / "old-0015.tar"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with served(folder) as site:
        for place in (str(folder), site.url):
            assert main(["verify", place]) == 2
            assert f"{place}/old-0015.tar: damaged: expected sha256" in capsys.readouterr().err


def test_stats_show_how_long_documents_are(tmp_path, model, tokens, capsys):
    folder = write_tars(tmp_path / "tars", [{"npy": x.astype(np.uint16)} for x in tokens])
    assert index(folder, model) == 0
    capsys.readouterr()
    assert main(["stats", "--json", str(folder)]) == 0
    (numbers,) = json.loads(capsys.readouterr().out)
    histogram = {int(name): number for name, number in numbers["document_tokens_histogram"].items()}
    for power, number in histogram.items():
        assert number == sum(power // 2 < len(x) <= power for x in tokens)
    assert sum(histogram.values()) == 40
    assert main(["stats", str(folder)]) == 0
    assert "document tokens histogram" in capsys.readouterr().out
