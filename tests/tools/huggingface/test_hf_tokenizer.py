"""tokenizer.json has the tokens of the SentencePiece model, whatever the text, and gives the text back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from tests.data_cases import AWKWARD, SYLLABLES, documents, write_jsonl
from tools.documents import DocumentReader
from tools.encoding import Tokenizer
from tools.huggingface.tokenizer import refusal, tokenizer_files
from tools.tokenizer import TRAINER_OPTIONS, train

REPEATS = ["-" * n for n in (2, 3, 5, 8, 33)] + ["\n" * 7, "=-" * 20, "aaaa baaaa abaaab", "0000 1111", " \t \t  \n \n"]


def save(folder: Path, path: Path) -> Path:
    for name, text in tokenizer_files(path).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def trained(folder: Path, **options: Any) -> Path:
    """A tokenizer of the random texts with other options than the project's."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents(60, seed=9)),
        model_prefix=str(folder / "other"),
        vocab_size=400,
        **{**TRAINER_OPTIONS, **options},
    )
    return folder / "other.model"


def random_texts(number: int) -> list[str]:
    generator = random.Random(4)
    alphabet = [*SYLLABLES, *"aab--  \n\u2581<s></s>é🚀\x00", "  ", "---"]
    return ["".join(generator.choices(alphabet, k=generator.randint(1, 80))) for _ in range(number)]


def assert_same_tokens(hf: Any, folder: Path, own: Tokenizer, texts: list[str]) -> None:
    theirs = hf.PreTrainedTokenizerFast.from_pretrained(folder)
    for text in texts:
        expected = own.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == expected, repr(text[:60])
        assert theirs(text).input_ids == [own.eos_id, *expected]
        assert theirs.decode(expected) == text, repr(text[:60])
        assert theirs.decode([own.eos_id, *expected, own.eos_id], skip_special_tokens=True) == text


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": True}, {"split_digits": False, "pad_id": -1}], ids=str)
def test_probes_and_whole_texts_have_the_same_tokens(hf: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    path = trained(tmp_path, **options) if options else tmp_path / "tokenizer.model"
    if not options:
        path.write_bytes(train(DocumentReader([write_jsonl(tmp_path / "x.jsonl", documents(60, seed=9))]), 400))
    assert refusal(path) is None
    texts = [*AWKWARD, *REPEATS, *documents(40, seed=3), "\n\n".join(documents(200, seed=5)), *random_texts(400)]
    assert_same_tokens(hf, save(tmp_path, path), Tokenizer.open(path), texts)


def test_runs_of_a_character_merge_from_the_left(hf: Any, tmp_path: Path) -> None:
    """Pieces of equal characters can be put together in several ways, of which SentencePiece takes the leftmost."""
    texts = ["".join(random.Random(n).choices("a-b", [9, 9, 1], k=400)) for n in range(40)]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(DocumentReader([write_jsonl(tmp_path / "x.jsonl", texts)]), 340))
    assert_same_tokens(hf, save(tmp_path, path), Tokenizer.open(path), texts + ["a" * n for n in range(1, 60)])


def test_special_tokens_are_the_models(hf: Any, tmp_path: Path, tokenizer_path: Path) -> None:
    own, theirs = (
        Tokenizer.open(tokenizer_path),
        hf.PreTrainedTokenizerFast.from_pretrained(save(tmp_path, tokenizer_path)),
    )
    assert theirs.eos_token_id == theirs.bos_token_id == own.eos_id
    assert theirs.pad_token_id == own.pad_id
    assert len(theirs) == own.vocab_size
    assert theirs.padding_side == "left"
    batch = theirs(["memory", "me mo ry ti tan"], padding=True, return_tensors="pt")
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch.attention_mask[0, 0] == 0
    assert batch.attention_mask[:, -1].all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"model_type": "unigram"}, "not a byte-pair encoding"), ({"user_defined_symbols": ["<x>"]}, "user-defined")],
)
def test_what_has_no_exact_conversion_is_refused(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    assert reason in refusal(trained(tmp_path, **options))
