"""Exported models without a training, and files for them to be asked about."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_cases import documents, make_tokenizer
from tests.tools.evaluation.evaluation_cases import write_babi, write_published
from tests.tools.huggingface.exported_cases import VOCABULARY, offline_transformers, write_exported
from tools.encoding import Tokenizer


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCABULARY)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer.open(tokenizer_path)


@pytest.fixture(scope="session")
def mac(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """A MAC's folder."""
    folder = tmp_path_factory.mktemp("mac") / "model"
    write_exported(folder, "mac", tokenizer=tokenizer_path)
    return folder


@pytest.fixture(scope="session")
def transformer(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """That of a transformer with full attention, trained on rows of 64 tokens."""
    folder = tmp_path_factory.mktemp("transformer") / "model"
    write_exported(folder, "transformer", tokenizer=tokenizer_path)
    return folder


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where transformers copies a model's code to."""
    folder = tmp_path_factory.mktemp("modules")
    offline_transformers(folder)
    return folder


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_babi(tmp_path_factory.mktemp("stories"))


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Running text."""
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(" ".join(documents(40, seed=5)))
    return path
