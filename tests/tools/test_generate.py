"""The text of a continuation as it comes: that of all its tokens at once, in a time that does not grow with it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import torch
from torch import Tensor

from tests.data_cases import documents
from tests.tools.huggingface.exported_cases import write_exported
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


class Written:
    """The stream of tokens of a model."""

    def __init__(self, new: Sequence[int]) -> None:
        self._tokens = iter(torch.tensor(list(new))[:, None])
        self.finite = torch.ones(1, dtype=torch.bool)

    def __iter__(self) -> Iterator[Tensor]:
        return self._tokens


def pieces(tokenizer: Any, prompt: str, new: Sequence[int], unread: Sequence[int] | None = None) -> list[str]:
    """Those of a model that writes `new`, behind a session that left `unread`."""
    session = None if unread is None else Session(None, torch.tensor([unread]), 5)
    arguments = generate.parser().parse_args(["model", "--prompt", prompt])
    continuation = generate.Continuation(SimpleNamespace(model=None, tokenizer=tokenizer), prompt, arguments, session)
    continuation._stream = Written(new)
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
        last = [tokenizer.eos_id] if unread is None else unread
        before = [*last, *tokenizer.encode(prompt, begins=last == [tokenizer.eos_id])]
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


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_a_prompt_behind_a_session_goes_on_with_its_text(tokenizer: Tokenizer, cut: int) -> None:
    """The tokens read are those of one text, without a space that nobody wrote; behind EOS another text begins."""
    ends_with_eos = Session(None, torch.tensor([[tokenizer.eos_id]]), 5)
    inside = Session(None, torch.tensor([tokenizer.encode("titan memory"[:cut])[-1:]]), 5)
    arguments = generate.parser().parse_args(["model", "--prompt", ""])
    loaded: Any = SimpleNamespace(model=None, tokenizer=tokenizer)
    prompt = "titan memory"[cut:]
    read = [generate.Continuation(loaded, prompt, arguments, x)._tokens[1:] for x in (None, ends_with_eos, inside)]
    assert read == [tokenizer.encode(prompt), tokenizer.encode(prompt), tokenizer.encode(prompt, begins=False)]
    assert tokenizer.decode(read[2], begins=False) == prompt


def test_a_model_that_only_breaks_characters_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    (first, *_) = tokenizer.encode("a🚀")[-4:]
    assert "".join(pieces(tokenizer, "a", [first, first])) == "\ufffd\ufffd"
    assert "".join(pieces(tokenizer, "", [first], [first])) == "\ufffd"


def test_what_a_prompt_ends_with_is_its_own(tokenizer: Tokenizer) -> None:
    assert "".join(pieces(tokenizer, "a\ufffd", tokenizer.encode("az")[-1:])) == "z"


@pytest.mark.parametrize("text", ["memory", " memory", "  "])
def test_a_text_that_begins_with_the_model_is_the_models(tokenizer: Tokenizer, text: str) -> None:
    assert "".join(pieces(tokenizer, "", tokenizer.encode(text))) == text


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_a_model_that_diverged_is_named_and_leaves_no_session(
    temperature: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_exported(tmp_path / "model", "lmm", diverged=True)
    session = tmp_path / "session"
    options = ["--prompt", "ki mo", "--temperature", temperature, "--save-memory", str(session)]
    assert generate.main([str(tmp_path / "model"), *options]) == 2
    assert "the model's logits are not finite behind" in capsys.readouterr().err
    assert not session.exists()


def test_a_text_beyond_a_transformers_context_is_refused_before_it_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, saved = tmp_path / "model", str(tmp_path / "session")
    write_exported(model, "transformer")  # trained on rows of 64 tokens
    read = 1 + len(Tokenizer.open(model / "tokenizer.model").encode("ki mo ta"))
    fits = ["--temperature", "0", "--max-new-tokens", str(65 - read)]
    beyond = ["--max-new-tokens", str(66 - read)]
    assert generate.main([str(model), "--prompt", "ki mo ta", *fits, "--save-memory", saved]) == 0
    capsys.readouterr()
    for options in (["--prompt", "ki mo ta", *beyond], ["--prompt", "ki mo ta " * 64, "--max-new-tokens", "1"]):
        assert generate.main([str(model), *options]) == 2
        said = capsys.readouterr()
        assert said.out == "" and "more than the transformer's context of 64, the rows of its training" in said.err
    assert generate.main([str(model), "--prompt", " ki mo ta re", "--load-memory", saved]) == 2
    assert "what was read before it" in capsys.readouterr().err
