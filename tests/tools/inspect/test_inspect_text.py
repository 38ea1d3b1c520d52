"""A text as tokens for people: every character at a token, sentences that are the whole, cuts and answers by token."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import sentencepiece

from pretrain.errors import UserError
from tests.data_cases import documents
from tools.encoding import Tokenizer
from tools.inspect.spans import spans_of
from tools.inspect.text import read, sentences
from tools.tokenizer import TRAINER_OPTIONS

TEXT = 'Dr. No said: "Is it?" 記憶 🚀 was empty… \u2581 Then\n\nrain! '


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "dummy prefix"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "made"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents(60, seed=9)),
        model_prefix=str(path),
        vocab_size=400,
        **{**TRAINER_OPTIONS, "add_dummy_prefix": request.param},
    )
    return Tokenizer.open(path.with_suffix(".model"))


def drawn_texts() -> list[str]:
    draw = random.Random(0)
    return [TEXT, *("".join(draw.choices([*TEXT, *documents(1, seed=3)[0][:60]], k=80)) for _ in range(40))]


def test_what_the_tokens_show_is_the_text(tokenizer: Tokenizer) -> None:
    for text in drawn_texts():
        found = read(tokenizer, text, max_tokens=1000)
        assert found.tokens == [tokenizer.eos_id, *tokenizer.encode(text)]
        assert "".join(found.shown[1:]) == text and not found.is_cut and found.words == text
        assert found.text == range(1, len(found.tokens)) and not found.answer


def test_a_text_is_cut_at_a_whole_token_and_character(tokenizer: Tokenizer) -> None:
    for text in drawn_texts():
        whole = len(tokenizer.encode(text))
        for most in (1, 2, 7, 20, whole - 1, whole):
            if not tokenizer.encode(text)[:most]:
                continue
            found = read(tokenizer, text, max_tokens=most)
            assert len(found.tokens) - 1 <= most and text.startswith(found.words)
            assert found.is_cut == (found.words != text)
            assert most < whole or not found.is_cut


def test_the_answer_is_the_tokens_that_hold_it(tokenizer: Tokenizer) -> None:
    for text in drawn_texts():
        found = read(tokenizer, text, query="the re", answer="sult 記", max_tokens=1000)
        assert "".join(found.shown[1:]) == text + "the result 記"
        assert "".join(found.shown[index] for index in found.answer).endswith("sult 記")
        before = "".join(found.shown[1 : found.answer.start])
        assert (text + "the re").startswith(before)
        assert len((text + "the re").encode()) < found.offsets[found.answer.start + 1]


def test_sentences_are_the_whole_text() -> None:
    for text in [*drawn_texts(), "one", "\n\n", "a.b c.", "  x. y"]:
        edges = sentences(text)
        assert b"".join(text.encode()[first:last] for first, last in edges) == text.encode()
        assert all(text.encode()[first:last].strip() for first, last in edges) or not text.strip()


def test_sentences_end_at_their_marks_and_at_lines() -> None:
    text = 'It is 3.14. "Is it?" he asked\nNow (so.) 記憶。次'
    pieces = [text.encode()[first:last].decode() for first, last in sentences(text)]
    assert pieces == ["It is 3.14.", ' "Is it?"', " he asked\n", "Now (so.)", " 記憶。", "次"]


def test_spans_are_the_sentences_or_those_asked_for(tokenizer: Tokenizer) -> None:
    found = read(tokenizer, TEXT, query="Who?", answer=" No", max_tokens=1000)
    spans = spans_of(found, None)
    assert [token for span in spans for token in span] == list(found.text)
    assert len(spans) > 3
    assert spans_of(found, [range(2, 5)]) == [range(2, 5)]
    for wrong in (range(3), range(3, found.text.stop + 1)):
        with pytest.raises(UserError, match=r"--span .* give a span inside it"):
            spans_of(found, [wrong])


def test_spans_of_a_cut_text_are_inside_it(tokenizer: Tokenizer) -> None:
    found = read(tokenizer, TEXT, query=" One. Two. Three.", answer=" Four. Five.", max_tokens=9)
    assert found.is_cut
    assert [token for span in spans_of(found, None) for token in span] == list(found.text)


def test_an_empty_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="the text is empty"):
        read(tokenizer, "", max_tokens=5)
