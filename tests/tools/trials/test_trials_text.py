"""Book text is divided by its content, built once, and not mistaken for another."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.data import ShardSet
from pretrain.errors import UserError
from tests.data_cases import documents
from tools.trials.suite import TextSizes
from tools.trials.text import divide, prepare_text, read_fingerprint, shard_folders

SIZES = TextSizes(vocab_size=400, train_bytes=20000, validation_bytes=8000)


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    for number, text in enumerate(documents(8, words=1600)):
        (folder / f"{number}.txt").write_text(text)
    return folder


def prepare(books: Path, folder: Path, sizes: TextSizes = SIZES, row: int = 500, scored: int = 1000) -> str:
    return prepare_text([books], sizes, folder, longest_row=row, scored_tokens=scored)


def test_parts_have_their_sizes_and_share_no_document() -> None:
    texts = documents(12, words=600)
    parts = divide(texts, SIZES)
    sizes = {part: sum(len(text.encode()) for text in found) for part, found in parts.items()}
    assert 7997 <= sizes["validation"] <= 8000 and 19997 <= sizes["train"] <= 20000
    sources = {
        part: {next(n for n, whole in enumerate(texts) if whole.startswith(text)) for text in found}
        for part, found in parts.items()
    }
    assert not sources["train"] & sources["validation"]
    assert divide(reversed(texts), SIZES) == parts == divide([*texts, texts[0]], SIZES)


def test_a_single_document_is_cut_in_two() -> None:
    text = "".join(documents(40, words=200))
    parts = divide([text], SIZES)
    (held_out,), (training,) = parts["validation"], parts["train"]
    assert text.startswith(held_out + training)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"bytes for text\.train_bytes 20,000: name more text, or lower it"):
        divide(documents(3, words=60), SIZES)


def test_shards_are_built_once_and_again_after_a_kill(books: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    assert read_fingerprint(folder, SIZES) is None
    fingerprint = prepare(books, folder)
    train, validation = (ShardSet.open(path) for path in shard_folders(folder))
    assert train.text_bytes > 2 * validation.text_bytes > 15000
    assert train.tokenizer.sha256 == validation.tokenizer.sha256 and train.tokenizer.vocab_size == 400
    before = (folder / "tokenizer.model").stat().st_mtime_ns
    assert prepare(books, folder) == fingerprint == read_fingerprint(folder, SIZES)
    assert (folder / "tokenizer.model").stat().st_mtime_ns == before
    (folder / "text.json").unlink()  # as a call leaves it that was killed before the end
    (folder / "shards" / "train" / "train" / "manifest.json").unlink()
    assert prepare(books, folder) == fingerprint
    assert ShardSet.open(shard_folders(folder)[0]).fingerprint == train.fingerprint


def test_another_text_and_other_sizes_are_refused(books: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    prepare(books, folder)
    with pytest.raises(UserError, match="was built with other sizes"):
        prepare(books, folder, SIZES.model_copy(update={"train_bytes": 10000}))
    for path in books.iterdir():
        path.write_text("x" + path.read_text())
    with pytest.raises(UserError, match="was built from another text"):
        prepare(books, folder)
    (folder / "text.json").write_text("{")
    with pytest.raises(UserError, match=r"text\.json: cannot be read"):
        prepare(books, folder)


def test_text_that_is_too_short_for_a_probe_is_refused_and_can_be_replaced(books: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    with pytest.raises(UserError, match=r"a probe reads rows of 50,000: name longer documents"):
        prepare(books, folder, row=50000)
    with pytest.raises(UserError, match=r"a probe scores 70,000: raise it"):
        prepare(books, folder, scored=70000)
    assert prepare(books, folder, SIZES.model_copy(update={"validation_bytes": 9000}))
