"""The demo's text is the same for the same files, no more than it needs, and loses nothing when it is cut."""

import json

import pytest

from pretrain.errors import UserError
from tools.demo.corpus import BUDGET_BYTES, choose, cut_at_lines, find_text, write_corpus


def texts_of(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_text_is_cut_at_line_ends_and_nothing_is_lost():
    text = "".join(f"line {number}\n" for number in range(1000)) + "the last one has no end"
    pieces = cut_at_lines(text, 500)
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") and len(piece) < 520 for piece in pieces[:-1])
    assert cut_at_lines("", 500) == []


def test_the_choice_follows_from_content_alone_and_stops_at_the_budget():
    texts = [f"text {number} " * 10 for number in range(100)]
    chosen = choose(texts, 1000)
    assert chosen == choose([*reversed(texts), texts[0]], 1000)
    assert 1000 <= sum(map(len, chosen)) < 1000 + len(texts[-1])
    assert sorted(choose(texts, 10**9)) == sorted(texts)


def test_the_standard_library_is_enough(tmp_path):
    corpus = write_corpus(find_text(None), tmp_path / "corpus.jsonl")
    assert corpus.documents == len(texts_of(corpus.path)) > 20
    assert corpus.bytes >= BUDGET_BYTES


def test_a_single_file_becomes_documents(tmp_path):
    source = tmp_path / "book.txt"
    source.write_text("a line of some length\n" * 5000)
    corpus = write_corpus(find_text(source), tmp_path / "corpus.jsonl")
    assert corpus.documents >= 2  # equal pieces count once
    source.write_text("".join(f"line {number}\n" for number in range(20_000)))
    corpus = write_corpus(find_text(source), tmp_path / "corpus.jsonl")
    assert sorted("".join(texts_of(corpus.path)).splitlines()) == sorted(source.read_text().splitlines())


def test_a_folder_s_files_stay_whole(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (folder / name).write_text(f"the text of {name}\n" * 3000)
    corpus = write_corpus(find_text(folder), tmp_path / "corpus.jsonl")
    assert sorted(texts_of(corpus.path)) == sorted(path.read_text() for path in folder.iterdir())


def test_missing_or_tiny_text_is_an_error(tmp_path):
    with pytest.raises(UserError, match="missing.txt"):
        write_corpus(find_text(tmp_path / "missing.txt"), tmp_path / "corpus.jsonl")
    (tmp_path / "tiny.txt").write_text("one line\n")
    with pytest.raises(UserError, match="not enough text"):
        write_corpus(find_text(tmp_path / "tiny.txt"), tmp_path / "corpus.jsonl")
