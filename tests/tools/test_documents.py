"""Reading documents: every format gives the same texts, in a fixed order, and what cannot be read is named."""

import errno
import gzip
import json
import os

import pyarrow
import pytest
from pyarrow import parquet

from pretrain.errors import UserError
from tests.data_cases import AWKWARD, documents, write_jsonl
from tools.documents import DocumentOptions, DocumentReader

TEXTS = [text for text in [*AWKWARD, *documents(5)] if text]


def read(*paths, **options):
    return [document.text for document in DocumentReader(list(paths), DocumentOptions(**options))]


def test_every_format_gives_the_same_texts(tmp_path):
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    compressed = tmp_path / "a.jsonl.gz"
    compressed.write_bytes(gzip.compress(plain.read_bytes()))
    zstd = tmp_path / "a.jsonl.zst"
    zstd.write_bytes(zstd_frames(plain.read_bytes()))
    table = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS}), table, row_group_size=3)
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:03d}.txt").write_bytes(text.encode())
    for path in (plain, compressed, zstd, table, folder):
        assert read(path) == TEXTS


def zstd_frames(data):
    """Two frames, as tools that compress in parallel write them."""
    middle = len(data) // 2
    return b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (data[:middle], data[middle:]))


def test_bytes_read_grow_to_the_total(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "b2.jsonl.zst").write_bytes(zstd_frames((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "c.txt").write_text("one|two|three")
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "d.parquet")
    reader = DocumentReader([tmp_path], DocumentOptions(separator="|"))
    done = [document.bytes_read for document in reader]
    assert done == sorted(done)
    assert done[-1] == reader.bytes_total == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_folders_are_read_in_the_order_of_their_paths_and_by_pattern(tmp_path):
    for name in ("b/x.py", "a/test/y.py", "a/z.py", "a/z.pyc", "c.py", "d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["d.txt"]
    assert read(tmp_path, globs=("*.py",)) == ["a/test/y.py", "a/z.py", "b/x.py", "c.py"]
    assert read(tmp_path, globs=("*.py", "*.txt"), excludes=("*/test/*", "c.*")) == ["a/z.py", "b/x.py", "d.txt"]
    assert read(tmp_path / "c.py", tmp_path / "b", globs=("*.py",)) == ["c.py", "b/x.py"]
    with pytest.raises(UserError, match=r"holds no file that matches \*\.rs; choose others with --glob"):
        read(tmp_path, globs=("*.rs",))


def test_separator_divides_text_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n<|end|>two<|end|>\n")
    assert read(tmp_path, separator="<|end|>") == ["one\n", "two"]
    assert read(tmp_path) == ["one\n<|end|>two<|end|>\n"]


def test_text_field_is_chosen(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "yes", "text": "no"}\n\n{"body": null}\n')
    reader = DocumentReader([tmp_path], DocumentOptions(text_field="body"))
    assert [document.text for document in reader] == ["yes"]
    assert reader.skipped.empty == 1


def test_invalid_utf8_is_an_error_with_its_place_or_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xff bad")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xc3"}\n')
    with pytest.raises(UserError, match=r"a\.txt: is not UTF-8: byte 0xff at offset 5; .*--invalid-utf8 skip"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"b\.jsonl, line 2: is not UTF-8"):
        read(tmp_path / "b.jsonl")
    reader = DocumentReader([tmp_path], DocumentOptions(invalid_utf8="skip"))
    for _ in range(2):
        assert [document.text for document in reader] == ["good"]
        assert reader.skipped.invalid_utf8 == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: is not JSON"),
        ("[1]", r"line 1: has no field 'text' \(found: list\)"),
        ('{"txt": 1}', r"line 1: has no field 'text' \(found: txt\); choose one with --text-field"),
        ('{"text": 1}', "line 1, field 'text': is int, not text"),
        (json.dumps({"text": "a\ud800"}), r"line 1, field 'text': holds the lone surrogate U\+D800"),
    ],
)
def test_wrong_jsonl_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl, " + message):
        read(tmp_path)


def test_damaged_files_are_named(tmp_path):
    data = gzip.compress(json.dumps({"text": "x" * 999}).encode() * 50)
    packed = pyarrow.compress(gzip.decompress(data), "zstd", asbytes=True)
    for name, content in {
        "cut.jsonl.zst": packed[:-3],
        "flipped.jsonl.zst": packed[:9] + bytes([packed[9] ^ 255]) + packed[10:],
        "page.jsonl.zst": b"<html>",
        "empty.jsonl.zst": b"",
        "empty.jsonl.gz": b"",
        "cut.jsonl.gz": data[:-9],
        "flipped.jsonl.gz": data[:20] + bytes([data[20] ^ 255]) + data[21:],
        "page.jsonl.gz": b"<html>",
        "page.parquet": b"<html>",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read(tmp_path / name)


def test_wrong_parquet_column_is_named(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["a"], "number": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: has no column 'text' \(found: body, number\)"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"row 1, column 'number': is int, not text"):
        read(tmp_path, text_field="number")


def test_missing_and_unreadable_inputs_are_named(tmp_path):
    with pytest.raises(UserError, match="nothing: no such file or folder; give an existing path to --input"):
        read(tmp_path / "nothing")
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.tar: cannot be read; inputs are text"):
        read(tmp_path / "a.tar")


def test_nothing_in_a_folder_is_left_out_silently(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"b\.txt: is no file that can be read, or a link to nothing"):
        read(tmp_path)
    assert read(tmp_path, excludes=("b.*",)) == ["text"]
    monkeypatch.setattr(os, "scandir", refuse)  # root may list any folder
    with pytest.raises(UserError, match="cannot be listed: Permission denied"):
        read(tmp_path)


def refuse(path):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))
