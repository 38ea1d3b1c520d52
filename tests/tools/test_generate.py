"""The text of a continuation as it comes: that of all its tokens at once, in a time that does not grow with it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import torch

from tests.data_cases import documents
from tools import generate
from tools.encoding import Tokenizer
from tools.sessions import Session
from tools.tokenizer import TRAINER_OPTIONS


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "dummy prefix"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "made"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents(60, seed=9)),
        model_prefix=str(path),
        vocab_size=400,
        **{**TRAINER_OPTIONS, "add_dummy_prefix": request.param},
    )
    return Tokenizer.open(path.with_suffix(".model"))


def pieces(tokenizer: Any, prompt: str, new: Sequence[int], unread: Sequence[int] | None = None) -> list[str]:
    """Those of a model that writes `new`, behind a session that left `unread`."""
    session = None if unread is None else Session(None, torch.tensor([unread]), 5)
    arguments = generate.parser().parse_args(["model", "--prompt", prompt])
    continuation = generate.Continuation(SimpleNamespace(model=None, tokenizer=tokenizer), prompt, arguments, session)
    continuation._stream = iter(torch.tensor(list(new))[:, None])
    return list(continuation.pieces())


def test_the_pieces_are_the_text_of_all_tokens_at_once(tokenizer: Tokenizer) -> None:
    """Of any tokens: control tokens, halves of characters, spaces at the beginning."""
    draw = random.Random(0)
    characters = [tokenizer.encode(text) for text in ("記", "🚀", " ", "  ", "\ufffd", "a b")]
    for number in range(300):
        new = [*draw.choices(range(tokenizer.vocab_size), k=draw.randint(1, 9))]
        new += [token for text in draw.choices(characters, k=draw.randint(0, 5)) for token in text]
        prompt = draw.choice(["", " ", "ti", "ti ", "記"])
        unread = None if number % 2 else [draw.choice([tokenizer.eos_id, *tokenizer.encode("a")])]
        before = [*([tokenizer.eos_id] if unread is None else unread), *tokenizer.encode(prompt)]
        whole, read = tokenizer.decode([*before, *new]), tokenizer.decode(before)
        assert "".join(pieces(tokenizer, prompt, new, unread)) == whole[len(read) :], (prompt, unread, new)


def test_a_token_is_decoded_once_or_while_its_character_is_unfinished(tokenizer: Tokenizer) -> None:
    decoded: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def decode(self, tokens: Sequence[int], **options: bool) -> str:
            decoded.append(len(tokens))
            return tokenizer.decode(tokens, **options)

    prompt, new = "titan " * 200, tokenizer.encode("memory 🚀 " * 100)
    "".join(pieces(Counting(), prompt, new))
    assert sum(decoded[1:]) <= 4 * len(new) and max(decoded[1:]) <= 4  # the first is of the prompt


def test_a_character_that_a_session_ended_in_is_completed(tokenizer: Tokenizer) -> None:
    rocket, after = tokenizer.encode("a🚀")[-4:], tokenizer.encode("az")[-1]
    assert [tokenizer.begins_character(token) for token in [*rocket, after]] == [True, False, False, False, False]
    assert "".join(pieces(tokenizer, "", [*rocket[1:], after], rocket[:1])) == "🚀z"
    # What was shown of it before, U+FFFD, is not shown again; of a whole one nothing is left.
    assert "".join(pieces(tokenizer, "", [after], rocket[:1])) == "z"
    assert "".join(pieces(tokenizer, "", [after], rocket[3:])) == "z"


def test_a_model_that_only_breaks_characters_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    (first, *_) = tokenizer.encode("a🚀")[-4:]
    assert "".join(pieces(tokenizer, "a", [first, first])) == "\ufffd\ufffd"
    assert "".join(pieces(tokenizer, "", [first], [first])) == "\ufffd"


def test_what_a_prompt_ends_with_is_its_own(tokenizer: Tokenizer) -> None:
    assert "".join(pieces(tokenizer, "a\ufffd", tokenizer.encode("az")[-1:])) == "z"


@pytest.mark.parametrize("text", ["memory", " memory", "  "])
def test_a_text_that_begins_with_the_model_is_the_models(tokenizer: Tokenizer, text: str) -> None:
    assert "".join(pieces(tokenizer, "", tokenizer.encode(text))) == text
